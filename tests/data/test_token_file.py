"""Prepared data is checked when it is opened, and completely by `verify`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY, flip_bit, random_stories

from storyllm import (
    DataConfig,
    StoryLLMError,
    evaluate,
    judge,
    load,
    load_tokenizer,
    open_token_file,
    prepare,
    train,
    verify,
)
from storyllm.data import token_file
from storyllm.data.token_file import PreparedData, TokenFile, open_dataset, read_info
from storyllm.data.tokenizer import tokenizer_hash
from storyllm.files import read_json, write_json


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data, with a vocabulary of 300 tokens."""
    return shutil.copytree(tiny_data, tmp_path / "data")


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(StoryLLMError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def set_id(path: Path, position: int, token: int) -> None:
    ids = np.fromfile(path, dtype="<u2")
    ids[position] = token
    ids.tofile(path)


def change_info(data: Path, split: str, changes: dict[str, Any]) -> None:
    """Changes entries of a `.json`, with a correct checksum."""
    path = data / f"{split}.json"
    write_json(path, {**read_json(path), **changes})


# Opening


@pytest.mark.parametrize("split", ["train", "validation"])
def test_open_token_file(tiny_data: Path, split: str) -> None:
    path = tiny_data / f"{split}.bin"
    tokens = open_token_file(str(path))
    assert isinstance(tokens, TokenFile)
    assert tokens.path == path
    assert isinstance(tokens.ids, np.memmap) and not tokens.ids.flags.writeable
    assert (tokens.ids.dtype, tokens.ids.shape) == (np.uint16, (tokens.info.tokens,))
    assert tokens.ids.tobytes() == path.read_bytes()
    assert tokens.info == read_info(path) == read_info(path.with_suffix(".json"))


@pytest.mark.parametrize("name", ["stories.txt", "train.json", "."])
def test_what_is_not_a_bin_is_refused(data: Path, name: str) -> None:
    (data / "stories.txt").write_text("An odd number of bytes.")
    message = error_of(lambda: open_token_file(data / name))
    assert "is not a .bin" in message and str(data) in message


def test_nanogpt_can_read_the_ids(tiny_data: Path) -> None:
    """As `get_batch` in its train.py does."""
    ids = np.memmap(tiny_data / "train.bin", dtype=np.uint16, mode="r")
    assert ids.tolist() == open_token_file(tiny_data / "train.bin").ids.tolist()
    assert ids[0:16].astype(np.int64).tolist() == load_tokenizer(tiny_data).encode_ordinary(random_stories(400)[0])[:16]


def test_open_dataset(tiny_data: Path) -> None:
    dataset = open_dataset(str(tiny_data))
    for split in ("train", "validation"):
        assert dataset[split] is getattr(dataset, split)
        assert dataset[split].info.split == split
        assert dataset[split].info.tokenizer_hash == tokenizer_hash(dataset.tokenizer)
        assert dataset.sha256[split] == read_info(tiny_data / f"{split}.bin").sha256
    assert dataset.tokenizer.n_vocab == dataset.train.info.vocab_size == 300
    expected = DataConfig(source=dataset.train.info.source, tokenizer="bpe:300", validation_fraction=0.1)
    assert dataset.config == expected


@pytest.mark.parametrize("name", ["train.bin", "nowhere/train.bin", "."])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    for call in (open_token_file, read_info, load_tokenizer, open_dataset, verify):
        message = error_of(lambda call=call: call(tmp_path / name))
        assert str(tmp_path) in message
        assert ("not found" in message or "is not a .bin" in message) and "storyllm prepare" in message


@pytest.mark.parametrize("name", ["train.bin", "train.json", "validation.bin", "validation.json", "vocabulary.json"])
def test_dataset_with_a_missing_file_is_refused(data: Path, name: str) -> None:
    (data / name).unlink()
    assert f"{name} not found" in error_of(lambda: open_dataset(data))


@pytest.mark.parametrize(
    ("change", "words"), [(-1, "even"), (1, "even"), (-2, "tokens"), (2, "tokens"), (None, "tokens")]
)
def test_file_of_another_size_is_refused(data: Path, change: int | None, words: str) -> None:
    path = data / "train.bin"
    content = path.read_bytes()
    path.write_bytes(b"" if change is None else content[:change] if change < 0 else content + bytes(change))
    message = error_of(lambda: open_token_file(path))
    assert words in message and str(path) in message


def test_empty_file_is_refused_even_if_its_description_agrees(data: Path) -> None:
    (data / "train.bin").write_bytes(b"")
    change_info(data, "train", {"tokens": 0, "stories": 0, "bytes": 0})
    error_of(lambda: open_token_file(data / "train.bin"))


@pytest.mark.parametrize("position", [0, 1_234, -1])
def test_id_outside_the_vocabulary_is_refused(data: Path, position: int) -> None:
    path = data / "train.bin"
    set_id(path, position, 299)
    open_token_file(path).check_ids()
    for token in (300, 65_535):
        set_id(path, position, token)
        for call in (open_token_file(path).check_ids, lambda: verify(data)):
            message = error_of(call)
            assert str(token) in message and "300" in message and str(path) in message


def test_id_outside_the_vocabulary_is_refused_where_it_is_read(data: Path, tiny_run: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (data / f"{split}.bin").write_bytes(b"\xff\xff" * read_info(data / f"{split}.bin").tokens)
    for call in (
        lambda: train(TINY, data, tmp_path / "run"),
        lambda: evaluate(load(tiny_run / "last.pt"), data / "validation.bin"),
        lambda: judge({"tiny": tiny_run / "last.pt"}, data),
    ):
        assert "has token id 65535" in error_of(call)


@pytest.mark.parametrize("chunk_tokens", [7, 100])
def test_every_chunk_is_checked(monkeypatch: pytest.MonkeyPatch, data: Path, chunk_tokens: int) -> None:
    monkeypatch.setattr(token_file, "CHUNK_TOKENS", chunk_tokens)  # real files have many chunks; this one, only one
    path = data / "validation.bin"
    open_token_file(path).check_ids()
    verify(data)
    set_id(path, -1, 300)
    error_of(open_token_file(path).check_ids)


# Descriptions


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b'"x"', b"{}", b"{", b"\xff", b"[" * 100_000, b'{"tokens": 3}']
)
@pytest.mark.parametrize("name", ["train.json", "vocabulary.json"])
def test_invalid_json_is_refused(data: Path, name: str, content: bytes) -> None:
    (data / name).write_bytes(content)
    assert name in error_of(lambda: open_dataset(data))
    assert name in error_of(lambda: load_tokenizer(data) if name == "vocabulary.json" else read_info(data / name))


@pytest.mark.parametrize("name", ["tokens", "vocab_size", "stories", "bytes"])
@pytest.mark.parametrize("value", ["many", None, 1.5, [1], True, -1, 2**63])
def test_count_that_is_not_a_valid_integer_is_refused(data: Path, name: str, value: Any) -> None:
    change_info(data, "train", {name: value})
    assert "train.json" in error_of(lambda: read_info(data / "train.bin"))


@pytest.mark.parametrize(
    "changes",
    [
        *({"split": "test"}, {"vocab_size": 65_537}, {"vocab_size": 256}, {"stories": 0}, {"stories": 10**9}),
        *({"sha256": "0"}, {"tokenizer_hash": 3}, {"request": None}, {"source": 3}, {"tokenizer": None}, {"new": 1}),
    ],
    ids=str,
)
def test_impossible_description_is_refused(data: Path, changes: dict[str, Any]) -> None:
    change_info(data, "train", changes)
    assert "train.json" in error_of(lambda: read_info(data / "train.bin"))


def test_manual_edit_of_a_description_is_refused(data: Path) -> None:
    path = data / "train.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "source": "another"}))
    assert "train.json" in error_of(lambda: read_info(path))


def test_invalid_request_in_a_description_is_refused(data: Path) -> None:
    for split in ("train", "validation"):
        change_info(data, split, {"request": {"tokenizer": "invalid"}})
    dataset = open_dataset(data)
    assert "train.json" in error_of(lambda: dataset.config)


# Files that belong together


def test_splits_that_were_not_prepared_together_are_refused(tmp_path: Path) -> None:
    """As after an interrupted `prepare --overwrite`."""
    config = DataConfig(source="synthetic", synthetic_stories=60, tokenizer="bpe:300")
    prepare(config, tmp_path / "one")
    prepare(dataclasses.replace(config, validation_fraction=0.5), tmp_path / "two")
    for name in ("validation.bin", "validation.json"):
        shutil.copy(tmp_path / "two" / name, tmp_path / "one" / name)
    for call in (open_dataset, verify):
        message = error_of(lambda call=call: call(tmp_path / "one"))
        assert "validation.bin" in message and "train.bin" in message and "prepare" in message


def test_other_vocabulary_is_refused(data: Path, tmp_path: Path) -> None:
    prepare(DataConfig(source="synthetic", synthetic_stories=60, tokenizer="bpe:300"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "vocabulary.json", data)
    for call in (open_dataset, verify):
        assert "vocabulary.json" in error_of(lambda call=call: call(data))


def test_swapped_splits_are_refused(data: Path) -> None:
    for suffix in (".bin", ".json"):
        (data / f"train{suffix}").rename(data / f"other{suffix}")
        (data / f"validation{suffix}").rename(data / f"train{suffix}")
        (data / f"other{suffix}").rename(data / f"validation{suffix}")
    assert "train.bin" in error_of(lambda: open_dataset(data))


# Verifying


def test_verify_returns_the_descriptions(tiny_data: Path) -> None:
    assert verify(str(tiny_data)) == PreparedData(
        read_info(tiny_data / "train.bin"), read_info(tiny_data / "validation.bin")
    )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_verify_finds_exchanged_ids(data: Path, split: str) -> None:
    path = data / f"{split}.bin"
    ids = np.fromfile(path, dtype="<u2")
    i = int(np.flatnonzero(ids[1:] != ids[:-1])[0])
    ids[[i, i + 1]] = ids[[i + 1, i]]
    ids.tofile(path)
    assert open_token_file(path)  # valid ids: opening reads no checksum
    message = error_of(lambda: verify(data))
    assert str(path) in message and "corrupted" in message and "sha256" in message


@pytest.mark.parametrize("name", ["stories", "bytes"])
def test_verify_finds_wrong_counts(data: Path, name: str) -> None:
    count = getattr(read_info(data / "train.bin"), name)
    change_info(data, "train", {name: count - 1})
    message = error_of(lambda: verify(data))
    assert f"{name} is {count}" in message and str(count - 1) in message


def test_corrupted_data_can_be_deleted_and_prepared_again(tmp_path: Path) -> None:
    config = DataConfig(source="synthetic", synthetic_stories=60, tokenizer="bpe:300")
    before = prepare(config, tmp_path)
    flip_bit(tmp_path / "train.bin", 20)
    assert "delete it and prepare" in error_of(lambda: verify(tmp_path))
    (tmp_path / "train.bin").unlink()
    assert prepare(config, tmp_path) == before == verify(tmp_path)
