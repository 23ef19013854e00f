"""Each of our files, corrupted anywhere: it is read as it was written, or rejected with one line that names it."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import string

import pytest
import torch
from helpers import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import storyllm
from storyllm import StoryLLMError, load_tokenizer, open_token_file, read_log, train, verify
from storyllm.checkpoint import CorruptedCheckpointError, load_checkpoint
from storyllm.data.token_file import TokenFileInfo, read_info
from storyllm.data.tokenizer import tokenizer_hash
from storyllm.files import read_json, write_json


@pytest.fixture(scope="module")
def run(tiny_data, tiny_run, tmp_path_factory):
    """A finished run and its data, to corrupt and restore."""
    folder = tmp_path_factory.mktemp("corrupted")
    shutil.copytree(tiny_data, folder / "data")
    shutil.copytree(tiny_run, folder / "run")
    return folder


# Where the normal suite corrupts a sample of positions, the campaign corrupts twenty times as many.
few_or_many = pytest.mark.parametrize(
    "factor", [1, pytest.param(20, marks=[pytest.mark.campaign, pytest.mark.timeout(1_800)])]
)


def sample_bits(data, count, rng):
    """Positions of bits all over the data, with more at both ends."""
    bits = 8 * len(data)
    ends = [*range(min(64, len(data)) * 8), *range(max(0, len(data) - 256) * 8, bits)]
    return sorted({*rng.sample(range(bits), min(count, bits)), *rng.sample(ends, min(count // 2, len(ends)))})


def flip_bits(data, positions):
    """Yields the data with one bit flipped, for each position."""
    for position in positions:
        corrupted = bytearray(data)
        corrupted[position // 8] ^= 1 << position % 8
        yield f"bit {position}", bytes(corrupted)


def truncate(data, count, rng):
    """Yields the data truncated, filled up with zeros, and with noise in it, at several positions."""
    for size in [0, 1, 2, len(data) - 1, *(rng.randrange(len(data)) for _ in range(count))]:
        yield f"truncated to {size}", data[:size]
        yield f"zeros from {size}", data[:size] + bytes(len(data) - size)
        yield f"noise at {size}", data[:size] + rng.randbytes(64) + data[size + 64 :]


def check(path, read, cases, is_correct):
    """Reads each corrupted version of a file and returns how many were rejected. The others must be read correctly."""
    original = path.read_bytes()
    rejected = 0
    try:
        for description, data in cases:
            if data == original:
                continue
            path.write_bytes(data)
            try:
                value = read()
            except StoryLLMError as error:
                message = str(error)
                assert path.name in message or path.with_suffix(".bin").name in message, (description, message)
                assert "\n" not in message
                rejected += 1
            except Exception as error:
                raise AssertionError(f"{path.name}, {description}: {error!r}") from error
            else:
                assert is_correct(value), f"{path.name}, {description}: read incorrectly"
    finally:
        path.write_bytes(original)
    return rejected


@few_or_many
@pytest.mark.parametrize("name", ["best_model_params.pt", "last.pt"])
def test_corrupted_checkpoints(run, name, factor):
    path = run / "run" / name
    expected = load_checkpoint(path)
    rng, data = random.Random(factor), path.read_bytes()

    def is_correct(contents):
        return contents["recipe"] == expected["recipe"] and all(
            torch.equal(contents["model"][key], tensor) for key, tensor in expected["model"].items()
        )

    cases = [*flip_bits(data, sample_bits(data, 100 * factor, rng)), *truncate(data, 15 * factor, rng)]
    rejected = check(path, lambda: load_checkpoint(path), cases, is_correct)
    assert rejected > 0.8 * len(cases)  # padding between the records may change


@few_or_many
@pytest.mark.parametrize("split", ["train", "validation"])
def test_corrupted_token_ids(run, split, factor):
    """`verify` finds every change; opening the file checks size and range."""
    path = run / "data" / f"{split}.bin"
    rng, data = random.Random(factor), path.read_bytes()
    cases = [*flip_bits(data, sample_bits(data, 100 * factor, rng)), *truncate(data, 15 * factor, rng)]
    assert check(path, lambda: verify(path.parent), cases, lambda _: False) >= len(cases) - 2

    def is_plausible(opened):
        return opened.ids.max() < 300 and len(opened.ids) == len(data) // 2

    check(path, lambda: open_token_file(path), cases, is_plausible)


@few_or_many
@pytest.mark.parametrize("split", ["train", "validation"])
def test_corrupted_descriptions(run, split, factor):
    path = run / "data" / f"{split}.json"
    expected, data = read_info(path), path.read_bytes()
    rng = random.Random(factor)
    positions = sample_bits(data, 500, rng) if factor == 1 else range(8 * len(data))
    cases = [*flip_bits(data, positions), *truncate(data, 50, rng)]
    assert check(path, lambda: read_info(path), cases, lambda info: info == expected) > 0.7 * len(cases)


@few_or_many
def test_corrupted_vocabularies(run, factor):
    path = run / "data" / "vocabulary.json"
    expected, data = tokenizer_hash(load_tokenizer(path.parent)), path.read_bytes()
    rng = random.Random(factor)
    cases = [*flip_bits(data, sample_bits(data, 150 * factor, rng)), *truncate(data, 15 * factor, rng)]
    rejected = check(path, lambda: load_tokenizer(path.parent), cases, lambda t: tokenizer_hash(t) == expected)
    assert rejected > 0.9 * len(cases)


@few_or_many
def test_corrupted_logs(run, factor):
    path = run / "run" / "log.jsonl"
    expected, data = read_log(path), path.read_bytes()

    def is_correct(log):
        """Complete except for a last line that lost its end. The name of a checksum may have changed."""
        for entries, complete in ((log.updates, expected.updates), (log.evaluations, expected.evaluations)):
            if len(entries) < len(complete) - (complete is expected.evaluations):
                return False
            if any(entry | other != entry for entry, other in zip(entries, complete, strict=False)):
                return False
        return expected.run.items() <= log.run.items()

    positions = range(8 * len(data)) if factor > 1 else sample_bits(data, 1_000, random.Random(0))
    assert check(path, lambda: read_log(path), flip_bits(data, positions), is_correct) > 0.9 * len(positions)
    check(path, lambda: read_log(path), truncate(data, 20, random.Random(0)), lambda log: len(log.updates) <= 6)


def test_readers_without_checksums_fail_these_tests(run, monkeypatch):
    """Shows that the tests above can fail. It has to replace our own checksums for that."""
    path = run / "run" / "best_model_params.pt"
    data, expected = path.read_bytes(), load_checkpoint(path)["model"]
    cases = list(flip_bits(data, sample_bits(data, 60, random.Random(0))))
    monkeypatch.setattr(storyllm.checkpoint, "_check_archive", lambda path: None)

    def is_correct(contents):
        return all(torch.equal(contents["model"][key], tensor) for key, tensor in expected.items())

    with pytest.raises((AssertionError, KeyError)):
        check(path, lambda: load_checkpoint(path), cases, is_correct)
    monkeypatch.setattr(storyllm.data.token_file, "sha256", lambda path: read_info(path).sha256)
    path = run / "data" / "train.bin"
    with pytest.raises(AssertionError):
        check(path, lambda: verify(path.parent), flip_bits(path.read_bytes(), range(0, 4000, 8)), lambda _: False)


# Files that were never ours, or were changed by someone who recomputed the checksums

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TENSORS = st.sampled_from(
    [
        torch.zeros(0),
        torch.zeros(300, 32, dtype=torch.float64),
        torch.zeros(1).expand(300, 32),
        torch.zeros(300, 32).t(),
        torch.full((300, 32), float("nan")),
        torch.zeros(300, 32, dtype=torch.int64),
        torch.eye(3).to_sparse(),
    ]
)


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def accepted_or_one_line(call):
    """Calls a function that may only raise a StoryLLMError of one line."""
    try:
        call()
    except StoryLLMError as error:
        assert "\n" not in str(error)  # noqa: PT017


@given(data=st.binary(max_size=300))
@examples(60)
def test_random_bytes_are_rejected_with_one_line(scratch, data):
    names = ("a.pt", "a.json", "vocabulary.json", "log.jsonl", "a.bin")
    readers = (load_checkpoint, read_info, lambda path: load_tokenizer(path.parent), read_log, open_token_file)
    for name, read in zip(names, readers, strict=True):
        (scratch / name).write_bytes(data)
        accepted_or_one_line(lambda read=read, name=name: read(scratch / name))


@given(name=st.sampled_from([field.name for field in dataclasses.fields(TokenFileInfo)]), value=JSON)
@examples(40)
def test_any_value_in_a_description_is_accepted_or_rejected_with_one_line(run, scratch, name, value):
    folder = scratch / "data"
    shutil.copytree(run / "data", folder, dirs_exist_ok=True)
    values = read_json(run / "data" / "train.json")
    write_json(folder / "train.json", {**values, name: value})
    accepted_or_one_line(lambda: verify(folder))
    accepted_or_one_line(lambda: train(TINY.override({"train.stop_at": 1}), folder, scratch / "run"))
    shutil.rmtree(scratch / "run", ignore_errors=True)


@given(changes=st.dictionaries(st.sampled_from(["name", "tokens", "request", "more"]), JSON, min_size=1))
@examples(60)
def test_any_vocabulary_is_accepted_or_rejected_with_one_line(run, scratch, changes):
    write_json(scratch / "vocabulary.json", {**read_json(run / "data" / "vocabulary.json"), **changes})
    accepted_or_one_line(lambda: load_tokenizer(scratch))


@given(
    event=st.sampled_from(["run", "update", "evaluation", "warning"]),
    values=st.dictionaries(
        st.sampled_from(["iteration", "train_loss", "val_loss", "learning_rate", "recipe", "device", "seconds"]), JSON
    ),
)
@examples(40)
def test_any_log_that_can_be_read_can_be_plotted(run, scratch, event, values):
    lines = [json.loads(line) for line in (run / "run" / "log.jsonl").read_bytes().splitlines()]
    line = next((line for line in lines if line["event"] == event), {"event": event, "iteration": 0, "message": ""})
    changed = {key: value for key, value in {**line, **values}.items() if key != "crc32"}
    path = scratch / "log.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [*lines[:3], changed, *lines[3:]]))
    accepted_or_one_line(lambda: storyllm.plot_losses(path))


def key_paths(value, path=()):
    """Every position in nested dictionaries, as a tuple of keys."""
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from key_paths(inner, (*path, key))


@given(data=st.data())
@examples(80)
def test_any_value_in_a_checkpoint_is_accepted_or_rejected_with_one_line(run, scratch, data):
    name = data.draw(st.sampled_from(["last.pt", "best_model_params.pt"]))
    contents = load_checkpoint(run / "run" / name)
    *path, key = data.draw(st.sampled_from(sorted(key_paths(contents), key=str)))
    inner = contents
    for step in path:
        inner = inner[step]
    if data.draw(st.booleans()):
        inner[key] = data.draw(JSON | TENSORS)
    else:
        del inner[key]
    folder = scratch / "run"
    folder.mkdir(exist_ok=True)
    torch.save(contents, folder / name)
    accepted_or_one_line(lambda: storyllm.load(folder / name).generate("One day", max_new_tokens=2, seed=0))
    if name == "last.pt":
        accepted_or_one_line(lambda: train(TINY.override({"train.max_iters": 24}), run / "data", folder))
    shutil.rmtree(folder)


def test_the_old_format_of_pytorch_which_has_no_checksums_is_rejected(run, tmp_path):
    torch.save(load_checkpoint(run / "run" / "last.pt"), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CorruptedCheckpointError, match=r"a\.pt"):
        load_checkpoint(tmp_path / "a.pt")
