"""Every source gives its stories back verbatim, splits them cleanly, and says in one line what is wrong with it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from conftest import synthetic_stories

from storyllm import stories as stories_module
from storyllm.config import DataConfig, StoryLLMError
from storyllm.stories import read_stories, source_fingerprint

MARK = "<|endoftext|>"
VERBATIM = [
    "One line.",
    "Two\nlines.",
    "",
    "\n\nBlank lines around it.\n\n",
    "  spaces around it  ",
    "ends with a line end\n",
    "Windows\r\nline ends\r\n",
    f"a {MARK} within a line, and\n {MARK}\n{MARK} \n{MARK}{MARK}\nin lines of their own company",
    "tab\t null\0 escape\x1b delete\x7f",
    "\u2028 and \u2029, \x85, \x0b, \x0c and \x1c end no line",
    "\ufeffa mark of byte order that is text",
    "Zoë 😀 e\u0301 שלום 日本 \U0010ffff",
    '{"text": "not JSON"}',
    " ",
    "One line.",  # twice: nothing is deduplicated
    "Ã©â€œ stays as it is",
    "",
]


def write_txt(path: Path, stories: list[str]) -> None:
    path.write_bytes("".join(f"{story}\n{MARK}\n" for story in stories).encode())


def write_jsonl(path: Path, stories: list[str], column: str = "text") -> None:
    lines = [json.dumps({"id": i, column: story}, ensure_ascii=i % 2 == 0) for i, story in enumerate(stories)]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def write_parquet(path: Path, stories: list[Any], column: str = "text", **options: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": list(range(len(stories))), column: stories}), path, **options)


WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    ".txt": write_txt,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


def read(source: Path | str, split: str = "train", **settings: Any) -> list[str]:
    return list(read_stories(DataConfig(source=str(source), **settings), split))


def both(source: Path | str, **settings: Any) -> dict[str, list[str]]:
    return {split: read(source, split, **settings) for split in ("train", "validation")}


def error_of(source: Path | str, **settings: Any) -> str:
    """The one line that reading the source ends with."""
    with pytest.raises(StoryLLMError) as caught:
        read(source, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message or repr(str(source)) in message
    return message


def written(path: Path, raw: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


# Verbatim


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_stories_back_verbatim(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"train{suffix}", VERBATIM)
    WRITERS[suffix](tmp_path / f"validation{suffix}", VERBATIM[::-1])
    assert read(tmp_path) == VERBATIM
    assert read(tmp_path, "validation") == VERBATIM[::-1]


@pytest.mark.parametrize("suffix", WRITERS)
def test_more_stories_than_are_read_at_once(tmp_path: Path, suffix: str) -> None:
    stories = [f"Story {i}.\nIt has {i % 7} cats." for i in range(2_345)]
    options = {"row_group_size": 333} if suffix == ".parquet" else {}
    WRITERS[suffix](tmp_path / f"train{suffix}", stories, **options)
    WRITERS[suffix](tmp_path / f"valid{suffix}", stories[:3])
    assert read(tmp_path) == stories


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_carriage_return_at_the_end_is_text(tmp_path: Path, suffix: str) -> None:
    """Not in .txt, where it belongs to the line end before the mark."""
    for name in ("train", "validation"):
        WRITERS[suffix](tmp_path / f"{name}{suffix}", ["a\r", "\r"])
    assert read(tmp_path) == ["a\r", "\r"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_column_can_be_named(tmp_path: Path, suffix: str) -> None:
    for name in ("train", "validation"):
        WRITERS[suffix](tmp_path / f"{name}{suffix}", VERBATIM, column="a.b ü")  # type: ignore[call-arg]
    assert read(tmp_path, text_column="a.b ü") == VERBATIM


def test_txt_of_windows_and_a_last_story_without_a_mark(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", f"one\r\ntwo\r\n{MARK}\r\n{MARK}\r\nlast".encode())
    found = both(path, validation_fraction=0.5)
    assert found == {"train": ["one\r\ntwo", "last"], "validation": [""]}


def test_txt_without_any_mark_is_one_story(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.txt", b"one\n\ntwo\n")) == ["one\n\ntwo\n"]


def test_jsonl_of_windows_and_with_blank_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", b'{"text": "a\\u00e9\\ud83d\\ude00"}\r\n\r\n  \n{"text": "b", "text": "c"}')
    assert read(path) == ["aé😀", "c"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_byte_order_mark_at_the_start_is_not_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, ["one", "two"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == ["one", "two"]


def test_parquet_strings_of_every_kind(tmp_path: Path) -> None:
    import pyarrow as pa

    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for number, kind in enumerate(kinds):
        path = tmp_path / f"{number}.parquet"
        write_parquet(path, pa.array(VERBATIM).cast(kind))
        assert read(path) == VERBATIM


def test_real_stories(sample_stories: Path) -> None:
    import pyarrow.parquet as pq

    for split in ("train", "validation"):
        (path,) = sample_stories.rglob(f"{split}*.parquet")
        assert read(sample_stories, split) == pq.read_table(path)["text"].to_pylist()


# Splits


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        *(("train", "validation"), ("TinyStoriesV2-GPT4-train", "TinyStoriesV2-GPT4-valid"), ("TRAIN", "Validation")),
        *(("train-00000-of-00001", "validation-00000-of-00001"), ("my.train", "my.val"), ("training_set", "dev_set")),
    ],
)
def test_files_are_told_apart_by_their_names(tmp_path: Path, train: str, validation: str) -> None:
    write_txt(tmp_path / f"{train}.txt", ["t1", "t2"])
    write_txt(tmp_path / f"{validation}.txt", ["v1"])
    (tmp_path / "README.md").write_bytes(b"\xff not a story")
    write_txt(tmp_path / "test.txt", ["neither"])
    assert both(tmp_path) == {"train": ["t1", "t2"], "validation": ["v1"]}


def test_several_files_of_a_split_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-2.jsonl", ["c"])
    write_txt(tmp_path / "train-1.txt", ["b"])
    (tmp_path / "deeper").mkdir()
    write_parquet(tmp_path / "deeper" / "train-0.parquet", ["a"])
    write_txt(tmp_path / "validation.txt", ["v"])
    assert both(tmp_path) == {"train": ["a", "b", "c"], "validation": ["v"]}


@pytest.mark.parametrize(
    "names",
    [
        *(
            ["a.txt"],
            ["a.txt", "b.txt", "c.txt"],
            ["train.txt", "more.txt"],
            ["train.txt", "interval.txt", "devil.txt"],
        ),
        *(["train_and_valid.txt", "valid.txt"], ["validation.txt"]),
    ],
)
def test_without_a_pair_of_splits_a_part_of_everything_is_held_out(tmp_path: Path, names: list[str]) -> None:
    everything = synthetic_stories(120)
    each = len(everything) // len(names)
    for number, name in enumerate(sorted(names)):
        write_txt(tmp_path / name, everything[number * each : (number + 1) * each])
    found = both(tmp_path, validation_fraction=0.2)
    assert len(set(everything)) == len(everything)
    assert sorted(found["train"] + found["validation"]) == sorted(everything)
    assert len(found["validation"]) == 24


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 0.3, 1 / 3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("count", [1, 7, 1_000])
def test_what_is_held_out(tmp_path: Path, fraction: float, count: int) -> None:
    """Disjoint, together everything in order, and at every place as many as the fraction says."""
    everything = [str(i) for i in range(count)]
    write_txt(tmp_path / "a.txt", everything)
    found = both(tmp_path / "a.txt", validation_fraction=fraction)
    assert not set(found["train"]) & set(found["validation"])
    assert sorted(found["train"] + found["validation"], key=int) == everything
    for part in found.values():
        assert part == sorted(part, key=int)
    held_out = set(found["validation"])
    for index, so_far in enumerate(accumulate(story in held_out for story in everything), 1):
        assert abs(so_far - index * fraction) < 1


def test_reading_again_gives_the_same_split(tmp_path: Path) -> None:
    write_txt(tmp_path / "a.txt", synthetic_stories(50))
    assert both(tmp_path, validation_fraction=0.3) == both(tmp_path, validation_fraction=0.3)


def test_a_split_that_does_not_exist(tmp_path: Path) -> None:
    write_txt(tmp_path / "a.txt", ["a"])
    for source in (str(tmp_path), "builtin", "owner/name"):
        with pytest.raises(StoryLLMError, match="validation"):
            list(read_stories(DataConfig(source=source), "valid"))


def test_a_local_folder_comes_before_a_dataset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roneneldan" / "TinyStories").mkdir(parents=True)
    write_txt(tmp_path / "roneneldan" / "TinyStories" / "train.txt", ["local"])
    write_txt(tmp_path / "roneneldan" / "TinyStories" / "valid.txt", ["local too"])
    assert both("roneneldan/TinyStories") == {"train": ["local"], "validation": ["local too"]}


def test_stories_are_read_one_by_one(tmp_path: Path) -> None:
    """What is wrong further on does not matter yet."""
    path = written(tmp_path / "a.jsonl", b'{"text": "one"}\n{"text": "two"}\noops\n')
    stories = read_stories(DataConfig(source=str(path)), "train")
    assert [next(stories), next(stories)] == ["one", "two"]
    with pytest.raises(StoryLLMError, match="line 3"):
        next(stories)


# What is wrong with a source


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_wrong_column(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, ["a"], column="story")  # type: ignore[call-arg]
    message = error_of(path)
    assert "'text'" in message
    assert "text_column" in message
    if suffix == ".parquet":
        assert "story" in message


@pytest.mark.parametrize("name", ["stories.csv", "stories", "stories.txt.gz", "stories.json"])
def test_wrong_suffix(tmp_path: Path, name: str) -> None:
    message = error_of(written(tmp_path / name, b"a"))
    assert all(suffix in message for suffix in WRITERS)
    assert "no stories" in error_of(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "no stories" in error_of(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    assert "no stories" in error_of(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        *("/no/such/folder", "no such folder/", "./stories", "../stories", "stories.txt", "owner/name.parquet", "a\0b"),
        *("a\nb", "/" + "a" * 300, "/a" * 5_000, "owner/name/file", "https://example.com/a"),
    ],
    ids=lambda source: repr(source[:20]),
)
def test_a_missing_path_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(StoryLLMError, match="no file or folder") as caught:
        read(source)
    assert "\n" not in str(caught.value)
    assert "builtin" in str(caught.value)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_that_is_not_utf8_is_named_by_line_and_byte(tmp_path: Path, suffix: str, mark: bytes) -> None:
    line = b'{"text": "a"}\n'
    message = error_of(written(tmp_path / f"a{suffix}", mark + line * 2 + b'{"text": "caf\xe9"}\n' + line))
    assert "line 3 " in message
    assert "0xe9" in message
    message = error_of(written(tmp_path / f"a{suffix}", mark + b'{"text": "caf\xe9"}\n'))
    assert "line 1 " in message
    assert "0xe9" in message


def test_utf16(tmp_path: Path) -> None:
    assert "UTF-8" in error_of(written(tmp_path / "a.txt", "Once upon a time".encode("utf-16")))


@pytest.mark.parametrize(
    "line",
    [
        *(b"hello", b"[1]", b"3", b"null", b'"text"', b"{}", b'{"text": "a"', b'{"text": "a"} {"text": "b"}'),
        *(b'{"text": "a\nb"}', b'{"Text": "a"}', b"[" * 100_000, b'{"text": ' + b"9" * 5_000 + b"}"),
    ],
    ids=lambda line: repr(line[:20]),
)
def test_a_line_that_is_not_a_story_is_named(tmp_path: Path, line: bytes) -> None:
    message = error_of(written(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line + b"\n"))
    assert "line 2 " in message


@pytest.mark.parametrize("value", ["null", "3", "true", '["a"]', '{"a": 1}'])
def test_a_story_that_is_not_text(tmp_path: Path, value: str) -> None:
    path = written(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{{"text": {value}}}\n'.encode())
    message = error_of(path)
    assert "story 2 " in message
    assert "expected text" in message


@pytest.mark.parametrize("escape", ["\\ud800", "\\udfff", "\\ude00\\ud83d", "\\ud83d x"])
def test_half_a_surrogate_pair(tmp_path: Path, escape: str) -> None:
    path = written(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{{"text": "a {escape}"}}\n'.encode())
    assert "story 2 " in error_of(path)


def test_a_null_story_in_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a", None, "b"])
    assert "story 2 " in error_of(tmp_path / "a.parquet")


def test_a_column_of_numbers_in_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    assert "expected text" in error_of(tmp_path / "a.parquet", text_column="id")


@pytest.mark.parametrize("keep", [0, 3, 4, 8, 1_000, -1, -8, -100])
def test_a_truncated_parquet_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, synthetic_stories(50), compression="none")
    path.write_bytes(path.read_bytes()[:keep])
    assert "parquet" in error_of(path)


def test_a_parquet_file_damaged_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, synthetic_stories(200), compression="none", row_group_size=50, use_dictionary=False)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 9_000] = b"\xff" * 9_000
    path.write_bytes(raw)
    error_of(path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="this system has no file that cannot be read")
@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_that_cannot_be_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.symlink_to("/proc/self/mem")  # it opens, and reading its beginning fails, for every user
    error_of(path)
    with pytest.raises(StoryLLMError, match="cannot read"):
        source_fingerprint(DataConfig(source=str(path)))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    write_txt(tmp_path / "a.txt", ["a"])
    (tmp_path / "a.txt").chmod(0)
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
def test_cleaning_mends(tmp_path: Path, dirty: str, clean: str) -> None:
    write_parquet(tmp_path / "a.parquet", [dirty, dirty])
    assert read(tmp_path, clean=True, validation_fraction=0.5) == [clean]
    assert read(tmp_path, validation_fraction=0.5) == [dirty]


@pytest.mark.parametrize(
    "text",
    [
        *("café naïve Zoë déjà vu", "“Hi,” said ‘Tom’ — softly…", "ÀÉÎÕÜ äöüß ÄÖÜ", "éé ÃÃ ââ €€", "Ã and Â alone"),
        *("😀😀 👩‍👩‍👧‍👦", "日本語のお話", "Привет, мир", "שלום", "Él dijo: ¡Sí! ¿Qué?", "two\n\nparagraphs", "a  b"),
    ],
)
def test_cleaning_leaves_proper_text_alone(tmp_path: Path, text: str) -> None:
    write_parquet(tmp_path / "a.parquet", [text, text])
    assert read(tmp_path, clean=True, validation_fraction=0.5) == [text]


def test_cleaning_drops_empty_stories(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write_jsonl(tmp_path / f"{name}.jsonl", ["a", "", " \r\n\t", "b", "\u00a0\u3000"])
    assert read(tmp_path, clean=True) == ["a", "b"]


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`hub(train=[...], validation=[...])` is what the hub will give; returns the names that were asked for."""
    import datasets

    asked: list[str] = []

    def give(column: str = "text", error: Exception | None = None, **splits: list[Any]) -> list[str]:
        def load_dataset(name: str, *_: Any, **__: Any) -> datasets.DatasetDict:
            asked.append(name)
            if error is not None:
                raise error
            return datasets.DatasetDict(
                {split: datasets.Dataset.from_dict({column: stories}) for split, stories in splits.items()}
            )

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return give


def test_hub_gives_the_stories_verbatim(hub: Callable[..., list[str]]) -> None:
    many = VERBATIM * 150
    asked = hub(train=many, validation=VERBATIM[::-1], test=["neither"])
    assert both("owner/some-stories_2.0") == {"train": many, "validation": VERBATIM[::-1]}
    assert set(asked) == {"owner/some-stories_2.0"}


@pytest.mark.parametrize("splits", [["train"], ["train", "test"], ["everything"]])
def test_hub_without_a_validation_split(hub: Callable[..., list[str]], splits: list[str]) -> None:
    everything = [str(i) for i in range(200)]
    hub(**{split: everything if split != "test" else ["neither"] for split in splits})
    found = both("somebody/stories", validation_fraction=0.1)
    assert len(found["validation"]) == 20
    assert sorted(found["train"] + found["validation"], key=int) == everything


def test_hub_without_the_column(hub: Callable[..., list[str]]) -> None:
    hub(column="story", train=["a"], validation=["b"])
    message = error_of("owner/name")
    assert "'text'" in message
    assert "story" in message
    assert "text_column" in message
    assert read("owner/name", text_column="story") == ["a"]


def test_hub_with_a_story_that_is_null(hub: Callable[..., list[str]]) -> None:
    hub(train=["a", None], validation=["b"])
    assert "story 2 " in error_of("owner/name")


def test_tinystories_counts_are_the_specifications() -> None:
    assert stories_module.TINYSTORIES_COUNTS == {"train": 2_119_719, "validation": 21_990}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_tinystories_that_are_not_all_there(
    hub: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    hub(train=["a", "b", "c"], validation=["d", "e"])
    name = "roneneldan/TinyStories"
    with pytest.raises(StoryLLMError, match=f"{stories_module.TINYSTORIES_COUNTS[split]:,}") as caught:
        read(name, split)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(stories_module, "TINYSTORIES_COUNTS", {"train": 3, "validation": 2})
    assert both(name) == {"train": ["a", "b", "c"], "validation": ["d", "e"]}


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nto host"), FileNotFoundError("Dataset\n not found"), ValueError("config?")]
)
def test_hub_out_of_reach_is_one_line(hub: Callable[..., list[str]], error: Exception) -> None:
    hub(error=error)
    message = error_of("owner/name")
    assert type(error).__name__ in message
    assert "builtin" in message


# Built in


def test_builtin_stories_differ_by_split_and_seed_and_by_nothing_else() -> None:
    train = read("builtin", builtin_stories=60)
    validation = read("builtin", "validation", builtin_stories=60)
    assert len(train) == 60
    assert len(validation) == 3
    assert not set(train) & set(validation)
    assert read("builtin", builtin_stories=60) == train
    assert read("builtin", builtin_stories=60, builtin_seed=1) != train
    assert read("builtin", builtin_stories=30) == train[:30]
    assert len(read("builtin", "validation", builtin_stories=1)) == 1


# Fingerprints


def test_the_fingerprint_of_a_folder_is_its_stories(tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> str:
        return source_fingerprint(DataConfig(source=str(folder)))

    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write_txt(folder / "train.txt", ["a", "b"])
        write_txt(folder / "validation.txt", ["c"])
    assert fingerprint(first) == fingerprint(second)
    (second / "README.md").write_text("not a story")
    assert fingerprint(first) == fingerprint(second)
    write_txt(second / "validation.txt", ["d"])
    assert fingerprint(first) != fingerprint(second)
    write_txt(second / "validation.txt", ["c"])
    assert fingerprint(first) == fingerprint(second)
    (second / "validation.txt").rename(second / "validation2.txt")
    assert fingerprint(first) != fingerprint(second)


def test_the_fingerprints_of_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    assert source_fingerprint(DataConfig(source="owner/name")) == "owner/name"
    before = source_fingerprint(DataConfig(source="builtin"))
    assert before == source_fingerprint(DataConfig(source="builtin"))

    def rewritten(seed: int, split: str, count: int) -> Iterator[str]:
        return iter([f"another story {i}" for i in range(count)])

    monkeypatch.setattr(stories_module, "builtin_stories", rewritten)
    assert source_fingerprint(DataConfig(source="builtin")) != before


def test_hidden_files_are_not_stories(tmp_path: Path) -> None:
    (tmp_path / ".ipynb_checkpoints").mkdir()
    written(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.txt", b"old")
    written(tmp_path / ".b.txt", b"hidden")
    written(tmp_path / "a.txt", b"new")
    assert read(tmp_path) == ["new"]


def test_a_large_parquet_is_not_read_ahead(tmp_path):
    """Of twenty row groups, no more than a few are in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    letters = random.Random(0).choices("abcdefghijklmnop", k=200_000)
    path = tmp_path / "stories.parquet"
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), compression="none", use_dictionary=False) as writer:
        for _ in range(20):
            random.Random(1).shuffle(letters)
            writer.write_table(pa.table({"text": ["".join(letters)] * 5}))
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_stories(DataConfig(source=str(path)), "train"):
        most = max(most, pa.total_allocated_bytes() - before)
    assert path.stat().st_size > 19_000_000
    assert most < 5_000_000
