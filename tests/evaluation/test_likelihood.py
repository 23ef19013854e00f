"""Loss, perplexity and bits per byte of a complete file."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import TINY
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from storyllm import (
    GPT,
    DataConfig,
    StoryLLMError,
    Storyteller,
    TrainConfig,
    evaluate,
    load_tokenizer,
    open_token_file,
    prepare,
)
from storyllm.device import resolve_device_config
from storyllm.evaluation import likelihood
from storyllm.evaluation.likelihood import bits_per_byte, total_loss
from storyllm.files import write_json

CONTEXT = TINY.model.block_size
PROPERTY = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],  # each example sets all it uses
)


@pytest.fixture
def storyteller(tiny_data) -> Storyteller:
    torch.manual_seed(0)
    return Storyteller(GPT(dataclasses.replace(TINY.model, n_layer=1)), load_tokenizer(tiny_data))


def test_loss_is_that_of_every_token_given_the_earlier_ones_in_its_window(storyteller, tiny_data):
    tokens = open_token_file(tiny_data / "validation.bin")
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    assert (len(ids) - 1) % CONTEXT  # the last window is shorter
    model, nats = storyteller.model.eval(), 0.0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = ids[start : start + CONTEXT + 1]
        log_probs = model(window[None, :-1])[0][0].log_softmax(-1)
        nats -= log_probs[range(len(window) - 1), window[1:]].sum().item()
    report = evaluate(storyteller, tiny_data / "validation.bin")
    assert (report.tokens, report.bytes) == (len(ids) - 1, tokens.info.bytes)
    assert report.loss == pytest.approx(nats / report.tokens, rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(report.loss))
    assert report.bits_per_byte == pytest.approx(nats / math.log(2) / tokens.info.bytes, rel=1e-5)


def test_evaluation_is_deterministic_and_keeps_the_mode_of_the_model(storyteller, tiny_data):
    storyteller.model.train()  # dropout must have no effect
    before = torch.get_rng_state()
    assert evaluate(storyteller, tiny_data / "validation.bin") == evaluate(
        storyteller, str(tiny_data / "validation.bin")
    )
    assert torch.equal(before, torch.get_rng_state())
    assert storyteller.model.training


@PROPERTY
@given(st.integers(1, 200) | st.integers(1, 100_000))
@example(1)
def test_evaluation_does_not_depend_on_the_batch_size(storyteller, tiny_data, tokens_per_batch):
    reports = []
    for tokens in (likelihood.CPU_TOKENS, tokens_per_batch):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(likelihood, "CPU_TOKENS", tokens)  # a constant that only trades memory for speed
            reports.append(evaluate(storyteller, tiny_data / "validation.bin"))
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-6)
    assert (reports[0].tokens, reports[0].bytes) == (reports[1].tokens, reports[1].bytes)


@pytest.mark.parametrize("confidence", [0.0, 0.5, 30.0, 1e4])
def test_perplexity_and_bits_per_byte_follow_from_the_loss(storyteller, tiny_data, confidence):
    with torch.no_grad():
        storyteller.model.transformer["ln_f"].weight.mul_(confidence)
    report = evaluate(storyteller, tiny_data / "validation.bin")
    assert report.bits_per_byte == pytest.approx(report.loss * report.tokens / math.log(2) / report.bytes)
    if confidence == 0:
        assert report.perplexity == pytest.approx(TINY.model.vocab_size)
    # The largest loss exceeds what a float holds as perplexity.
    assert report.perplexity == (math.inf if confidence == 1e4 else math.exp(report.loss))


def test_nan_weights_give_nan_rather_than_a_number(storyteller, tiny_data):
    with torch.no_grad():
        storyteller.model.transformer["ln_f"].weight.fill_(math.nan)
    report = evaluate(storyteller, tiny_data / "validation.bin")
    assert math.isnan(report.loss) and math.isnan(report.perplexity) and math.isnan(report.bits_per_byte)


def test_bits_per_byte_by_hand():
    # 3 tokens at ln 4 nats are 2 bits each; they are 12 bytes of text.
    assert bits_per_byte(math.log(4), 3, 12) == pytest.approx(0.5)
    assert bits_per_byte(math.log(256), 7, 7) == pytest.approx(8)  # bytes that are predicted uniformly
    assert bits_per_byte(1.0, 3, 0) == pytest.approx(3 / math.log(2))  # no text at all


@PROPERTY
@given(st.integers(1, 12), st.integers(1, 13), st.integers(0, 999))
def test_the_total_loss_does_not_depend_on_the_micro_batches(storyteller, windows, size, seed):
    x, y = torch.randint(300, (2, windows, CONTEXT), generator=torch.Generator().manual_seed(seed))
    model, device = storyteller.model.eval(), resolve_device_config(TrainConfig(device="cpu"), TINY.model)
    total, count = total_loss(model.loss, zip(x.split(size), y.split(size), strict=True), device)
    with torch.no_grad():
        each = [model(row[None], targets[None])[1].item() for row, targets in zip(x, y, strict=True)]
    assert (total, count) == (pytest.approx(math.fsum(each), rel=1e-6), windows)


@pytest.mark.filterwarnings("ignore:the stories")
def test_data_of_another_tokenizer_is_rejected(storyteller, tmp_path):
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(f"The pig {'ate ' * n}corn." for n in range(200)))
    prepare(DataConfig(source=str(tmp_path / "stories.txt"), tokenizer="bpe:270"), tmp_path / "data")
    with pytest.raises(StoryLLMError, match=r"validation\.bin.*bpe:270.*bpe:300"):
        evaluate(storyteller, tmp_path / "data" / "validation.bin")


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_file_needs_at_least_two_tokens(storyteller, tiny_data, tmp_path, tokens):
    info = dataclasses.replace(open_token_file(tiny_data / "validation.bin").info, stories=1, tokens=tokens)
    (tmp_path / "validation.bin").write_bytes(b"\x01\x00" * tokens)
    write_json(tmp_path / "validation.json", dataclasses.asdict(info))
    if tokens == 1:
        with pytest.raises(StoryLLMError, match=r"validation\.bin.*1 token.*2"):
            evaluate(storyteller, tmp_path / "validation.bin")
    else:
        assert evaluate(storyteller, tmp_path / "validation.bin").tokens == 1


def test_a_missing_file_is_rejected(storyteller, tmp_path):
    with pytest.raises(StoryLLMError, match=r"none\.bin"):
        evaluate(storyteller, tmp_path / "none.bin")


@pytest.mark.parametrize("other", ["best_model_params.pt", None])
def test_what_is_not_a_storyteller_is_rejected(tiny_data, other):
    with pytest.raises(StoryLLMError, match=f"{type(other).__name__}.*storyllm.load"):
        evaluate(other, tiny_data / "validation.bin")
