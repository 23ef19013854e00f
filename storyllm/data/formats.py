"""Reads the stories in one file: .txt, .jsonl, .json, .csv (also compressed as .gz) and .parquet."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ..config import StoryLLMError

# Stories are passed on in pieces, so that a book need not fit in memory: a part of the text, and whether the story ends
# with it. The token ids of the pieces are those of the whole story.
Piece = tuple[str, bool]

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".txt.gz", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
END_OF_TEXT = "<|endoftext|>"  # separates stories in a .txt file; also the name of the last token of every vocabulary
PIECE_CHARACTERS = (
    1 << 19
)  # a .txt story is cut into pieces of about this many characters; without spaces, it is not cut
CUT_CHARACTERS = 10_000  # the end of a piece in which a place to cut is searched for
MAX_CSV_CELL = 1 << 30  # characters; the default of Python's csv module is shorter than some stories


def file_format(path: Path) -> str | None:
    """The suffix in SUFFIXES that the file has, in upper or lower case, or None."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_file(path: Path, column: str) -> Iterator[tuple[Any, bool]]:
    """Yields the stories of a file in pieces. A value in `column` that is not text is yielded as it is.

    Newlines in a .txt become "\\n"; other formats are read verbatim. Raises StoryLLMError if the file is invalid.
    """
    suffix = (file_format(path) or "").removesuffix(".gz")
    if suffix == ".txt":
        return _txt_pieces(path)
    readers = {".jsonl": _jsonl_stories, ".json": _json_stories, ".csv": _csv_stories, ".parquet": _parquet_stories}
    return ((story, True) for story in readers[suffix](path, column))


def missing_column(column: str, columns: list[str]) -> str:
    """The rest of the message for a source that has other columns, after the name of the source."""
    available = ", ".join(columns[:20])[:300]
    return f"has no column {column[:100]!r}, only {available}; set data.text_column (--text-column)"


def _txt_pieces(path: Path) -> Iterator[Piece]:
    """Stories separated by lines that contain only END_OF_TEXT. The newline before a separator is part of it."""
    parts: list[str] = []
    size, limit = 0, PIECE_CHARACTERS
    at_line_start = True
    for _, line in _lines(path, newline=None, limit=PIECE_CHARACTERS):
        if at_line_start and line.removesuffix("\n") == END_OF_TEXT:
            yield "".join(parts).removesuffix("\n"), True
            parts, size, limit = [], 0, PIECE_CHARACTERS
        else:
            parts.append(line)
            size += len(line)
        at_line_start = line.endswith("\n")
        if size >= limit:
            text = "".join(parts)
            cut = _last_cut(text)
            if cut:
                yield text[:cut], False
            parts, size = [text[cut:]], len(text) - cut
            limit = size + PIECE_CHARACTERS  # without a cut, search again only after as much text
    if any(parts):
        yield "".join(parts), True


def _last_cut(text: str) -> int:
    """The last place in `text` where a cut keeps the token ids, or 0 if its last CUT_CHARACTERS have none.

    GPT-2's pattern always begins a new match at whitespace after another character. Whitespace for Python includes
    whitespace for the pattern.
    """
    for place in range(len(text) - 1, max(len(text) - CUT_CHARACTERS, 0), -1):
        if text[place] in " \n" and not text[place - 1].isspace():
            return place
    return 0


def _jsonl_stories(path: Path, column: str) -> Iterator[Any]:
    return _json_lines(_lines(path), path, column)


def _json_stories(path: Path, column: str) -> Iterator[Any]:
    """The stories of a JSON array of objects, which is parsed as a whole, or of JSON lines."""
    lines = ((number, line) for number, line in _lines(path) if line.strip())
    first = next(lines, (1, ""))
    if not first[1].lstrip().startswith("["):
        yield from _json_lines(chain([first], lines), path, column)
        return
    values = _parsed(first[1] + "".join(line for _, line in lines))
    if not isinstance(values, list):
        raise StoryLLMError(f"{path} is not a valid JSON array; download or copy it again")
    for index, value in enumerate(values, 1):
        yield _value(value, column, f"{path} element {index}")


def _json_lines(lines: Iterable[tuple[int, str]], path: Path, column: str) -> Iterator[Any]:
    for number, line in lines:
        if line.strip():
            yield _value(_parsed(line), column, f"{path} line {number}")


def _parsed(text: str) -> Any:
    """The JSON value, or None if it is invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _value(value: Any, column: str, place: str) -> Any:
    if not isinstance(value, dict) or column not in value:
        raise StoryLLMError(
            f"{place} is not a JSON object with the key {column[:100]!r}; fix it, or set data.text_column "
            "(--text-column)"
        )
    return value[column]


def _csv_stories(path: Path, column: str) -> Iterator[str]:
    """The cells of a column as they are in the file; an empty cell is an empty story."""
    csv.field_size_limit(MAX_CSV_CELL)  # of the process: a reader has none of its own
    rows = csv.reader((line for _, line in _lines(path, newline="")), strict=True)
    try:
        header = next((row for row in rows if row), [])
        if header and column not in header:
            raise StoryLLMError(f"{path} {missing_column(column, header)}")
        for row in rows:
            if row and len(row) != len(header):
                raise StoryLLMError(
                    f"{path} line {rows.line_num} has {len(row)} cells, the header has {len(header)}; fix the line"
                )
            if row:  # not a blank line
                yield row[header.index(column)]
    except csv.Error as error:
        raise StoryLLMError(f"{path} line {rows.line_num} is not valid CSV ({error}); fix it") from error


def _parquet_stories(path: Path, column: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if column not in file.schema_arrow.names:
                raise StoryLLMError(f"{path} {missing_column(column, file.schema_arrow.names)}")
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


def _lines(path: Path, newline: str | None = "\n", limit: int = -1) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines with their newlines, decoded as UTF-8. A byte order mark is skipped.

    `newline` is that of `open`. A line of more than `limit` characters is yielded in parts.
    """
    number = 1
    open_file: Any = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with open_file(path, "rt", encoding="utf-8", newline=newline) as file:
            line = file.readline(limit).removeprefix("\ufeff")
            while line:
                yield number, line
                number += line.endswith(("\n", "\r"))
                line = file.readline(limit)
    except UnicodeDecodeError as error:
        # The error comes with a block of the file: the lines that `readline` has not returned yet.
        before = error.object[: error.start]
        number += before.count(b"\n") if newline == "\n" else len((before + b".").splitlines()) - 1
        byte = error.object[error.start]
        raise StoryLLMError(
            f"{path} line {number} is not UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StoryLLMError(f"{path} is not a valid gzip file ({error}); download or copy it again") from error
    except OSError as error:
        raise StoryLLMError(f"cannot read {path} ({error.strerror})") from error
