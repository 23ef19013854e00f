"""What a run is made of, saved whole or not at all, and loaded without ever executing what is in the file."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from .config import Recipe, StoryLLMError
from .files import atomic_write, cannot, earlier
from .model import GPT
from .tokenizer import tokenizer_from_dict, tokenizer_to_dict

FORMAT = "storyllm 1"

# Fields that may change when a run continues: they say how long and where, not what is learned.
FREE_FIELDS = frozenset(
    "max_iters stop_at micro_batch_size checkpoint_minutes keep_checkpoints dtype device compile".split()
)


class DamagedCheckpointError(StoryLLMError):
    """A file that is cut short, altered, or no checkpoint at all."""


def model_contents(model: GPT, tokenizer: tiktoken.Encoding, recipe: Recipe) -> dict[str, Any]:
    """What a model needs to be loaded alone, anywhere: weights, configuration and the whole vocabulary."""
    return {
        "format": FORMAT,
        "recipe": recipe.to_dict(),
        "tokenizer": tokenizer_to_dict(tokenizer),
        "model": model.state_dict(),
    }


def save_checkpoint(path: str | Path, contents: dict[str, Any], keep: int = 0) -> None:
    """Writes `contents` (tensors and plain values) to `path`; an earlier file stays until the new one is whole.

    With `keep`, so many earlier ones stay beside it (last.1.pt, last.2.pt, ...). Raises StoryLLMError where the file
    cannot be written, as on a full disk.
    """
    try:
        with atomic_write(Path(path), keep) as file:
            torch.save(contents, file)
    except RuntimeError as error:  # what PyTorch's own writer raises on a full disk
        reason = " ".join(str(error).split())[:100]
        raise StoryLLMError(f"{path} cannot be written ({reason}): make room; an earlier one is as it was") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint, tensors on the CPU.

    Raises StoryLLMError for a file that cannot be read, and of those DamagedCheckpointError for one that is not whole.
    Every byte of it is covered by a checksum, which is compared first: PyTorch does not look at them. Nothing in it can
    take more memory than the file has bytes.
    """
    path = Path(path)
    if not path.is_file():
        raise StoryLLMError(f"there is no checkpoint {path}: train first, or name another file")
    try:
        with open(path, "rb"):  # what the system forbids is no damage
            pass
    except OSError as error:
        raise cannot("read", path, error) from error
    try:
        _check_archive(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251  the only one
        tensor_bytes = sum(tensor.nbytes for tensor in _tensors(contents, set()))
    except MemoryError as error:
        raise StoryLLMError(f"{path} does not fit in the memory that is left: close other programs") from error
    except Exception as error:  # zip, pickle and storage errors: the file is not what it should be
        raise DamagedCheckpointError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}): copy it again, or name another file"
        ) from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise DamagedCheckpointError(
            f"{path} is not a StoryLLM checkpoint: name a best_model_params.pt that StoryLLM saved"
        )
    if tensor_bytes > path.stat().st_size:
        raise DamagedCheckpointError(
            f"{path} claims tensors of {tensor_bytes:,} bytes, more than it has: name another file"
        )
    return contents


def _check_archive(path: Path) -> None:
    """Raises BadZipFile unless the file is an archive of plain records, each as its checksum says."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise zipfile.BadZipFile("compressed")
        if len(archive.NameToInfo) != len(entries) or sum(e.file_size for e in entries) > path.stat().st_size:
            raise zipfile.BadZipFile("records that overlap")
        if archive.testzip() is not None:
            raise zipfile.BadZipFile("another checksum")


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor within dictionaries and lists; those that are the same part of the same storage once."""
    if isinstance(value, Tensor):
        key = hash((value.data_ptr(), value.shape, value.stride()))
        if key not in seen:
            seen.add(key)
            yield value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part, seen)


def restore_model(contents: dict[str, Any], where: str | Path) -> tuple[GPT, tiktoken.Encoding, Recipe]:
    """Model (on the CPU, in evaluation mode), tokenizer and recipe out of a checkpoint's contents.

    Raises StoryLLMError, naming the file `where`, if they do not fit together.
    """
    try:
        recipe = Recipe.from_dict(contents["recipe"])
        tokenizer = tokenizer_from_dict(contents["tokenizer"])
        if recipe.model.vocab_size != tokenizer.n_vocab:
            raise StoryLLMError(f"vocabulary of {tokenizer.n_vocab} tokens, model for {recipe.model.vocab_size}")
        weights = contents["model"]
        layers = sum(name.endswith(".ln_1.weight") for name in weights)
        if recipe.model.n_layer != layers:  # before so many are made
            raise StoryLLMError(f"weights of {layers} layers, model of {recipe.model.n_layer}")
        with torch.device("meta"):  # shapes without memory: the weights are the file's
            model = GPT(recipe.model)
        if not all(weight.dtype == torch.float32 for weight in weights.values()):
            raise StoryLLMError("weights in another format than float32")
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StoryLLMError(
            f"{where} holds weights that do not fit its configuration ({reason}): name another file"
        ) from error
    return model.eval(), tokenizer, recipe


def state_paths(path: Path) -> list[Path]:
    """The states of a run that are there, the newest first: `path` and the earlier ones beside it."""
    pattern = f"{path.stem}.*{path.suffix}"
    numbers = {p.name.removeprefix(f"{path.stem}.").removesuffix(path.suffix) for p in path.parent.glob(pattern)}
    paths = [earlier(path, number) for number in sorted(int(n) for n in numbers if re.fullmatch("[1-9][0-9]{0,3}", n))]
    return [p for p in (path, *paths) if p.is_file()]


def load_state(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The newest whole state of a run (None where there is none at all), and what is to be said of it ("": nothing).

    A damaged one is put aside as `.damaged`, and the one before is taken. Raises DamagedCheckpointError where none is
    whole.
    """
    paths = state_paths(path)
    errors: list[DamagedCheckpointError] = []
    for candidate in paths:
        try:
            contents = load_checkpoint(candidate)
        except DamagedCheckpointError as error:
            errors.append(error)
            continue
        for damaged in paths[: len(errors)]:
            os.replace(damaged, damaged.with_name(f"{damaged.name}.damaged"))
        names = ", ".join(damaged.name for damaged in paths[: len(errors)])
        if candidate == path:
            return contents, ""
        reason = f"{names} is damaged" if errors else f"{path.name} is not there"
        return contents, f"{reason}: going on from {candidate}, an earlier state"
    if errors:
        raise errors[0]
    return None, ""


def check_same_run(saved: dict[str, Any], recipe: Recipe, data_sha256: dict[str, str], where: Path) -> None:
    """Raises StoryLLMError, naming the file `where`, unless `saved` is the state of a run of this recipe and data."""
    if "optimizer" not in saved:
        raise StoryLLMError(f"{where} holds weights but no training state: take another checkpoint folder")
    try:
        before, now = Recipe.from_dict(saved["recipe"]).to_dict(), recipe.to_dict()
        iteration, same_data = saved["iteration"], saved["data_sha256"] == data_sha256
        counts = [iteration, saved["evaluated"] + 1, saved["log_bytes"], saved["skipped_updates"]]
        counts += [saved["micro_batch_size"] - 1]
        if type(saved["device"]) is not str or not all(type(count) is int and count >= 0 for count in counts):
            raise TypeError("a count is not a whole number")
        if math.isnan(saved["best_val_loss"] + saved["seconds"]):
            raise ValueError("a number is none")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StoryLLMError(f"{where} is damaged or of another version: take another checkpoint folder") from error
    if not same_data:
        raise StoryLLMError(f"{where} was trained on other data: take another checkpoint folder, or its data")
    changed = [
        f"{part}.{name} was {before[part][name]!r}, now {value!r}"
        for part in ("model", "train")
        for name, value in now[part].items()
        if name not in FREE_FIELDS and before[part][name] != value
    ]
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
    if before["train"]["max_iters"] != recipe.train.max_iters:
        print(f"max_iters was {before['train']['max_iters']:,}, now {recipe.train.max_iters:,}: the schedule changes")
