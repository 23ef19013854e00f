"""Model files: saved atomically, loaded without executing anything."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from .config import GPTConfig, Recipe, StoryLLMError
from .data.tokenizer import tokenizer_from_dict, tokenizer_to_dict
from .files import atomic_write, os_error
from .model.gpt import GPT

BEST = "best_model_params.pt"  # the name of a run's best model
FORMAT = "storyllm 1"


class CorruptedCheckpointError(StoryLLMError):
    """The file is truncated, altered, or not a checkpoint."""


def model_contents(model: GPT, tokenizer: tiktoken.Encoding, recipe: Recipe) -> dict[str, Any]:
    """Everything needed to load a model: weights, configuration and the complete vocabulary."""
    return {
        "format": FORMAT,
        "recipe": recipe.to_dict(),
        "tokenizer": tokenizer_to_dict(tokenizer),
        "model": model.state_dict(),
    }


def save_checkpoint(path: str | Path, contents: dict[str, Any], keep: int = 0) -> None:
    """Saves `contents` (tensors and plain values) atomically.

    `keep` previous versions are kept as last.1.pt, last.2.pt, and so on. Raises StoryLLMError if the file cannot be
    written.
    """
    try:
        with atomic_write(Path(path), keep) as file:
            torch.save(contents, file)
    except RuntimeError as error:  # raised by PyTorch's writer when a write fails
        if isinstance(error.__context__, OSError):
            raise os_error("write", path, error.__context__) from error
        reason = " ".join(str(error).split())[:100]
        raise StoryLLMError(
            f"cannot write {path} ({reason}); free some disk space (an existing file is unchanged)"
        ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint, read by `load_archive`.

    Raises StoryLLMError if the file cannot be read, and CorruptedCheckpointError, a subclass, if its contents are not
    intact or those of another program.
    """
    contents = load_archive(path)
    check_format(contents, path)
    return contents


def check_format(contents: dict[str, Any], path: str | Path) -> None:
    """Raises CorruptedCheckpointError unless these are the contents of a StoryLLM checkpoint."""
    if contents.get("format") != FORMAT:
        raise CorruptedCheckpointError(f"{path} is not a StoryLLM checkpoint; pass a {BEST}")


def load_archive(path: str | Path) -> dict[str, Any]:
    """The dictionary that a program saved with `torch.save`, with tensors on the CPU.

    Nothing in the file is executed. All its checksums are verified first, which PyTorch does not do, and its tensors
    cannot take more memory than the file's size. Raises StoryLLMError if the file cannot be read, and
    CorruptedCheckpointError, a subclass, if its contents are not intact.
    """
    path = Path(path)
    if not path.is_file():
        raise StoryLLMError(f"checkpoint {path} not found; train a model first, or pass another file")
    try:
        with open(path, "rb"):  # distinguishes a file that may not be read from a corrupted one
            pass
    except OSError as error:
        raise os_error("read", path, error) from error
    try:
        _check_archive(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251  the only use
        tensor_bytes = sum(tensor.nbytes for tensor in _tensors(contents, set()))
    except MemoryError as error:
        raise StoryLLMError(f"not enough memory to load {path}; close other programs") from error
    except Exception as error:  # zip, pickle and storage errors
        raise CorruptedCheckpointError(
            f"{path} is corrupted or not a checkpoint ({type(error).__name__}); pass another file"
        ) from error
    if not isinstance(contents, dict):
        raise CorruptedCheckpointError(f"{path} is not a StoryLLM checkpoint; pass a {BEST}")
    if tensor_bytes > path.stat().st_size:
        raise CorruptedCheckpointError(
            f"{path} declares tensors of {tensor_bytes:,} bytes, more than its own size; pass another file"
        )
    return contents


def _check_archive(path: Path) -> None:
    """Raises BadZipFile unless the file is an archive of uncompressed records with matching checksums."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise zipfile.BadZipFile("compressed records")
        if len(archive.NameToInfo) != len(entries) or sum(e.file_size for e in entries) > path.stat().st_size:
            raise zipfile.BadZipFile("overlapping records")
        if archive.testzip() is not None:
            raise zipfile.BadZipFile("checksum mismatch")


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in nested containers. Tensors that are the same view of the same storage count once."""
    if isinstance(value, Tensor):
        key = hash((value.data_ptr(), value.shape, value.stride()))
        if key not in seen:
            seen.add(key)
            yield value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, seen)


def check_tied(weights: dict[str, Tensor]) -> None:
    """Raises StoryLLMError if head and token embedding differ: loading would silently discard the head."""
    head, embedding = weights["lm_head.weight"], weights["transformer.wte.weight"]
    if not (head.is_set_to(embedding) or torch.equal(head, embedding)):
        raise StoryLLMError("lm_head.weight differs from transformer.wte.weight, must be tied to it")


def restore_model(contents: dict[str, Any], path: str | Path) -> tuple[GPT, tiktoken.Encoding, Recipe]:
    """Model (on the CPU, in evaluation mode), tokenizer and recipe from the contents of the checkpoint `path`.

    Raises StoryLLMError, naming `path`, if they are inconsistent.
    """
    with mismatch_errors(path):
        recipe = Recipe.from_dict(contents["recipe"])
        tokenizer = tokenizer_from_dict(contents["tokenizer"])
        if recipe.model.vocab_size != tokenizer.n_vocab:
            raise StoryLLMError(f"the tokenizer has {tokenizer.n_vocab} tokens, the model {recipe.model.vocab_size}")
        return model_from_weights(recipe.model, contents["model"]), tokenizer, recipe


def model_from_weights(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """A model (in evaluation mode) with these float32 weights, which are not copied.

    Raises some exception, for `mismatch_errors`, if they are not the weights of such a model.
    """
    layers = sum(name.endswith(".ln_1.weight") for name in weights)
    if config.n_layer != layers:  # checked before the layers are created
        raise StoryLLMError(f"it has weights of {layers} layers, but n_layer is {config.n_layer}")
    with torch.device("meta"):  # allocates nothing: the weights come from the file
        model = GPT(config)
    if not all(weight.dtype == torch.float32 for weight in weights.values()):
        raise StoryLLMError("the weights are not float32")
    # A copy: `assign` changes the metadata of a state dict, and loading it again would assign, too.
    model.load_state_dict(dict(weights), assign=True)
    check_tied(weights)
    model.tie_weights()
    return model.eval()


@contextmanager
def mismatch_errors(path: str | Path) -> Iterator[None]:
    """Turns what inconsistent contents of the file `path` raise into a StoryLLMError."""
    try:
        yield
    except (StoryLLMError, LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StoryLLMError(
            f"the weights in {path} do not match its configuration ({reason}); pass another file"
        ) from error
