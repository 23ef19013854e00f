"""A model in Hugging Face's format: a folder that `transformers` opens, and its upload to the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import GPTConfig, StoryLLMError, missing_extra
from ..data.formats import END_OF_TEXT
from ..data.tokenizer_json import tokenizer_to_json
from ..files import atomic_folder
from ..importing import ACTIVATIONS, CONFIG, OPTIONS, TOKENIZER, TRANSPOSED, WEIGHTS, load_model
from ..model.gpt import GPT
from .model_card import model_card

TOKENIZER_CONFIG, GENERATION_CONFIG, CARD = "tokenizer_config.json", "generation_config.json", "README.md"
FILES = (CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, CARD)


def export_hugging_face(checkpoint: str | Path, folder: str | Path, overwrite: bool = False, name: str = "") -> None:
    """Writes the model in `checkpoint` (see `load_model`) to `folder`, for `AutoModelForCausalLM.from_pretrained`.

    The model card calls it `name`, by default the name of the folder. The folder appears when all files are complete.
    Raises StoryLLMError if it has files already, unless they are those of an earlier export and `overwrite` is True, if
    the checkpoint cannot be loaded, and if the extra `hub` is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise missing_extra("a model in Hugging Face's format", "safetensors", "hub") from error
    folder = Path(folder)
    with atomic_folder(folder, replace=FILES if overwrite else ()) as part:
        loaded = load_model(checkpoint)
        config, end_of_text = loaded.model.config, loaded.tokenizer.eot_token
        # `save_file` would make it readable by its owner only.
        (part / WEIGHTS).write_bytes(safetensors.torch.save(_weights(loaded.model), {"format": "pt"}))
        contents = {
            CONFIG: _config(config, end_of_text),
            TOKENIZER: tokenizer_to_json(loaded.tokenizer),
            TOKENIZER_CONFIG: {
                "tokenizer_class": "PreTrainedTokenizerFast",  # known to transformers 4 and 5
                "bos_token": END_OF_TEXT,
                "eos_token": END_OF_TEXT,
                "model_max_length": config.block_size,
                "clean_up_tokenization_spaces": False,
            },
            GENERATION_CONFIG: {
                "bos_token_id": end_of_text,
                "eos_token_id": end_of_text,
                "pad_token_id": end_of_text,
                "max_length": config.block_size,  # the default of pipelines may exceed the context
            },
        }
        for file_name, values in contents.items():
            (part / file_name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        card = model_card(loaded, checkpoint, name or folder.resolve().name)
        (part / CARD).write_text(card, encoding="utf-8")


def _config(config: GPTConfig, end_of_text: int) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": next(name for name, own in ACTIVATIONS.items() if own == config.activation),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        **OPTIONS,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


def _weights(model: GPT) -> dict[str, Tensor]:
    """The weights under their names in `transformers`. The tied head is left out; biases that are not used are 0."""
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    for name, weight in list(weights.items()):
        if not model.config.bias and not name.endswith(("wte.weight", "wpe.weight")):
            weights[name.removesuffix("weight") + "bias"] = torch.zeros(len(weight))  # one for each output
        if name.endswith(TRANSPOSED):
            weights[name] = weight.t().contiguous()
    return weights


def check_hub_name(name: str) -> None:
    """Raises StoryLLMError unless `name` can be that of a repository on the Hub."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise StoryLLMError(f"the Hub repository is {name!r}, must be OWNER/NAME")


def push_to_hub(folder: str | Path, name: str) -> None:
    """Uploads the files of an exported folder to the repository `name` (OWNER/NAME), which is created if necessary.

    huggingface_hub finds the token that `hf auth login` stored, or HF_TOKEN. Raises StoryLLMError if a file is missing
    or the upload fails.
    """
    check_hub_name(name)
    for file_name in FILES:
        if not (Path(folder) / file_name).is_file():
            raise StoryLLMError(f"{Path(folder) / file_name} not found; export the model to this folder first")
    try:
        from huggingface_hub import create_repo, upload_folder
    except ImportError as error:
        raise missing_extra("the Hub", "huggingface_hub", "hub") from error
    try:
        create_repo(name, exist_ok=True)
        upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=list(FILES), commit_message="Upload from StoryLLM"
        )
    except Exception as error:  # network, Hub and authentication errors; their text might quote a token
        raise StoryLLMError(
            f"cannot upload to {name} ({type(error).__name__}); check the network connection, log in with "
            f"`hf auth login`, and use a name of your own; the export is complete in {folder}"
        ) from error
