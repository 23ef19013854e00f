"""The model that a run starts with: new weights, or those of another model (fine-tuning)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..config import GPTConfig, StoryLLMError
from ..data.token_file import Dataset
from ..data.tokenizer import tokenizer_hash
from ..files import sha256
from ..importing import load_model, model_file
from ..model.gpt import GPT

# The fields of GPTConfig that stay those of the recipe when a run starts from another model.
RECIPE_FIELDS = frozenset("block_size dropout flash_attention gradient_checkpointing".split())


def initial_model(config: GPTConfig, data: Dataset, init_from: str | None) -> GPT:
    """A model with new weights, or with those of the model in `init_from` (see `load_model`), on the CPU.

    In the second case its config is that of the model, except for RECIPE_FIELDS. A shorter context than the model's
    crops the position embeddings. Raises StoryLLMError if it is longer, or if the data has another tokenizer.
    """
    if init_from is None:
        return GPT(config)
    loaded = load_model(init_from)
    other, block_size = loaded.model.config, config.block_size
    if tokenizer_hash(loaded.tokenizer) != tokenizer_hash(data.tokenizer):
        raise StoryLLMError(
            f"the data uses the tokenizer {data.tokenizer.name} ({data.tokenizer.n_vocab} tokens), {init_from} uses "
            f"another, {loaded.tokenizer.name} ({loaded.tokenizer.n_vocab}); prepare the data with its tokenizer "
            f"(--tokenizer-from {init_from})"
        )
    if block_size > other.block_size:
        raise StoryLLMError(
            f"block_size is {block_size}, must be at most that of {init_from}, {other.block_size}; "
            f"set model.block_size (--model.block-size {other.block_size})"
        )
    model = GPT(dataclasses.replace(other, **{name: getattr(config, name) for name in RECIPE_FIELDS}))
    weights = loaded.model.state_dict()
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size]
    model.load_state_dict(weights)
    return model


def describe_initial_model(init_from: str) -> dict[str, str]:
    """What a run remembers of the model it started from: its name, and its file's SHA-256, empty if it is not here."""
    path = model_file(init_from)
    return {"name": init_from, "sha256": sha256(path) if path.is_file() else ""}


def check_same_initial_model(before: dict[str, str] | None, init_from: str | None, path: Path) -> None:
    """Raises StoryLLMError if the run in the state `path` started from another model than `init_from`.

    Files are compared if `init_from` is still here, otherwise names. None matches any run.
    """
    if init_from is None:
        return
    now = describe_initial_model(init_from)
    compared = "sha256" if now["sha256"] else "name"
    if before is None or before[compared] != now[compared]:
        started_from = "new weights" if before is None else before["name"]
        raise StoryLLMError(
            f"{path} belongs to a run that started from {started_from}, not from {init_from} as it is now; omit "
            "init_from (--init-from) to resume it, or use another checkpoint folder"
        )
