"""`prepare` writes exactly the stories, wholly or not at all; windows hold every token where it belongs."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from conftest import synthetic_stories

from storyllm import tokens as tokens_module
from storyllm.config import DataConfig, StoryLLMError
from storyllm.files import read_json, write_json
from storyllm.tokenizer import (
    END_OF_TEXT,
    gpt2_tokenizer,
    tokenizer_from_dict,
    tokenizer_hash,
    tokenizer_to_dict,
    train_bpe,
)
from storyllm.tokens import (
    PreparedData,
    open_tokens,
    prepare,
    random_windows,
    read_info,
    read_tokenizer,
    sequential_windows,
    shuffled_windows,
    verify,
)

MARK = "<|endoftext|>"
STORIES = {
    "train": [
        *synthetic_stories(40),
        "",
        f"a {MARK} within",
        "Zoë 😀\0\r\nשלום\n",
        "  ",
        "",
        *synthetic_stories(9, seed=1),
    ],
    "validation": [*synthetic_stories(10, seed=2), "", f"{MARK}"],
}


def write_source(folder: Path, stories: dict[str, list[str]] = STORIES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in stories.items():
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def config(source: Path, **settings: Any) -> DataConfig:
    return DataConfig(**{"source": str(source), "tokenizer": "bpe:300", **settings})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def stories_in(path: Path, tokenizer: tiktoken.Encoding) -> list[str]:
    """The texts of a .bin, read without any of the module's code."""
    raw = path.read_bytes()
    ids = list(struct.unpack(f"<{len(raw) // 2}H", raw))
    assert ids[-1] == tokenizer.eot_token, "the last story does not end with the end-of-text token"
    stories: list[list[int]] = [[]]
    for token in ids:
        if token == tokenizer.eot_token:
            stories.append([])
        else:
            stories[-1].append(token)
    return [tokenizer.decode_bytes(story).decode() for story in stories[:-1]]


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(tokens_module, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(StoryLLMError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What prepare writes


def assert_facts(prepared: PreparedData, out: Path, tokenizer: tiktoken.Encoding, source: Path, name: str) -> None:
    for split, stories in STORIES.items():
        info = getattr(prepared, split)
        path = out / f"{split}.bin"
        assert stories_in(path, tokenizer) == stories
        assert (info.split, info.source, info.tokenizer) == (split, str(source), name)
        assert info.stories == len(stories)
        assert info.tokens == sum(len(tokenizer.encode_ordinary(story)) + 1 for story in stories)
        assert info.tokens * 2 == path.stat().st_size
        assert info.bytes == sum(len(story.encode()) for story in stories)
        assert info.vocab_size == tokenizer.n_vocab
        assert info.tokenizer_hash == tokenizer_hash(tokenizer)
        assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        written = json.loads((out / f"{split}.json").read_bytes())
        assert {name: value for name, value in written.items() if name != "checksum"} == dataclasses.asdict(info)
        assert read_info(path) == info


def test_prepare_with_a_trained_vocabulary(source: Path, tmp_path: Path) -> None:
    prepared = prepare(config(source), tmp_path / "deep" / "out")
    tokenizer = read_tokenizer(tmp_path / "deep" / "out")
    assert tokenizer.n_vocab == 300
    assert_facts(prepared, tmp_path / "deep" / "out", tokenizer, source, "bpe:300")
    files = {"train.bin", "train.json", "validation.bin", "validation.json", "vocabulary.json"}
    assert set(contents(tmp_path / "deep" / "out")) == files


def test_prepare_with_gpt2s_vocabulary(gpt2_cache: Path, source: Path, tmp_path: Path) -> None:
    prepared = prepare(config(source, tokenizer="gpt2"), tmp_path / "out")
    assert prepared.train.vocab_size == 50257
    assert_facts(prepared, tmp_path / "out", gpt2_tokenizer(), source, "gpt2")
    assert tokenizer_hash(read_tokenizer(tmp_path / "out")) == prepared.train.tokenizer_hash


def test_the_vocabulary_is_learned_from_the_training_stories_alone(tmp_path: Path) -> None:
    train = ["the cat sat on the mat and the other cat sat there"] * 20
    source = write_source(tmp_path / "source", {"train": train, "validation": ["zzzzzzzz qqqqqqqq"] * 500})
    prepare(config(source, tokenizer="bpe:265"), tmp_path / "out")
    tokenizer = read_tokenizer(tmp_path / "out")
    assert len(tokenizer.encode_ordinary("zzzz")) == 4
    assert len(tokenizer.encode_ordinary("the")) == 1


def test_more_stories_than_are_encoded_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Batches of three stories; some hold the end-of-text mark: alone, at an end, or in two halves."""
    monkeypatch.setattr(tokens_module, "TEXT_AT_ONCE", 3 * (len("Story 10.") + len(END_OF_TEXT)))
    train = [f"Story {i}." for i in range(10, 41)]
    train[5], train[11], train[12] = END_OF_TEXT, f"a{END_OF_TEXT}b", f"a {END_OF_TEXT}"
    train[20:24] = ["a <|endof", "text|> b", "", " <|endoftext|"]
    exactly = [f"Story {i}." for i in range(10, 16)]
    source = write_source(tmp_path / "source", {"train": train, "validation": exactly})
    prepared = prepare(config(source, tokenizer="bpe:258"), tmp_path / "out")
    tokenizer = read_tokenizer(tmp_path / "out")
    assert stories_in(tmp_path / "out" / "train.bin", tokenizer) == train
    assert stories_in(tmp_path / "out" / "validation.bin", tokenizer) == exactly
    assert (prepared.train.stories, prepared.validation.stories) == (len(train), len(exactly))


def test_real_stories(sample_stories: Path, gpt2_cache: Path, tmp_path: Path) -> None:
    """GPT-2's ids for real stories, each as tiktoken gives them by itself."""
    import pyarrow.parquet as pq

    (path,) = sample_stories.rglob("validation*.parquet")
    stories = pq.read_table(path)["text"].to_pylist()[:80]
    source = write_source(tmp_path / "source", {"train": stories[:60], "validation": stories[60:]})
    prepare(config(source, tokenizer="gpt2"), tmp_path / "out")
    reference = tiktoken.get_encoding("gpt2")
    ids = [token for story in stories[:60] for token in [*reference.encode(story, disallowed_special=()), 50256]]
    assert open_tokens(tmp_path / "out" / "train.bin").ids.tolist() == ids


def test_the_largest_ids_fit(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path) -> None:
    """65,536 tokens, where the end of text is the largest number that 16 bits hold."""

    def train(stories: Iterator[str], vocab_size: int) -> tiktoken.Encoding:
        few = tokenizer_to_dict(train_bpe(stories, 300))["tokens"].split()
        many = [base64.b64encode(f"<{i}>".encode()).decode() for i in range(vocab_size - 1 - len(few))]
        return tokenizer_from_dict({"name": f"bpe:{vocab_size}", "tokens": " ".join(few + many)})

    monkeypatch.setattr(tokens_module, "train_bpe", train)
    prepared = prepare(config(source, tokenizer="bpe:65536"), tmp_path / "out")
    tokens = open_tokens(tmp_path / "out" / "train.bin")
    assert prepared.train.vocab_size == 65_536
    assert (tokens.ids == 65_535).sum() == len(STORIES["train"])


# Again


def test_the_second_time_there_is_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare(config(source), tmp_path / "out")
    before = contents(tmp_path / "out"), times(tmp_path / "out")
    forbid(monkeypatch, "read_stories", "train_bpe")
    capsys.readouterr()
    for overwrite in (False, True):
        assert prepare(config(source), str(tmp_path / "out"), overwrite=overwrite) == first
    assert (contents(tmp_path / "out"), times(tmp_path / "out")) == before
    assert capsys.readouterr().out == ""


def test_two_folders_get_the_same_bytes(source: Path, tmp_path: Path) -> None:
    prepare(config(source), tmp_path / "one")
    prepare(config(source), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_source_that_moved_is_the_same(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path) -> None:
    prepare(config(source), tmp_path / "out")
    before = times(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    moved = source.rename(tmp_path / "elsewhere" / "under another name")
    forbid(monkeypatch, "read_stories")
    prepare(config(moved), tmp_path / "out")
    assert times(tmp_path / "out") == before


def test_a_lost_split_is_made_again_with_the_vocabulary_that_was_kept(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    prepare(config(source), tmp_path / "out")
    whole, before = contents(tmp_path / "out"), times(tmp_path / "out")
    (tmp_path / "out" / "validation.bin").unlink()
    forbid(monkeypatch, "train_bpe")
    prepare(config(source), tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    after = times(tmp_path / "out")
    assert {after[name] == before[name] for name in ("train.bin", "train.json", "vocabulary.json")} == {True}


@pytest.mark.parametrize("damage", [None, b"", b"[]", b"\xff", b"[" * 100_000, b'{"request": 1}', "half"])
def test_a_lost_or_damaged_vocabulary_is_made_again(source: Path, tmp_path: Path, damage: bytes | str | None) -> None:
    prepare(config(source), tmp_path / "out")
    whole = contents(tmp_path / "out")
    vocabulary = tmp_path / "out" / "vocabulary.json"
    if damage is None:
        vocabulary.unlink()
    else:
        vocabulary.write_bytes(damage if isinstance(damage, bytes) else whole["vocabulary.json"][:1_000])
        assert "vocabulary.json" in refusal(lambda: read_tokenizer(tmp_path / "out"))
    prepare(config(source), tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_data_and_vocabulary_always_belong_together(source: Path, tmp_path: Path) -> None:
    """Even where vocabulary.json was exchanged for one of the same size."""
    out, other = tmp_path / "out", tmp_path / "other"
    prepare(config(source), out)
    prepare(config(write_source(tmp_path / "b", {**STORIES, "train": ["zu " * 9, *STORIES["train"][:9]]})), other)
    mine = json.loads((out / "vocabulary.json").read_bytes())
    tokens = json.loads((other / "vocabulary.json").read_bytes())["tokens"]
    assert tokens != mine["tokens"]
    (out / "vocabulary.json").write_text(json.dumps({**mine, "tokens": tokens}))
    (out / "validation.bin").unlink()
    prepared = prepare(config(source), out)
    kept = tokenizer_hash(read_tokenizer(out))
    assert prepared.train.tokenizer_hash == prepared.validation.tokenizer_hash == kept
    for split, stories in STORIES.items():
        assert stories_in(out / f"{split}.bin", read_tokenizer(out)) == stories


# Other data in the folder


def changed_source(source: Path) -> DataConfig:
    (source / "train.jsonl").write_text((source / "train.jsonl").read_text() + '{"text": "one more"}\n')
    return config(source)


def changed_validation(source: Path) -> DataConfig:
    raw = (source / "validation.jsonl").read_bytes()
    (source / "validation.jsonl").write_bytes(raw.replace(b"One day", b"One dax", 1))  # as long as before
    return config(source)


OTHERS: dict[str, Callable[[Path], DataConfig]] = {
    "vocabulary": lambda source: config(source, tokenizer="bpe:299"),
    "cleaning": lambda source: config(source, clean=True),
    "column": lambda source: config(source, text_column="story"),
    "source": lambda source: config(write_source(source.parent / "b", {"train": ["a"], "validation": ["b"]})),
    "builtin": lambda source: config(Path("builtin"), builtin_stories=20),
    "train changed": changed_source,
    "validation changed": changed_validation,
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_data_is_not_overwritten_unasked(source: Path, tmp_path: Path, other: str) -> None:
    prepare(config(source), tmp_path / "out")
    before = contents(tmp_path / "out"), times(tmp_path / "out")
    data = OTHERS[other](source)
    message = refusal(lambda: prepare(data, tmp_path / "out"))
    assert "--overwrite" in message
    assert str(tmp_path / "out") in message
    assert (contents(tmp_path / "out"), times(tmp_path / "out")) == before


@pytest.mark.parametrize("other", sorted(set(OTHERS) - {"column"}))
@pytest.mark.filterwarnings("ignore:the stories have words")
def test_overwriting_gives_what_an_empty_folder_would_get(source: Path, tmp_path: Path, other: str) -> None:
    prepare(config(source), tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("not ours")
    data = OTHERS[other](source)
    replaced = prepare(data, tmp_path / "out", overwrite=True)
    assert prepare(data, tmp_path / "empty") == replaced
    assert contents(tmp_path / "out") == {**contents(tmp_path / "empty"), "notes.txt": b"not ours"}


def test_a_folder_where_only_validation_is_other_data_is_refused_whole(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "validation.bin").write_bytes(b"somebody else's")
    assert "validation.bin" in refusal(lambda: prepare(config(source), tmp_path / "out"))
    assert contents(tmp_path / "out") == {"validation.bin": b"somebody else's"}


def test_data_cut_short_is_not_taken_for_complete(source: Path, tmp_path: Path) -> None:
    prepare(config(source), tmp_path / "out")
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "train.bin").write_bytes(whole["train.bin"][:-2])
    assert "--overwrite" in refusal(lambda: prepare(config(source), tmp_path / "out"))
    prepare(config(source), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("within", ["", "below"])
def test_a_file_in_the_folders_place(source: Path, tmp_path: Path, within: str) -> None:
    (tmp_path / "out").write_text("a file")
    assert "take another folder" in refusal(lambda: prepare(config(source), tmp_path / "out" / within))
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.filterwarnings("ignore:the stories have words")
def test_a_split_without_stories_is_refused(tmp_path: Path, split: str) -> None:
    source = write_source(tmp_path / "source", {"train": ["a"], "validation": ["b"], split: []})
    assert f"no {split} stories" in refusal(lambda: prepare(config(source), tmp_path / "out"))
    assert f"{split}.bin" not in contents(tmp_path / "out")


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "no such folder"
    assert str(missing) in refusal(lambda: prepare(config(missing), tmp_path / "out"))


# Cut off half way


def assert_nothing_half(out: Path) -> None:
    """Whatever is there under its name is whole, and belongs to what stands beside it."""
    for path in out.glob("*.bin"):
        tokens = open_tokens(path)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == tokens.info.sha256
    for path in out.glob("*.json"):
        json.loads(path.read_bytes())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("nth_reading", "after"), [(1, 0), (1, 20), (2, 0), (2, 5), (3, 0), (3, 20)])
def test_a_preparation_that_was_cut_off_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
    source: Path,
    tmp_path: Path,
    error: type[BaseException],
    nth_reading: int,
    after: int,
) -> None:
    """Cut while the vocabulary is learned, while validation.bin is written, while train.bin is written."""
    prepare(config(source), tmp_path / "whole")
    readings = itertools.count(1)
    read_stories = tokens_module.read_stories

    def cut(data: DataConfig, split: str) -> Iterator[str]:
        stories = read_stories(data, split)
        if next(readings) != nth_reading:
            return stories

        def until() -> Iterator[str]:
            yield from itertools.islice(stories, after)
            raise error("cut")

        return until()

    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "read_stories", cut)
        patch.setattr(tokens_module, "TEXT_AT_ONCE", 200)
        with pytest.raises(error):
            prepare(config(source), tmp_path / "out")
    assert ("validation.bin" in contents(tmp_path / "out")) == (nth_reading > 2)
    assert "train.bin" not in contents(tmp_path / "out")
    assert not [name for name in contents(tmp_path / "out") if name.endswith((".part", ".tmp"))]
    assert_nothing_half(tmp_path / "out")
    assert prepare(config(source), tmp_path / "out") == prepare(config(source), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys, types
from pathlib import Path

_, package, source, out, tokenizer, at = sys.argv
sys.modules["storyllm"] = types.ModuleType("storyllm")  # only the modules that prepare needs: the rest takes seconds
sys.modules["storyllm"].__path__ = [package]
from storyllm import tokens
from storyllm.config import DataConfig

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def replace(one, other, replace=os.replace):
    if at == f"before {Path(other).name}":
        kill()
    replace(one, other)
    if at == f"after {Path(other).name}":
        kill()

readings = []

def read_stories(data, split, read_stories=tokens.read_stories):
    readings.append(split)
    for number, story in enumerate(read_stories(data, split)):
        if number == 9 and at == f"within reading {len(readings)}":
            kill()
        yield story

os.replace, tokens.read_stories, tokens.TEXT_AT_ONCE = replace, read_stories, 200
tokens.prepare(DataConfig(source=source, tokenizer=tokenizer), out, overwrite=True)
"""


def kill_at(at: str, source: Path, out: Path, tokenizer: str = "bpe:300") -> None:
    package = str(Path(tokens_module.__file__).parent)
    command = [sys.executable, "-c", KILLED, package, str(source), str(out), tokenizer, at]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.parametrize(
    "at",
    [
        *("within reading 1", "before vocabulary.json", "within reading 2", "after train.json", "after train.bin"),
        *("within reading 3", "before validation.bin"),
    ],
)
def test_killed(source: Path, tmp_path: Path, at: str) -> None:
    prepare(config(source), tmp_path / "whole")
    kill_at(at, source, tmp_path / "out")
    for split in ("train", "validation"):
        if not (tmp_path / "out" / f"{split}.bin").exists():
            refusal(lambda split=split: open_tokens(tmp_path / "out" / f"{split}.bin"))
    assert_nothing_half(tmp_path / "out")
    prepare(config(source), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "at", ["after vocabulary.json", "within reading 2", "after train.json", "before validation.bin"]
)
def test_killed_while_overwriting(source: Path, tmp_path: Path, at: str) -> None:
    """The old data or the new, each with its own description; and what is left of the old is not taken for the new."""
    prepare(config(source), tmp_path / "out")
    prepare(config(source, tokenizer="bpe:290"), tmp_path / "whole")
    kill_at(at, source, tmp_path / "out", tokenizer="bpe:290")
    assert_nothing_half(tmp_path / "out")
    try:
        prepare(config(source, tokenizer="bpe:290"), tmp_path / "out")
    except StoryLLMError as error:
        assert "--overwrite" in str(error)  # noqa: PT017
        prepare(config(source, tokenizer="bpe:290"), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Memory


def test_memory_does_not_grow_with_the_corpus(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(2, 8))) for _ in range(300)]

    def peak(count: int) -> int:
        def read_stories(data: DataConfig, split: str) -> Iterator[str]:
            rng = random.Random(1)
            return (" ".join(rng.choices(words, k=60)) for _ in range(count if split == "train" else 10))

        monkeypatch.setattr(tokens_module, "read_stories", read_stories)
        tracemalloc.start()
        try:
            assert prepare(config(source), tmp_path / f"{count}").train.stories == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    monkeypatch.setattr(tokens_module, "TEXT_AT_ONCE", 10_000)
    peak(100)  # what is only needed once
    assert peak(3_000) < peak(300) + 100_000  # the stories themselves: a megabyte


# Opening


@pytest.fixture
def prepared(source: Path, tmp_path: Path) -> Path:
    prepare(config(source), tmp_path / "out")
    return tmp_path / "out"


def test_open_tokens(tiny_data: Path) -> None:
    for split in ("train", "validation"):
        tokens = open_tokens(str(tiny_data / f"{split}.bin"))
        assert tokens.ids.dtype == np.uint16
        assert tokens.ids.shape == (tokens.info.tokens,)
        assert isinstance(tokens.ids, np.memmap)
        assert tokens.ids.tobytes() == (tiny_data / f"{split}.bin").read_bytes()
        assert not tokens.ids.flags.writeable
        assert tokens.info == read_info(tiny_data / f"{split}.json")


def test_the_shared_data_is_large_enough(tiny_data: Path) -> None:
    assert read_info(tiny_data / "train.bin").tokens > 2_000
    assert read_info(tiny_data / "validation.bin").tokens > 2_000
    assert read_info(tiny_data / "validation.bin").vocab_size == 300


@pytest.mark.parametrize("name", ["train.bin", "nowhere/train.bin", ""])
def test_data_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    message = refusal(lambda: open_tokens(tmp_path / name))
    assert str(tmp_path / name) in message
    assert "prepare" in message
    refusal(lambda: read_tokenizer(tmp_path / name))


@pytest.mark.parametrize(
    ("change", "words"), [(-1, "even"), (1, "even"), (-2, "tokens"), (2, "tokens"), (None, "tokens")]
)
def test_data_of_another_size(prepared: Path, change: int | None, words: str) -> None:
    raw = (prepared / "train.bin").read_bytes()
    changed = b"" if change is None else raw[:change] if change < 0 else raw + b"\0" * change
    (prepared / "train.bin").write_bytes(changed)
    message = refusal(lambda: open_tokens(prepared / "train.bin"))
    assert words in message
    assert "train.bin" in message


def test_an_empty_file_is_refused_even_if_its_description_agrees(prepared: Path) -> None:
    (prepared / "train.bin").write_bytes(b"")
    info = json.loads((prepared / "train.json").read_bytes())
    (prepared / "train.json").write_text(json.dumps({**info, "tokens": 0}))
    refusal(lambda: open_tokens(prepared / "train.bin"))


@pytest.mark.parametrize("place", [0, 1_234, -1])
@pytest.mark.parametrize(("token", "fits"), [(299, True), (300, False), (65_535, False)])
def test_ids_beyond_the_vocabulary(prepared: Path, place: int, token: int, fits: bool) -> None:
    ids = np.fromfile(prepared / "train.bin", dtype="<u2")
    ids[place] = token
    ids.tofile(prepared / "train.bin")
    if fits:
        assert open_tokens(prepared / "train.bin").ids[place] == token
    else:
        message = refusal(lambda: open_tokens(prepared / "train.bin"))
        assert str(token) in message
        assert "300" in message


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_ids_are_all_looked_at_when_there_are_many(
    monkeypatch: pytest.MonkeyPatch, prepared: Path, at_once: int
) -> None:
    monkeypatch.setattr(tokens_module, "IDS_AT_ONCE", at_once)
    open_tokens(prepared / "validation.bin")
    ids = np.fromfile(prepared / "validation.bin", dtype="<u2")
    ids[-1] = 300
    ids.tofile(prepared / "validation.bin")
    refusal(lambda: open_tokens(prepared / "validation.bin"))


@pytest.mark.parametrize(
    "raw", [None, b"", b"[]", b"null", b'"x"', b"{}", b"{", b"\xff", b"[" * 100_000, b'{"tokens": 3}']
)
def test_a_description_that_is_missing_or_damaged(prepared: Path, raw: bytes | None) -> None:
    (prepared / "train.json").unlink() if raw is None else (prepared / "train.json").write_bytes(raw)
    assert "train.json" in refusal(lambda: open_tokens(prepared / "train.bin"))
    assert "train.json" in refusal(lambda: read_info(prepared / "train.bin"))


@pytest.mark.parametrize("name", ["tokens", "vocab_size", "stories", "bytes"])
@pytest.mark.parametrize("value", ["many", None, 1.5, [1]])
def test_a_description_whose_numbers_are_none(source: Path, prepared: Path, name: str, value: Any) -> None:
    info = json.loads((prepared / "train.json").read_bytes())
    (prepared / "train.json").write_text(json.dumps({**info, name: value}))
    assert "train.json" in refusal(lambda: open_tokens(prepared / "train.bin"))
    assert "--overwrite" in refusal(lambda: prepare(config(source), prepared))


# Windows


def ids_of(count: int) -> np.ndarray:
    return np.arange(count, dtype="<u2")


@pytest.mark.parametrize(("block_size", "count"), [(1, 1), (8, 5), (8, 0), (99, 3)])
def test_random_windows(block_size: int, count: int) -> None:
    x, y = random_windows(ids_of(100), block_size, count, np.random.default_rng(0))
    assert x.shape == y.shape == (count, block_size)
    assert x.dtype == y.dtype == np.int64
    assert (y == x + 1).all()  # the ids count up, so a neighbour is one more
    assert (np.diff(x, axis=1) == 1).all()


def test_random_windows_start_everywhere_alike() -> None:
    x, y = random_windows(ids_of(12), 4, 8_000, np.random.default_rng(0))
    starts, counts = np.unique(x[:, 0], return_counts=True)
    assert starts.tolist() == list(range(8))  # the last one's last target is the last id
    assert y.max() == 11
    assert counts.min() > 850  # of 1,000 expected


def test_random_windows_follow_the_generator() -> None:
    def windows(seed: int) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return [random_windows(ids_of(1_000), 8, 4, rng)[0][:, 0].tolist() for _ in range(3)]

    assert windows(1) == windows(1)
    assert windows(1) != windows(2)
    assert len({tuple(starts) for starts in windows(1)}) == 3


def test_random_windows_of_a_mapped_file(tiny_data: Path) -> None:
    ids = open_tokens(tiny_data / "validation.bin").ids
    x, y = random_windows(ids, 64, 10, np.random.default_rng(3))
    text = ids.astype(np.int64).tobytes()
    for inputs, targets in zip(x, y, strict=True):
        assert inputs[:1].tobytes() + targets.tobytes() in text
    x[:] = 0  # a copy: the data is not written to
    assert ids.astype(np.int64).tobytes() == text


@pytest.mark.parametrize("count", [0, 1, 7, 8])
def test_too_few_tokens_for_one_window(count: int) -> None:
    message = refusal(lambda: random_windows(ids_of(count), 8, 2, np.random.default_rng(0)))
    assert str(count) in message
    assert "block_size" in message


def test_just_enough_tokens_for_one_window() -> None:
    x, y = random_windows(ids_of(9), 8, 3, np.random.default_rng(0))
    assert x.tolist() == [list(range(8))] * 3
    assert y.tolist() == [list(range(1, 9))] * 3


@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_sequential_windows_have_every_token_but_the_first_as_a_target_once(block_size: int, count: int) -> None:
    lengths = {0, 1, 2, 3} | {max(block_size * n + d, 0) for n in (1, 2, 3, 6, 7, 8) for d in (-1, 0, 1, 2)}
    for length in sorted(lengths):
        inputs: list[int] = []
        targets: list[int] = []
        batches = list(sequential_windows(ids_of(length), block_size, count))
        for x, y in batches:
            assert x.shape == y.shape
            assert 1 <= x.shape[0] <= count
            assert 1 <= x.shape[1] <= block_size
            assert x.dtype == y.dtype == np.int64
            inputs += x.ravel().tolist()
            targets += y.ravel().tolist()
        assert targets == list(range(1, length))
        assert inputs == list(range(length - 1))
        assert all(x.shape[1] == block_size for x, _ in batches[:-1])
        full = [x.shape[0] for x, _ in batches if x.shape[1] == block_size]
        assert all(rows == count for rows in full[:-1] if rows != 1)  # as many at a time as may be


def test_sequential_windows_of_a_mapped_file(tiny_data: Path) -> None:
    ids = open_tokens(tiny_data / "validation.bin").ids
    targets = np.concatenate([y.ravel() for _, y in sequential_windows(ids, 128, 4)])
    assert np.array_equal(targets, ids[1:])


def test_the_real_sample_has_the_tokens_that_were_counted_elsewhere(sample_stories, gpt2_cache, tmp_path):
    info = prepare(DataConfig(source=str(sample_stories)), tmp_path)
    assert (info.train.stories, info.train.tokens) == (21_228, 4_406_869)
    assert (info.validation.stories, info.validation.tokens) == (1_500, 297_543)


@pytest.mark.parametrize("name", ["train.json", "validation.json", "vocabulary.json", "train.bin"])
def test_a_file_of_somebody_elses_is_never_written_over(name, tmp_path):
    (tmp_path / name).write_text('{"mine": "a list of trains"}')
    data = DataConfig(source="builtin", tokenizer="bpe:300", builtin_stories=20)
    with pytest.raises(StoryLLMError, match=f"{name} holds other data .*--overwrite"):
        prepare(data, tmp_path)
    assert (tmp_path / name).read_text() == '{"mine": "a list of trains"}'
    assert prepare(data, tmp_path, overwrite=True).train.stories == 20


def test_verify_reads_everything(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    assert verify(tmp_path / "data").train == read_info(tiny_data / "train.bin")
    path = tmp_path / "data" / "validation.bin"
    ids = np.fromfile(path, np.uint16)
    ids[[3, 4]] = ids[[4, 3]]  # an allowed id, and the same number of each
    ids.tofile(path)
    assert open_tokens(path)
    message = refusal(lambda: verify(tmp_path / "data"))
    assert message.startswith(f"{path} is damaged: its sha256 is ")
    assert message.endswith("remove it and prepare the data again")


@pytest.mark.parametrize("name", ["stories", "bytes"])
def test_verify_counts(tiny_data: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    info = read_json(tmp_path / "data" / "train.json")
    write_json(tmp_path / "data" / "train.json", {**info, name: info[name] - 1})
    assert f"its {name} is {info[name]}, expected {info[name] - 1}" in refusal(lambda: verify(tmp_path / "data"))


def test_data_that_was_damaged_is_removed_and_made_again(source: Path, tmp_path: Path) -> None:
    before = prepare(config(source), tmp_path / "out")
    path = tmp_path / "out" / "train.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoryLLMError, match="remove it and prepare"):
        verify(tmp_path / "out")
    path.unlink()
    assert prepare(config(source), tmp_path / "out") == before == verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("length", "block_size", "count"), [(1000, 8, 5), (1000, 8, 300), (17, 8, 4), (16, 8, 3), (9, 8, 2)]
)
def test_shuffled_windows_come_once_before_any_comes_again(length: int, block_size: int, count: int) -> None:
    ids = np.arange(length, dtype=np.uint16)
    in_epoch = max(1, length // block_size - 1)
    batches = [shuffled_windows(ids, block_size, count, (0, 1), i) for i in range(3 * in_epoch // count + 3)]
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert x.shape == y.shape == (count * len(batches), block_size)
    assert (x[:, 1:] == x[:, :-1] + 1).all()
    assert (y == x + 1).all()
    for epoch in range(len(x) // in_epoch):
        starts = np.sort(x[epoch * in_epoch : (epoch + 1) * in_epoch, 0])
        assert (np.diff(starts) == block_size).all()  # none twice, and none left out between
    for i, (again, _) in enumerate(batches):
        assert (shuffled_windows(ids, block_size, count, (0, 1), i)[0] == again).all()
    if in_epoch > 10:
        other = shuffled_windows(ids, block_size, count, (0, 2), 0)[0]
        assert (other != batches[0][0]).any()
        assert (x[:in_epoch] != x[in_epoch : 2 * in_epoch]).any()  # another order
        assert len({int(x[e * in_epoch : (e + 1) * in_epoch, 0].min()) for e in range(3)}) > 1  # and other cuts


def test_too_few_tokens_for_one_shuffled_window() -> None:
    with pytest.raises(StoryLLMError, match="a window of 8 needs 9"):
        shuffled_windows(np.arange(8, dtype=np.uint16), 8, 1, (0,), 0)
