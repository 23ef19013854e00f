"""What a run is made of, saved whole or not at all, and loaded without ever executing what is in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiktoken
import torch

from .config import Recipe, StoryLLMError
from .files import atomic_write
from .model import GPT
from .tokenizer import tokenizer_from_dict, tokenizer_to_dict

FORMAT = "storyllm 1"

# Fields that may change when a run continues: they say how long and where, not what is learned.
FREE_FIELDS = frozenset(
    {"max_iters", "stop_at", "micro_batch_size", "checkpoint_minutes", "dtype", "device", "compile"}
)


def model_contents(model: GPT, tokenizer: tiktoken.Encoding, recipe: Recipe) -> dict[str, Any]:
    """What a model needs to be loaded alone, anywhere: weights, configuration and the whole vocabulary."""
    return {
        "format": FORMAT,
        "recipe": recipe.to_dict(),
        "tokenizer": tokenizer_to_dict(tokenizer),
        "model": model.state_dict(),
    }


def save_checkpoint(path: str | Path, contents: dict[str, Any]) -> None:
    """Writes `contents` (tensors and plain values) to `path`; an earlier file stays until the new one is whole.

    Raises StoryLLMError where the file cannot be written, as on a full disk.
    """
    try:
        with atomic_write(Path(path)) as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:  # PyTorch's own writer raises the latter
        reason = " ".join(str(error).split())[:100]
        raise StoryLLMError(f"{path} cannot be written ({reason}): make room; an earlier one is as it was") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint, tensors on the CPU. Raises StoryLLMError for a file that is not a whole one."""
    path = Path(path)
    if not path.is_file():
        raise StoryLLMError(f"there is no checkpoint {path}: train first, or name another file")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and storage errors: the file is not what it should be
        raise StoryLLMError(
            f"{path} is cut short or not a checkpoint ({type(error).__name__}): copy it again, or name another file"
        ) from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise StoryLLMError(f"{path} is not a StoryLLM checkpoint: name a best_model_params.pt that StoryLLM saved")
    return contents


def restore_model(contents: dict[str, Any], where: str | Path) -> tuple[GPT, tiktoken.Encoding, Recipe]:
    """Model (on the CPU, in evaluation mode), tokenizer and recipe out of a checkpoint's contents.

    Raises StoryLLMError, naming the file `where`, if they do not fit together.
    """
    try:
        recipe = Recipe.from_dict(contents["recipe"])
        tokenizer = tokenizer_from_dict(contents["tokenizer"])
        if recipe.model.vocab_size != tokenizer.n_vocab:
            raise StoryLLMError(f"vocabulary of {tokenizer.n_vocab} tokens, model for {recipe.model.vocab_size}")
        with torch.random.fork_rng(devices=[]):  # weights about to be loaded need no draws of the caller's generator
            model = GPT(recipe.model)
        model.load_state_dict(contents["model"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StoryLLMError(
            f"{where} holds weights that do not fit its configuration ({reason}): name another file"
        ) from error
    return model.eval(), tokenizer, recipe


def check_same_run(saved: dict[str, Any], recipe: Recipe, data_sha256: str, where: Path) -> None:
    """Raises StoryLLMError, naming the file `where`, unless `saved` is the state of a run of this recipe and data."""
    if "optimizer" not in saved:
        raise StoryLLMError(f"{where} holds weights but no training state: take another checkpoint folder")
    try:
        if saved["data_sha256"] != data_sha256:
            raise StoryLLMError(f"{where} was trained on other data: take another checkpoint folder, or its data")
        before, now = saved["recipe"], recipe.to_dict()
        changed = [
            f"{part}.{name} was {before[part].get(name)!r}, now {value!r}"
            for part in ("model", "train")
            for name, value in now[part].items()
            if name not in FREE_FIELDS and before[part].get(name) != value
        ]
        iteration, max_iters_before = int(saved["iteration"]), int(before["train"]["max_iters"])
    except (KeyError, TypeError, AttributeError) as error:
        raise StoryLLMError(f"{where} is damaged: take another checkpoint folder") from error
    if changed:
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise StoryLLMError(
            f"{where} belongs to another recipe ({'; '.join(changed[:4])}{more}): take another checkpoint folder, "
            "or the old recipe to continue"
        )
    if iteration > recipe.train.max_iters:
        raise StoryLLMError(
            f"{where} has {iteration} iterations, max_iters is {recipe.train.max_iters}: raise it, "
            "or take another checkpoint folder to begin anew"
        )
    if max_iters_before != recipe.train.max_iters:
        print(f"max_iters was {max_iters_before:,}, now {recipe.train.max_iters:,}: the schedule changes")
