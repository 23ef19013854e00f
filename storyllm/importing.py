"""Models from files: StoryLLM's checkpoints, GPT-2 in Hugging Face's format, and nanoGPT's checkpoints."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
from torch import Tensor

from .checkpoint import BEST, check_format, load_archive, mismatch_errors, model_from_weights, restore_model
from .config import GPTConfig, StoryLLMError, missing_extra, shown
from .data.token_file import VOCABULARY, load_tokenizer
from .data.tokenizer import gpt2_tokenizer
from .data.tokenizer_json import tokenizer_from_json
from .files import os_error
from .model.gpt import GPT

# The files of a model in Hugging Face's format.
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"

# Names of activations in transformers -> GPTConfig.activation.
ACTIVATIONS: dict[str, Any] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

# Options of transformers' GPT2Config that change what it computes: their default, the only value that is supported.
OPTIONS: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "layer_norm_epsilon": 1e-5,
}

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers stores these as (in, out)
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks in files of older versions
FORMATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_JSON = 2**26  # bytes; GPT-2's tokenizer.json has 1.4 to 4 MB


class ModelFile(NamedTuple):
    """What `load_model` read."""

    model: GPT  # on the CPU, in evaluation mode, with float32 weights
    tokenizer: tiktoken.Encoding
    contents: dict[str, Any]  # of a StoryLLM checkpoint; empty for a model of another program


def load_model(source: str | Path) -> ModelFile:
    """The model and the tokenizer in one of these:

    - a checkpoint of StoryLLM, or the folder of a run, which stands for its best model;
    - a folder with a GPT-2 model in Hugging Face's format: config.json, model.safetensors and tokenizer.json;
    - OWNER/NAME, such a model on the Hub, which is downloaded once;
    - a checkpoint of nanoGPT. Its vocabulary is GPT-2's, or that of the `vocabulary.json` next to it.

    Nothing in the files is executed. Rows of a padded vocabulary, which belong to no token, are cut. Raises
    StoryLLMError if a file is missing or corrupted, and, naming what was found, if the model is another one.
    """
    path = Path(source)
    if _is_hub_name(path):
        path = _download(path.as_posix())
    if (path / CONFIG).is_file():
        return _hugging_face_model(path)
    path = model_file(path)
    contents = load_archive(path)
    if {"model", "model_args"} <= contents.keys():
        return _nanogpt_model(contents, path)
    check_format(contents, path)
    model, tokenizer, _ = restore_model(contents, path)
    return ModelFile(model, tokenizer, contents)


def model_file(source: str | Path) -> Path:
    """The file with the weights of a local model: `source` itself, or a file in the folder `source`."""
    path = Path(source)
    if not path.is_dir():
        return path
    return path / (WEIGHTS if (path / CONFIG).is_file() else BEST)


def _is_hub_name(path: Path) -> bool:
    """True for OWNER/NAME that can hardly be meant as a path."""
    name_like = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path.as_posix()) and path.suffix != ".pt"
    return bool(name_like) and not path.exists() and not path.parent.exists()


def _download(name: str) -> Path:
    """The folder in the Hub's cache with the files of a model."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise missing_extra("the Hub", "huggingface_hub", "hub") from error
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, TOKENIZER]))
    except Exception as error:  # network, Hub and cache errors
        raise StoryLLMError(
            f"{name} is not a file or folder here, and cannot be loaded from the Hub ({type(error).__name__}); check "
            "the name and the network connection, or pass a folder"
        ) from error


# Hugging Face


def _hugging_face_model(folder: Path) -> ModelFile:
    """The model in a folder in Hugging Face's format."""
    config = _gpt_config(_read_json(folder / CONFIG), folder / CONFIG)
    contents = _read_json(folder / TOKENIZER)
    try:
        tokenizer = tokenizer_from_json(contents)
    except StoryLLMError as error:
        raise StoryLLMError(f"{folder / TOKENIZER} cannot be used, {error}; pass another model") from error
    tensors = _read_safetensors(folder / WEIGHTS)
    with mismatch_errors(folder / WEIGHTS):
        weights = {}
        for name, weight in tensors.items():
            if name.endswith(MASKS) and weight.ndim != 1:
                continue
            if weight.dtype not in FORMATS:
                raise StoryLLMError(f"{name} is {weight.dtype}, must be float32, float16 or bfloat16")
            name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            weights[name] = (weight.t().contiguous() if name.endswith(TRANSPOSED) else weight).float()
        weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])  # tied weights are stored once
        return ModelFile(_without_padding(config, weights, tokenizer), tokenizer, {})


def _gpt_config(values: Any, path: Path) -> GPTConfig:
    """The GPTConfig for the contents of a config.json. Raises StoryLLMError for what GPT does not compute."""
    if not isinstance(values, dict):
        raise StoryLLMError(f"{path} is not a JSON object, must be a model's configuration; pass another model")
    if "auto_map" in values:
        raise StoryLLMError(f"{path} has auto_map, code that would have to be executed; StoryLLM never runs it")
    architectures = values.get("architectures") or ["GPT2LMHeadModel"]
    if values.get("model_type") != "gpt2" or architectures != ["GPT2LMHeadModel"]:
        found = f"{values.get('model_type')!r} with architectures {architectures!r}"[:200]
        raise StoryLLMError(f"{path} is of type {found}, must be 'gpt2' with ['GPT2LMHeadModel']; pass another model")
    for name, default in OPTIONS.items():
        if (found := values.get(name, default)) != default:
            raise StoryLLMError(f"{path}: {name} is {shown(found)}, must be {default}; pass another model")
    activation = values.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise StoryLLMError(
            f"{path}: activation_function is {shown(activation)}, must be one of {', '.join(ACTIVATIONS)}"
        )
    fields: dict[str, Any] = {name: values.get(name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    fields |= {"block_size": values.get("n_positions"), "dropout": values.get("resid_pdrop", 0.1)}
    try:
        config = GPTConfig(**fields, activation=ACTIVATIONS[activation])
    except StoryLLMError as error:
        raise StoryLLMError(f"{path}: {error}") from error
    if (n_inner := values.get("n_inner")) not in (None, 4 * config.n_embd):
        raise StoryLLMError(f"{path}: n_inner is {shown(n_inner)}, must be 4 * n_embd ({4 * config.n_embd})")
    return config


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, whose header is checked against the size of the file, which bounds memory."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise missing_extra("a model in Hugging Face's format", "safetensors", "hub") from error
    if not path.is_file():
        raise StoryLLMError(
            f"{path} not found; save the model as one .safetensors (weights in several files are not supported, and "
            "pytorch_model.bin is not read, since it can execute code)"
        )
    try:
        return safetensors.torch.load_file(path)
    except OSError as error:
        raise os_error("read", path, error) from error
    except Exception as error:  # SafetensorError, and others for an unknown dtype
        reason = " ".join(str(error).split())[:100]
        raise StoryLLMError(f"{path} is truncated or not a valid .safetensors ({reason}); copy it again") from error


def _read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises StoryLLMError if it is missing, too large or malformed."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise StoryLLMError(f"{path} has {path.stat().st_size:,} bytes, must have at most {MAX_JSON:,}")
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StoryLLMError(f"{path} not found; save the model and its (fast) tokenizer in one folder") from error
    except OSError as error:
        raise os_error("read", path, error) from error
    except (ValueError, RecursionError) as error:
        raise StoryLLMError(f"{path} is not valid JSON; copy it again") from error


def _without_padding(config: GPTConfig, weights: dict[str, Tensor], tokenizer: tiktoken.Encoding) -> GPT:
    """The model without the rows of embedding and head beyond the tokenizer's last token."""
    size = tokenizer.n_vocab
    if config.vocab_size < size or len(weights["transformer.wte.weight"]) != config.vocab_size:
        rows = len(weights["transformer.wte.weight"])
        raise StoryLLMError(
            f"vocab_size is {config.vocab_size}, with {rows} embeddings, the tokenizer has {size} tokens"
        )
    for name in ("transformer.wte.weight", "lm_head.weight"):
        if config.vocab_size > size:
            weights[name] = weights[name][:size].clone()  # a view would keep the padding in memory and in checkpoints
    return model_from_weights(dataclasses.replace(config, vocab_size=size), weights)


# nanoGPT


def _nanogpt_model(contents: dict[str, Any], path: Path) -> ModelFile:
    """The model in the contents of a nanoGPT ckpt.pt, whose weights have StoryLLM's names and shapes."""
    own_vocabulary = (path.parent / VOCABULARY).is_file()
    tokenizer = load_tokenizer(path.parent) if own_vocabulary else gpt2_tokenizer()
    with mismatch_errors(path):
        arguments = contents["model_args"]
        shape = {name: arguments[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
        config = GPTConfig(**shape, bias=arguments.get("bias", True), dropout=arguments.get("dropout", 0.0))
        padded = -(-tokenizer.n_vocab // 64) * 64  # nanoGPT rounds GPT-2's vocabulary up to a multiple of 64
        if config.vocab_size not in (tokenizer.n_vocab, padded):
            raise StoryLLMError(
                f"its vocabulary has {config.vocab_size} tokens, {tokenizer.name} has {tokenizer.n_vocab}; for another "
                f"one, put the {VOCABULARY} of its data next to the file"
            )
        weights = {
            name.removeprefix("_orig_mod."): weight.float()  # the prefix is torch.compile's
            for name, weight in contents["model"].items()
            if not (name.endswith(MASKS) and weight.ndim == 4)
        }
        return ModelFile(_without_padding(config, weights, tokenizer), tokenizer, {})
