"""Reads stories from a dataset on the Hugging Face Hub, from local files, or from the synthetic generator."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..config import DataConfig, StoryLLMError
from ..files import sha256
from .synthetic import synthetic_stories

SPLITS = ("train", "validation")
SUFFIXES = (".parquet", ".jsonl", ".txt")
END_OF_TEXT = "<|endoftext|>"  # separates stories in a .txt file; also the name of the last token of every vocabulary
MAX_WHITESPACE = 500_000  # consecutive whitespace characters; tiktoken's regex engine fails at about twice as many
TINYSTORIES = "roneneldan/TinyStories"
TINYSTORIES_COUNTS = {"train": 2_119_719, "validation": 21_990}  # from the dataset card (Eldan and Li 2023)


def read_stories(data: DataConfig, split: str) -> Iterator[str]:
    """Yields the stories of a split, "train" or "validation", without loading them all into memory.

    If the source has no validation split, `validation_fraction` of its stories are held out, evenly spaced.
    Raises StoryLLMError if the source does not exist, cannot be read or contains anything but text.
    """
    if split not in SPLITS:
        raise StoryLLMError(f"split is {split!r}, must be one of: {', '.join(SPLITS)}")
    if data.source == "synthetic":
        count = data.synthetic_stories if split == "train" else max(1, data.synthetic_stories // 20)
        stories: Iterator[str] = synthetic_stories(data.synthetic_seed, split, count)
    elif os.path.exists(data.source):
        stories = _local_stories(data, split)
    else:
        stories = _hub_stories(data, split)
    return _cleaned(stories) if data.clean else stories


def source_fingerprint(data: DataConfig) -> str:
    """A string that changes when the stories change.

    Local files: their names and SHA-256. Synthetic stories: the SHA-256 of the first hundred. A Hub dataset: its name.
    """
    if data.source == "synthetic":
        sample = "\n".join(synthetic_stories(data.synthetic_seed, "train", 100))
        return f"synthetic:{hashlib.sha256(sample.encode()).hexdigest()}"
    if not os.path.exists(data.source):
        _check_hub_name(data.source)
        return data.source
    files = {path for split in SPLITS for path in _local_files(data.source)[split]}
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


def _hold_out(stories: Iterable[str], split: str, fraction: float) -> Iterator[str]:
    """The stories of one split, with every (1 / fraction)-th story in the validation split."""
    for index, story in enumerate(stories):
        held_out = int((index + 1) * fraction) > int(index * fraction)
        if held_out == (split == "validation"):
            yield story


# Hugging Face Hub


def _check_hub_name(source: str) -> None:
    if source.endswith(SUFFIXES) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise StoryLLMError(
            f"source {source!r} not found (no file or folder, nor a Hub dataset as 'owner/name'); pass an existing "
            "path, a Hub dataset or 'synthetic'"
        )


def _hub_stories(data: DataConfig, split: str) -> Iterator[str]:
    _check_hub_name(data.source)
    import datasets

    try:
        splits = datasets.load_dataset(data.source)  # cached on disk and memory-mapped
    except Exception as error:  # several libraries raise their own network, Hub and format errors
        raise StoryLLMError(
            f"cannot load {data.source!r} from the Hub ({type(error).__name__}); check the name and the network "
            "connection, or use a local file or source 'synthetic'"
        ) from error
    has_both_splits = "train" in splits and "validation" in splits
    name = split if has_both_splits else "train" if "train" in splits else next(iter(splits))
    part = splits[name]
    if data.text_column not in part.column_names:
        raise StoryLLMError(f"{data.source} {_missing_column(data.text_column, part.column_names)}")
    if data.source == TINYSTORIES and len(part) != TINYSTORIES_COUNTS[split]:
        raise StoryLLMError(
            f"{TINYSTORIES} has {len(part):,} {split} stories, must be {TINYSTORIES_COUNTS[split]:,}; "
            "the download is incomplete or the dataset has changed: clear the datasets cache, or use local files"
        )
    stories: Iterator[Any] = (story for batch in part.iter(batch_size=1_000) for story in batch[data.text_column])
    if not has_both_splits:
        stories = _hold_out(stories, split, data.validation_fraction)
    return _validated(stories, data.source)


def _missing_column(column: str, columns: list[str]) -> str:
    available = ", ".join(columns[:20])[:300]
    return f"has no column {column[:100]!r}, only {available}; set data.text_column (--text-column)"


# Local files


def _local_stories(data: DataConfig, split: str) -> Iterator[str]:
    files = _local_files(data.source)
    stories = (story for path in files[split] for story in _validated(_file_stories(path, data.text_column), str(path)))
    if files["train"] == files["validation"]:
        return _hold_out(stories, split, data.validation_fraction)
    return stories


def _local_files(source: str) -> dict[str, list[Path]]:
    """The files of each split.

    A file belongs to a split if its name contains "train", or "valid", "val" or "dev". Unless both kinds exist, each
    split gets every file.
    """
    path = Path(source)
    files = [path] if path.is_file() else _story_files(path)
    if not files:
        raise StoryLLMError(f"{source} contains no {', '.join(SUFFIXES)} files; pass another folder or file")
    if files[0].suffix not in SUFFIXES:
        raise StoryLLMError(
            f"{source} has the suffix {path.suffix!r}, must be one of {', '.join(SUFFIXES)}; convert the file"
        )
    train = [p for p in files if re.search(r"train", p.stem, re.IGNORECASE)]
    validation = [p for p in files if re.search(r"valid|(^|[-_.])(val|dev)([-_.]|$)", p.stem, re.IGNORECASE)]
    if train and validation and not set(train) & set(validation):
        return {"train": train, "validation": validation}
    return {"train": files, "validation": files}


def _story_files(folder: Path) -> list[Path]:
    """The story files in a folder and its subfolders, sorted, without hidden ones (such as Jupyter's checkpoints)."""
    files = (path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES and path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _file_stories(path: Path, column: str) -> Iterator[object]:
    if path.suffix == ".parquet":
        return _parquet_stories(path, column)
    if path.suffix == ".jsonl":
        return _jsonl_stories(path, column)
    return _txt_stories(path)


def _parquet_stories(path: Path, column: str) -> Iterator[object]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if column not in file.schema_arrow.names:
                raise StoryLLMError(f"{path} {_missing_column(column, file.schema_arrow.names)}")
            rows = 0
            for group in range(file.num_row_groups):  # one at a time: given all groups, pyarrow prefetches the file
                for batch in file.iter_batches(batch_size=1_000, columns=[column], row_groups=[group]):
                    rows += len(batch)
                    yield from batch.column(0).to_pylist()
            if rows != file.metadata.num_rows:
                raise pa.ArrowInvalid(f"{rows} rows of {file.metadata.num_rows}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error)[:200]
        raise StoryLLMError(f"{path} is not a valid Parquet file ({reason}); download or copy it again") from error


def _jsonl_stories(path: Path, column: str) -> Iterator[object]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            story = json.loads(line)[column]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            key = repr(column[:100])
            raise StoryLLMError(
                f"{path} line {number} is not a JSON object with the key {key}; fix the line, or set "
                "data.text_column (--text-column)"
            ) from error
        yield story


def _txt_stories(path: Path) -> Iterator[str]:
    """Stories separated by lines that contain only END_OF_TEXT. The newline before a separator is part of it."""
    story: list[str] = []
    for _, line in _lines(path):
        if line.rstrip("\r\n") == END_OF_TEXT:
            yield "".join(story).removesuffix("\n").removesuffix("\r")
            story = []
        else:
            story.append(line)
    if any(story):
        yield "".join(story)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines with their newlines, decoded as UTF-8. A byte order mark is skipped."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise StoryLLMError(
                        f"{path} line {number} is not UTF-8 (byte 0x{line[error.start]:02x}); convert the file to UTF-8"
                    ) from error
    except OSError as error:
        raise StoryLLMError(f"cannot read {path} ({error.strerror})") from error


# Validation and cleaning


def _validated(stories: Iterable[object], source: str) -> Iterator[str]:
    """The same stories. Raises StoryLLMError for one that is not Unicode text or that tiktoken cannot encode."""
    for number, story in enumerate(stories, 1):
        if not isinstance(story, str):
            raise StoryLLMError(
                f"{source} story {number} is {type(story).__name__}, must be text; set data.text_column (--text-column)"
            )
        try:
            story.encode("utf-8")
        except UnicodeEncodeError as error:
            raise StoryLLMError(f"{source} story {number} has an unpaired surrogate; fix its \\u escapes") from error
        check_whitespace(story, f"{source} story {number}")
        yield story


def _cleaned(stories: Iterable[str]) -> Iterator[str]:
    """Stories with mojibake fixed and surrounding whitespace stripped, without those that are then empty."""
    for story in stories:
        story = re.sub(r"[^\x00-\x7f]{2,}", _fix_mojibake, story).strip()
        if story:
            yield story


def _fix_mojibake(match: re.Match[str]) -> str:
    """UTF-8 that was decoded as Windows-1252 ("â€œ" for an opening quote), decoded correctly; other text unchanged."""
    try:
        # Decoders map the five bytes that Windows-1252 leaves undefined to Latin-1 control characters.
        raw = b"".join(c.encode("latin-1") if "\x80" <= c <= "\x9f" else c.encode("cp1252") for c in match[0])
        return raw.decode("utf-8")
    except UnicodeError:
        return match[0]
