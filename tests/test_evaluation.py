"""Judging a model: over the whole file, the same every time."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch

import storyllm.evaluation
from storyllm import GPT, DataConfig, GPTConfig, StoryLLMError, Storyteller, evaluate, prepare
from storyllm.evaluation import bits_per_byte
from storyllm.tokens import open_tokens, read_tokenizer


@pytest.fixture
def teller(tiny_data):
    tokenizer = read_tokenizer(tiny_data)
    torch.manual_seed(0)
    return Storyteller(GPT(GPTConfig(tokenizer.n_vocab, 16, n_layer=2, n_head=2, n_embd=32)), tokenizer)


def test_the_loss_is_that_of_every_token_but_the_first_in_its_window(teller, tiny_data):
    tokens = open_tokens(tiny_data / "validation.bin")
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    teller.model.eval()
    nats = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        log_probs = teller.model(window[None, :-1])[0][0].log_softmax(-1)
        nats -= log_probs[range(len(window) - 1), window[1:]].sum().item()
    report = evaluate(teller, tiny_data / "validation.bin")
    assert report.tokens == len(ids) - 1
    assert report.loss == pytest.approx(nats / report.tokens, rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(report.loss))
    assert report.bits_per_byte == pytest.approx(nats / math.log(2) / tokens.info.bytes, rel=1e-5)
    assert report.bytes == tokens.info.bytes


def test_evaluation_is_repeatable_and_needs_no_luck(teller, tiny_data, monkeypatch):
    teller.model.train()  # dropout must not matter
    before = torch.get_rng_state()
    report = evaluate(teller, tiny_data / "validation.bin")
    assert report == evaluate(teller, tiny_data / "validation.bin")
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(storyllm.evaluation, "CPU_TOKENS", 3 * 16)
    other = evaluate(teller, tiny_data / "validation.bin")
    assert other.loss == pytest.approx(report.loss, rel=1e-6)


def test_bits_per_byte_by_hand():
    # 3 tokens at ln 4 nats are 2 bits each; they stand for 12 bytes.
    assert bits_per_byte(math.log(4), 3, 12) == pytest.approx(0.5)


@pytest.mark.filterwarnings("ignore:the stories")
def test_data_of_another_tokenizer_is_refused(teller, tmp_path):
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(f"The pig {'ate ' * n}corn." for n in range(200)))
    prepare(DataConfig(source=str(tmp_path / "stories.txt"), tokenizer="bpe:270"), tmp_path / "data")
    with pytest.raises(StoryLLMError, match=r"made with the tokenizer bpe:270 .* the model's is another, bpe:300"):
        evaluate(teller, tmp_path / "data" / "validation.bin")


def test_a_file_of_one_token_is_refused(teller, tiny_data, tmp_path):
    info = open_tokens(tiny_data / "validation.bin").info
    shutil.copy(tiny_data / "validation.json", tmp_path)
    (tmp_path / "validation.bin").write_bytes(b"\x01\x00")
    one = dataclasses.replace(info, stories=1, tokens=1)
    storyllm.files.write_json(tmp_path / "validation.json", dataclasses.asdict(one))
    with pytest.raises(StoryLLMError, match="expected at least 2"):
        evaluate(teller, tmp_path / "validation.bin")
