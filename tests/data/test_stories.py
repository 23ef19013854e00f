"""Every source returns its stories verbatim and in disjoint splits, or is refused with a one-line message."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import STORY_FORMATS, random_stories, source_of, txt_bytes, write_stories
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storyllm import DataConfig, StoryLLMError, read_stories
from storyllm.data.stories import TINYSTORIES, TINYSTORIES_COUNTS, source_fingerprint
from storyllm.data.synthetic import synthetic_stories

MARK = "<|endoftext|>"
BOM = b"\xef\xbb\xbf"
VERBATIM = [
    "One line.",
    "Two\nlines.",
    "",
    "\n\nBlank lines around it.\n\n",
    "  spaces around it  ",
    "ends with a newline\n",
    "Windows\r\nnewlines\r\n",
    f"a {MARK} within a line, and\n {MARK}\n{MARK} \n{MARK}{MARK}\non lines with other characters",
    "tab\t null\0 escape\x1b delete\x7f",
    "\u2028 and \u2029, \x85, \x0b, \x0c and \x1c end no line",
    "lone\rcarriage\r\rreturns",
    "NA",
    "null",
    "1.50",
    "2020-01-01",
    '"quotes", commas, ""',
    "\ufeffa byte order mark that is text",
    "Zoë 😀 e\u0301 שלום 日本 \U0010ffff",
    '{"text": "not JSON"}',
    " ",
    "One line.",  # a duplicate
    "Ã©â€œ mojibake",
    "",
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read(source: Path | str, split: str = "train", **fields: Any) -> list[str]:
    return list(read_stories(DataConfig(source=str(source), **fields), split))


def both(source: Path | str, **fields: Any) -> dict[str, list[str]]:
    return {split: read(source, split, **fields) for split in ("train", "validation")}


def read_all(folder: Path, suffix: str, stories: Any, **options: Any) -> list[str]:
    """The stories of a file of this format, none held out."""
    return read(source_of(folder, suffix, STORY_FORMATS[suffix](stories, **options)))


def expected(suffix: str, stories: list[str]) -> list[str]:
    """The stories as they are read: verbatim, except for the newlines of a .txt."""
    if not suffix.startswith(".txt"):
        return stories
    return [story.replace("\r\n", "\n").replace("\r", "\n") for story in stories]


def error_of(source: Path | str, **fields: Any) -> str:
    """The one-line message that the source is refused with."""
    with pytest.raises(StoryLLMError) as caught:
        read(source, **fields)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message or repr(str(source)) in message
    return message


def numbered_stories(count: int) -> list[str]:
    """Different stories in sorted order, long enough that no more of them are held out than requested."""
    return [f"{i:04} {'x' * 500}" for i in range(count)]


def fingerprint(source: Path | str, **fields: Any) -> str:
    return source_fingerprint(DataConfig(source=str(source), **fields))


# Formats


@pytest.mark.parametrize("suffix", STORY_FORMATS)
def test_stories_are_read_verbatim(tmp_path: Path, suffix: str) -> None:
    write_stories(tmp_path / f"train{suffix}", VERBATIM)
    write_stories(tmp_path / f"validation{suffix}", VERBATIM[::-1])
    stories = expected(suffix, VERBATIM)
    assert both(tmp_path) == {"train": stories, "validation": stories[::-1]}


@pytest.mark.parametrize("suffix", STORY_FORMATS)
@PROPERTY
@given(st.lists(ANY_TEXT.filter(lambda text: MARK not in text and not text.endswith("\r")), max_size=8))
def test_any_text_is_read_verbatim(tmp_path_factory: pytest.TempPathFactory, suffix: str, stories: list[str]) -> None:
    if suffix.startswith(".txt") and stories and stories[0].startswith("\ufeff"):
        stories = ["", *stories]  # at the beginning of a .txt it would be a byte order mark
    assert read_all(tmp_path_factory.getbasetemp() / f"any{suffix}", suffix, stories) == expected(suffix, stories)


@pytest.mark.parametrize("suffix", STORY_FORMATS)
def test_more_stories_than_one_batch(tmp_path: Path, suffix: str) -> None:
    stories = [f"Story {i}.\nIt has {i % 7} cats." for i in range(2_345)]
    write_stories(tmp_path / f"train{suffix}", stories, **({"row_group_size": 333} if suffix == ".parquet" else {}))
    write_stories(tmp_path / f"valid{suffix}", ["validation"])
    assert read(tmp_path) == stories


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_trailing_carriage_return_is_text(tmp_path: Path, suffix: str) -> None:
    """Except in a .txt, where it is part of the newline before the separator."""
    assert read_all(tmp_path / "source", suffix, ["a\r", "\r"]) == ["a\r", "\r"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_text_column(tmp_path: Path, suffix: str) -> None:
    source = source_of(tmp_path / "source", suffix, STORY_FORMATS[suffix](VERBATIM, column="a.b ü"))
    assert read(source, text_column="a.b ü") == VERBATIM


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", BOM])
def test_txt_of_any_editor(tmp_path: Path, newline: str, bom: bytes) -> None:
    stories = random_stories(12)
    content = bom + txt_bytes([story.replace("\n", newline) for story in stories], newline)
    assert read(source_of(tmp_path / "source", ".txt", content)) == stories


@pytest.mark.parametrize(
    ("suffix", "content", "stories"),
    [
        (".txt", f"one\r\ntwo\r\n{MARK}\r\n{MARK}\r\nlast".encode(), ["one\ntwo", "", "last"]),
        (".txt", b"one\n\ntwo\n", ["one\n\ntwo\n"]),
        (".jsonl", b'{"text": "a\\u00e9\\ud83d\\ude00"}\r\n\r\n  \n{"text": "b", "text": "c"}', ["aé😀", "c"]),
    ],
    ids=["windows newlines, no last separator", "no separator", "blank lines and escapes"],
)
def test_unusual_file(tmp_path: Path, suffix: str, content: bytes, stories: list[str]) -> None:
    assert read(source_of(tmp_path / "source", suffix, content)) == stories


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_byte_order_mark_at_the_beginning_is_skipped(tmp_path: Path, suffix: str) -> None:
    content = BOM + STORY_FORMATS[suffix](["one", "two"])
    assert read(source_of(tmp_path / "source", suffix, content)) == ["one", "two"]


def test_every_string_type_of_parquet(tmp_path: Path) -> None:
    import pyarrow as pa

    for string_type in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        assert read_all(tmp_path / "source", ".parquet", pa.array(VERBATIM).cast(string_type)) == VERBATIM


def test_real_stories(sample_stories: Path) -> None:
    import pyarrow.parquet as pq

    (path,) = sample_stories.rglob("validation*.parquet")
    assert read(sample_stories, "validation") == pq.read_table(path)["text"].to_pylist()


# Streaming


def test_stories_are_read_one_at_a_time(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", ".jsonl", b'{"text": "one"}\n{"text": "two"}\noops\n')
    stories = read_stories(DataConfig(source=str(source)), "train")
    assert [next(stories), next(stories)] == ["one", "two"]
    with pytest.raises(StoryLLMError, match="line 3"):
        next(stories)


def test_parquet_row_groups_are_not_prefetched(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    letters = random.Random(0).choices("abcdefghijklmnop", k=200_000)
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), compression="none", use_dictionary=False) as writer:
        for i in range(20):
            writer.write_table(pa.table({"text": ["".join(letters[i:])] * 5}))
    before, peak = pa.total_allocated_bytes(), 0
    for _ in read_stories(DataConfig(source=str(path)), "train"):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert path.stat().st_size > 19_000_000
    assert peak < 5_000_000


# Splits


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        *(("train", "validation"), ("TinyStoriesV2-GPT4-train", "TinyStoriesV2-GPT4-valid"), ("TRAIN", "Validation")),
        *(("train-00000-of-00001", "validation-00000-of-00001"), ("my.train", "my.val"), ("training_set", "dev_set")),
    ],
)
def test_file_names_determine_the_splits(tmp_path: Path, train: str, validation: str) -> None:
    write_stories(tmp_path / f"{train}.txt", ["t1", "t2"])
    write_stories(tmp_path / f"{validation}.txt", ["v1"])
    write_stories(tmp_path / "test.txt", ["neither"])
    write_bytes(tmp_path / "README.md", b"\xff not a story")
    assert both(tmp_path) == {"train": ["t1", "t2"], "validation": ["v1"]}


def test_files_of_a_split_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "subfolder").mkdir()
    write_stories(tmp_path / "train-2.txt", ["c"])
    write_stories(tmp_path / "train-1.txt", ["b"])
    write_stories(tmp_path / "subfolder" / "train-0.txt", ["a"])
    write_stories(tmp_path / "validation.txt", ["v"])
    assert both(tmp_path) == {"train": ["a", "b", "c"], "validation": ["v"]}


@pytest.mark.parametrize(
    "names",
    [
        "a.txt",
        "a.txt b.txt c.txt",
        "more.txt train.txt",
        "devil.txt interval.txt train.txt",
        "train_and_valid.txt valid.txt",
        "validation.txt",
    ],
)
def test_stories_are_held_out_if_file_names_give_no_splits(tmp_path: Path, names: str) -> None:
    stories = numbered_stories(120)
    per_file = len(stories) // len(names.split())
    for number, name in enumerate(names.split()):
        write_stories(tmp_path / name, stories[number * per_file : (number + 1) * per_file])
    found = both(tmp_path, validation_fraction=0.2)
    assert sorted(found["train"] + found["validation"]) == stories
    assert len(found["validation"]) == 24
    assert both(tmp_path, validation_fraction=0.2) == found


@pytest.mark.parametrize("source", [".", "synthetic", "owner/name"])
def test_unknown_split_is_refused(source: str) -> None:
    with pytest.raises(StoryLLMError, match=r"'valid'.*validation"):
        read(source, "valid")


# Refused sources


@pytest.mark.parametrize(
    "source",
    [
        *("/no/such/folder", "no such folder/", "./stories", "../stories", "stories.txt", "owner/name.parquet", "a\0b"),
        *("a\nb", "/" + "a" * 300, "/a" * 5_000, "owner/name/file", "https://example.com/a"),
    ],
    ids=lambda source: repr(source[:20]),
)
def test_missing_path_is_refused_without_asking_the_hub(hub: Callable[..., list[str]], source: str) -> None:
    requests = hub(train=["a"])
    for call in (lambda: read(source), lambda: fingerprint(source)):
        with pytest.raises(StoryLLMError, match=r"not found.*synthetic") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert requests == []


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_missing_column_is_named(tmp_path: Path, suffix: str) -> None:
    message = error_of(write_stories(tmp_path / f"a{suffix}", ["a"], column="story"))
    assert "'text'" in message and "text_column" in message
    if suffix in (".csv", ".parquet"):
        assert "story" in message


@pytest.mark.parametrize("name", ["stories.md", "stories", "stories.txt.zip", "stories.parquet.gz"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    message = error_of(write_bytes(tmp_path / name, b"a"))
    assert all(suffix in message for suffix in STORY_FORMATS)
    assert "contains no" in error_of(tmp_path)


def test_folder_without_story_files_is_refused(tmp_path: Path) -> None:
    assert "contains no" in error_of(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    assert "contains no" in error_of(tmp_path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("lines_before", [0, 2, 2_345])
def test_text_that_is_not_utf8_is_located(tmp_path: Path, suffix: str, bom: bytes, lines_before: int) -> None:
    line = b'{"text": "a"}\n'
    content = bom + line * lines_before + b'{"text": "caf\xe9"}\n' + line
    message = error_of(write_bytes(tmp_path / f"a{suffix}", content))
    assert f"line {lines_before + 1} " in message
    assert "0xe9" in message and "UTF-8" in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_other_encodings_are_refused(tmp_path: Path, suffix: str, encoding: str) -> None:
    text = STORY_FORMATS[suffix](["Once upon a time — Zoë"] * 2).decode()
    error_of(write_bytes(tmp_path / f"a{suffix}", text.encode(encoding)))


@pytest.mark.parametrize(
    "line",
    [
        *(b"hello", b"[1]", b"3", b"null", b'"text"', b"{}", b'{"text": "a"', b'{"text": "a"} {"text": "b"}'),
        *(b'{"text": "a\nb"}', b'{"Text": "a"}', b"[" * 100_000, b'{"text": ' + b"9" * 5_000 + b"}"),
    ],
    ids=lambda line: repr(line[:20]),
)
def test_line_that_is_not_a_story_is_located(tmp_path: Path, line: bytes) -> None:
    assert "line 2 " in error_of(write_bytes(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line + b"\n"))


@pytest.mark.parametrize("value", ["null", "3", "true", '["a"]', '{"a": 1}'])
def test_story_that_is_not_text_is_located(tmp_path: Path, value: str) -> None:
    content = f'{{"text": "a"}}\n{{"text": {value}}}\n'.encode()
    message = error_of(write_bytes(tmp_path / "a.jsonl", content))
    assert "story 2 " in message and "text" in message


@pytest.mark.parametrize("escape", ["\\ud800", "\\udfff", "\\ude00\\ud83d", "\\ud83d x"])
def test_unpaired_surrogate_is_located(tmp_path: Path, escape: str) -> None:
    content = f'{{"text": "a"}}\n{{"text": "a {escape}"}}\n'.encode()
    message = error_of(write_bytes(tmp_path / "a.jsonl", content))
    assert "story 2 " in message and "surrogate" in message


def test_null_in_parquet_is_located(tmp_path: Path) -> None:
    assert "story 2 " in error_of(write_stories(tmp_path / "a.parquet", ["a", None, "b"]))


def test_parquet_columns_that_are_not_text_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    binary = pa.array([b"ab"], pa.binary(2))
    for column in ([1], [1.5], [True], [None], [{"text": "a"}], [["a"]], [b"a"], [b"\xff"], binary):
        assert "must be text" in error_of(write_stories(tmp_path / "a.parquet", column))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file is unreadable for every user here")
@pytest.mark.parametrize("suffix", STORY_FORMATS)
def test_file_that_cannot_be_read_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.symlink_to("/proc/self/mem")  # opens, but reading its beginning fails
    error_of(path)
    with pytest.raises(StoryLLMError, match="cannot read"):
        fingerprint(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_file_without_read_permission_is_refused(tmp_path: Path) -> None:
    write_stories(tmp_path / "a.txt", ["a"]).chmod(0)
    assert "cannot read" in error_of(tmp_path / "a.txt")


# Cleaning


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("â€œHi,â€\x9d said Tom.", "“Hi,” said Tom."),
        ("â€œHi,â€™ said Tom â€” softlyâ€¦", "“Hi,’ said Tom — softly…"),
        ("donâ€™t", "don’t"),
        ("cafÃ© ZoÃ« Ã\xa0 la", "café Zoë à la"),
        ("ðŸ˜€ ðŸ\x90±", "😀 🐱"),
        ("  \n spaces \t\n", "spaces"),
    ],
)
def test_cleaning_fixes_mojibake_and_strips_whitespace(tmp_path: Path, dirty: str, clean: str) -> None:
    source = source_of(tmp_path / "source", ".parquet", STORY_FORMATS[".parquet"]([dirty]))
    assert read(source, clean=True) == [clean]
    assert read(source) == [dirty]


@pytest.mark.parametrize(
    "text",
    [
        *("café naïve Zoë déjà vu", "“Hi,” said ‘Tom’ — softly…", "ÀÉÎÕÜ äöüß ÄÖÜ", "éé ÃÃ ââ €€", "Ã and Â alone"),
        *("😀😀 👩‍👩‍👧‍👦", "日本語のお話", "Привет, мир", "שלום", "Él dijo: ¡Sí! ¿Qué?", "two\n\nparagraphs", "a  b"),
    ],
)
def test_cleaning_keeps_correct_text(tmp_path: Path, text: str) -> None:
    source = source_of(tmp_path / "source", ".parquet", STORY_FORMATS[".parquet"]([text]))
    assert read(source, clean=True) == [text]


def test_cleaning_drops_empty_stories(tmp_path: Path) -> None:
    content = STORY_FORMATS[".jsonl"](["a", "", " \r\n\t", "b", "\u00a0\u3000"])
    assert read(source_of(tmp_path / "source", ".jsonl", content), clean=True) == ["a", "b"]


@PROPERTY
@given(ANY_TEXT | ANY_TEXT.map(lambda text: text.encode().decode("cp1252", "replace")))
@example("â" * 100_000 + "é " * 100_000 + " " * 400_000 + "x")
def test_cleaning_any_text_gives_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    source = source_of(tmp_path_factory.getbasetemp() / "clean", ".jsonl", STORY_FORMATS[".jsonl"]([text]))
    found = read(source, clean=True)
    assert len(found) == bool(text.strip())
    assert all(story == story.strip() for story in found)
    if text.isascii():
        assert "".join(found) == text.strip()


# Hugging Face Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`hub(train=[...], validation=[...])` sets what the Hub returns, and returns the names requested."""
    import datasets

    requests: list[str] = []

    def respond(column: str = "text", error: Exception | None = None, **splits: list[Any]) -> list[str]:
        def load_dataset(name: str, streaming: bool) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
            requests.append(name)
            if error is not None:
                raise error
            found = {split: datasets.Dataset.from_dict({column: stories}) for split, stories in splits.items()}
            return {split: part.to_iterable_dataset() for split, part in found.items()} if streaming else found

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return requests

    return respond


def test_hub_stories_are_read_verbatim(hub: Callable[..., list[str]]) -> None:
    many = VERBATIM * 150
    requests = hub(train=many, validation=VERBATIM[::-1], test=["neither"])
    assert both("owner/some-stories_2.0") == {"train": many, "validation": VERBATIM[::-1]}
    assert set(requests) == {"owner/some-stories_2.0"}


@pytest.mark.parametrize("splits", [["train"], ["train", "test"], ["everything"]])
def test_hub_dataset_without_a_validation_split(hub: Callable[..., list[str]], splits: list[str]) -> None:
    stories = numbered_stories(200)
    hub(**{split: ["neither"] if split == "test" else stories for split in splits})
    found = both("owner/name", validation_fraction=0.1)
    assert len(found["validation"]) == 20
    assert sorted(found["train"] + found["validation"]) == stories


def test_hub_dataset_without_the_column(hub: Callable[..., list[str]]) -> None:
    hub(column="story", train=["a"], validation=["b"])
    message = error_of("owner/name")
    assert "'text'" in message and "story" in message and "text_column" in message
    assert read("owner/name", text_column="story") == ["a"]


def test_hub_dataset_with_a_null(hub: Callable[..., list[str]]) -> None:
    hub(train=["a", None], validation=["b"])
    assert "story 2 " in error_of("owner/name")


def test_incomplete_tinystories_is_refused(hub: Callable[..., list[str]]) -> None:
    assert TINYSTORIES_COUNTS == {"train": 2_119_719, "validation": 21_990}  # as in the specification
    hub(train=["a", "b"], validation=["c"] * 21_990)
    assert read(TINYSTORIES, "validation") == ["c"] * 21_990
    message = error_of(TINYSTORIES)
    assert "2 train" in message and "2,119,719" in message


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nto host"), FileNotFoundError("Dataset\n not found"), ValueError("config?")]
)
def test_unavailable_hub_is_one_line(hub: Callable[..., list[str]], error: Exception) -> None:
    hub(error=error)
    message = error_of("owner/name")
    assert type(error).__name__ in message
    assert "synthetic" in message


def test_local_folder_takes_precedence_over_the_hub(
    hub: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = hub(train=["from the Hub"])
    monkeypatch.chdir(tmp_path)
    Path(TINYSTORIES).mkdir(parents=True)
    write_stories(Path(TINYSTORIES, "train.txt"), ["local"])
    write_stories(Path(TINYSTORIES, "valid.txt"), ["also local"])
    assert both(TINYSTORIES) == {"train": ["local"], "validation": ["also local"]}
    assert requests == []


@pytest.mark.parametrize("name", ["owner/name", TINYSTORIES])  # the published counts are not those of a part
def test_first_stories_of_a_hub_dataset_are_streamed(hub: Callable[..., list[str]], name: str) -> None:
    hub(train=["a", "b", "c"], validation=["d", "e"])
    assert both(name, max_stories=2) == {"train": ["a", "b"], "validation": ["d", "e"]}


def test_error_while_streaming_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def stories() -> Iterator[dict[str, str]]:
        yield from ({"text": "a"} for _ in range(1_000))
        raise ConnectionError("no route\nto host")

    splits = {split: datasets.IterableDataset.from_generator(stories) for split in ("train", "validation")}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: splits)
    assert "cannot read owner/name (ConnectionError)" in error_of("owner/name", max_stories=2_000)


# Folders written by `save_to_disk`


def save_to_disk(folder: Path, **splits: list[Any]) -> Path:
    import datasets

    parts = {split: datasets.Dataset.from_dict({"text": stories}) for split, stories in splits.items()}
    (parts["all"] if "all" in parts else datasets.DatasetDict(parts)).save_to_disk(folder)
    return folder


def test_saved_dataset_is_read_verbatim(tmp_path: Path) -> None:
    source = save_to_disk(tmp_path / "saved", train=VERBATIM, validation=VERBATIM[::-1], test=["neither"])
    assert both(source) == {"train": VERBATIM, "validation": VERBATIM[::-1]}
    assert fingerprint(source) != fingerprint(save_to_disk(tmp_path / "other", train=["a"], validation=["b"]))


@pytest.mark.parametrize("split", ["train", "all"])
def test_saved_dataset_without_a_validation_split(tmp_path: Path, split: str) -> None:
    stories = numbered_stories(200)
    found = both(save_to_disk(tmp_path / "saved", **{split: stories}), validation_fraction=0.1)
    assert len(found["validation"]) == 20
    assert sorted(found["train"] + found["validation"]) == stories


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [None, b"", b"oops", "truncated"])
def test_corrupted_saved_dataset_is_refused(tmp_path: Path, name: str, content: bytes | str | None) -> None:
    source = save_to_disk(tmp_path / "saved", all=random_stories(100))
    path = source / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "truncated" else content)
    error_of(source)


def test_saved_dataset_without_text_is_refused(tmp_path: Path) -> None:
    assert "story 2 " in error_of(save_to_disk(tmp_path / "saved", all=["a", None]))


# The first stories


@pytest.mark.filterwarnings("ignore:.* is small")
def test_max_stories_applies_before_stories_are_held_out(tmp_path: Path) -> None:
    stories = numbered_stories(200)
    path = write_stories(tmp_path / "a.txt", stories)
    found = both(path, max_stories=10, validation_fraction=0.5)
    assert found == {"train": stories[0:10:2], "validation": stories[1:10:2]}
    assert both(path, max_stories=500) == both(path)


def test_max_stories_of_synthetic_stories() -> None:
    found = both("synthetic", max_stories=2, synthetic_stories=100)
    assert found == {split: read("synthetic", split, synthetic_stories=100)[:2] for split in found}


# Synthetic stories


def test_synthetic_source_depends_on_split_seed_and_count_only() -> None:
    train = read("synthetic", synthetic_stories=60)
    validation = read("synthetic", "validation", synthetic_stories=60)
    assert (len(train), len(validation)) == (60, 3)
    assert not set(train) & set(validation)
    assert read("synthetic", synthetic_stories=30, validation_fraction=0.5) == train[:30]
    assert read("synthetic", synthetic_stories=60, synthetic_seed=1) != train
    assert len(read("synthetic", "validation", synthetic_stories=1)) == 1


# Fingerprints


def test_fingerprint_of_local_files_depends_on_names_and_content(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write_stories(folder / "train.txt", ["a", "b"])
        write_stories(folder / "validation.txt", ["c"])
    assert fingerprint(first) == fingerprint(second)
    (second / "README.md").write_text("not a story")
    assert fingerprint(first) == fingerprint(second)
    write_stories(second / "validation.txt", ["d"])
    assert fingerprint(first) != fingerprint(second)
    write_stories(second / "validation.txt", ["c"])
    assert fingerprint(first) == fingerprint(second)
    (second / "validation.txt").rename(second / "validation2.txt")
    assert fingerprint(first) != fingerprint(second)


def test_fingerprint_of_a_hub_dataset_is_its_name() -> None:
    assert fingerprint("owner/name") == "owner/name"


def test_fingerprint_of_synthetic_stories_depends_on_their_text() -> None:
    text = "\n".join(synthetic_stories(3, "train", 100))
    assert hashlib.sha256(text.encode()).hexdigest() in fingerprint("synthetic", synthetic_seed=3)
    assert fingerprint("synthetic", synthetic_seed=3) != fingerprint("synthetic")
