"""Which files of a folder are read: all of one format, from every subfolder, or a message about what is ambiguous."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from storyllm import StoryLLMError
from storyllm.data.local_files import source_files


def make(folder: Path, names: str) -> Path:
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("a story")
    return folder


def found(folder: Path) -> dict[str, str]:
    return {
        name: " ".join(path.relative_to(folder).as_posix() for path in paths)
        for name, paths in source_files(str(folder)).items()
    }


def error_of(folder: Path) -> str:
    with pytest.raises(StoryLLMError) as caught:
        source_files(str(folder))
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "train", "validation", "skipped"),
    [
        ("b.txt a.TXT c/d.Txt", "a.TXT b.txt c/d.Txt", "a.TXT b.txt c/d.Txt", ""),
        ("README.md train.txt test.txt valid.txt", "train.txt", "valid.txt", "README.md test.txt"),
        ("a.txt .b.txt .git/c.txt", "a.txt", "a.txt", ""),
        ("data00.json data01.json", "data00.json data01.json", "data00.json data01.json", ""),
        ("dataset_infos.json a.parquet", "a.parquet", "a.parquet", "dataset_infos.json"),
        ("train-0.txt train-1.txt val.txt", "train-0.txt train-1.txt", "val.txt", ""),
        ("train.jsonl dev.jsonl stats.json notes.txt", "train.jsonl", "dev.jsonl", "notes.txt stats.json"),
        ("train/a.txt validation/b.txt", "train/a.txt", "validation/b.txt", ""),
        ("training/val.txt training/train.txt", "training/train.txt", "training/val.txt", ""),
        ("V1-train.txt V2-train.txt V1-valid.txt", "V1-train.txt V2-train.txt", "V1-valid.txt", ""),
    ],
)
def test_files_of_a_folder(tmp_path: Path, names: str, train: str, validation: str, skipped: str) -> None:
    assert found(make(tmp_path, names)) == {"train": train, "validation": validation, "skipped": skipped}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("a.txt b.jsonl", [".jsonl, .txt", "one format"]),
        ("a.txt a.txt.gz", [".txt, .txt.gz", "one format"]),
        ("train.parquet valid.txt", [".parquet, .txt", "one format"]),
        (
            "TinyStories-train.txt TinyStories-valid.txt TinyStoriesV2-GPT4-train.txt TinyStoriesV2-GPT4-valid.txt",
            ["TinyStories-*, TinyStoriesV2-GPT4-*", "one of them"],
        ),
        ("v1/train.txt v1/valid.txt v2/train.txt v2/valid.txt", ["v1/*, v2/*", "one of them"]),
    ],
)
def test_a_folder_that_may_hold_the_same_stories_twice_is_refused(tmp_path: Path, names: str, words: list[str]) -> None:
    message = error_of(make(tmp_path, names))
    assert str(tmp_path) in message
    assert all(word in message for word in words), message


@pytest.mark.skipif(os.name != "posix", reason="links need a privilege on Windows")
def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    make(tmp_path, "source/a.txt elsewhere/b.txt")
    source = tmp_path / "source"
    (source / "again").symlink_to(".")
    (source / "link").symlink_to(tmp_path / "elsewhere")
    (source / "second").symlink_to(tmp_path / "elsewhere")
    assert found(source)["train"] == "a.txt link/b.txt"


@pytest.mark.skipif(os.name != "posix", reason="links need a privilege on Windows")
def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to("missing")
    assert "b.txt is not a regular file" in error_of(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every folder")
@pytest.mark.parametrize("mode", [0o000, 0o400])
def test_an_unreadable_subfolder_is_refused(tmp_path: Path, mode: int) -> None:
    make(tmp_path, "a.txt b/c.txt")
    (tmp_path / "b").chmod(mode)
    try:
        assert str(tmp_path / "b") in error_of(tmp_path)
    finally:
        (tmp_path / "b").chmod(0o700)
