"""`prepare` writes exactly the stories of its source, completely or not at all, and overwrites nothing unless asked."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from helpers import folder_contents, jsonl_bytes, random_stories, run_in_subprocess, stories_in, write_stories
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storyllm import DataConfig, StoryLLMError, load_tokenizer, open_token_file, prepare, read_stories, verify
from storyllm.data import formats
from storyllm.data import prepare as prepare_module
from storyllm.data.prepare import BATCH_CHARACTERS, encoded_batches
from storyllm.data.token_file import PreparedData, open_dataset, read_info
from storyllm.data.tokenizer import gpt2_tokenizer, tokenizer_from_dict, tokenizer_hash, tokenizer_to_dict, train_bpe
from storyllm.files import lock_folder, read_json, write_json

MARK = "<|endoftext|>"
STORIES = {
    "train": [*random_stories(40), "", f"a {MARK} within", "Zoë 😀\0\r\nשלום\n", "  ", "", *random_stories(9, seed=1)],
    "validation": [*random_stories(10, seed=2), "", MARK],
}
FILES = {"train.bin", "train.json", "validation.bin", "validation.json", "vocabulary.json"}


def write_source(folder: Path, stories: dict[str, list[str]] = STORIES) -> Path:
    folder.mkdir()
    for split, texts in stories.items():
        (folder / f"{split}.jsonl").write_bytes(jsonl_bytes(texts))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def config(source: Path, **fields: Any) -> DataConfig:
    return DataConfig(**{"source": str(source), "tokenizer": "bpe:300", **fields})


def modification_times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(StoryLLMError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is written


def assert_describes(prepared: PreparedData, out: Path, source: Path, tokenizer: tiktoken.Encoding) -> None:
    """Checks every count and checksum against STORIES."""
    for split, stories in STORIES.items():
        info = getattr(prepared, split)
        path = out / f"{split}.bin"
        assert stories_in(path, tokenizer) == stories
        assert (info.split, info.source, info.tokenizer) == (split, str(source), tokenizer.name)
        assert info.stories == len(stories)
        assert info.tokens == sum(len(tokenizer.encode_ordinary(story)) + 1 for story in stories)
        assert info.tokens * 2 == path.stat().st_size
        assert info.bytes == sum(len(story.encode()) for story in stories)
        assert info.vocab_size == tokenizer.n_vocab
        assert info.tokenizer_hash == tokenizer_hash(tokenizer)
        assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert read_json(path.with_suffix(".json")) == dataclasses.asdict(info)
        assert read_info(path) == info


def test_prepare_with_a_trained_vocabulary(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    prepared = prepare(config(source), out)
    assert load_tokenizer(out).n_vocab == 300
    assert_describes(prepared, out, source, load_tokenizer(out))
    assert set(folder_contents(out)) == FILES
    assert verify(out) == prepared


def test_prepare_with_gpt2(gpt2_cache: Path, source: Path, out: Path) -> None:
    prepared = prepare(config(source, tokenizer="gpt2"), out)
    assert prepared.train.vocab_size == 50257
    assert_describes(prepared, out, source, gpt2_tokenizer())
    assert tokenizer_hash(load_tokenizer(out)) == prepared.train.tokenizer_hash


def test_prepare_is_deterministic(source: Path, tmp_path: Path) -> None:
    prepare(config(source), tmp_path / "one")
    prepare(config(source), tmp_path / "two")
    assert folder_contents(tmp_path / "one") == folder_contents(tmp_path / "two")


def test_vocabulary_is_trained_on_the_training_stories_only(tmp_path: Path, out: Path) -> None:
    train = ["the cat sat on the mat and the other cat sat there"] * 20
    source = write_source(tmp_path / "source", {"train": train, "validation": ["zzzzzzzz qqqqqqqq"] * 500})
    prepare(config(source, tokenizer="bpe:265"), out)
    tokenizer = load_tokenizer(out)
    assert len(tokenizer.encode_ordinary("zzzz")) == 4
    assert len(tokenizer.encode_ordinary("the")) == 1


ANY_STORY = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from([*"\0\r\ufeff \x85\u2028", MARK, "<|endoftext|", "\r\n", "   ", "'ll", *random_stories(3)])
).map("".join)


@pytest.mark.filterwarnings("ignore:the stories yield")
@pytest.mark.parametrize("examples", [8, pytest.param(500, marks=[pytest.mark.campaign, pytest.mark.timeout(1_200)])])
def test_any_stories_survive_preparation(tmp_path_factory: pytest.TempPathFactory, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=examples < 100, database=None)
    @given(st.lists(ANY_STORY, min_size=1, max_size=6), st.lists(ANY_STORY, min_size=1, max_size=3))
    @example([""], [""])
    @example(["", MARK, f"a{MARK}b", ""], [MARK * 2])
    @example(["\0", "a\r\nb\r\n", "a \ufeff b", "\ufeff", " \n"], ["\u2028\x85\x1c", "\n"])
    def survive(train: list[str], validation: list[str]) -> None:
        folder = tmp_path_factory.mktemp("stories")
        stories = {"train": train, "validation": validation}
        info = prepare(config(write_source(folder / "source", stories)), folder / "out")
        for split, texts in stories.items():
            assert stories_in(folder / "out" / f"{split}.bin", load_tokenizer(folder / "out")) == texts
            assert getattr(info, split).bytes == sum(len(text.encode()) for text in texts)

    survive()


def test_a_few_stories_are_enough_for_a_window(tmp_path: Path, out: Path) -> None:
    path = write_stories(tmp_path / "a.txt", random_stories(40))
    with pytest.warns(UserWarning, match=r"a\.txt is small") as caught:
        info = prepare(config(path), out)
    assert len(caught) == 1
    assert info.train.stories + info.validation.stories == 40
    assert info.validation.tokens > 256


@pytest.mark.filterwarnings("ignore:.* is small")
def test_a_book_is_cut_into_a_training_and_a_validation_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: Path
) -> None:
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", 1_000)  # a book of the usual size is one piece
    text = " ".join(random_stories(60))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    info = prepare(config(tmp_path / "book.txt"), out)
    (train,), (validation,) = (
        stories_in(out / f"{split}.bin", load_tokenizer(out)) for split in ("train", "validation")
    )
    assert train + validation == text
    assert info.validation.tokens > 256


def test_max_stories_limits_each_split(source: Path, out: Path) -> None:
    info = prepare(config(source, max_stories=7), out)
    assert (info.train.stories, info.validation.stories) == (7, 7)
    assert stories_in(out / "train.bin", load_tokenizer(out)) == STORIES["train"][:7]


def test_settings_without_a_value_are_not_part_of_the_request(source: Path, out: Path) -> None:
    """Data that was prepared before such a setting existed stays valid."""
    assert "max_stories" not in prepare(config(source), out).train.request
    assert open_dataset(out).config == config(source)


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        ("train valid test", ["train: train.jsonl", "validation: valid.jsonl", "skipped: test.jsonl"]),
        ("1 2 3 4 5 6 7", ["stories: 1.jsonl, 2.jsonl, 3.jsonl, 4.jsonl, 5.jsonl and 2 more"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.* is small")
def test_the_files_of_a_folder_are_printed(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], names: str, lines: list[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in names.split():
        write_stories(source / f"{name}.jsonl", random_stories(40))
    prepare(config(source), out)
    assert capsys.readouterr().out.splitlines()[: len(lines)] == lines


# Batches


def pieces_of(stories: Iterable[str]) -> Iterator[tuple[str, bool]]:
    return ((story, True) for story in stories)


def assert_encoded(stories: list[str], tokenizer: tiktoken.Encoding) -> None:
    """Checks `encoded_batches` against the stories encoded one by one."""
    batches = list(encoded_batches(pieces_of(stories), tokenizer))
    ids = [token for story in stories for token in [*tokenizer.encode_ordinary(story), tokenizer.eot_token]]
    assert np.concatenate([batch.ids for batch in batches]).tolist() == ids
    assert all(batch.ids.dtype == np.uint16 for batch in batches)
    assert sum(batch.num_stories for batch in batches) == len(stories)
    assert sum(batch.num_bytes for batch in batches) == sum(len(story.encode()) for story in stories)


def test_end_of_text_in_a_story_is_ordinary_text_in_every_batch() -> None:
    rest = [f"Story {i}." for i in range(10)] + ["a <|endof", "text|> b", "", " <|endoftext|"]
    filler = "Zoë and the cat. " * (BATCH_CHARACTERS // 17)  # fills most of a batch
    stories = [MARK, filler, *rest, filler, f"a{MARK}b", filler, *rest, f"a {MARK}"]
    tokenizer = train_bpe(rest, 262)
    assert len(list(encoded_batches(pieces_of(stories), tokenizer))) > 2
    assert_encoded(stories, tokenizer)


def test_ids_of_the_largest_vocabulary_fit_16_bits() -> None:
    few = tokenizer_to_dict(train_bpe(random_stories(20), 300))["tokens"].split()
    tokens = few + ["PGE" + f"{i:05}" for i in range(65_535 - len(few))]  # valid base64
    tokenizer = tokenizer_from_dict({"name": "largest", "tokens": " ".join(tokens)})
    assert tokenizer.eot_token == 65_535
    assert_encoded(STORIES["train"], tokenizer)


@pytest.mark.parametrize("part", [200, pytest.param(None, marks=pytest.mark.campaign)])
def test_real_stories(sample_stories: Path, gpt2_cache: Path, part: int | None) -> None:
    """GPT-2's ids of each story, as tiktoken encodes it alone."""
    stories = read_stories(DataConfig(source=str(sample_stories)), "validation")
    assert_encoded(list(itertools.islice(stories, part)), tiktoken.get_encoding("gpt2"))


@pytest.mark.campaign
def test_token_counts_of_the_real_stories(sample_stories: Path, gpt2_cache: Path, out: Path) -> None:
    info = prepare(DataConfig(source=str(sample_stories)), out)
    assert (info.train.stories, info.train.tokens) == (21_228, 4_406_869)
    assert (info.validation.stories, info.validation.tokens) == (1_500, 297_543)


def test_stories_are_read_a_bounded_number_of_batches_ahead() -> None:
    read = 0

    def stories() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "a" * (BATCH_CHARACTERS // 4)

    batches = encoded_batches(pieces_of(stories()), train_bpe([], 257))
    for number in range(1, 4):
        next(batches)
        assert read <= 4 * (number + (os.cpu_count() or 1) + 1)
    batches.close()


def test_memory_does_not_grow_with_the_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # With batches of the usual size, only a large corpus would have more than one.
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 10_000)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(2, 8))) for _ in range(300)]
    stories = [" ".join(rng.choices(words, k=60)) for _ in range(3_000)]

    def peak(number: int) -> int:
        source = write_source(tmp_path / f"source-{number}", {"train": stories[:number], "validation": stories[:10]})
        tracemalloc.start()
        try:
            assert prepare(config(source), tmp_path / f"{number}").train.stories == number
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # imports and caches
    assert peak(3_000) < peak(300) + 100_000  # the stories take a megabyte


# Calling it again


def test_completed_data_is_reused(source: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = prepare(config(source), out)
    before = folder_contents(out), modification_times(out)
    capsys.readouterr()
    for overwrite in (False, True):
        assert prepare(config(source), str(out), overwrite=overwrite) == first
    assert (folder_contents(out), modification_times(out)) == before
    assert capsys.readouterr().out == ""  # no progress bar: nothing was read


def test_source_may_move(source: Path, tmp_path: Path, out: Path) -> None:
    prepare(config(source), out)
    before = modification_times(out)
    prepare(config(source.rename(tmp_path / "another name")), out)
    assert modification_times(out) == before


def test_missing_split_is_prepared_again_with_the_same_vocabulary(source: Path, out: Path) -> None:
    prepare(config(source), out)
    complete, before = folder_contents(out), modification_times(out)
    (out / "validation.bin").unlink()
    prepare(config(source), out)
    assert folder_contents(out) == complete
    after = modification_times(out)
    assert all(after[name] == before[name] for name in ("train.bin", "train.json", "vocabulary.json"))


@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff", b"[" * 100_000, b'{"request": 1}', "truncated"])
def test_missing_or_corrupted_vocabulary_is_replaced(source: Path, out: Path, content: bytes | str | None) -> None:
    prepare(config(source), out)
    complete = folder_contents(out)
    path = out / "vocabulary.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(complete[path.name][:1_000] if content == "truncated" else content)
    assert "vocabulary.json" in error_of(lambda: load_tokenizer(out))
    prepare(config(source), out)
    assert folder_contents(out) == complete


def test_data_of_another_vocabulary_is_prepared_again(source: Path, tmp_path: Path, out: Path) -> None:
    """The vocabulary file names the same request, but its tokens differ."""
    prepare(config(source), out)
    prepare(config(write_source(tmp_path / "b", {**STORIES, "train": ["zu " * 9, *STORIES["train"][:9]]})), out / "b")
    own, other = (read_json(folder / "vocabulary.json") for folder in (out, out / "b"))
    assert own["tokens"] != other["tokens"]
    write_json(out / "vocabulary.json", {**own, "tokens": other["tokens"]})
    prepared = prepare(config(source), out)
    tokenizer = load_tokenizer(out)
    assert verify(out) == prepared
    assert prepared.train.tokenizer_hash == tokenizer_hash(tokenizer)
    for split, stories in STORIES.items():
        assert stories_in(out / f"{split}.bin", tokenizer) == stories


# A folder with other data


def changed_train_stories(source: Path) -> DataConfig:
    path = source / "train.jsonl"
    path.write_bytes(path.read_bytes() + b'{"text": "one more"}\n')
    return config(source)


def changed_validation_stories(source: Path) -> DataConfig:
    path = source / "validation.jsonl"
    path.write_bytes(path.read_bytes().replace(b"One day", b"One dax", 1))  # of the same size
    return config(source)


OTHER_DATA: dict[str, Callable[[Path], DataConfig]] = {
    "vocabulary": lambda source: config(source, tokenizer="bpe:299"),
    "cleaning": lambda source: config(source, clean=True),
    "number of stories": lambda source: config(source, max_stories=3),
    "column": lambda source: config(source, text_column="story"),
    "source": lambda source: config(write_source(source.parent / "b", {"train": ["a"], "validation": ["b"]})),
    "synthetic": lambda source: config(Path("synthetic"), synthetic_stories=20),
    "changed train stories": changed_train_stories,
    "changed validation stories": changed_validation_stories,
}


@pytest.mark.parametrize("other", OTHER_DATA)
@pytest.mark.filterwarnings("ignore:the stories yield")
def test_other_data_is_replaced_only_if_asked(source: Path, tmp_path: Path, out: Path, other: str) -> None:
    prepare(config(source), out)
    (out / "notes.txt").write_text("unrelated")
    before = folder_contents(out), modification_times(out)
    data = OTHER_DATA[other](source)
    message = error_of(lambda: prepare(data, out))
    assert "--overwrite" in message and str(out) in message
    assert (folder_contents(out), modification_times(out)) == before
    if other != "column":  # no story has that column
        replaced = prepare(data, out, overwrite=True)
        assert prepare(data, tmp_path / "empty") == replaced
        assert folder_contents(out) == {**folder_contents(tmp_path / "empty"), "notes.txt": b"unrelated"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_file_of_another_program_is_replaced_only_if_asked(out: Path, name: str) -> None:
    content = {name: b'{"mine": "a list of trains"}'}
    out.mkdir()
    (out / name).write_bytes(content[name])
    data = config(Path("synthetic"), synthetic_stories=20)
    message = error_of(lambda: prepare(data, out))
    assert str(out / name) in message and "--overwrite" in message
    assert folder_contents(out) == content
    assert prepare(data, out, overwrite=True).train.stories == 20


def test_truncated_data_is_not_complete(source: Path, out: Path) -> None:
    prepare(config(source), out)
    complete = folder_contents(out)
    (out / "train.bin").write_bytes(complete["train.bin"][:-2])
    assert "--overwrite" in error_of(lambda: prepare(config(source), out))
    prepare(config(source), out, overwrite=True)
    assert folder_contents(out) == complete


@pytest.mark.parametrize("name", ["out", "out/below"])
def test_file_in_place_of_the_folder_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").write_text("a file")
    message = error_of(lambda: prepare(config(source), tmp_path / name))
    assert str(tmp_path / name) in message and "another folder" in message
    assert (tmp_path / "out").read_text() == "a file"


def test_folder_that_is_in_use_is_refused(source: Path, out: Path) -> None:
    with lock_folder(out):
        assert "in use" in error_of(lambda: prepare(config(source), out))
    assert folder_contents(out) == {}


# Refused input


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.filterwarnings("ignore:the stories yield")
def test_split_without_stories_is_refused(tmp_path: Path, out: Path, split: str) -> None:
    source = write_source(tmp_path / "source", {"train": ["a"], "validation": ["b"], split: []})
    assert f"no {split} stories" in error_of(lambda: prepare(config(source), out))
    assert f"{split}.bin" not in folder_contents(out)


def test_missing_source_is_refused(tmp_path: Path, out: Path) -> None:
    assert "missing" in error_of(lambda: prepare(config(tmp_path / "missing"), out))
    assert not out.exists()


def test_something_other_than_a_data_config_is_refused(out: Path) -> None:
    assert "DataConfig" in error_of(lambda: prepare("synthetic", out))  # type: ignore[arg-type]


# Interruptions


def assert_only_complete_files(out: Path) -> None:
    """Each `.bin` in the folder has the content that the `.json` next to it describes."""
    for path in out.glob("*.bin"):
        tokens = open_token_file(path)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == tokens.info.sha256
    for path in out.glob("*.json"):
        json.loads(path.read_bytes())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("nth_flush", range(1, 11))
def test_interrupted_preparation_leaves_no_incomplete_file_and_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path, out: Path, error: type[BaseException], nth_flush: int
) -> None:
    prepare(config(source), tmp_path / "complete")
    flushes = itertools.count(1)
    fsync = os.fsync

    def interrupted_fsync(descriptor: int) -> None:
        if next(flushes) == nth_flush:
            raise error
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(error):  # noqa: PT012
        patch.setattr(os, "fsync", interrupted_fsync)
        prepare(config(source), out)
    assert not list(out.glob("*.part"))
    assert_only_complete_files(out)
    prepare(config(source), out)
    assert folder_contents(out) == folder_contents(tmp_path / "complete")


@pytest.mark.parametrize("bad_line", [0, 20, 53])
def test_bad_story_leaves_no_incomplete_file(source: Path, out: Path, bad_line: int) -> None:
    path = source / "train.jsonl"
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:bad_line], b"oops\n", *lines[bad_line:]]))
    assert f"line {bad_line + 1} " in error_of(lambda: prepare(config(source), out))
    assert folder_contents(out) == {}
    path.write_bytes(content)
    prepare(config(source), out)
    verify(out)


def kill_at_file_operation(number: int) -> None:
    """Makes the `number`-th call of a function that changes the names in a folder kill this process instead."""
    calls = itertools.count(1)

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("replace", "unlink"):
        setattr(os, name, killing(getattr(os, name)))


def kill_and_repeat_preparations() -> None:
    """In a subprocess: for each file operation, forks a preparation that is killed there, and repeats it.

    Both in a new folder and, overwriting, in a folder with the data of another vocabulary. Prints the number of kills.
    """
    data = config(write_source(Path("source")))
    other = config(Path("source"), tokenizer="bpe:290")

    def exit_code_in_fork(action: Callable[[], object]) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)

    def prepare_and_be_killed(out: Path, number: int, overwrite: bool) -> None:
        kill_at_file_operation(number)
        prepare(data, out, overwrite=overwrite)

    def prepare_again(out: Path, overwrite: bool) -> None:
        try:
            prepare(data, out)
        except StoryLLMError:
            if not overwrite:
                raise
            prepare(data, out, overwrite=True)  # part of the other data is left

    assert exit_code_in_fork(lambda: prepare(data, Path("complete"))) == 0
    assert exit_code_in_fork(lambda: prepare(other, Path("other"))) == 0
    complete = folder_contents(Path("complete"))
    for overwrite in (False, True):
        for number in itertools.count(1):
            out = Path(f"out-{overwrite}-{number}")
            if overwrite:
                shutil.copytree("other", out)
            arguments = out, number, overwrite
            code = exit_code_in_fork(lambda arguments=arguments: prepare_and_be_killed(*arguments))
            if code == 0:
                break
            assert code == -signal.SIGKILL, arguments
            assert_only_complete_files(out)
            assert exit_code_in_fork(lambda arguments=arguments: prepare_again(arguments[0], arguments[2])) == 0, (
                arguments
            )
            assert folder_contents(out) == complete, arguments
        print(f"\n{number - 1}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_preparation_can_be_repeated(tmp_path: Path) -> None:
    printed = run_in_subprocess(kill_and_repeat_preparations, cwd=tmp_path, timeout=110)
    assert min(int(line) for line in printed.splitlines() if line.isdigit()) >= 10
