"""A GGUF file, read back with the package `gguf`: weights, shape and tokenizer are those of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from storyllm import StoryLLMError, export_gguf, load
from storyllm.cli import main

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def path(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    export_gguf(tiny_run, path)
    return path


def test_the_settings_are_those_of_the_model(path, tiny_run):
    config = load(tiny_run).model.config
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "gpt2"
    for name, value in {
        "context_length": config.block_size,
        "embedding_length": config.n_embd,
        "feed_forward_length": 4 * config.n_embd,
        "block_count": config.n_layer,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": pytest.approx(1e-5),
    }.items():
        assert fields[f"gpt2.{name}"] == value


def test_the_tokenizer_is_that_of_the_model(path, tiny_run):
    tokenizer = load(tiny_run).tokenizer
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == tokenizer.n_vocab and tokens[-1] == "<|endoftext|>"
    end_of_text = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")]
    assert end_of_text == [tokenizer.eot_token] * 2
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.token_type"] == [gguf.TokenType.NORMAL] * tokenizer.eot_token + [
        gguf.TokenType.CONTROL
    ]
    assert all("".join(merge.split(" ")) in tokens for merge in fields["tokenizer.ggml.merges"])
    assert len(fields["tokenizer.ggml.merges"]) >= tokenizer.n_vocab - 257


def test_the_weights_are_those_of_the_model(path, tiny_run):
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    weights = load(tiny_run).model.state_dict()
    for name, own in {
        "token_embd.weight": "wte.weight",
        "position_embd.weight": "wpe.weight",
        "blk.1.attn_norm.bias": "h.1.ln_1.bias",
        "blk.0.attn_qkv.weight": "h.0.attn.c_attn.weight",
        "blk.0.attn_output.weight": "h.0.attn.c_proj.weight",
        "blk.1.ffn_norm.weight": "h.1.ln_2.weight",
        "blk.1.ffn_up.weight": "h.1.mlp.c_fc.weight",
        "blk.1.ffn_down.bias": "h.1.mlp.c_proj.bias",
        "output_norm.weight": "ln_f.weight",
    }.items():
        np.testing.assert_array_equal(tensors[name], weights[f"transformer.{own}"].numpy())
    assert len(tensors) == len(weights) - 1  # the tied head is left out


def test_an_existing_file_is_only_replaced_on_request(path, tiny_run, tmp_path, capsys):
    copy = tmp_path / "model.gguf"
    copy.write_bytes(b"other")
    command = ["export", "--format", "gguf", "--checkpoint", str(tiny_run), "--to", str(copy)]
    assert main(command) == 2
    assert "model.gguf exists" in capsys.readouterr().err
    assert copy.read_bytes() == b"other"
    assert main([*command, "--overwrite"]) == 0
    assert copy.stat().st_size == pytest.approx(path.stat().st_size, abs=100)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_invalid_targets_are_refused(tiny_run, tmp_path, capsys):
    with pytest.raises(StoryLLMError, match=r"must end in \.gguf"):
        export_gguf(tiny_run, tmp_path / "model")
    assert main(["export", "--format", "gguf", "--to", str(tmp_path / "x.gguf"), "--push", "someone/tiny"]) == 2
    assert "omit --format gguf" in capsys.readouterr().err
    with pytest.raises(StoryLLMError, match=r"missing\.pt not found"):
        export_gguf(tmp_path / "missing.pt", tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
