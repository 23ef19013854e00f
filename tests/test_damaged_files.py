"""Every file of ours, damaged in every region: it is read as it was written, or refused in one line that names it."""

import json
import random
import shutil
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import TINY

import storyllm
from storyllm import StoryLLMError, read_log, tokens, train
from storyllm.checkpoint import DamagedCheckpointError, load_checkpoint, save_checkpoint
from storyllm.files import read_json, write_json
from storyllm.tokens import open_tokens, read_info, read_tokenizer, verify


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """A finished run, and its data beside it."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(tiny_data, folder / "data")
    train(TINY, folder / "data", folder / "run")
    return folder


def flipped(data, places):
    """`data` again and again, each time with one other bit."""
    for place in places:
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        yield place, bytes(damaged)


def cut(data, count, rng):
    """Beginnings of `data`, with what was there before lost, or gone to zeros, or written over."""
    for size in [0, 1, 2, len(data) - 1, *(rng.randrange(len(data)) for _ in range(count))]:
        yield f"cut at {size}", data[:size]
        yield f"zeros from {size}", data[:size] + bytes(len(data) - size)
        yield f"noise at {size}", data[:size] + rng.randbytes(64) + data[size + 64 :]


def check(path, read, cases, same):
    """Puts each case in the file's place; returns how many were refused. What is read must be the `same`."""
    before = path.read_bytes()
    refused = 0
    try:
        for place, data in cases:
            if data == before:
                continue
            path.write_bytes(data)
            try:
                value = read()
            except StoryLLMError as error:
                message = str(error)
                assert path.name in message or path.with_suffix(".bin").name in message, (place, message)
                assert "\n" not in message
                refused += 1
            except Exception as error:
                raise AssertionError(f"{path.name}, {place}: {error!r}") from error
            else:
                assert same(value), f"{path.name}, {place}: read as something else"
    finally:
        path.write_bytes(before)
    return refused


# Where the ordinary tests take a sample of places, the campaign takes many.
FEW_OR_MANY = pytest.mark.parametrize("share", [1, pytest.param(20, marks=pytest.mark.campaign)])


def sample(data, count, rng):
    """Places of bits: all over the file, and more at both its ends."""
    ends = [*range(min(64, len(data)) * 8), *range(max(0, len(data) - 256) * 8, len(data) * 8)]
    return sorted(
        {*rng.sample(range(len(data) * 8), min(count, len(data) * 8)), *rng.sample(ends, min(count // 2, len(ends)))}
    )


@FEW_OR_MANY
@pytest.mark.parametrize("name", ["best_model_params.pt", "last.pt"])
def test_checkpoints(run, name, share):
    path = run / "run" / name
    expected = load_checkpoint(path)
    rng, data = random.Random(share), path.read_bytes()

    def same(contents):
        assert set(contents) == set(expected)
        return contents["recipe"] == expected["recipe"] and all(
            torch.equal(contents["model"][key], tensor) for key, tensor in expected["model"].items()
        )

    cases = [*flipped(data, sample(data, 150 * share, rng)), *cut(data, 20 * share, rng)]
    refused = check(path, lambda: load_checkpoint(path), cases, same)
    assert refused > 0.8 * len(cases)  # what lies between the records may change


@FEW_OR_MANY
@pytest.mark.parametrize("split", ["train", "validation"])
def test_ids(run, split, share):
    """At each start by size and range, in full by `verify`."""
    path = run / "data" / f"{split}.bin"
    rng, data = random.Random(share), path.read_bytes()
    cases = [*flipped(data, sample(data, 200 * share, rng)), *cut(data, 20 * share, rng)]
    assert check(path, lambda: verify(path.parent), cases, lambda _: False) >= len(cases) - 2
    check(
        path,
        lambda: open_tokens(path),
        cases,
        lambda opened: opened.ids.max() < 300 and len(opened.ids) == len(data) // 2,
    )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_descriptions(run, split):
    path = run / "data" / f"{split}.json"
    expected, data = read_info(path), path.read_bytes()
    cases = [*flipped(data, range(8 * len(data))), *cut(data, 50, random.Random(0))]
    assert check(path, lambda: read_info(path), cases, lambda info: info == expected) > 0.7 * len(cases)


@FEW_OR_MANY
def test_vocabularies(run, share):
    path = run / "data" / "vocabulary.json"
    expected, data = read_tokenizer(path.parent), path.read_bytes()
    rng = random.Random(share)

    def same(tokenizer):
        return storyllm.tokens.tokenizer_hash(tokenizer) == storyllm.tokens.tokenizer_hash(expected)

    cases = [*flipped(data, sample(data, 200 * share, rng)), *cut(data, 20 * share, rng)]
    assert check(path, lambda: read_tokenizer(path.parent), cases, same) > 0.9 * len(cases)


@FEW_OR_MANY
def test_logs(run, share):
    path = run / "run" / "log.jsonl"
    expected, data = read_log(path), path.read_bytes()

    def same(log):
        """All of it, but for a last line that lost its end; the name of a checksum may have become another."""
        for entries, whole in ((log.updates, expected.updates), (log.evaluations, expected.evaluations)):
            if len(entries) < len(whole) - (whole is expected.evaluations):
                return False
            if any(entry | other != entry for entry, other in zip(entries, whole, strict=False)):
                return False
        return expected.run.items() <= log.run.items()

    places = range(8 * len(data)) if share > 1 else sample(data, 1500, random.Random(0))
    assert check(path, lambda: read_log(path), flipped(data, places), same) > 0.9 * len(places)
    check(path, lambda: read_log(path), cut(data, 20, random.Random(0)), lambda log: len(log.updates) <= 6)


def test_a_fault_is_found(run, monkeypatch):
    """Readers that look at no checksum do not pass these tests."""
    path = run / "run" / "best_model_params.pt"
    data, expected = path.read_bytes(), load_checkpoint(path)["model"]
    cases = list(flipped(data, sample(data, 60, random.Random(0))))
    monkeypatch.setattr(storyllm.checkpoint, "_check_archive", lambda path: None)

    def same(contents):
        return all(torch.equal(contents["model"][key], tensor) for key, tensor in expected.items())

    with pytest.raises((AssertionError, KeyError)):
        check(path, lambda: load_checkpoint(path), cases, same)
    monkeypatch.setattr(tokens, "sha256", lambda path: read_info(path).sha256)
    path = run / "data" / "train.bin"
    with pytest.raises(AssertionError):
        check(path, lambda: verify(path.parent), flipped(path.read_bytes(), range(0, 4000, 8)), lambda _: False)


# What never was one of ours

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
REPEATABLE = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def refused_or(call, accepted=lambda value: True):
    try:
        assert accepted(call())
    except StoryLLMError as error:
        assert "\n" not in str(error)  # noqa: PT017


@given(data=st.binary(max_size=300))
@REPEATABLE
def test_random_bytes(scratch, data):
    names = ("a.pt", "a.json", "vocabulary.json", "log.jsonl", "a.bin")
    readers = (load_checkpoint, read_info, lambda path: read_tokenizer(path.parent), read_log, open_tokens)
    for name, read in zip(names, readers, strict=True):
        (scratch / name).write_bytes(data)
        refused_or(lambda read=read, name=name: read(scratch / name))


@given(name=st.sampled_from([f.name for f in storyllm.tokens.dataclasses.fields(tokens.TokenInfo)]), value=JSON)
@REPEATABLE
def test_descriptions_that_lie(run, scratch, name, value):
    """With a checksum that is right: written by somebody who means it."""
    folder = scratch / "lying"
    shutil.copytree(run / "data", folder, dirs_exist_ok=True)
    values = read_json(run / "data" / "train.json")
    write_json(folder / "train.json", {**values, name: value})
    refused_or(lambda: verify(folder))
    refused_or(lambda: train(TINY.override({"train.stop_at": 1}), folder, scratch / "run"))
    shutil.rmtree(scratch / "run", ignore_errors=True)


@given(changes=st.dictionaries(st.sampled_from(["name", "tokens", "request", "more"]), JSON, min_size=1))
@REPEATABLE
def test_vocabularies_that_lie(run, scratch, changes):
    write_json(scratch / "vocabulary.json", {**read_json(run / "data" / "vocabulary.json"), **changes})
    refused_or(lambda: read_tokenizer(scratch))


@given(
    event=st.sampled_from(["run", "update", "evaluation", "warning"]),
    values=st.dictionaries(
        st.sampled_from(["iteration", "train_loss", "val_loss", "learning_rate", "recipe", "device", "seconds"]), JSON
    ),
)
@REPEATABLE
def test_logs_that_lie(run, scratch, event, values):
    """They can be drawn, if they can be read."""
    lines = [json.loads(line) for line in (run / "run" / "log.jsonl").read_bytes().splitlines()]
    line = next((line for line in lines if line["event"] == event), {"event": event, "iteration": 0, "message": ""})
    changed = {key: value for key, value in {**line, **values}.items() if key != "crc32"}
    path = scratch / "log.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [*lines[:3], changed, *lines[3:]]))
    refused_or(lambda: storyllm.plot_losses(path))


def paths_in(value, path=()):
    """Every place in nested dictionaries, as a tuple of keys."""
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from paths_in(inner, (*path, key))


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


@given(data=st.data())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_checkpoints_that_lie(run, scratch, data):
    """Any part of a whole checkpoint is something else."""
    name = data.draw(st.sampled_from(["last.pt", "best_model_params.pt"]))
    contents = load_checkpoint(run / "run" / name)
    places = sorted(paths_in(contents), key=str)
    *path, key = data.draw(st.sampled_from(places))
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
    refused_or(lambda: storyllm.load(folder / name).tell("One day", max_new_tokens=2, seed=0))
    if name == "last.pt":
        refused_or(lambda: train(TINY.override({"train.max_iters": 24}), run / "data", folder))
    shutil.rmtree(folder)


def test_a_state_of_another_shape_is_refused(run, tmp_path):
    contents = load_checkpoint(run / "run" / "last.pt")
    contents["optimizer"]["state"][1]["exp_avg"] = torch.zeros(3)
    save_checkpoint(tmp_path / "last.pt", contents)
    with pytest.raises(StoryLLMError, match=r"last\.pt does not fit this model \(exp_avg of parameter 1 has shape"):
        train(TINY.override({"train.max_iters": 30}), run / "data", tmp_path)


def test_an_older_format_is_no_checkpoint(run, tmp_path):
    """PyTorch's own of before 1.6 has no checksums."""
    torch.save(load_checkpoint(run / "run" / "last.pt"), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(DamagedCheckpointError, match=r"a\.pt is damaged or not a checkpoint \(BadZipFile\)"):
        load_checkpoint(tmp_path / "a.pt")
