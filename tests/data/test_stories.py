"""Every source returns its stories verbatim and in disjoint splits, or is refused with a one-line message."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from helpers import STORY_FORMATS, random_stories, txt_bytes
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


def write(path: Path, stories: Any, **options: Any) -> Path:
    """Writes a story file in the format of its suffix."""
    path.write_bytes(STORY_FORMATS[path.suffix](stories, **options))
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read(source: Path | str, split: str = "train", **fields: Any) -> list[str]:
    return list(read_stories(DataConfig(source=str(source), **fields), split))


def both(source: Path | str, **fields: Any) -> dict[str, list[str]]:
    return {split: read(source, split, **fields) for split in ("train", "validation")}


def error_of(source: Path | str, **fields: Any) -> str:
    """The one-line message that the source is refused with."""
    with pytest.raises(StoryLLMError) as caught:
        read(source, **fields)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message or repr(str(source)) in message
    return message


def fingerprint(source: Path | str, **fields: Any) -> str:
    return source_fingerprint(DataConfig(source=str(source), **fields))


# Formats


@pytest.mark.parametrize("suffix", STORY_FORMATS)
def test_stories_are_read_verbatim(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train{suffix}", VERBATIM)
    write(tmp_path / f"validation{suffix}", VERBATIM[::-1])
    assert both(tmp_path) == {"train": VERBATIM, "validation": VERBATIM[::-1]}


@pytest.mark.parametrize("suffix", STORY_FORMATS)
@PROPERTY
@given(st.lists(ANY_TEXT.filter(lambda text: MARK not in text and not text.endswith("\r")), max_size=8))
def test_any_text_is_read_verbatim(tmp_path_factory: pytest.TempPathFactory, suffix: str, stories: list[str]) -> None:
    if suffix == ".txt" and stories and stories[0].startswith("\ufeff"):
        stories = ["", *stories]  # at the beginning of a .txt it would be a byte order mark
    assert read(write(tmp_path_factory.getbasetemp() / f"any{suffix}", stories)) == stories


@pytest.mark.parametrize("suffix", STORY_FORMATS)
def test_more_stories_than_one_batch(tmp_path: Path, suffix: str) -> None:
    stories = [f"Story {i}.\nIt has {i % 7} cats." for i in range(2_345)]
    write(tmp_path / f"train{suffix}", stories, **({"row_group_size": 333} if suffix == ".parquet" else {}))
    write(tmp_path / f"valid{suffix}", ["validation"])
    assert read(tmp_path) == stories


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_trailing_carriage_return_is_text(tmp_path: Path, suffix: str) -> None:
    """Except in a .txt, where it is part of the newline before the separator."""
    assert read(write(tmp_path / f"a{suffix}", ["a\r", "\r"])) == ["a\r", "\r"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_text_column(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", VERBATIM, column="a.b ü")
    assert read(path, text_column="a.b ü") == VERBATIM


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", BOM])
def test_txt_of_any_editor(tmp_path: Path, newline: str, bom: bytes) -> None:
    stories = [story.replace("\n", newline) for story in random_stories(12)]
    assert read(write_bytes(tmp_path / "a.txt", bom + txt_bytes(stories, newline))) == stories


def test_txt_with_windows_newlines_and_without_a_last_separator(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.txt", f"one\r\ntwo\r\n{MARK}\r\n{MARK}\r\nlast".encode())
    assert both(path, validation_fraction=0.5) == {"train": ["one\r\ntwo", "last"], "validation": [""]}


def test_txt_without_a_separator_is_one_story(tmp_path: Path) -> None:
    assert read(write_bytes(tmp_path / "a.txt", b"one\n\ntwo\n")) == ["one\n\ntwo\n"]


def test_jsonl_with_windows_newlines_blank_lines_and_escapes(tmp_path: Path) -> None:
    content = b'{"text": "a\\u00e9\\ud83d\\ude00"}\r\n\r\n  \n{"text": "b", "text": "c"}'
    assert read(write_bytes(tmp_path / "a.jsonl", content)) == ["aé😀", "c"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_byte_order_mark_at_the_beginning_is_skipped(tmp_path: Path, suffix: str) -> None:
    path = write_bytes(tmp_path / f"a{suffix}", BOM + STORY_FORMATS[suffix](["one", "two"]))
    assert read(path) == ["one", "two"]


def test_every_string_type_of_parquet(tmp_path: Path) -> None:
    import pyarrow as pa

    for string_type in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        assert read(write(tmp_path / "a.parquet", pa.array(VERBATIM).cast(string_type))) == VERBATIM


def test_real_stories(sample_stories: Path) -> None:
    import pyarrow.parquet as pq

    (path,) = sample_stories.rglob("validation*.parquet")
    assert read(sample_stories, "validation") == pq.read_table(path)["text"].to_pylist()


# Streaming


def test_stories_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.jsonl", b'{"text": "one"}\n{"text": "two"}\noops\n')
    stories = read_stories(DataConfig(source=str(path)), "train")
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
    write(tmp_path / f"{train}.txt", ["t1", "t2"])
    write(tmp_path / f"{validation}.txt", ["v1"])
    write(tmp_path / "test.txt", ["neither"])
    write_bytes(tmp_path / "README.md", b"\xff not a story")
    assert both(tmp_path) == {"train": ["t1", "t2"], "validation": ["v1"]}


def test_files_of_a_split_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "subfolder").mkdir()
    write(tmp_path / "train-2.jsonl", ["c"])
    write(tmp_path / "train-1.txt", ["b"])
    write(tmp_path / "subfolder" / "train-0.parquet", ["a"])
    write(tmp_path / "validation.txt", ["v"])
    assert both(tmp_path) == {"train": ["a", "b", "c"], "validation": ["v"]}


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    (tmp_path / ".ipynb_checkpoints").mkdir()
    write_bytes(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.txt", b"old")
    write_bytes(tmp_path / ".b.txt", b"hidden")
    write_bytes(tmp_path / "a.txt", b"new")
    assert read(tmp_path) == ["new"]


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
    stories = [str(i) for i in range(120)]
    per_file = len(stories) // len(names.split())
    for number, name in enumerate(names.split()):
        write(tmp_path / name, stories[number * per_file : (number + 1) * per_file])
    found = both(tmp_path, validation_fraction=0.2)
    assert sorted(found["train"] + found["validation"], key=int) == stories
    assert len(found["validation"]) == 24
    assert both(tmp_path, validation_fraction=0.2) == found


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1 / 3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("count", [1, 7, 1_000])
def test_held_out_stories_are_evenly_spaced(tmp_path: Path, fraction: float, count: int) -> None:
    stories = [str(i) for i in range(count)]
    found = both(write(tmp_path / "a.txt", stories), validation_fraction=fraction)
    assert sorted(found["train"] + found["validation"], key=int) == stories
    for part in found.values():
        assert part == sorted(part, key=int)
    held_out = set(found["validation"])
    for index, held_out_so_far in enumerate(accumulate(story in held_out for story in stories), 1):
        assert abs(held_out_so_far - index * fraction) < 1


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


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_missing_column_is_named(tmp_path: Path, suffix: str) -> None:
    message = error_of(write(tmp_path / f"a{suffix}", ["a"], column="story"))
    assert "'text'" in message and "text_column" in message
    if suffix == ".parquet":
        assert "story" in message


@pytest.mark.parametrize("name", ["stories.csv", "stories", "stories.txt.gz", "stories.json"])
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
@pytest.mark.parametrize("lines_before", [0, 2])
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
    assert "story 2 " in error_of(write(tmp_path / "a.parquet", ["a", None, "b"]))


def test_parquet_columns_that_are_not_text_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    binary = pa.array([b"ab"], pa.binary(2))
    for column in ([1], [1.5], [True], [None], [{"text": "a"}], [["a"]], [b"a"], [b"\xff"], binary):
        assert "must be text" in error_of(write(tmp_path / "a.parquet", column))


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
    write(tmp_path / "a.txt", ["a"]).chmod(0)
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
    path = write(tmp_path / "a.parquet", [dirty])
    assert read(path, clean=True) == [clean]
    assert read(path) == [dirty]


@pytest.mark.parametrize(
    "text",
    [
        *("café naïve Zoë déjà vu", "“Hi,” said ‘Tom’ — softly…", "ÀÉÎÕÜ äöüß ÄÖÜ", "éé ÃÃ ââ €€", "Ã and Â alone"),
        *("😀😀 👩‍👩‍👧‍👦", "日本語のお話", "Привет, мир", "שלום", "Él dijo: ¡Sí! ¿Qué?", "two\n\nparagraphs", "a  b"),
    ],
)
def test_cleaning_keeps_correct_text(tmp_path: Path, text: str) -> None:
    assert read(write(tmp_path / "a.parquet", [text]), clean=True) == [text]


def test_cleaning_drops_empty_stories(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "", " \r\n\t", "b", "\u00a0\u3000"])
    assert read(path, clean=True) == ["a", "b"]


@PROPERTY
@given(ANY_TEXT | ANY_TEXT.map(lambda text: text.encode().decode("cp1252", "replace")))
@example("â" * 100_000 + "é " * 100_000 + " " * 400_000 + "x")
def test_cleaning_any_text_gives_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    found = read(write(tmp_path_factory.getbasetemp() / "clean.jsonl", [text]), clean=True)
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
        def load_dataset(name: str) -> datasets.DatasetDict:
            requests.append(name)
            if error is not None:
                raise error
            return datasets.DatasetDict(
                {split: datasets.Dataset.from_dict({column: stories}) for split, stories in splits.items()}
            )

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
    stories = [str(i) for i in range(200)]
    hub(**{split: ["neither"] if split == "test" else stories for split in splits})
    found = both("owner/name", validation_fraction=0.1)
    assert len(found["validation"]) == 20
    assert sorted(found["train"] + found["validation"], key=int) == stories


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
    write(Path(TINYSTORIES, "train.txt"), ["local"])
    write(Path(TINYSTORIES, "valid.txt"), ["also local"])
    assert both(TINYSTORIES) == {"train": ["local"], "validation": ["also local"]}
    assert requests == []


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
        write(folder / "train.txt", ["a", "b"])
        write(folder / "validation.txt", ["c"])
    assert fingerprint(first) == fingerprint(second)
    (second / "README.md").write_text("not a story")
    assert fingerprint(first) == fingerprint(second)
    write(second / "validation.txt", ["d"])
    assert fingerprint(first) != fingerprint(second)
    write(second / "validation.txt", ["c"])
    assert fingerprint(first) == fingerprint(second)
    (second / "validation.txt").rename(second / "validation2.txt")
    assert fingerprint(first) != fingerprint(second)


def test_fingerprint_of_a_hub_dataset_is_its_name() -> None:
    assert fingerprint("owner/name") == "owner/name"


def test_fingerprint_of_synthetic_stories_depends_on_their_text() -> None:
    text = "\n".join(synthetic_stories(3, "train", 100))
    assert hashlib.sha256(text.encode()).hexdigest() in fingerprint("synthetic", synthetic_seed=3)
    assert fingerprint("synthetic", synthetic_seed=3) != fingerprint("synthetic")
