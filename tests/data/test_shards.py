"""Shards, prepared by several processes and merged, are byte for byte what one process prepares."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import folder_contents, jsonl_bytes, random_stories, txt_bytes

from storyllm import DataConfig, StoryLLMError, load_tokenizer, merge_shards, prepare, prepare_shard, verify
from storyllm.cli import main
from storyllm.data import prepare as prepare_module
from storyllm.files import read_json, write_json

FILES = {"train.bin", "train.json", "validation.bin", "validation.json", "vocabulary.json"}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real batches have a million characters; the stories of these tests would be a single one."""
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 2_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "stories.jsonl"
    path.write_bytes(jsonl_bytes(["", *random_stories(120), "  ", "a <|endoftext|> within"]))
    return path


def config(source: Path, **fields: Any) -> DataConfig:
    return DataConfig(**{"source": str(source), "tokenizer": "bpe:300", "validation_fraction": 0.1, **fields})


def prepare_shards(data: DataConfig, out: Path, shards: int) -> None:
    for shard in range(1, shards + 1):
        prepare_shard(data, out, shard, shards)


def data_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(StoryLLMError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is written


@pytest.mark.parametrize(
    ("shards", "fields"),
    [(1, {}), (2, {}), (3, {"clean": True}), (4, {"max_stories": 50}), (7, {"validation_fraction": 0.02}), (60, {})],
)
@pytest.mark.filterwarnings("ignore:.* is small")
def test_merged_shards_equal_the_data_of_one_process(
    source: Path, tmp_path: Path, shards: int, fields: dict[str, Any]
) -> None:
    data = config(source, **fields)
    one = prepare(data, tmp_path / "one")
    prepare_shards(data, tmp_path / "merged", shards)
    assert merge_shards(tmp_path / "merged") == one
    assert data_files(tmp_path / "merged") == folder_contents(tmp_path / "one")
    assert merge_shards(tmp_path / "merged") == one  # again


def test_both_splits_of_a_folder_and_a_story_in_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storyllm.data.formats.PIECE_CHARACTERS", 3_000)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/train.txt").write_bytes(txt_bytes([" ".join(random_stories(100)), *random_stories(9, seed=1)]))
    (tmp_path / "source/valid.txt").write_bytes(txt_bytes(random_stories(3, seed=2)))
    data = config(tmp_path / "source")
    prepare(data, tmp_path / "one")
    prepare_shards(data, tmp_path / "merged", 3)
    merge_shards(tmp_path / "merged")
    assert data_files(tmp_path / "merged") == folder_contents(tmp_path / "one")


def test_shards_divide_the_tokens_evenly(source: Path, tmp_path: Path) -> None:
    infos = [prepare_shard(config(source), tmp_path, shard, 3)["train"] for shard in (1, 2, 3)]
    total = sum(info.tokens for info in infos)
    assert all(0.25 < info.tokens / total < 0.42 for info in infos)


def test_shards_with_a_given_tokenizer(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line, as on two machines that copy their shards to a third one."""
    prepare(config(source, max_stories=60), tmp_path / "sample")
    options = ["prepare", "--source", str(source), "--validation-fraction", "0.1"]
    options += ["--tokenizer-from", str(tmp_path / "sample")]
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    for shard in ("1", "2"):
        machine = tmp_path / f"machine-{shard}"
        assert main([*options, "--out", str(machine), "--shards", "2", "--shard", shard]) == 0
        assert f"stories in shard {shard} of 2" in capsys.readouterr().out
        shutil.copytree(machine, tmp_path / "merged", dirs_exist_ok=True)
    source.unlink()  # merging does not need it
    assert main(["prepare", "--merge", "--out", str(tmp_path / "merged")]) == 0
    assert f"{tmp_path / 'merged' / 'train.bin'}: " in capsys.readouterr().out
    assert data_files(tmp_path / "merged") == folder_contents(tmp_path / "one")
    assert load_tokenizer(tmp_path / "merged").n_vocab == 300


# Interrupted and repeated


def test_completed_shard_is_reused_and_a_truncated_one_prepared_again(source: Path, tmp_path: Path) -> None:
    infos = prepare_shard(config(source), tmp_path, 1, 2)
    folder = tmp_path / "shard-1-of-2"
    contents = folder_contents(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare_shard(config(source), tmp_path, 1, 2) == infos
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "train.shard.bin").unlink()
    prepare_shard(config(source), tmp_path, 1, 2)
    (folder / "validation.shard.bin").write_bytes(b"xx")
    assert "(--overwrite)" in error_of(lambda: prepare_shard(config(source), tmp_path, 1, 2))
    prepare_shard(config(source), tmp_path, 1, 2, overwrite=True)
    assert folder_contents(folder) == contents


def test_failed_shard_leaves_no_incomplete_file(source: Path, tmp_path: Path) -> None:
    content = source.read_bytes()
    source.write_bytes(content + b"oops\n")
    assert "line 124 " in error_of(lambda: prepare_shard(config(source), tmp_path, 1, 2))
    assert folder_contents(tmp_path / "shard-1-of-2") == {}


# What does not belong together


@pytest.fixture
def shards(source: Path, tmp_path: Path) -> Path:
    """A folder with two shards."""
    prepare_shards(config(source), tmp_path / "shards", 2)
    return tmp_path / "shards"


def change_description(folder: Path, split: str, **changes: Any) -> None:
    path = folder / f"{split}.shard.json"
    write_json(path, {**read_json(path), **changes})


def remove(shards: Path, source: Path) -> None:
    shutil.rmtree(shards / "shard-2-of-2")


def remove_all(shards: Path, source: Path) -> None:
    for folder in shards.iterdir():
        shutil.rmtree(folder)


def duplicate(shards: Path, source: Path) -> None:
    remove(shards, source)
    shutil.copytree(shards / "shard-1-of-2", shards / "shard-2-of-2")


def interrupt(shards: Path, source: Path) -> None:
    (shards / "shard-2-of-2" / "train.shard.bin").unlink()


def truncate(shards: Path, source: Path) -> None:
    path = shards / "shard-2-of-2" / "train.shard.bin"
    path.write_bytes(path.read_bytes()[:-2])


def flip(shards: Path, source: Path) -> None:
    path = shards / "shard-2-of-2" / "validation.shard.bin"
    path.write_bytes(b"\0" + path.read_bytes()[1:])


def other_number(shards: Path, source: Path) -> None:
    prepare_shard(config(source), shards, 2, 3)


def other_setting(shards: Path, source: Path) -> None:
    prepare_shard(config(source, clean=True), shards, 2, 2, overwrite=True)


def other_stories(shards: Path, source: Path) -> None:
    source.write_bytes(source.read_bytes() + jsonl_bytes(["one more"]))
    prepare_shard(config(source), shards, 2, 2, overwrite=True)


def other_version(shards: Path, source: Path) -> None:
    change_description(shards / "shard-2-of-2", "train", version="0.0.1")


def dataset_that_changed(shards: Path, source: Path) -> None:  # a Hub dataset is identified by its name alone
    change_description(shards / "shard-2-of-2", "validation", source_characters=7)


def other_vocabulary(shards: Path, source: Path) -> None:
    change_description(shards / "shard-2-of-2", "train", tokenizer_hash="0" * 64)


def wrong_type(shards: Path, source: Path) -> None:
    change_description(shards / "shard-2-of-2", "train", batch_tokens=["many"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove, "shard-2-of-2 is missing; prepare that shard (--shards 2 --shard 2)"),
        (remove_all, "has no shards"),
        (duplicate, "shard-2-of-2 holds shard 1 of 2"),
        (interrupt, "shard-2-of-2 is not complete"),
        (truncate, "does not match its .json"),
        (flip, "is corrupted"),
        (other_number, "has shards of 2 and of 3"),
        (other_setting, "another source or setting than shard 1 (clean True instead of False)"),
        (other_stories, "another source or setting than shard 1;"),
        (other_version, "another version of StoryLLM than shard 1 (version '0.0.1' instead of"),
        (dataset_that_changed, "another source than shard 1 (source_characters 7 instead of"),
        (other_vocabulary, "another vocabulary than shard 1;"),
        (wrong_type, "does not match its .json"),
    ],
)
def test_shards_that_do_not_belong_together_are_refused(
    shards: Path, source: Path, change: Callable[[Path, Path], None], words: str
) -> None:
    change(shards, source)
    assert words in error_of(lambda: merge_shards(shards))
    assert not list(shards.glob("*.bin")) and not list(shards.glob("*.part"))


def test_other_data_is_replaced_only_if_asked(shards: Path, source: Path, tmp_path: Path) -> None:
    prepare(config(source, clean=True), shards)
    before = data_files(shards)
    assert "(--overwrite)" in error_of(lambda: merge_shards(shards))
    assert data_files(shards) == before
    merged = merge_shards(shards, overwrite=True)
    assert merged == prepare(config(source), tmp_path / "one") == verify(shards)


def test_shard_of_other_settings_is_replaced_only_if_asked(shards: Path, source: Path) -> None:
    other = config(source, clean=True)
    before = folder_contents(shards / "shard-1-of-2")
    assert "another source, setting or version" in error_of(lambda: prepare_shard(other, shards, 1, 2))
    assert folder_contents(shards / "shard-1-of-2") == before
    prepare_shard(other, shards, 1, 2, overwrite=True)
    assert folder_contents(shards / "shard-1-of-2") != before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--shards 2", "shards is 2, but shard is missing"),
        ("--shard 2", "shard is 2, must be from 1 to shards (1)"),
        ("--shards 2 --shard 0", "shard is 0, must be from 1 to shards (2)"),
        ("--shards 2 --shard 3", "shard is 3, must be from 1 to shards (2)"),
        ("--merge", "has no shards"),
    ],
)
def test_invalid_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, words: str
) -> None:
    assert main(["prepare", "--source", "synthetic", "--out", str(tmp_path), *options.split()]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_split_without_stories_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("A story.")
    (tmp_path / "valid.txt").write_text("")
    message = error_of(lambda: prepare_shard(config(tmp_path), tmp_path / "out", 1, 2))
    assert "has no validation stories" in message
