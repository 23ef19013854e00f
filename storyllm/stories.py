"""Where the text comes from: a dataset on the hub, a local folder or file, or the built-in story generator."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from .builtin import builtin_stories
from .config import DataConfig, StoryLLMError
from .files import sha256
from .tokenizer import END_OF_TEXT, check_space

SPLITS = ("train", "validation")
SUFFIXES = (".parquet", ".jsonl", ".txt")
TINYSTORIES = "roneneldan/TinyStories"
TINYSTORIES_COUNTS = {"train": 2_119_719, "validation": 21_990}  # the dataset's card (Eldan and Li 2023)


def read_stories(data: DataConfig, split: str) -> Iterator[str]:
    """The stories of one split ("train" or "validation"), one by one, never all in memory.

    A source without a validation split of its own has `validation_fraction` of its stories held out, evenly spread.
    Raises StoryLLMError for a source that is not there, cannot be read or holds something else.
    """
    if split not in SPLITS:
        raise StoryLLMError(f"there is no split {split!r}, expected one of: {', '.join(SPLITS)}")
    if data.source == "builtin":
        count = data.builtin_stories if split == "train" else max(1, data.builtin_stories // 20)
        stories: Iterator[str] = builtin_stories(data.builtin_seed, split, count)
    elif os.path.exists(data.source):
        stories = _local_stories(data, split)
    else:
        stories = _hub_stories(data, split)
    return _cleaned(stories) if data.clean else stories


def source_fingerprint(data: DataConfig) -> str:
    """What tells that the stories are still the same: the local files' SHA-256, the built-in's first, a hub's name."""
    if data.source == "builtin":
        sample = "\n".join(builtin_stories(data.builtin_seed, "train", 100))
        return f"builtin:{hashlib.sha256(sample.encode()).hexdigest()}"
    if not os.path.exists(data.source):
        _check_hub_name(data.source)
        return data.source
    files = {path for split in SPLITS for path in _local_files(data.source)[split]}
    try:
        return " ".join(f"{path.name}:{sha256(path)}" for path in sorted(files))
    except OSError as error:
        raise StoryLLMError(f"cannot read {error.filename or data.source} ({error.strerror})") from error


def _hold_out(stories: Iterable[str], split: str, fraction: float) -> Iterator[str]:
    """The stories of one split, where validation is every (1 / fraction)-th one."""
    for index, story in enumerate(stories):
        held_out = int((index + 1) * fraction) > int(index * fraction)
        if held_out == (split == "validation"):
            yield story


def _check_hub_name(source: str) -> None:
    if source.endswith(SUFFIXES) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise StoryLLMError(
            f"there is no file or folder {source!r}: name one that exists, a dataset on the hub as 'owner/name', "
            "or 'builtin'"
        )


def _hub_stories(data: DataConfig, split: str) -> Iterator[str]:
    _check_hub_name(data.source)
    import datasets

    try:
        splits = datasets.load_dataset(data.source)  # cached on disk, memory-mapped
    except Exception as error:  # network, hub and format errors of four libraries
        raise StoryLLMError(
            f"could not get {data.source!r} from the hub ({type(error).__name__}): check the name and the network, "
            "or take a local file, or source 'builtin'"
        ) from error
    own_split = "train" in splits and "validation" in splits
    part = splits[split] if own_split else splits["train"] if "train" in splits else next(iter(splits.values()))
    if data.text_column not in part.column_names:
        raise StoryLLMError(f"{data.source} {_no_column(data.text_column, part.column_names)}")
    if data.source == TINYSTORIES and len(part) != TINYSTORIES_COUNTS[split]:
        raise StoryLLMError(
            f"the hub gave {len(part):,} {split} stories of {TINYSTORIES}, expected {TINYSTORIES_COUNTS[split]:,}: "
            "remove its folder from the datasets cache and prepare again"
        )
    stories = (story for batch in part.iter(batch_size=1_000) for story in batch[data.text_column])
    return _checked(stories if own_split else _hold_out(stories, split, data.validation_fraction), data.source)


def _no_column(column: str, columns: list[str]) -> str:
    names = ", ".join(columns[:20])[:300]
    return f"has no column {column[:100]!r}, expected one of {names}: set data.text_column"


def _files_below(folder: Path) -> list[Path]:
    """The story files in a folder and its subfolders, in order (hidden ones, as Jupyter makes, aside)."""
    files = (path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES and path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _local_files(source: str) -> dict[str, list[Path]]:
    """The files of each split, by name: "train" or "valid" in it. Without a pair, every file serves both."""
    path = Path(source)
    files = [path] if path.is_file() else _files_below(path)
    if not files or files[0].suffix not in SUFFIXES:
        found = f"{source} is a {path.suffix or 'nameless'} file" if path.is_file() else f"{source} holds no stories"
        raise StoryLLMError(f"{found}, expected {', '.join(SUFFIXES)}: convert it, or name another source")
    train = [p for p in files if re.search(r"train", p.stem, re.IGNORECASE)]
    validation = [p for p in files if re.search(r"valid|(^|[-_.])(val|dev)([-_.]|$)", p.stem, re.IGNORECASE)]
    if train and validation and not set(train) & set(validation):
        return {"train": train, "validation": validation}
    return {"train": files, "validation": files}


def _local_stories(data: DataConfig, split: str) -> Iterator[str]:
    files = _local_files(data.source)
    stories = (story for path in files[split] for story in _checked(_file_stories(path, data.text_column), str(path)))
    if files["train"] == files["validation"]:
        return _hold_out(stories, split, data.validation_fraction)
    return stories


def _file_stories(path: Path, column: str) -> Iterator[str]:
    readers = {".parquet": _parquet_stories, ".jsonl": _jsonl_stories, ".txt": _txt_stories}
    return readers[path.suffix](path, column)


def _parquet_stories(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if column not in file.schema_arrow.names:
                raise StoryLLMError(f"{path} {_no_column(column, file.schema_arrow.names)}")
            rows = 0
            for group in range(file.num_row_groups):  # asked for all at once, pyarrow reads the whole file ahead
                for batch in file.iter_batches(batch_size=1_000, columns=[column], row_groups=[group]):
                    rows += len(batch)
                    yield from batch.column(0).to_pylist()
            if rows != file.metadata.num_rows:
                raise pa.ArrowInvalid(f"{rows} rows of {file.metadata.num_rows}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error)[:200]
        raise StoryLLMError(f"{path} is not a whole parquet file ({reason}): get it again") from error


def _jsonl_stories(path: Path, column: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            yield json.loads(line)[column]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            key = repr(column[:100])
            raise StoryLLMError(
                f"{path} line {number} is not a JSON object with a {key}: mend the line, or set data.text_column"
            ) from error


def _txt_stories(path: Path, column: str) -> Iterator[str]:
    """Stories between lines that hold the end-of-text mark alone; the line end before a mark belongs to the mark."""
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
    """Numbered lines with their line ends, decoded as UTF-8 (a byte order mark at the start is not text)."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise StoryLLMError(
                        f"{path} line {number} is not UTF-8 (byte 0x{line[error.start]:02x}): convert the file to UTF-8"
                    ) from error
    except OSError as error:
        raise StoryLLMError(f"cannot read {path} ({error.strerror})") from error


def _checked(stories: Iterable[object], where: str) -> Iterator[str]:
    """The same stories, each made sure to be Unicode text."""
    for number, story in enumerate(stories, 1):
        if not isinstance(story, str):
            raise StoryLLMError(f"{where} story {number} is {type(story).__name__}, expected text: check text_column")
        try:
            story.encode("utf-8")
        except UnicodeEncodeError as error:
            raise StoryLLMError(f"{where} story {number} holds half a surrogate pair: mend its \\u escapes") from error
        check_space(story, f"{where} story {number}")
        yield story


def _cleaned(stories: Iterable[str]) -> Iterator[str]:
    """Stories with mojibake mended and spaces at the ends stripped; those with nothing left are dropped."""
    for story in stories:
        story = re.sub(r"[^\x00-\x7f]{2,}", _mend_mojibake, story).strip()
        if story:
            yield story


def _mend_mojibake(match: re.Match[str]) -> str:
    """UTF-8 that was read as Windows-1252 ("â€œ" for an opening quote), read again; other text stays as it is."""
    try:
        # The five bytes that Windows-1252 leaves undefined come out as the control characters of Latin-1.
        raw = b"".join(c.encode("latin-1") if "\x80" <= c <= "\x9f" else c.encode("cp1252") for c in match[0])
        return raw.decode("utf-8")
    except UnicodeError:
        return match[0]
