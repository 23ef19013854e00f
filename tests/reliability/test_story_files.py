"""Corrupted, random and very large story files are read correctly or refused with one line that names the file.

What could crash, hang or exhaust memory runs in a subprocess, which writes the current case to `case.txt`. The tests
marked `campaign` try many more cases.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    STORY_FORMATS,
    jsonl_bytes,
    parquet_bytes,
    random_stories,
    run_in_subprocess,
    source_of,
    stories_in,
    txt_bytes,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import storyllm
from storyllm import DataConfig, StoryLLMError, load_tokenizer, prepare, read_stories
from storyllm.data.formats import file_format
from storyllm.data.stories import source_fingerprint

MARK = "<|endoftext|>"
STORIES = random_stories(12)
MEGABYTE = 1_000_000
PARQUET_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"compression": "none", "use_dictionary": False, "row_group_size": 5},
    "snappy": {"compression": "snappy", "use_dictionary": True},
    "gzip-2.0": {"compression": "gzip", "use_dictionary": True, "data_page_version": "2.0", "row_group_size": 5},
    "zstd-2.0": {"compression": "zstd", "use_dictionary": False, "data_page_version": "2.0"},
    "checksums": {"compression": "none", "use_dictionary": True, "write_page_checksum": True, "row_group_size": 5},
    "checksums-snappy": {"compression": "snappy", "use_dictionary": False, "write_page_checksum": True},
}
KINDS = [
    *((suffix, "") for suffix in (".txt", ".jsonl", ".json", ".csv")),
    (".jsonl.gz", "gz"),
    *((".parquet", kind) for kind in PARQUET_OPTIONS),
]


# Independent readers: the stories in a file, or None if it must be refused.


def expected_txt(content: bytes) -> list[str] | None:
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    *ended, last = re.split(rf"(?:(?<=\n)|\A){re.escape(MARK)}(?:\n|\Z)", text)
    return [re.sub(r"\n\Z", "", story) for story in ended] + [last] * bool(last)


def expected_jsonl(content: bytes) -> list[str] | None:
    try:
        lines = [line.decode() for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
        stories = [json.loads(line)["text"] for line in lines if line.strip()]
        for story in stories:
            story.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return stories if all(isinstance(story, str) for story in stories) else None


def expected_json(content: bytes) -> list[str] | None:
    """An array is read as if it were JSON lines."""
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode()
        if text.lstrip().startswith("["):
            content = "\n".join(json.dumps(value) for value in json.loads(text)).encode()
    except (ValueError, RecursionError):
        return None
    return expected_jsonl(content)


EXPECTED = {".txt": expected_txt, ".jsonl": expected_jsonl, ".json": expected_json}


def assert_clear_message(message: str, path: Path | str) -> None:
    """Checks that the message is one short line, names the file, and has no control characters."""
    name = str(path)
    assert name in message or repr(name)[1:-1] in message, message[:300]
    assert message.isprintable(), repr(message[:300])
    assert len(message) < 1_000 + 2 * len(name), f"a message of {len(message)} characters"


def stories_or_none(path: Path, **fields: Any) -> list[str] | None:
    """The training stories of a source, or None if it is refused with a clear message."""
    try:
        stories = list(read_stories(DataConfig(source=str(path), **fields), "train"))
    except StoryLLMError as error:
        assert_clear_message(str(error), path)
        return None
    for story in stories:
        assert type(story) is str
        story.encode()
    return stories


def assert_read_or_refused(path: Path, content: bytes, kind: str = "") -> None:
    """Checks the result of reading `content`, a corrupted file of STORIES if `kind` is given."""
    suffix = str(file_format(path))
    found = stories_or_none(source_of(path.with_name(f"{path.name}-source"), suffix, content))
    if suffix in EXPECTED:
        assert found == EXPECTED[suffix](content)
    elif kind == "gz":
        assert found in (None, STORIES) or (not content and not found), "the stories differ"
    elif kind.startswith("checksums"):
        assert found in (None, STORIES), "the stories differ"
    elif kind:  # without checksums, corrupted text cannot be noticed; missing stories can
        assert found is None or len(found) == len(STORIES), f"{len(found)} stories of {len(STORIES)}"


# Corrupted files


def random_corruptions(content: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Endless random changes: bits flipped, the end missing, bytes filled, removed or replaced."""
    while True:
        at = rng.randrange(len(content))
        # The beginning and the end, where Parquet has its metadata, are as likely as everything between them.
        at = rng.choice((at, at, at % 64, len(content) - 1 - at % 64, len(content) - 1 - at % 700))
        at = min(max(at, 0), len(content) - 1)
        length = rng.choice((1, 2, 4, 16, 100, 1_000))
        kind = rng.randrange(7)
        if kind <= 2:
            bit = rng.randrange(8)
            changed = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
            yield f"bit {bit} of byte {at} flipped", changed
        elif kind == 3:
            yield f"truncated to {at} bytes", content[:at]
        elif kind == 4:
            fill = bytes([rng.choice((0, 255, 0x80, 10))]) * min(length, len(content) - at)
            yield f"{len(fill)} bytes from {at} set to {fill[:1]!r}", content[:at] + fill + content[at + length :]
        elif kind == 5:
            yield f"{length} bytes from {at} removed", content[:at] + content[at + length :]
        else:
            other = rng.randbytes(rng.randrange(1, 5))
            yield f"byte {at} overwritten with {other!r}", content[:at] + other + content[at + len(other) :]


def all_flips_and_truncations(content: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Every single-bit flip and every truncation, in random order."""
    bits = 8 * len(content)
    for number in rng.sample(range(bits + len(content)), bits + len(content)):
        at, bit = divmod(number, 8)
        if number < bits:
            changed = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
            yield f"bit {bit} of byte {at} flipped", changed
        else:
            yield f"truncated to {number - bits} bytes", content[: number - bits]


def random_parquet_files(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Random bytes between Parquet's magic numbers, with various footer lengths."""
    for number in count():
        body = rng.randbytes(rng.randrange(300))
        length = rng.choice((len(body), len(body) // 2, 10, 0, len(body) + 4, 2**31 - 1, 2**32 - 1))
        case = f"random bytes {number}, {body[:20].hex()}... and length {length}"
        yield case, b"PAR1" + body + length.to_bytes(4, "little") + b"PAR1"


def peak_memory() -> float:
    """The peak memory use of this process in MB."""
    status = Path("/proc/self/status")  # on Linux, getrusage reports at least the parent's peak
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024 / MEGABYTE


def try_corruptions(kinds: list[tuple[str, str]], exhaustive: bool, cases: int) -> None:
    """In a subprocess: prints the cases that fail."""
    before = None
    for suffix, kind in kinds:
        rng = random.Random(f"{suffix} {kind}")
        content = STORY_FORMATS[suffix](STORIES, **PARQUET_OPTIONS.get(kind, {}))
        path = Path(f"a{suffix}")
        assert_read_or_refused(path, content, kind)
        before = before or peak_memory()
        sources = [all_flips_and_truncations(content, rng) if exhaustive else random_corruptions(content, rng)]
        if suffix == ".parquet" and not exhaustive:
            sources.append(random_parquet_files(rng))
        for case, changed in (found for source in sources for found in islice(source, cases)):
            Path("case.txt").write_text(f"{suffix} {kind} {case}")
            try:
                assert_read_or_refused(path, changed, "" if case.startswith("random") else kind)
            except Exception as error:
                print(f"{suffix} {kind} {case}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if before and (growth := peak_memory() - before) > 200:
        print(f"memory grew by {growth:.0f} MB")


def run_cases(folder: Path, function: Callable[..., None], *arguments: object, timeout: float) -> None:
    """Runs a function in a subprocess. Fails with its last case if it crashes, hangs or prints anything."""
    case = folder / "case.txt"
    try:
        printed = run_in_subprocess(function, *arguments, cwd=folder, timeout=timeout)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        pytest.fail(f"{case.read_text() if case.exists() else 'before the first case'}: {error}")
    assert printed == "", printed[:3_000]


def test_corrupted_files(tmp_path: Path) -> None:
    run_cases(tmp_path, try_corruptions, KINDS, False, 60, timeout=110)


@pytest.mark.campaign
@pytest.mark.timeout(1_300)
@pytest.mark.parametrize(("exhaustive", "cases"), [(True, 5_000), (False, 2_000)])
@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_many_corrupted_files(tmp_path: Path, kind: tuple[str, str], exhaustive: bool, cases: int) -> None:
    run_cases(tmp_path, try_corruptions, [kind], exhaustive, cases, timeout=1_200)


def try_corruptions_of_a_saved_dataset(cases: int) -> None:
    """In a subprocess: a folder written by `save_to_disk`, whose .arrow has no checksums."""
    import datasets

    datasets.Dataset.from_dict({"text": random_stories(100)}).save_to_disk("saved")
    (path,) = Path("saved").glob("*.arrow")
    content = path.read_bytes()
    for case, changed in islice(random_corruptions(content, random.Random(0)), cases):
        Path("case.txt").write_text(case)
        path.unlink()  # the previous one may still be memory-mapped
        path.write_bytes(changed)
        stories_or_none(Path("saved"))


@pytest.mark.parametrize("cases", [200, pytest.param(5_000, marks=[pytest.mark.campaign, pytest.mark.timeout(1_300)])])
def test_corrupted_saved_dataset(tmp_path: Path, cases: int) -> None:
    run_cases(tmp_path, try_corruptions_of_a_saved_dataset, cases, timeout=110 if cases == 200 else 1_200)


# Random content

REPEATABLE = settings(
    derandomize=True, deadline=None, max_examples=100, database=None, suppress_health_check=list(HealthCheck)
)
# fmt: off
PIECES = st.sampled_from([
    MARK.encode(), b"\n", b"\r\n", b"\r", b"\xef\xbb\xbf", b'{"text": "', b'"}', b"\0", b"\\ud83d", b"\xed\xa0\x80",
    "😀é".encode(), "שלום".encode(), "\u2028\x85".encode(), b"NaN", b"[" * 2_000, b'{"text": null}', b" ", b"PAR1",
])
# fmt: on
ANY_BYTES = st.lists(st.one_of(st.binary(max_size=20), PIECES), max_size=30).map(b"".join)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
@REPEATABLE
@given(content=ANY_BYTES)
@example(content=b"")
@example(content=b"\xef\xbb\xbf")
@example(content=f"a\r\n{MARK}\r\n{MARK}".encode())
@example(content=f"{MARK}\r\r\nb\r{MARK}\n".encode())
@example(content=b'{"text": "' + b"9" * 5_000 + b'"}')
@example(content=b'{"text": ' + b"9" * 5_000 + b"}")
@example(content=b'{"text": "a", "b": ' + b"[" * 100_000)
@example(content=b'{"text": "a"}\r{"text": "b"}')
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes) -> None:
    assert_read_or_refused(tmp_path_factory.getbasetemp() / f"any{suffix}", content)


@pytest.mark.campaign
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
@settings(REPEATABLE, max_examples=4_000)
@given(content=ANY_BYTES)
def test_many_random_bytes(tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes) -> None:
    assert_read_or_refused(tmp_path_factory.getbasetemp() / f"any{suffix}", content)


def try_bytes_as_parquet(examples: int) -> None:
    """In a subprocess: any bytes, alone and as the footer or pages of a Parquet file."""
    valid = parquet_bytes(STORIES, compression="none")

    @settings(REPEATABLE, max_examples=examples)
    @given(content=ANY_BYTES, place=st.sampled_from(["file", "footer", "pages"]))
    def check(content: bytes, place: str) -> None:
        Path("case.txt").write_text(f"{place} {content.hex()}")
        if place == "footer":
            content = b"PAR1" + content + len(content).to_bytes(4, "little") + b"PAR1"
        elif place == "pages":
            content = valid[:120] + content + valid[120 + len(content) :]
        assert_read_or_refused(Path("a.parquet"), content)

    check()


@pytest.mark.parametrize("examples", [100, pytest.param(10_000, marks=pytest.mark.campaign)])
@pytest.mark.timeout(300)
def test_any_bytes_as_parquet(tmp_path: Path, examples: int) -> None:
    run_cases(tmp_path, try_bytes_as_parquet, examples, timeout=280)


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    content = parquet_bytes(["Zoë", "b"], compression="none", use_dictionary=False, write_statistics=False)
    assert content.count("ë".encode()) == 1
    path = tmp_path / "a.parquet"
    path.write_bytes(content.replace("ë".encode(), b"e\xff"))
    assert stories_or_none(path) is None


def test_parquet_with_fewer_rows_than_its_metadata_claims_is_refused(tmp_path: Path) -> None:
    content = parquet_bytes(STORIES)
    rows = b"\x16\x18\x19"  # the number of rows, 12, in Thrift's compact encoding
    assert content.count(rows) == 1
    path = tmp_path / "a.parquet"
    path.write_bytes(content.replace(rows, b"\x16\x1a\x19"))
    assert stories_or_none(path) is None


# Names


@pytest.mark.parametrize("column", ["te\nxt", "\x1b[31mtext", "\u202etxet", "x" * 100_000])
def test_column_name_is_escaped_and_shortened(tmp_path: Path, column: str) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(["a"], column))
    assert stories_or_none(tmp_path / "a.parquet") is None
    (tmp_path / "a.jsonl").write_bytes(b'{"story": "a"}')
    assert stories_or_none(tmp_path / "a.jsonl", text_column=column) is None


def test_list_of_thousands_of_columns_is_shortened(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({f"column {i}": ["a"] for i in range(3_000)}), tmp_path / "a.parquet")
    assert stories_or_none(tmp_path / "a.parquet") is None


@pytest.mark.skipif(os.name != "posix", reason="such file names exist only on POSIX systems")
@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred"])
def test_file_name_is_escaped(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.txt"
    path.write_bytes(b"\xff")
    with pytest.raises(StoryLLMError) as caught:
        list(read_stories(DataConfig(source=str(path)), "train"))
    assert str(caught.value).isprintable()


@pytest.mark.skipif(sys.platform != "linux", reason="file names are arbitrary bytes only on Linux")
def test_file_name_that_is_not_unicode(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.txt"
    with open(path, "wb") as file:
        file.write(txt_bytes(STORIES))
    data = DataConfig(source=os.fsdecode(path), tokenizer="bpe:260", validation_fraction=0.5)
    try:
        prepare(data, tmp_path / "data")
    except StoryLLMError as error:
        assert_clear_message(str(error), tmp_path)
    else:
        storyllm.verify(tmp_path / "data")


# Things that are not regular files


def read_irregular_files() -> None:
    """In a subprocess: sources that would block or never end if they were read."""
    os.mkfifo("pipe.txt")
    os.symlink("loop.txt", "loop.txt")
    os.symlink("/dev/zero", "zero.txt")
    os.mkdir("folder")
    os.mkfifo("folder/a.jsonl")
    os.symlink("/dev/zero", "folder/a.parquet")
    os.symlink(".", "folder/again")
    for name in ("pipe.txt", "loop.txt", "zero.txt", "/dev/zero", "folder"):
        Path("case.txt").write_text(name)
        assert stories_or_none(Path(name)) is None
        try:
            source_fingerprint(DataConfig(source=name))
        except StoryLLMError as error:
            assert_clear_message(str(error), name)
        else:
            raise AssertionError(f"{name} has a fingerprint")


@pytest.mark.skipif(sys.platform != "linux", reason="uses Linux devices")
def test_pipes_devices_and_link_loops_are_refused(tmp_path: Path) -> None:
    run_cases(tmp_path, read_irregular_files, timeout=110)


@pytest.mark.parametrize("suffix", STORY_FORMATS)
def test_file_that_is_truncated_while_it_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    complete = random_stories(5_000)
    path.write_bytes(STORY_FORMATS[suffix](complete))
    stories = read_stories(DataConfig(source=str(path)), "train")
    found = [next(stories)]
    os.truncate(path, path.stat().st_size // 2)
    try:
        found += stories
    except StoryLLMError as error:
        assert_clear_message(str(error), path)
    assert set(found[:-1]) <= set(complete)


# Large files


def long_text(kind: str, size: int) -> str:
    """A story of about `size` bytes."""
    if kind == "letters":
        return "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=size))
    units = {"prose": " ".join(STORIES), "one letter": "a", "digits": "1", "punctuation": "!?", "emoji": "😀"}
    unit = {**units, "Hebrew": "שלום "}[kind]
    return unit * (size // len(unit.encode()))


def prepare_large_file(
    case: str, suffix: str, content: bytes, stories: list[str], tokenizer: str, limit: float
) -> None:
    """Prepares a file and checks the result and peak memory in MB. The file may be refused."""
    Path("case.txt").write_text(case)
    source, out = source_of(Path(f"source {case}"), suffix, content), Path(f"data {case}")
    with open(os.devnull, "w") as sys.stdout, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few stories for the vocabulary
        try:
            prepare(DataConfig(source=str(source), tokenizer=tokenizer), out)
        except StoryLLMError as error:
            assert_clear_message(str(error), source)
        else:
            assert stories_in(out / "train.bin", load_tokenizer(out)) == stories
    sys.stdout = sys.__stdout__
    assert peak_memory() < limit, f"{peak_memory():.0f} MB"


def prepare_long_stories(cases: list[tuple[str, str]], size: int) -> None:
    """In a subprocess: a .txt with one story of `size` bytes. Each case is a kind of text and a tokenizer."""
    before = peak_memory()
    for kind, tokenizer in cases:
        text = long_text(kind, size)
        limit = before + 250 + 90 * size / MEGABYTE  # merging one long word takes about 75 bytes per byte
        case = f"{kind} {tokenizer}".replace(":", "-")
        prepare_large_file(case, ".txt", text.encode(), [text], tokenizer, limit)


def prepare_book(size: int, limit: float) -> None:
    """In a subprocess: a book of `size` bytes in a single line. Checks the peak memory in MB."""
    text = " ".join(STORIES).replace("\n", " ") + " "
    with open("book.txt", "w", encoding="utf-8") as file:
        for _ in range(size // len(text.encode())):
            file.write(text)
    before = peak_memory()
    with open(os.devnull, "w") as sys.stdout:
        info = prepare(DataConfig(source="book.txt", tokenizer="bpe:300"), Path("data"))
    sys.stdout = sys.__stdout__
    assert info.train.stories == info.validation.stories == 1
    assert info.train.bytes + info.validation.bytes == Path("book.txt").stat().st_size
    assert peak_memory() - before < limit, f"{peak_memory() - before:.0f} MB"


def prepare_empty_stories(suffixes: list[str], number: int) -> None:
    """In a subprocess: files with very many empty stories."""
    before = peak_memory()
    for suffix in suffixes:
        content = f"{MARK}\n".encode() * number if suffix == ".txt" else STORY_FORMATS[suffix]([""] * number)
        prepare_large_file(suffix, suffix, content, [""] * number, "bpe:300", before + 250 + 200 * number / MEGABYTE)


def prepare_long_whitespace() -> None:
    """In a subprocess: the vocabulary is trained on very much consecutive whitespace."""
    stories = ["a b" + " " * 400_000 + "\n" * 50_000 + "x", *STORIES]
    prepare_large_file("whitespace", ".jsonl", jsonl_bytes(stories), stories, "bpe:300", peak_memory() + 250)


def prepare_large_files() -> None:
    """In a subprocess: a smaller version of each large file."""
    prepare_long_stories([("letters", "bpe:300"), ("one letter", "bpe:300")], MEGABYTE)
    prepare_empty_stories(list(STORY_FORMATS), 30_000)
    prepare_long_whitespace()


def test_large_files(tmp_path: Path) -> None:
    run_cases(tmp_path, prepare_large_files, timeout=110)


def test_long_story_with_gpt2(tmp_path: Path, gpt2_cache: Path) -> None:
    run_cases(tmp_path, prepare_long_stories, [("prose", "gpt2")], MEGABYTE, timeout=110)


@pytest.mark.campaign
@pytest.mark.timeout(1_300)
@pytest.mark.parametrize(
    ("kind", "tokenizer"),
    [
        *(("prose", "gpt2"), ("one letter", "gpt2"), ("punctuation", "gpt2"), ("emoji", "gpt2"), ("digits", "gpt2")),
        *(("prose", "bpe:300"), ("letters", "bpe:300"), ("one letter", "bpe:300"), ("Hebrew", "bpe:300")),
    ],
)
def test_story_of_50_megabytes(request: pytest.FixtureRequest, tmp_path: Path, kind: str, tokenizer: str) -> None:
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2_cache")
    run_cases(tmp_path, prepare_long_stories, [(kind, tokenizer)], 50 * MEGABYTE, timeout=1_200)


@pytest.mark.campaign
@pytest.mark.timeout(1_300)
def test_book_is_not_loaded_into_memory(tmp_path: Path) -> None:
    run_cases(tmp_path, prepare_book, 200 * MEGABYTE, 150, timeout=1_200)


@pytest.mark.campaign
@pytest.mark.timeout(1_300)
@pytest.mark.parametrize("suffix", STORY_FORMATS)
def test_million_empty_stories(tmp_path: Path, suffix: str) -> None:
    run_cases(tmp_path, prepare_empty_stories, [suffix], 1_000_000, timeout=1_200)


def read_highly_compressed_file(rows: int) -> None:
    """In a subprocess: a file of about a kilobyte that contains the same 100,000 characters in every row."""
    import pyarrow as pa

    text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["x" * 100_000])
    Path("a.parquet").write_bytes(parquet_bytes(text, compression="zstd"))
    before = peak_memory()
    assert sum(map(len, read_stories(DataConfig(source="a.parquet"), "train"))) >= 0.98 * rows * 100_000
    assert peak_memory() - before < 250


def test_highly_compressed_file_is_streamed(tmp_path: Path) -> None:
    run_cases(tmp_path, read_highly_compressed_file, 5_000, timeout=110)


# Unusual text


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe:300"])
@pytest.mark.parametrize("whitespace", [" ", "\n", "\u3000"])
@pytest.mark.parametrize("end", ["x", ""])
def test_million_whitespace_characters(
    request: pytest.FixtureRequest, tmp_path: Path, tokenizer: str, whitespace: str, end: str
) -> None:
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2_cache")
    text = "a" + whitespace * 1_000_000 + end
    for name, stories in (("train", STORIES), ("validation", [text])):
        (tmp_path / f"{name}.txt").write_bytes(txt_bytes(stories))
    with pytest.raises(StoryLLMError, match="whitespace") as caught:
        prepare(DataConfig(source=str(tmp_path), tokenizer=tokenizer), tmp_path / "data")
    assert_clear_message(str(caught.value), tmp_path)


@pytest.mark.parametrize("prompt", [" " * 1_000_000 + "x", "\n" * 1_000_000, "a" * 300_000, "\0😀" * 50_000])
def test_unusual_prompt_is_used_or_refused(tiny_data: Path, prompt: str) -> None:
    tokenizer = load_tokenizer(tiny_data)
    torch.manual_seed(0)
    config = storyllm.GPTConfig(vocab_size=tokenizer.n_vocab, block_size=8, n_layer=1, n_head=1, n_embd=8)
    storyteller = storyllm.Storyteller(storyllm.GPT(config), tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the prompt is longer than the context
        try:
            assert storyteller.generate(prompt, max_new_tokens=2, seed=0).startswith(prompt)
        except StoryLLMError as error:
            assert_clear_message(str(error), "prompt")
