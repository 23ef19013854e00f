"""Damaged, random and enormous story files: read correctly, or refused in one line that names the file.

What could crash in native code, hang or fill the memory runs in a child. It writes down each case before trying it,
so that the last one written is the one that killed it. `-m campaign` tries more of everything.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import synthetic_stories
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import storyllm
from storyllm import DataConfig, StoryLLMError
from storyllm.stories import read_stories, source_fingerprint
from storyllm.tokens import read_tokenizer

MARK = "<|endoftext|>"
STORIES = synthetic_stories(12)
MEGABYTE = 1_000_000

# By hand, without the package's reader: what each file should give. None where it should be refused.


def txt_should_give(raw: bytes) -> list[str] | None:
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        return None
    *ended, last = re.split(rf"(?:(?<=\n)|\A){re.escape(MARK)}\r*(?:\n|\Z)", text)
    return [re.sub(r"\r?\n\Z", "", story) for story in ended] + [last] * bool(last)


def jsonl_should_give(raw: bytes) -> list[str] | None:
    try:
        lines = [line.decode() for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
        stories = [json.loads(line)["text"] for line in lines if line.strip()]
        for story in stories:
            story.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return stories if all(isinstance(story, str) for story in stories) else None


SHOULD_GIVE = {".txt": txt_should_give, ".jsonl": jsonl_should_give}


def txt_of(stories: list[str], line_end: str = "\n") -> bytes:
    return "".join(f"{story}{line_end}{MARK}{line_end}" for story in stories).encode()


def jsonl_of(stories: list[str]) -> bytes:
    return "".join(json.dumps({"text": s}, ensure_ascii=i % 2 == 0) + "\n" for i, s in enumerate(stories)).encode()


def parquet_of(stories: Any, column: str = "text", **options: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(stories)), column: stories}), file, **options)
    return file.getvalue()


BYTES_OF: dict[str, Callable[[list[str]], bytes]] = {".txt": txt_of, ".jsonl": jsonl_of, ".parquet": parquet_of}

PARQUETS = {
    "plain": {"compression": "none", "use_dictionary": False, "row_group_size": 5},
    "snappy": {"compression": "snappy", "use_dictionary": True},
    "gzip-2.0": {"compression": "gzip", "use_dictionary": True, "data_page_version": "2.0", "row_group_size": 5},
    "zstd-2.0": {"compression": "zstd", "use_dictionary": False, "data_page_version": "2.0"},
    "checksums": {"compression": "none", "use_dictionary": True, "write_page_checksum": True, "row_group_size": 5},
    "checksums-snappy": {"compression": "snappy", "use_dictionary": False, "write_page_checksum": True},
}


def is_one_line(message: str, path: Path | str) -> None:
    """It names the file, says what to do after a colon, and cannot steer a terminal."""
    name = str(path)
    assert name in message or repr(name)[1:-1] in message, message[:300]
    assert ": " in message.replace(name, ""), message[:300]
    assert message.isprintable(), repr(message[:300])
    assert len(message) < 1_000 + 2 * len(name), f"a message of {len(message)} characters"


def outcome(path: Path, **options: Any) -> list[str] | None:
    """The stories, or None where the file is refused as it should be."""
    try:
        stories = list(read_stories(DataConfig(source=str(path), **options), "train"))
    except StoryLLMError as error:
        is_one_line(str(error), path)
        return None
    assert all(type(story) is str for story in stories)
    for story in stories:
        story.encode()
    return stories


def is_right(path: Path, raw: bytes, kind: str = "") -> None:
    """Reading `raw` ends as it should."""
    path.write_bytes(raw)
    found = outcome(path)
    if path.suffix in SHOULD_GIVE:
        assert found == SHOULD_GIVE[path.suffix](raw)
    elif kind.startswith("checksums"):  # no damage goes unnoticed
        assert found in (None, STORIES), "other stories than were written"
    elif kind:  # damage within the text cannot be noticed; stories that are lost can
        assert found is None or len(found) == len(STORIES), f"{len(found)} stories of {len(STORIES)}"


# Damage


def damaged(raw: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Without end: a bit flipped, the end cut off, a stretch filled, taken out or doubled, bytes replaced."""
    while True:
        at = rng.randrange(len(raw))
        # The beginning and the end, where parquet keeps what describes the rest, get as much as all between.
        at = rng.choice((at, at, at % 64, len(raw) - 1 - at % 64, len(raw) - 1 - at % 700))
        at = min(max(at, 0), len(raw) - 1)
        length = rng.choice((1, 2, 4, 16, 100, 1_000))
        kind = rng.randrange(7)
        if kind <= 2:
            bit = rng.randrange(8)
            yield f"bit {bit} of byte {at} flipped", raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]
        elif kind == 3:
            yield f"cut to {at} bytes", raw[:at]
        elif kind == 4:
            fill = bytes([rng.choice((0, 255, 0x80, 10))]) * min(length, len(raw) - at)
            yield f"{len(fill)} bytes from {at} on made {fill[:1]!r}", raw[:at] + fill + raw[at + length :]
        elif kind == 5:
            yield f"{length} bytes from {at} on taken out", raw[:at] + raw[at + length :]
        else:
            other = rng.randbytes(rng.randrange(1, 5))
            yield f"{other!r} written over byte {at}", raw[:at] + other + raw[at + len(other) :]


def every_bit_and_cut(raw: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Every single-bit flip and every truncation, in a random order: a run cut short has been everywhere."""
    bits = 8 * len(raw)
    for number in rng.sample(range(bits + len(raw)), bits + len(raw)):
        at, bit = divmod(number, 8)
        if number < bits:
            yield f"bit {bit} of byte {at} flipped", raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]
        else:
            yield f"cut to {number - bits} bytes", raw[: number - bits]


def random_parquet(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Random bytes between parquet's magic words, with all kinds of footer lengths."""
    for number in count():
        body = rng.randbytes(rng.randrange(300))
        length = rng.choice((len(body), len(body) // 2, 10, 0, len(body) + 4, 2**31 - 1, 2**32 - 1))
        yield (
            f"random bytes {number}, {body[:20].hex()}... and length {length}",
            b"PAR1" + body + length.to_bytes(4, "little") + b"PAR1",
        )


def peak_memory() -> float:
    """This process's, in MB. What `getrusage` says begins with its parent's, so Linux is asked first."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024 / MEGABYTE


def try_cases(suffix: str, kind: str, exhaustive: bool, cases: int, seconds: float) -> None:
    """The child's work. Prints what went wrong, and last how many cases it tried and how far its memory grew."""
    rng = random.Random(f"{suffix} {kind}")
    raw = parquet_of(STORIES, **PARQUETS[kind]) if kind else BYTES_OF[suffix](STORIES)
    path, note = Path(f"a{suffix}"), Path("case.txt")
    is_right(path, raw, kind)
    before, end = peak_memory(), time.monotonic() + seconds
    sources = [every_bit_and_cut(raw, rng) if exhaustive else damaged(raw, rng)]
    sources += [random_parquet(rng)] if suffix == ".parquet" and not exhaustive else []
    tried = 0
    for case, made in (found for source in sources for found in islice(source, cases)):
        note.write_text(f"{suffix} {kind} {case}")
        started = time.monotonic()
        try:
            is_right(path, made, "" if case.startswith("random") else kind)
            assert time.monotonic() - started < 2, "slow"
        except Exception as error:
            print(f"{suffix} {kind} {case}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        tried += 1
        if time.monotonic() > end:
            break
    if (grown := peak_memory() - before) > 200:
        print(f"the memory grew by {grown:.0f} MB")
    print(f"tried {tried}")


def try_all(cases: int, seconds: float) -> None:
    for suffix, kind in KINDS:
        try_cases(suffix, kind, False, cases, seconds)


def in_child(folder: Path, function: str, *arguments: object, timeout: float) -> str:
    """What `function` of this module prints, run in a process of its own; a crash or a hang fails with its case."""
    note = folder / "case.txt"
    paths = (Path(storyllm.__file__).parents[1], Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    code = f"import test_story_files; test_story_files.{function}(*{arguments!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, timeout=timeout, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs: {note.read_text() if note.exists() else 'at once'}")
    assert done.returncode == 0, f"{done.returncode} {note.read_text() if note.exists() else ''} {done.stderr[-2_000:]}"
    return done.stdout


KINDS = [(".txt", ""), (".jsonl", ""), *((".parquet", kind) for kind in PARQUETS)]


def test_damaged_files(tmp_path: Path) -> None:
    printed = in_child(tmp_path, "try_all", 180, 5, timeout=60)
    assert re.fullmatch(rf"(tried \d{{3,}}\n){{{len(KINDS)}}}", printed), printed[:3_000]


@pytest.mark.campaign
@pytest.mark.parametrize("exhaustive", [True, False])
@pytest.mark.parametrize(("suffix", "kind"), KINDS)
def test_damaged_files_at_length(tmp_path: Path, suffix: str, kind: str, exhaustive: bool) -> None:
    printed = in_child(tmp_path, "try_cases", suffix, kind, exhaustive, 10**6, 5, timeout=60)
    assert re.fullmatch(r"tried \d{3,}\n", printed), printed[:3_000]


# Anything at all

REPEATABLE = settings(
    derandomize=True, deadline=None, max_examples=150, database=None, suppress_health_check=list(HealthCheck)
)
AT_LENGTH = settings(REPEATABLE, max_examples=4_000)

PIECES = st.sampled_from(
    [
        *(
            MARK.encode(),
            b"\n",
            b"\r\n",
            b"\r",
            b"\xef\xbb\xbf",
            b'{"text": "',
            b'"}',
            b"\0",
            b"\\ud83d",
            b"\xed\xa0\x80",
        ),
        *(
            "😀é".encode(),
            "שלום".encode(),
            "\u2028\x85".encode(),
            b"NaN",
            b"[" * 2_000,
            b'{"text": null}',
            b" ",
            b"PAR1",
        ),
    ]
)
ANYTHING = st.lists(st.one_of(st.binary(max_size=20), PIECES), max_size=30).map(b"".join)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@REPEATABLE
@given(raw=ANYTHING)
@example(raw=b"")
@example(raw=b"\xef\xbb\xbf")
@example(raw=f"a\r\n{MARK}\r\n{MARK}".encode())
@example(raw=f"{MARK}\r\r\nb\r{MARK}\n".encode())
@example(raw=b'{"text": "' + b"9" * 5_000 + b'"}')
@example(raw=b'{"text": ' + b"9" * 5_000 + b"}")
@example(raw=b'{"text": "a", "b": ' + b"[" * 100_000)
@example(raw=b'{"text": "a"}\r{"text": "b"}')
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, suffix: str, raw: bytes) -> None:
    is_right(tmp_path_factory.getbasetemp() / f"any{suffix}", raw)


@pytest.mark.campaign
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@AT_LENGTH
@given(raw=ANYTHING)
def test_any_bytes_at_length(tmp_path_factory: pytest.TempPathFactory, suffix: str, raw: bytes) -> None:
    is_right(tmp_path_factory.getbasetemp() / f"any{suffix}", raw)


def any_parquet(examples: int) -> None:
    """A child's work: anything at all, alone and as parquet's footer or pages."""
    whole = parquet_of(STORIES, compression="none")

    @settings(REPEATABLE, max_examples=examples)
    @given(raw=ANYTHING, as_what=st.sampled_from(["all", "footer", "pages"]))
    def check(raw: bytes, as_what: str) -> None:
        footer = b"PAR1" + raw + len(raw).to_bytes(4, "little") + b"PAR1"
        made = {"all": raw, "footer": footer, "pages": whole[:120] + raw + whole[120 + len(raw) :]}[as_what]
        Path("case.txt").write_text(f"{as_what} {raw.hex()}")
        is_right(Path("a.parquet"), made)

    check()


def test_any_bytes_as_parquet(tmp_path: Path) -> None:
    in_child(tmp_path, "any_parquet", 300, timeout=60)


@pytest.mark.campaign
def test_any_bytes_as_parquet_at_length(tmp_path: Path) -> None:
    in_child(tmp_path, "any_parquet", 10_000, timeout=120)


@pytest.mark.parametrize("suffix", BYTES_OF)
@REPEATABLE
@given(stories=st.lists(UNICODE.filter(lambda text: MARK not in text and not text.endswith("\r")), max_size=8))
def test_any_text_is_read_verbatim(tmp_path_factory: pytest.TempPathFactory, suffix: str, stories: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / f"verbatim{suffix}"
    if suffix == ".txt" and stories and stories[0].startswith("\ufeff"):
        stories = ["", *stories]  # at the very start of a text file it would be a byte order mark
    path.write_bytes(BYTES_OF[suffix](stories))
    assert outcome(path) == stories


@REPEATABLE
@given(text=st.one_of(UNICODE, UNICODE.map(lambda text: text.encode().decode("cp1252", "replace"))))
def test_cleaning_any_text_ends_in_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "clean.jsonl"
    path.write_bytes(jsonl_of([text]))
    found = outcome(path, clean=True)
    assert found is not None and len(found) == bool(text.strip())
    if text.isascii():
        assert "".join(found) == text.strip()


# Odd texts, all the way to ids and back

ODD = [
    "Windows\r\nline\r\n\r\nends.",
    "old\rMac\rline ends",
    "a line end at the end\n",
    "\ufeffa byte order mark, \ufeffand another",
    "NUL \0\0 and \x1a and \x1b[31m",
    "שלום, עולם! مرحبا \u202eabc\u202c \u200f",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪",
    "mojibake: â€œHi,â€\x9d said ZoÃ« â€” ðŸ˜€",
    "e\u0301 is not \u00e9, \ufb01 is not fi, \u212b is not \u00c5",
    "\u2028\u2029\x85\x0b\x0c\x1c\u3000\u00a0",
    "a\u0301" + "\u0301" * 300,
    "\U0010ffff \ufffe \ufffd",
    f"the {MARK} within a line",
    "",
    " ",
    "It's we're I'VE 1,000 ½ ٣٤٥   three spaces",
]


@pytest.mark.parametrize("tokenizer", ["bpe:300", "gpt2"])
@pytest.mark.parametrize("suffix", BYTES_OF)
def test_odd_texts_come_back_from_their_ids(
    request: pytest.FixtureRequest, tmp_path: Path, suffix: str, tokenizer: str
) -> None:
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2_cache")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train", "validation"):
        (source / f"{name}{suffix}").write_bytes(BYTES_OF[suffix](ODD))
    info = storyllm.prepare(DataConfig(source=str(source), tokenizer=tokenizer), tmp_path / "data")
    assert stories_in(tmp_path / "data") == ODD
    assert info.train.bytes == sum(len(story.encode()) for story in ODD)


def stories_in(data: Path, split: str = "train") -> list[str]:
    """The stories of a `.bin`, decoded strictly."""
    tokenizer = read_tokenizer(data)
    ids = np.fromfile(data / f"{split}.bin", "<u2")
    assert ids[-1] == tokenizer.eot_token
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.eot_token) + 1)[:-1]
    return [tokenizer.decode_bytes(part[:-1].tolist()).decode() for part in parts]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_text_file_of_any_editor(tmp_path: Path, line_end: str, mark: str) -> None:
    stories = [story.replace("\n", line_end) for story in STORIES]
    path = tmp_path / "a.txt"
    path.write_bytes(mark.encode() + txt_of(stories, line_end))
    assert outcome(path) == stories


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_other_encodings_are_refused(tmp_path: Path, suffix: str, encoding: str) -> None:
    """Also where every byte could be UTF-8, as in UTF-16 of plain letters without a byte order mark."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(BYTES_OF[suffix](["Once upon a time — Zoë"] * 2).decode().encode(encoding))
    assert outcome(path) is None


# Names


@pytest.mark.parametrize("column", ["te\nxt", "\x1b[31mtext", "\u202etxet", "x" * 100_000])
def test_a_column_name_cannot_break_the_line(tmp_path: Path, column: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_of(["a"], column))
    assert outcome(path) is None
    (tmp_path / "a.jsonl").write_bytes(b'{"story": "a"}')
    assert outcome(tmp_path / "a.jsonl", text_column=column) is None


def test_a_file_of_thousands_of_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({f"column {i}": ["a"] for i in range(3_000)}), tmp_path / "a.parquet")
    assert outcome(tmp_path / "a.parquet") is None


def test_columns_that_are_not_text(tmp_path: Path) -> None:
    import pyarrow as pa

    path = tmp_path / "a.parquet"
    columns = [[{"text": "a"}], [["a"]], [b"a"], [b"\xff"], [None], [1.5], [True], pa.array([b"ab"], pa.binary(2))]
    for column in columns:
        path.write_bytes(parquet_of(column))
        assert outcome(path) is None, column


def test_a_parquet_string_that_is_not_utf8(tmp_path: Path) -> None:
    raw = parquet_of(["Zoë", "b"], compression="none", use_dictionary=False, write_statistics=False)
    assert raw.count("ë".encode()) == 1
    path = tmp_path / "a.parquet"
    path.write_bytes(raw.replace("ë".encode(), b"e\xff"))
    assert outcome(path) is None


@pytest.mark.skipif(os.name != "posix", reason="such names are POSIX's")
@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred"])
def test_a_file_name_cannot_break_the_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.txt"
    path.write_bytes(b"\xff")
    with pytest.raises(StoryLLMError) as caught:
        list(read_stories(DataConfig(source=str(path)), "train"))
    assert str(caught.value).isprintable()


@pytest.mark.skipif(sys.platform != "linux", reason="only there can a name be any bytes")
def test_a_file_name_that_is_not_unicode(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.txt"
    with open(path, "wb") as file:
        file.write(txt_of(STORIES))
    data = DataConfig(source=os.fsdecode(path), tokenizer="bpe:260", validation_fraction=0.5)
    try:
        storyllm.prepare(data, tmp_path / "data")
    except StoryLLMError as error:
        is_one_line(str(error), tmp_path)
    else:
        assert sorted(stories_in(tmp_path / "data") + stories_in(tmp_path / "data", "validation")) == sorted(STORIES)


def test_fewer_rows_than_the_file_says(tmp_path: Path) -> None:
    raw = parquet_of(STORIES)
    says = b"\x16\x18\x19"  # the number of rows, twice 12 in thrift's compact form, between its field and the next
    assert raw.count(says) == 1
    path = tmp_path / "a.parquet"
    path.write_bytes(raw.replace(says, b"\x16\x1a\x19"))
    assert outcome(path) is None


# What is no file


def read_what_is_no_file() -> None:
    """A child's work: none of these is opened, for it might never end."""
    os.mkfifo("pipe.txt")
    os.symlink("loop.txt", "loop.txt")
    os.symlink("/dev/zero", "zero.txt")
    os.mkdir("folder")
    os.mkfifo("folder/a.jsonl")
    os.symlink("/dev/zero", "folder/a.parquet")
    os.symlink(".", "folder/again")
    for name in ("pipe.txt", "loop.txt", "zero.txt", "/dev/zero", "folder"):
        Path("case.txt").write_text(name)
        assert outcome(Path(name)) is None
        try:
            source_fingerprint(DataConfig(source=name))
        except StoryLLMError as error:
            is_one_line(str(error), name)
        else:
            raise AssertionError(f"{name} has a fingerprint")


@pytest.mark.skipif(sys.platform != "linux", reason="made of what Linux has")
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    in_child(tmp_path, "read_what_is_no_file", timeout=30)


@pytest.mark.parametrize("suffix", BYTES_OF)
def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    everything = synthetic_stories(5_000)
    path.write_bytes(BYTES_OF[suffix](everything))
    stories = read_stories(DataConfig(source=str(path)), "train")
    found = [next(stories)]
    os.truncate(path, path.stat().st_size // 2)
    try:
        found += stories
    except StoryLLMError as error:
        is_one_line(str(error), path)
    assert set(found[:-1]) <= set(everything)


# The large ones


def prepared(folder: Path, suffix: str, raw: bytes, tokenizer: str, timeout: float) -> tuple[int, float]:
    """`storyllm prepare` with the file to train on: its exit code and peak memory in MB. A refusal is checked."""
    source = folder / "source"
    source.mkdir()
    (source / f"train{suffix}").write_bytes(raw)
    (source / "validation.txt").write_bytes(txt_of(STORIES))
    command = [sys.executable, "-m", "storyllm", "prepare", "--source", source, "--tokenizer", tokenizer]
    environment = {**os.environ, "PYTHONPATH": str(Path(storyllm.__file__).parents[1])}
    done = subprocess.run(  # through a small process, for a child's peak memory begins with that of its parent
        [sys.executable, "-c", MEASURE, str(timeout), *map(str, command), "--out", str(folder / "data")],
        env=environment,
        capture_output=True,
        text=True,
    )
    message = done.stderr
    assert done.returncode == 0, f"it took over {timeout} s: {message[-1_500:]}"
    code, peak = map(int, done.stdout.split())
    assert code in (0, 2), f"{code} {message[-1_500:]}"
    lines = [line for line in message.splitlines() if "tokens asked for" not in line]  # that is a warning
    assert len(lines) == (code == 2), message[-1_500:]
    if code == 2:
        assert str(source) in message
    return code, peak * 1024 / MEGABYTE


MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[2:], stdout=subprocess.DEVNULL, timeout=float(sys.argv[1])).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
PROSE = " ".join(STORIES)


def long_text(kind: str, size: int) -> str:
    """One story of about `size` bytes."""
    if kind == "letters":
        return "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=size))
    unit = {"prose": PROSE, "one letter": "a", "digits": "1", "marks": "!?", "emoji": "😀", "Hebrew": "שלום "}[kind]
    return unit * (size // len(unit.encode()))


@pytest.mark.parametrize(("kind", "tokenizer"), [("prose", "gpt2"), ("letters", "bpe:300"), ("one letter", "bpe:300")])
def test_a_long_story(request: pytest.FixtureRequest, tmp_path: Path, kind: str, tokenizer: str) -> None:
    check_a_long_story(request, tmp_path, kind, tokenizer, MEGABYTE, timeout=12)


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("kind", "tokenizer"),
    [
        *(("prose", "gpt2"), ("one letter", "gpt2"), ("marks", "gpt2"), ("emoji", "gpt2"), ("digits", "gpt2")),
        *(("prose", "bpe:300"), ("letters", "bpe:300"), ("one letter", "bpe:300"), ("Hebrew", "bpe:300")),
    ],
)
def test_a_story_of_50_megabytes(request: pytest.FixtureRequest, tmp_path: Path, kind: str, tokenizer: str) -> None:
    check_a_long_story(request, tmp_path, kind, tokenizer, 50 * MEGABYTE, timeout=200)


def check_a_long_story(
    request: pytest.FixtureRequest, folder: Path, kind: str, tokenizer: str, size: int, timeout: float
) -> None:
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2_cache")
    text = long_text(kind, size)
    code, peak = prepared(folder, ".txt", text.encode(), tokenizer, timeout)
    assert peak < 500 + 90 * size / MEGABYTE  # one word of that size, merged pair by pair, takes some 75 bytes a byte
    if code == 0:
        (found,) = stories_in(folder / "data")
        assert found == text


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe:300"])
@pytest.mark.parametrize("run", [" ", "\n", "\u3000"])
@pytest.mark.parametrize("after", ["x", ""])
def test_a_million_spaces_in_a_row(
    request: pytest.FixtureRequest, tmp_path: Path, tokenizer: str, run: str, after: str
) -> None:
    """Where the vocabulary is trained beforehand: in the text that it is trained on, see below."""
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2_cache")
    text = "a" + run * 1_000_000 + after
    for name, stories in (("train", STORIES), ("validation", [text])):
        (tmp_path / f"{name}.txt").write_bytes(txt_of(stories))
    try:
        storyllm.prepare(DataConfig(source=str(tmp_path), tokenizer=tokenizer), tmp_path / "data")
    except StoryLLMError as error:
        is_one_line(str(error), tmp_path)
    else:
        assert stories_in(tmp_path / "data", "validation") == [text]


def test_a_vocabulary_trained_on_very_many_spaces_in_a_row(tmp_path: Path) -> None:
    text = "a b" + " " * 400_000 + "\n" * 50_000 + "x"
    if prepared(tmp_path, ".jsonl", jsonl_of([text, *STORIES]), "bpe:300", timeout=12)[0] == 0:
        assert stories_in(tmp_path / "data") == [text, *STORIES]


@pytest.mark.parametrize("prompt", [" " * 1_000_000 + "x", "\n" * 1_000_000, "a" * 300_000, "\0😀" * 50_000])
def test_a_prompt_of_any_kind(tiny_data: Path, prompt: str) -> None:
    tokenizer = read_tokenizer(tiny_data)
    torch.manual_seed(0)
    shape = storyllm.GPTConfig(vocab_size=tokenizer.n_vocab, block_size=8, n_layer=1, n_head=1, n_embd=8)
    teller = storyllm.Storyteller(storyllm.GPT(shape), tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is cut to the context, and says so
        try:
            assert teller.tell(prompt, max_new_tokens=2, seed=0).startswith(prompt)
        except StoryLLMError as error:
            is_one_line(str(error), "prompt")


@pytest.mark.parametrize("suffix", BYTES_OF)
def test_very_many_empty_stories(tmp_path: Path, suffix: str) -> None:
    check_empty_stories(tmp_path, suffix, 100_000, timeout=15)


@pytest.mark.campaign
@pytest.mark.parametrize("suffix", BYTES_OF)
def test_a_million_empty_stories(tmp_path: Path, suffix: str) -> None:
    check_empty_stories(tmp_path, suffix, 1_000_000, timeout=60)


def check_empty_stories(folder: Path, suffix: str, count: int, timeout: float) -> None:
    raw = f"{MARK}\n".encode() * count if suffix == ".txt" else BYTES_OF[suffix]([""] * count)
    code, peak = prepared(folder, suffix, raw, "bpe:300", timeout)
    assert code == 0
    assert peak < 500 + 4 * len(raw) / MEGABYTE
    ids = np.fromfile(folder / "data" / "train.bin", "<u2")
    assert len(ids) == count
    assert (ids == read_tokenizer(folder / "data").eot_token).all()


def read_a_small_file_of_much_text(rows: int) -> None:
    """A child's work: a kilobyte that says the same 100,000 characters over and over."""
    import pyarrow as pa

    text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["x" * 100_000])
    Path("a.parquet").write_bytes(parquet_of(text, compression="zstd"))
    before = peak_memory()
    assert sum(map(len, read_stories(DataConfig(source="a.parquet"), "train"))) >= 0.98 * rows * 100_000
    assert peak_memory() - before < 400


def test_a_small_file_that_holds_much_text_is_read_bit_by_bit(tmp_path: Path) -> None:
    in_child(tmp_path, "read_a_small_file_of_much_text", 20_000, timeout=30)


def test_cleaning_long_odd_text_takes_no_longer_than_its_length(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        jsonl_of(["â€œ" * 200_000 + "é" * 500_000 + " " * 400_000 + "x" + "\u00a0" * 100_000, "é " * 200_000])
    )
    started = time.monotonic()
    assert outcome(path, clean=True) is not None
    assert time.monotonic() - started < 5
