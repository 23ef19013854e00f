"""Reads stories from a dataset on the Hugging Face Hub, from local files, or from the synthetic generator."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import DataConfig, StoryLLMError
from ..files import sha256
from .formats import SUFFIXES, Piece, missing_column, read_file
from .hold_out import hold_out
from .local_files import is_saved_dataset, source_files
from .synthetic import synthetic_stories

SPLITS = ("train", "validation")
MAX_WHITESPACE = 500_000  # consecutive whitespace characters; tiktoken's regex engine fails at about twice as many
TINYSTORIES = "roneneldan/TinyStories"
TINYSTORIES_COUNTS = {"train": 2_119_719, "validation": 21_990}  # from the dataset card (Eldan and Li 2023)

# A source: a function that returns the pieces of its stories from the beginning, and whether it has both splits.
Source = tuple[Callable[[], Iterator[Piece]], bool]


def read_stories(data: DataConfig, split: str) -> Iterator[str]:
    """Yields the stories of a split, "train" or "validation", without loading them all into memory.

    Stories are verbatim, except that newlines in a .txt become "\\n". If the source has no validation split,
    `validation_fraction` of the stories are held out, evenly spaced; more of a small source (see `hold_out`).
    Raises StoryLLMError if the source does not exist, cannot be read or contains anything but text.
    """
    return _joined(read_pieces(data, split))


def read_pieces(data: DataConfig, split: str) -> Iterator[Piece]:
    """The stories of `read_stories` in pieces: a part of the text, and whether the story ends with it.

    The token ids of the pieces are those of the whole story. Long stories of a .txt come in several pieces.
    """
    if split not in SPLITS:
        raise StoryLLMError(f"split is {split!r}, must be one of: {', '.join(SPLITS)}")
    read, has_splits = _source(data, split)

    def first_stories() -> Iterator[Piece]:
        return _first_stories(read(), data.max_stories)

    pieces = first_stories() if has_splits else hold_out(first_stories, split, data.validation_fraction, data.source)
    return _cleaned(pieces) if data.clean else pieces


def source_fingerprint(data: DataConfig) -> str:
    """A string that changes when the stories change.

    Local files: their names and SHA-256. Synthetic stories: the SHA-256 of the first hundred. A Hub dataset: its name.
    """
    if data.source == "synthetic":
        sample = "\n".join(synthetic_stories(data.synthetic_seed, "train", 100, data.synthetic_genre))
        return f"synthetic:{hashlib.sha256(sample.encode()).hexdigest()}"
    if not os.path.exists(data.source):
        _check_hub_name(data.source)
        return data.source
    files = {path for split in SPLITS for path in source_files(data.source)[split]}
    try:
        return " ".join(f"{path.name}:{sha256(path)}" for path in sorted(files))
    except OSError as error:
        raise StoryLLMError(f"cannot read {error.filename or data.source} ({error.strerror})") from error


def check_whitespace(text: str, name: str) -> None:
    """Raises StoryLLMError if `text` has more consecutive whitespace than tiktoken can encode.

    The message refers to the text as `name`.
    """
    if len(text) <= MAX_WHITESPACE:
        return
    longest = max(map(len, re.findall(r"\s+", text)), default=0)
    if longest > MAX_WHITESPACE:
        raise StoryLLMError(
            f"{name} has {longest:,} consecutive whitespace characters, must be at most {MAX_WHITESPACE:,}; remove some"
        )


# Sources


def _source(data: DataConfig, split: str) -> Source:
    if data.source == "synthetic":
        count = data.synthetic_stories if split == "train" else max(1, data.synthetic_stories // 20)
        arguments = (data.synthetic_seed, split, count, data.synthetic_genre)
        return lambda: ((story, True) for story in synthetic_stories(*arguments)), True
    if not os.path.exists(data.source):
        return _dataset_source(data, split, _load_from_hub(data))
    if is_saved_dataset(Path(data.source)):
        return _dataset_source(data, split, _load_from_disk(data.source))
    files = source_files(data.source)
    return lambda: _file_pieces(files[split], data.text_column), files["train"] != files["validation"]


def _file_pieces(files: list[Path], column: str) -> Iterator[Piece]:
    for path in files:
        yield from _validated(read_file(path, column), str(path))


def _check_hub_name(source: str) -> None:
    if source.lower().endswith((*SUFFIXES, ".gz")) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise StoryLLMError(
            f"source {source!r} not found (no file or folder, nor a Hub dataset as 'owner/name'); pass an existing "
            "path, a Hub dataset or 'synthetic'"
        )


def _load_from_hub(data: DataConfig) -> Mapping[str, Any]:
    """The splits of a Hub dataset: cached on disk and memory-mapped, or streamed if only the first stories are used."""
    _check_hub_name(data.source)
    import datasets

    try:
        splits = datasets.load_dataset(data.source, streaming=data.max_stories is not None)
    except Exception as error:  # several libraries raise their own network, Hub and format errors
        raise StoryLLMError(
            f"cannot load {data.source!r} from the Hub ({type(error).__name__}); check the name and the network "
            "connection, or use a local file or source 'synthetic'"
        ) from error
    return splits


def _load_from_disk(folder: str) -> Mapping[str, Any]:
    """The splits of a folder written by `save_to_disk` of the `datasets` library."""
    import datasets

    try:
        loaded = datasets.load_from_disk(folder)
        splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
        for part in splits.values():
            part.data.validate(full=True)  # the files have no checksums, and a wrong offset would crash the process
    except Exception as error:  # of several libraries, depending on the file that is corrupted
        raise StoryLLMError(
            f"{folder} is not a valid dataset folder ({type(error).__name__}); download or save it again"
        ) from error
    return splits


def _dataset_source(data: DataConfig, split: str, splits: Mapping[str, Any]) -> Source:
    """The stories of one split; of the training split or else the first one, if there are not both."""
    has_splits = "train" in splits and "validation" in splits
    part = splits[split if has_splits else "train" if "train" in splits else next(iter(splits))]
    count = TINYSTORIES_COUNTS[split]
    if data.source == TINYSTORIES and data.max_stories is None and len(part) != count:
        raise StoryLLMError(
            f"{TINYSTORIES} has {len(part):,} {split} stories, must be {count:,}; "
            "the download is incomplete or the dataset has changed: clear the datasets cache, or use local files"
        )
    return lambda: _validated(_column(part, data), data.source), has_splits


def _column(part: Any, data: DataConfig) -> Iterator[tuple[Any, bool]]:
    """The values in the text column of a dataset, as pieces."""
    try:
        for batch in part.with_format(None).iter(batch_size=1_000):
            if data.text_column not in batch:
                raise StoryLLMError(f"{data.source} {missing_column(data.text_column, list(batch))}")
            yield from ((story, True) for story in batch[data.text_column])
    except StoryLLMError:
        raise
    except Exception as error:  # a corrupted file, or the network while streaming
        raise StoryLLMError(
            f"cannot read {data.source} ({type(error).__name__}); check the network connection, or download it again"
        ) from error


# Validation and cleaning


def _joined(pieces: Iterable[Piece]) -> Iterator[str]:
    """Whole stories."""
    parts = []
    for text, ends_story in pieces:
        parts.append(text)
        if ends_story:
            yield "".join(parts)
            parts = []


def _first_stories(pieces: Iterator[Piece], count: int | None) -> Iterator[Piece]:
    """The first `count` stories, or all of them."""
    for text, ends_story in pieces:
        yield text, ends_story
        if count is not None and ends_story:
            count -= 1
            if not count:
                return


def _validated(pieces: Iterable[tuple[Any, bool]], source: str) -> Iterator[Piece]:
    """The same pieces. Raises StoryLLMError for one that is not Unicode text or that tiktoken cannot encode."""
    number = 1
    for text, ends_story in pieces:
        if not isinstance(text, str):
            raise StoryLLMError(
                f"{source} story {number} is {type(text).__name__}, must be text; set data.text_column (--text-column)"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise StoryLLMError(f"{source} story {number} has an unpaired surrogate; fix its \\u escapes") from error
        check_whitespace(text, f"{source} story {number}")
        yield text, ends_story
        number += ends_story


def _cleaned(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Stories with mojibake fixed and surrounding whitespace stripped, without those that are then empty."""
    started, whitespace = False, ""
    for text, ends_story in pieces:
        text = whitespace + re.sub(r"[^\x00-\x7f]{2,}", _fix_mojibake, text)
        if not started:
            text = text.lstrip()
        stripped = text.rstrip()
        whitespace = "" if ends_story else text[len(stripped) :]  # belongs to the next piece, if the story goes on
        started = started or bool(stripped)
        if started:
            yield stripped, ends_story
        started = started and not ends_story


def _fix_mojibake(match: re.Match[str]) -> str:
    """UTF-8 that was decoded as Windows-1252 ("â€œ" for an opening quote), decoded correctly; other text unchanged."""
    try:
        # Decoders map the five bytes that Windows-1252 leaves undefined to Latin-1 control characters.
        raw = b"".join(c.encode("latin-1") if "\x80" <= c <= "\x9f" else c.encode("cp1252") for c in match[0])
        return raw.decode("utf-8")
    except UnicodeError:
        return match[0]
