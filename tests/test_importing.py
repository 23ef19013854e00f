"""Models of other programs: the same logits as there, and one clear line for what cannot be loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY
from torch import Tensor

from storyllm import GPT, GPTConfig, StoryLLMError, load, load_tokenizer
from storyllm.data.tokenizer import tokenizer_hash
from storyllm.data.tokenizer_json import tokenizer_to_json

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

IDX = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(0))
VOCAB = TINY.model.vocab_size


def reference(**changes: Any) -> Any:
    """GPT-2 of transformers with random weights, large enough that a wrong activation or a missing bias is noticed."""
    torch.manual_seed(0)
    options = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, **changes}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).eval()
    for name, parameter in model.named_parameters():
        if ".h." in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits_of(model: Any, idx: Tensor = IDX) -> Tensor:
    with torch.no_grad():
        output = model(idx)
    return output[0] if isinstance(output, tuple) else output.logits


@pytest.fixture
def save(tiny_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Saves a model of transformers and the tokenizer of `tiny_data` in a folder."""

    def save(model: Any) -> Path:
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_to_json(load_tokenizer(tiny_data))))
        return folder

    return save


@pytest.fixture
def folder(save: Callable[..., Path]) -> Path:
    return save(reference())


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    weights = safetensors_torch.load_file(path)
    change(weights)
    safetensors_torch.save_file(weights, path)


def error_of(source: str | Path) -> str:
    """The one-line message with which `source` is refused."""
    with pytest.raises(StoryLLMError) as caught:
        load(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# Hugging Face


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_a_hugging_face_gpt2_has_the_same_logits(save, tiny_data, activation):
    model = reference(activation_function=activation, n_inner=128)
    storyteller = load(save(model), device="cpu")
    torch.testing.assert_close(logits_of(storyteller.model), logits_of(model), atol=1e-5, rtol=0)
    assert tokenizer_hash(storyteller.tokenizer) == tokenizer_hash(load_tokenizer(tiny_data))
    assert not storyteller.model.training
    assert storyteller.generate("One day", max_new_tokens=3).startswith("One day")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_float32(save, dtype):
    model = reference().to(dtype)
    storyteller = load(save(model), device="cpu")
    assert storyteller.model.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(logits_of(storyteller.model), logits_of(model.float()), atol=1e-5, rtol=0)


def test_names_without_prefix_and_masks_are_accepted(folder):
    """As in the files that OpenAI's models have on the Hub."""
    expected = logits_of(load(folder, device="cpu").model)
    names = safetensors_torch.load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): weight.contiguous() for name, weight in names.items()}
    weights |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in (0, 1)}
    safetensors_torch.save_file(weights, folder / "model.safetensors")
    assert torch.equal(logits_of(load(folder, device="cpu").model), expected)


def test_rows_of_a_padded_vocabulary_are_cut(save):
    model = reference(vocab_size=VOCAB + 20)
    loaded = load(save(model), device="cpu").model
    assert loaded.config.vocab_size == VOCAB
    assert loaded.lm_head.weight.untyped_storage().nbytes() == VOCAB * 32 * 4
    torch.testing.assert_close(logits_of(loaded), logits_of(model)[..., :VOCAB], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c.update(model_type="gpt_neo", architectures=["GPTNeoForCausalLM"]),
            ["gpt_neo", "GPTNeoForCausalLM"],
        ),
        (lambda c: c.update(architectures=["GPT2ForSequenceClassification"]), ["GPT2ForSequenceClassification"]),
        (lambda c: c.pop("model_type"), ["None", "gpt2"]),
        (lambda c: c.update(auto_map={"AutoModel": "evil.Model"}), ["auto_map", "never"]),
        (lambda c: c.update(activation_function="relu"), ["activation_function", "'relu'"]),
        (lambda c: c.update(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx", "True"]),
        (lambda c: c.update(reorder_and_upcast_attn=True), ["reorder_and_upcast_attn"]),
        (lambda c: c.update(scale_attn_weights=False), ["scale_attn_weights"]),
        (lambda c: c.update(add_cross_attention=True), ["add_cross_attention"]),
        (lambda c: c.update(tie_word_embeddings=False), ["tie_word_embeddings"]),
        (lambda c: c.update(layer_norm_epsilon=1e-6), ["layer_norm_epsilon", "1e-06"]),
        (lambda c: c.update(n_inner=64), ["n_inner is 64", "128"]),
        (lambda c: c.update(n_embd=33), ["n_embd is 33"]),
        (lambda c: c.update(n_head="2"), ["n_head is '2'"]),
        (lambda c: c.pop("n_positions"), ["block_size is None"]),
        (lambda c: c.update(n_layer=3), ["2 layers", "n_layer is 3"]),
        (lambda c: c.update(n_positions=17), ["model.safetensors", "wpe"]),
        (lambda c: c.update(vocab_size=VOCAB - 1), [f"vocab_size is {VOCAB - 1}", f"{VOCAB} embeddings"]),
        (lambda c: c.update(vocab_size=VOCAB + 1), [f"vocab_size is {VOCAB + 1}", f"{VOCAB} embeddings"]),
    ],
)
def test_another_configuration_is_refused_by_name(folder, change, words):
    change_json(folder / "config.json", change)
    message = error_of(folder)
    for word in words:
        assert word in message


def test_a_model_with_fewer_embeddings_than_tokens_is_refused(save):
    assert f"the tokenizer has {VOCAB} tokens" in error_of(save(reference(vocab_size=VOCAB - 1)))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t["model"].update(type="WordPiece"), "model.type is 'WordPiece'"),
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space is True"),
        (lambda t: t.update(pre_tokenizer={"type": "Sequence"}), "'Sequence'"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "normalizer is {'type': 'NFC'}"),
        (lambda t: t.update(post_processor={"type": "TemplateProcessing"}), "'TemplateProcessing'"),
        (lambda t: t["model"].update(byte_fallback=True), "byte_fallback is True"),
        (lambda t: t["model"].update(ignore_merges=False), "merges"),
        (lambda t: t["model"]["merges"].pop(), "merges"),
        (lambda t: t["model"]["merges"].insert(0, t["model"]["merges"].pop()), "merges"),
        (lambda t: t["added_tokens"].append({"id": VOCAB, "content": "[PAD]"}), "'[PAD]'"),
        (lambda t: t["added_tokens"].clear(), "special tokens are []"),
        (lambda t: t["added_tokens"][0].update(id=0), "ids"),
        (lambda t: t["model"]["vocab"].update(a=100_000), "ids"),
        (lambda t: t["model"]["vocab"].update(a="0"), "byte-level BPE"),
        (lambda t: t["model"]["vocab"].pop("Ġ"), "ids"),
        (lambda t: t["model"].pop("vocab"), "byte-level BPE"),
        (lambda t: t.pop("model"), "model.type is None"),
    ],
)
def test_another_tokenizer_is_refused_by_name(folder, change, word):
    change_json(folder / "tokenizer.json", change)
    message = error_of(folder)
    assert "tokenizer.json" in message and word in message


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda w: w.pop("transformer.ln_f.bias"), "ln_f.bias"),
        (lambda w: w.update(extra=torch.ones(1)), "extra"),
        (lambda w: w.update({"transformer.wte.weight": torch.ones(VOCAB, 31)}), "wte"),
        (lambda w: w.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(128, 32)}), "c_fc"),
        (lambda w: w.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(2, 2, 2)}), "model.safetensors"),
        (lambda w: w.update({"transformer.ln_f.bias": torch.ones(32, dtype=torch.int8)}), "int8"),
        (lambda w: w.update({"lm_head.weight": torch.ones(VOCAB, 32)}), "tied"),
        (lambda w: w.clear(), "model.safetensors"),
    ],
)
def test_other_weights_are_refused_by_name(folder, change, word):
    change_weights(folder, change)
    assert word in error_of(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: (2**40).to_bytes(8, "little") + data[8:],
        lambda data: data.replace(b'"shape":[32]', b'"shape":[99]'),
    ],
)
def test_a_truncated_or_oversized_safetensors_is_refused(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert "model.safetensors is truncated or not a valid .safetensors" in error_of(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b" " * (2**26 + 1)])
def test_a_malformed_json_is_refused(folder, name, content):
    (folder / name).write_bytes(content)
    assert name in error_of(folder)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null"])
def test_a_json_that_is_no_object_is_refused(folder, content):
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_bytes(content)
        assert name in error_of(folder)


def test_a_pickle_is_never_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = error_of(folder)
    assert "model.safetensors not found" in message and "pytorch_model.bin is not read" in message
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json not found" in error_of(folder)


# Hub


def test_a_name_is_loaded_from_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    requests = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        requests.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("someone/tiny-gpt2").model.config.vocab_size == VOCAB
    assert requests == [("someone/tiny-gpt2", ["config.json", "model.safetensors", "tokenizer.json"])]


def test_without_a_network_a_name_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def snapshot_download(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    message = error_of("someone/tiny-gpt2")
    assert "someone/tiny-gpt2" in message and "ConnectionError" in message and "network" in message


@pytest.mark.parametrize("name", ["checkpoints/missing", "elsewhere/best_model_params.pt", "missing", "a/b/c"])
def test_a_path_is_not_taken_for_a_name_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert "not found" in error_of(name)


# nanoGPT


def nanogpt_checkpoint(**changes: Any) -> dict[str, Any]:
    """The contents of a ckpt.pt, as nanoGPT's train.py writes it."""
    torch.manual_seed(0)
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    arguments = {name: getattr(TINY.model, name) for name in names} | changes
    weights = GPT(GPTConfig(**arguments)).state_dict()
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in (0, 1)}
    return {
        "model": {f"_orig_mod.{name}": weight for name, weight in {**weights, **masks}.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "model_args": arguments,
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "stories", "compile": True},
    }


def weights_without_prefix(contents: dict[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix("_orig_mod."): weight for name, weight in contents["model"].items()}


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"vocab_size": 320}])
def test_a_nanogpt_checkpoint_has_the_same_logits(tiny_data, tmp_path, changes):
    contents = nanogpt_checkpoint(**changes)
    torch.save(contents, tmp_path / "ckpt.pt")
    (tmp_path / "vocabulary.json").write_bytes((tiny_data / "vocabulary.json").read_bytes())
    loaded = load(tmp_path / "ckpt.pt", device="cpu").model
    expected = GPT(GPTConfig(**contents["model_args"])).eval()
    expected.load_state_dict(weights_without_prefix(contents), strict=False)  # without the masks
    assert torch.equal(logits_of(loaded), logits_of(expected)[..., :VOCAB])
    assert loaded.config.vocab_size == VOCAB and loaded.config.bias == contents["model_args"]["bias"]


@pytest.mark.parametrize("size", [50257, 50304])
def test_without_a_vocabulary_it_is_gpt2s_and_padding_is_cut(gpt2_cache, tmp_path, size):
    torch.save(nanogpt_checkpoint(vocab_size=size, n_embd=4), tmp_path / "ckpt.pt")
    storyteller = load(tmp_path / "ckpt.pt", device="cpu")
    assert storyteller.model.config.vocab_size == storyteller.tokenizer.n_vocab == 50257
    assert len(storyteller.model.lm_head.weight) == 50257


@pytest.mark.parametrize("size", [65, 50256, 50258, 50368])
def test_another_vocabulary_is_refused(gpt2_cache, tmp_path, size):
    torch.save(nanogpt_checkpoint(vocab_size=size, n_embd=4), tmp_path / "ckpt.pt")
    message = error_of(tmp_path / "ckpt.pt")
    assert f"{size} tokens" in message and "50257" in message and "vocabulary.json" in message


class Malicious:
    """Creates the folder `executed` when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c: c.update(extra=Malicious()), "not a checkpoint"),
        (lambda c: c["model_args"].pop("n_layer"), "n_layer"),
        (lambda c: c["model_args"].update(n_layer=3), "n_layer is 3"),
        (lambda c: c["model_args"].update(n_embd=64), "size mismatch"),
        (lambda c: c["model"].pop("_orig_mod.transformer.wpe.weight"), "wpe"),
        (lambda c: c.update(model=[1]), "ckpt.pt"),
        (lambda c: c.update(model_args=None), "ckpt.pt"),
        (lambda c: c.pop("model_args"), "not a StoryLLM checkpoint"),
    ],
)
def test_an_altered_nanogpt_checkpoint_is_refused(tiny_data, tmp_path, monkeypatch, change, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vocabulary.json").write_bytes((tiny_data / "vocabulary.json").read_bytes())
    contents = nanogpt_checkpoint()
    change(contents)
    torch.save(contents, "ckpt.pt")
    message = error_of("ckpt.pt")
    assert "ckpt.pt" in message and word in message
    assert not (tmp_path / "executed").exists()
