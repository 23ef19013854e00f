"""Every file that StoryLLM writes, corrupted anywhere, is read correctly or refused in one line that names it."""

from __future__ import annotations

import hashlib
import random
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import TINY, flip_bit, folder_contents, losses, weights

import storyllm
from storyllm import StoryLLMError, load_tokenizer, open_token_file, read_log, train, verify
from storyllm.checkpoint import CorruptedCheckpointError, load_checkpoint
from storyllm.data.token_file import read_info
from storyllm.data.tokenizer import tokenizer_hash

Case = tuple[str, bytes]  # what was done to a file, and its content then

# The campaign tries many times as many places as the ordinary tests.
sample_and_campaign = pytest.mark.parametrize(
    "factor", [1, pytest.param(20, marks=[pytest.mark.campaign, pytest.mark.timeout(1_000)])]
)


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def flipped_bits(content: bytes, bits: Iterable[int]) -> Iterator[Case]:
    """`content` with one bit flipped, for each of these positions."""
    for bit in bits:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", bytes(changed)


def sample_bits(content: bytes, count: int, rng: random.Random) -> list[int]:
    """Positions of bits: some anywhere, and some near the start and the end of the file."""
    bits = 8 * len(content)
    ends = [*range(min(512, bits)), *range(max(0, bits - 2_048), bits)]
    return sorted({*rng.sample(range(bits), min(count, bits)), *rng.sample(ends, min(count // 2, len(ends)))})


def lost_ends(content: bytes, count: int, rng: random.Random) -> Iterator[Case]:
    """`content` truncated, with its end replaced by zeros, or with a part overwritten."""
    for size in [0, 1, 2, len(content) - 1, *(rng.randrange(len(content)) for _ in range(count))]:
        yield f"truncated to {size}", content[:size]
        yield f"zeros from {size}", content[:size] + bytes(len(content) - size)
        yield f"noise at {size}", content[:size] + rng.randbytes(64) + content[size + 64 :]


def count_refused(path: Path, cases: Iterable[Case], read: Callable[[], Any], is_correct: Callable[[Any], bool]) -> int:
    """Replaces the file by each case, and checks that `read` gives a correct value or one line that names the file.

    Returns the number of cases that were refused.
    """
    original, refused = path.read_bytes(), 0
    for description, content in cases:
        if content == original:
            continue
        path.write_bytes(content)
        try:
            value = read()
        except StoryLLMError as error:
            message = str(error)
            assert path.name in message or path.with_suffix(".bin").name in message, (description, message)
            assert len(message.splitlines()) == 1
            refused += 1
        except Exception as error:
            raise AssertionError(f"{path.name}, {description}: {error!r}") from error
        else:
            assert is_correct(value), f"{path.name}, {description}: read as something else"
    path.write_bytes(original)
    return refused


def same_weights(contents: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(torch.equal(contents["model"][name], tensor) for name, tensor in expected["model"].items())


@sample_and_campaign
@pytest.mark.parametrize("name", ["best_model_params.pt", "last.pt"])
def test_corrupted_checkpoints_are_refused(run, name, factor):
    path, rng = run / name, random.Random(factor)
    content, expected = path.read_bytes(), load_checkpoint(path)
    cases = [*flipped_bits(content, sample_bits(content, 150 * factor, rng)), *lost_ends(content, 20 * factor, rng)]
    refused = count_refused(
        path,
        cases,
        lambda: load_checkpoint(path),
        lambda contents: contents["recipe"] == expected["recipe"] and same_weights(contents, expected),
    )
    assert refused > 0.8 * len(cases)  # the padding between records may change


@sample_and_campaign
@pytest.mark.parametrize("split", ["train", "validation"])
def test_corrupted_token_files_are_found_by_verify(data, split, factor):
    path, rng = data / f"{split}.bin", random.Random(factor)
    content = path.read_bytes()
    cases = [*flipped_bits(content, sample_bits(content, 200 * factor, rng)), *lost_ends(content, 20 * factor, rng)]
    assert count_refused(path, cases, lambda: verify(data), lambda _: False) >= len(cases) - 2  # two change nothing
    count_refused(path, cases, lambda: open_token_file(path), lambda tokens: len(tokens.ids) == len(content) // 2)


@sample_and_campaign
@pytest.mark.parametrize("split", ["train", "validation"])
def test_corrupted_descriptions_are_refused(data, split, factor):
    path = data / f"{split}.json"
    content, expected = path.read_bytes(), read_info(path)
    bits = range(0, 8 * len(content), 1 if factor > 1 else 7)
    cases = [*flipped_bits(content, bits), *lost_ends(content, 20 * factor, random.Random(0))]
    refused = count_refused(path, cases, lambda: read_info(path), lambda info: info == expected)
    assert refused > 0.7 * len(cases)  # whitespace may change


@sample_and_campaign
def test_corrupted_vocabularies_are_refused(data, factor):
    path, rng = data / "vocabulary.json", random.Random(factor)
    content, expected = path.read_bytes(), tokenizer_hash(load_tokenizer(data))
    cases = [*flipped_bits(content, sample_bits(content, 200 * factor, rng)), *lost_ends(content, 20 * factor, rng)]
    refused = count_refused(
        path, cases, lambda: load_tokenizer(data), lambda tokenizer: tokenizer_hash(tokenizer) == expected
    )
    assert refused > 0.9 * len(cases)


@sample_and_campaign
def test_corrupted_logs_are_refused(run, factor):
    path, rng = run / "log.jsonl", random.Random(0)
    content, expected = path.read_bytes(), read_log(path)

    def is_correct(log: storyllm.Log) -> bool:
        # The last line, an evaluation, counts as incomplete without its newline. A flipped bit in the
        # name of its checksum disables it and adds an entry of another name.
        complete = len(log.updates) == len(expected.updates)
        complete &= len(log.evaluations) >= len(expected.evaluations) - 1
        read = [log.run, *log.updates, *log.evaluations]
        logged = [expected.run, *expected.updates, *expected.evaluations]
        return complete and all(entry | original == entry for entry, original in zip(read, logged, strict=False))

    bits = range(8 * len(content)) if factor > 1 else sample_bits(content, 1_000, rng)
    assert count_refused(path, flipped_bits(content, bits), lambda: read_log(path), is_correct) > 0.9 * len(bits)
    cases = lost_ends(content, 20 * factor, rng)
    count_refused(path, cases, lambda: read_log(path), lambda log: len(log.updates) <= len(expected.updates))


def test_readers_that_verify_no_checksum_fail_these_tests(run, data, monkeypatch):
    """The checks above can fail: without checksums, corrupted files are read as something else."""
    path, rng = run / "best_model_params.pt", random.Random(0)
    content, expected = path.read_bytes(), load_checkpoint(path)
    cases = list(flipped_bits(content, sample_bits(content, 60, rng)))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: None)
    with pytest.raises((AssertionError, KeyError)):
        count_refused(path, cases, lambda: load_checkpoint(path), lambda contents: same_weights(contents, expected))
    path = data / "train.bin"
    unverified = SimpleNamespace(hexdigest=lambda: read_info(path).sha256)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: unverified)
    with pytest.raises(AssertionError):
        count_refused(path, flipped_bits(path.read_bytes(), range(0, 4_000, 8)), lambda: verify(data), lambda _: False)


def test_an_older_pytorch_format_is_not_a_checkpoint(run):
    """PyTorch's format before 1.6 has no checksums."""
    path = run / "last.pt"
    torch.save(load_checkpoint(path), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CorruptedCheckpointError, match=r"last\.pt .*not a checkpoint"):
        load_checkpoint(path)


# Resuming with corrupted files


def assert_resumes_like_uninterrupted(folder: Path, tiny_data: Path, tiny_run: Path) -> None:
    train(TINY, tiny_data, folder)
    assert weights(folder) == weights(tiny_run)
    assert losses(folder)[0] == losses(tiny_run)[0]


@pytest.mark.parametrize("corrupted", [["last.pt"], ["last.pt", "last.1.pt"]])
def test_a_run_resumes_from_the_newest_intact_save(unfinished, tiny_run, tiny_data, corrupted):
    for name in corrupted:
        flip_bit(unfinished / name, (unfinished / name).stat().st_size // 2)
    with pytest.warns(UserWarning, match=rf"last\.pt.* corrupted.*last\.{len(corrupted)}\.pt"):
        assert_resumes_like_uninterrupted(unfinished, tiny_data, tiny_run)
    assert "corrupted" in read_log(unfinished / "log.jsonl").warnings[0]["message"]
    assert all((unfinished / f"{name}.corrupted").exists() for name in corrupted)  # nothing is deleted


def test_a_save_that_was_killed_between_two_renames_loses_nothing(unfinished, tiny_run, tiny_data):
    """last.pt has become last.1.pt, and the new file does not have its name yet."""
    for number in (1, 0):
        old = unfinished / (f"last.{number}.pt" if number else "last.pt")
        old.rename(unfinished / f"last.{number + 1}.pt")
    with pytest.warns(UserWarning, match=r"last\.pt is missing.*last\.1\.pt"):
        assert_resumes_like_uninterrupted(unfinished, tiny_data, tiny_run)


def test_zeros_that_a_power_loss_appended_to_the_log_are_removed(unfinished, tiny_run, tiny_data):
    with open(unfinished / "log.jsonl", "ab") as log:
        log.write(bytes(5_000))
    assert_resumes_like_uninterrupted(unfinished, tiny_data, tiny_run)


@pytest.mark.parametrize("kept", [0, 1, 3_000])
def test_a_log_that_lost_its_end_does_not_affect_the_model(unfinished, tiny_run, tiny_data, kept):
    log = unfinished / "log.jsonl"
    log.write_bytes(log.read_bytes()[:kept])
    with pytest.warns(UserWarning, match=r"log\.jsonl lost .* bytes"):
        train(TINY, tiny_data, unfinished)
    assert weights(unfinished) == weights(tiny_run)
    assert [entry["iteration"] for entry in read_log(log).updates][-2:] == [20, 22]


@pytest.mark.parametrize("name", ["last.pt", "log.jsonl"])
def test_without_an_intact_file_a_run_is_refused_and_left_alone(unfinished, tiny_data, name):
    for path in unfinished.glob("last*.pt" if name == "last.pt" else name):
        flip_bit(path, 700)
    before = folder_contents(unfinished)
    with pytest.raises(StoryLLMError, match=rf"{name}.* corrupted"):
        train(TINY, tiny_data, unfinished)
    assert folder_contents(unfinished) == before


def test_a_finished_run_without_its_log_still_succeeds(run, tiny_data):
    (run / "log.jsonl").write_bytes(b"")
    with pytest.warns(UserWarning, match="lost"):
        assert train(TINY, tiny_data, run).evaluations == []
