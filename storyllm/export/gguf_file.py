"""A model as a GGUF file, the format of llama.cpp."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import StoryLLMError, missing_extra
from ..data.tokenizer_json import tokenizer_to_json
from ..files import fsync, os_error
from ..importing import OPTIONS, load_model
from ..model.gpt import GPT

# Parts of a block in StoryLLM -> in GGUF.
BLOCK_PARTS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def export_gguf(checkpoint: str | Path, path: str | Path, overwrite: bool = False) -> None:
    """Writes the model in `checkpoint` (see `load_model`) to the GGUF file `path`, with float32 weights.

    llama.cpp always uses the tanh approximation of GELU, so the logits of a model with exact GELU differ slightly.
    Raises StoryLLMError if the file exists and `overwrite` is False, if the checkpoint cannot be loaded, and if the
    extra `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise missing_extra("GGUF", "gguf", "gguf") from error
    path = Path(path)
    if path.suffix != ".gguf":
        raise StoryLLMError(f"the output file is {path}, must end in .gguf")
    if path.exists() and not overwrite:
        raise StoryLLMError(f"{path} exists; use another name, or pass overwrite=True (--overwrite) to replace it")
    loaded = load_model(checkpoint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            writer = gguf.GGUFWriter(temporary, "gpt2")
            _add_settings(writer, loaded.model, path.stem)
            _add_tokenizer(writer, tokenizer_to_json(loaded.tokenizer), gguf.TokenType)
            for name, weight in _tensors(loaded.model):
                writer.add_tensor(name, weight.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            with open(temporary, "r+b") as file:
                fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise os_error("write", path, error) from error


def _add_settings(writer: Any, model: GPT, name: str) -> None:
    """The shape of the model."""
    config = model.config
    writer.add_name(name)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(OPTIONS["layer_norm_epsilon"])
    writer.add_file_type(0)  # float32


def _add_tokenizer(writer: Any, values: dict[str, Any], token_type: Any) -> None:
    """The vocabulary, from the contents of a tokenizer.json."""
    tokens = sorted(values["model"]["vocab"], key=values["model"]["vocab"].__getitem__)
    end_of_text = len(tokens) - 1
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([token_type.NORMAL] * end_of_text + [token_type.CONTROL])
    writer.add_token_merges(values["model"]["merges"])
    writer.add_bos_token_id(end_of_text)
    writer.add_eos_token_id(end_of_text)
    writer.add_add_bos_token(False)


def _tensors(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """The weights under their names in GGUF. The tied head is left out; llama.cpp needs the biases, which may be 0."""
    state = model.state_dict()
    layers = {
        f"h.{layer}.{part}": f"blk.{layer}.{name}"
        for layer in range(model.config.n_layer)
        for part, name in BLOCK_PARTS.items()
    }
    for part, name in {"wte": "token_embd", "wpe": "position_embd", **layers, "ln_f": "output_norm"}.items():
        weight = state[f"transformer.{part}.weight"]
        yield f"{name}.weight", weight
        if part not in ("wte", "wpe"):
            yield f"{name}.bias", state.get(f"transformer.{part}.bias", torch.zeros(len(weight)))
