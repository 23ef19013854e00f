"""A run survives the loss of its machine if it has a mirror, and a mirror that fails never stops it."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import SAVE_EVERY_UPDATE, TINY, iteration_of, losses, weights

from storyllm import StoryLLMError, load, read_log, train
from storyllm.training import mirror as mirror_module

FILES = ["best_model_params.pt", "last.pt", "log.jsonl"]
COPY_EVERY_UPDATE = {"train.mirror_minutes": 0.0, **SAVE_EVERY_UPDATE}


@pytest.fixture
def drive(tmp_path):
    """The folder in which a Drive is mounted."""
    (tmp_path / "drive").mkdir()
    return tmp_path / "drive"


@pytest.fixture
def recipe(drive):
    """TINY with a mirror, which gets its first copy when the run stops."""
    return TINY.override({"train.mirror_dir": str(drive / "mirror")})


def copies(drive):
    """The copies of the run, in the order of their iterations."""
    found = (drive / "mirror" / "run").iterdir()
    return sorted(found, key=lambda path: int(path.name.split("-")[0]))


def lose_machine(folder: Path) -> None:
    """Another machine has nothing but the mirror."""
    shutil.rmtree(folder)


def assert_complete_run(folder, tiny_run):
    assert weights(folder) == weights(tiny_run)
    assert losses(folder)[0] == losses(tiny_run)[0]


# Copies


def test_a_copy_has_the_state_at_the_end(recipe, tiny_data, tmp_path, drive, tiny_run):
    train(recipe, tiny_data, tmp_path / "run")
    (copy,) = copies(drive)
    assert sorted(path.name for path in copy.iterdir()) == sorted([*FILES, "manifest.json"])
    for name in FILES:
        assert (copy / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert load(copy / "best_model_params.pt")
    assert_complete_run(copy, tiny_run)


def test_an_interrupted_run_is_copied(recipe, tiny_data, tmp_path, drive, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: signal.raise_signal(signal.SIGINT) or clip(*a))
    assert train(recipe, tiny_data, tmp_path / "run").interrupted
    (copy,) = copies(drive)
    assert iteration_of(copy / "last.pt") == 4
    assert read_log(copy / "log.jsonl").evaluations[-1]["iteration"] == 4


def test_copies_are_made_in_intervals_and_two_are_kept(recipe, tiny_data, tmp_path, drive):
    train(recipe.override(COPY_EVERY_UPDATE), tiny_data, tmp_path / "run")
    assert [iteration_of(copy / "last.pt") for copy in copies(drive)] == [22, 22]  # the last update, and the evaluation
    train(recipe.override({"train.stop_at": 16, **COPY_EVERY_UPDATE}), tiny_data, tmp_path / "other" / "run2")
    others = sorted((drive / "mirror" / "run2").iterdir())
    assert [iteration_of(copy / "last.pt") for copy in others] == [16, 16]


def test_no_copy_is_made_before_it_is_due(recipe, tiny_data, tmp_path, drive, monkeypatch):
    now = [1_000.0]
    monkeypatch.setattr(mirror_module.time, "monotonic", lambda: now[0])
    mirror = mirror_module.Mirror(str(drive / "mirror"), 10.0, tmp_path / "run", ("log.jsonl", "last.pt"), pytest.fail)
    (tmp_path / "run").mkdir()
    for name in ("log.jsonl", "last.pt"):
        (tmp_path / "run" / name).write_text("state")
    for seconds, number in ((599, 0), (2, 1), (598, 1), (2, 2)):
        now[0] += seconds
        mirror.copy_if_due((int(now[0]), 1))
        assert len(copies(drive) if (drive / "mirror").exists() else []) == number


# Resuming


@pytest.mark.parametrize("stop_at", [8, 16])
def test_another_machine_resumes_from_the_mirror(recipe, tiny_data, tmp_path, drive, tiny_run, capsys, stop_at):
    train(recipe.override({"train.stop_at": stop_at}), tiny_data, tmp_path / "run")
    lose_machine(tmp_path / "run")
    capsys.readouterr()
    log = train(recipe, tiny_data, tmp_path / "run")
    (first, _) = copies(drive)
    assert f"resuming at iteration {stop_at} from {first}\n" in capsys.readouterr().out
    assert [entry["iteration"] for entry in log.updates][:2] == [4, 8]
    assert_complete_run(tmp_path / "run", tiny_run)


def test_a_local_state_that_is_ahead_is_used(recipe, tiny_data, tmp_path, drive, tiny_run, capsys):
    train(recipe.override({"train.stop_at": 8}), tiny_data, tmp_path / "run")
    train(recipe.override({"train.stop_at": 16, "train.mirror_dir": None}), tiny_data, tmp_path / "run")
    capsys.readouterr()
    train(recipe, tiny_data, tmp_path / "run")
    assert f"resuming at iteration 16 from {tmp_path / 'run'}\n" in capsys.readouterr().out
    assert_complete_run(tmp_path / "run", tiny_run)


def test_a_local_state_that_is_behind_is_replaced(recipe, tiny_data, tmp_path, drive, tiny_run, capsys):
    train(recipe.override({"train.stop_at": 8}), tiny_data, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    train(recipe.override({"train.stop_at": 16}), tiny_data, tmp_path / "run")
    lose_machine(tmp_path / "run")
    shutil.move(tmp_path / "old", tmp_path / "run")
    capsys.readouterr()
    train(recipe, tiny_data, tmp_path / "run")
    assert "resuming at iteration 16 from " + str(drive) in capsys.readouterr().out
    assert_complete_run(tmp_path / "run", tiny_run)


def test_a_corrupted_local_state_is_replaced(recipe, tiny_data, tmp_path, drive, tiny_run):
    train(recipe.override({"train.stop_at": 16}), tiny_data, tmp_path / "run")
    for path in (tmp_path / "run").glob("last*.pt"):
        path.write_bytes(b"")
    train(recipe, tiny_data, tmp_path / "run")
    assert_complete_run(tmp_path / "run", tiny_run)


def test_a_restoration_that_was_killed_is_repeated(recipe, tiny_data, tmp_path, drive, tiny_run):
    """The log arrives first, last.pt at the end."""
    train(recipe.override({"train.stop_at": 16}), tiny_data, tmp_path / "run")
    for name in ("last.pt", "best_model_params.pt"):
        for path in (tmp_path / "run").glob(name.replace(".pt", "*.pt")):
            path.unlink()
    (tmp_path / "run" / "last.pt.part").write_bytes(b"PK")
    train(recipe, tiny_data, tmp_path / "run")
    assert_complete_run(tmp_path / "run", tiny_run)
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_finished_run_is_restored(recipe, tiny_data, tmp_path, drive, tiny_run, capsys):
    train(recipe, tiny_data, tmp_path / "run")
    lose_machine(tmp_path / "run")
    train(recipe, tiny_data, tmp_path / "run")
    assert "already finished" in capsys.readouterr().out
    assert_complete_run(tmp_path / "run", tiny_run)


# A mirror in which files are late, empty or missing


def truncate(copy: Path, name: str) -> None:
    os.truncate(copy / name, (copy / name).stat().st_size // 2)


def empty(copy: Path, name: str) -> None:
    os.truncate(copy / name, 0)


def remove(copy: Path, name: str) -> None:
    (copy / name).unlink()


def change_a_byte(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, empty, remove, change_a_byte])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_an_earlier_copy_replaces_one_that_is_not_complete(
    recipe, tiny_data, tmp_path, drive, tiny_run, capsys, recwarn, damage, name
):
    for stop_at in (8, 16):
        train(recipe.override({"train.stop_at": stop_at}), tiny_data, tmp_path / "run")
    first, second = copies(drive)
    damage(second, name)
    lose_machine(tmp_path / "run")
    capsys.readouterr()
    train(recipe, tiny_data, tmp_path / "run")
    assert f"resuming at iteration 8 from {first}\n" in capsys.readouterr().out
    assert_complete_run(tmp_path / "run", tiny_run)
    assert [iteration_of(copy / "last.pt") for copy in copies(drive)] == [8, 22]  # two complete ones
    problems = [str(warning.message) for warning in recwarn if "is not complete" in str(warning.message)]
    assert len(problems) == (0 if name == "manifest.json" else 1)


def test_without_a_complete_copy_the_local_state_is_used(recipe, tiny_data, tmp_path, drive, tiny_run):
    train(recipe.override({"train.stop_at": 8}), tiny_data, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    train(recipe.override({"train.stop_at": 16}), tiny_data, tmp_path / "run")
    for copy in copies(drive):
        empty(copy, "last.pt")
    lose_machine(tmp_path / "run")
    shutil.move(tmp_path / "old", tmp_path / "run")
    with pytest.warns(UserWarning, match=r"is not complete \(last\.pt does not match its checksum\)"):
        train(recipe, tiny_data, tmp_path / "run")
    assert_complete_run(tmp_path / "run", tiny_run)


@pytest.mark.parametrize("name", ["last.pt", "manifest.json"])
def test_a_run_does_not_start_again_while_its_only_copy_is_incomplete(recipe, tiny_data, tmp_path, drive, name):
    train(recipe.override({"train.stop_at": 8}), tiny_data, tmp_path / "run")
    lose_machine(tmp_path / "run")
    (copy,) = copies(drive)
    late = (copy / name).read_bytes()
    empty(copy, name)
    with pytest.raises(StoryLLMError, match=r"none of them is complete \(1 in all\); wait"):
        train(recipe, tiny_data, tmp_path / "run")
    (copy / name).write_bytes(late)
    assert len(train(recipe, tiny_data, tmp_path / "run").updates) == 6


# A mirror that fails


def full(monkeypatch, drive, open_file):
    """A disk without space for the last file."""

    def failing_open(path, mode="r", *arguments, **options):
        if str(path).startswith(str(drive)) and str(path).endswith("last.pt") and "x" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_file(path, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", failing_open)


def lossy(monkeypatch, drive, open_file):
    """A disk on which a file is empty after it was written."""

    def failing_open(path, mode="r", *arguments, **options):
        if str(path).startswith(str(drive)) and str(path).endswith("last.pt") and mode == "rb":
            os.truncate(path, 0)
        return open_file(path, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", failing_open)


def unreadable(monkeypatch, drive, open_file):
    """A disk with read errors."""

    def failing_open(path, mode="r", *arguments, **options):
        if str(path).startswith(str(drive)) and mode == "rb":
            raise OSError(errno.EIO, "Input/output error")
        return open_file(path, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", failing_open)


def unmounted(monkeypatch, drive, open_file):
    shutil.rmtree(drive)


def unwritable(monkeypatch, drive, open_file):
    """A file where the folder should be; permissions do not stop an administrator."""
    shutil.rmtree(drive)
    drive.write_text("")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (full, "No space left"),
        (lossy, "last.pt is corrupted when read back"),
        (unreadable, "Input/output error"),
        (unmounted, "No such file"),
        (unwritable, "Not a directory"),
    ],
)
def test_a_mirror_that_fails_is_one_warning(recipe, tiny_data, tmp_path, drive, tiny_run, monkeypatch, fault, reason):
    """It fails after the first copy, several times."""
    make_copy, attempts = mirror_module.Mirror.copy, []

    def copy(self, position):
        attempts.append(position)
        if len(attempts) == 4:
            fault(monkeypatch, drive, open)
        make_copy(self, position)

    monkeypatch.setattr(mirror_module.Mirror, "copy", copy)  # the disk fails at a known moment
    with pytest.warns(UserWarning, match=f"cannot copy the run to .*{reason}.*training continues") as caught:
        log = train(recipe.override(COPY_EVERY_UPDATE), tiny_data, tmp_path / "run")
    monkeypatch.undo()
    assert len(caught) == len(log.warnings) == 1
    assert len(attempts) > 5
    assert_complete_run(tmp_path / "run", tiny_run)
    if fault in (full, lossy, unreadable):
        assert [iteration_of(copy / "last.pt") for copy in copies(drive)] == [4, 8]  # no partial ones


def test_a_mirror_that_works_again_gets_copies(recipe, tiny_data, tmp_path, drive, monkeypatch):
    make_copy, attempts = mirror_module.Mirror.copy, []

    def copy(self, position):
        attempts.append(position)
        if len(attempts) == 3:
            drive.rename(tmp_path / "elsewhere")
        if len(attempts) == 4:
            (tmp_path / "elsewhere").rename(drive)
        make_copy(self, position)

    monkeypatch.setattr(mirror_module.Mirror, "copy", copy)
    with pytest.warns(UserWarning, match="cannot copy the run"):
        train(recipe.override(COPY_EVERY_UPDATE), tiny_data, tmp_path / "run")
    assert [iteration_of(copy / "last.pt") for copy in copies(drive)] == [22, 22]


def test_copies_that_cannot_be_read_do_not_stop_a_run_with_a_local_state(
    recipe, tiny_data, tmp_path, drive, tiny_run, monkeypatch
):
    train(recipe.override({"train.stop_at": 8}), tiny_data, tmp_path / "run")
    shutil.rmtree(drive / "mirror" / "run")
    (drive / "mirror" / "run").write_text("")  # not a folder any more
    with pytest.warns(UserWarning, match=r"cannot read .*resuming from") as caught:
        train(recipe, tiny_data, tmp_path / "run")
    assert len(caught) == 2  # and no copy at the end
    assert_complete_run(tmp_path / "run", tiny_run)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StoryLLMError, match="cannot read"):
        train(recipe, tiny_data, tmp_path / "run")


# Other runs


def test_the_copies_of_another_run_are_kept(recipe, tiny_data, tmp_path, drive):
    train(recipe, tiny_data, tmp_path / "run")
    before = {path: path.read_bytes() for path in drive.rglob("*") if path.is_file()}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    train(TINY.override({"train.stop_at": 8}), tiny_data, tmp_path / "a" / "run")
    with pytest.raises(StoryLLMError, match="has copies of another run than"):
        train(recipe, tiny_data, tmp_path / "a" / "run")
    with pytest.raises(StoryLLMError, match=r"another recipe .*train\.seed was 0, now 1"):
        train(recipe.override({"train.seed": 1}), tiny_data, tmp_path / "b" / "run")
    assert {path: path.read_bytes() for path in drive.rglob("*") if path.is_file()} == before


def test_each_run_has_its_own_folder(recipe, tiny_data, tmp_path, drive):
    for name in ("run", "other"):
        train(recipe.override({"train.stop_at": 4}), tiny_data, tmp_path / name)
    assert sorted(path.name for path in (drive / "mirror").iterdir()) == ["other", "run"]


def test_other_files_in_the_mirror_are_kept(recipe, tiny_data, tmp_path, drive):
    for path in ("run/notes.txt", "photos/cat.png"):
        (drive / "mirror" / path).parent.mkdir(parents=True, exist_ok=True)
        (drive / "mirror" / path).write_text("mine")
    train(recipe.override(COPY_EVERY_UPDATE), tiny_data, tmp_path / "run")
    assert {(drive / "mirror" / path).read_text() for path in ("run/notes.txt", "photos/cat.png")} == {"mine"}


@pytest.mark.parametrize(
    ("name", "message"), [("missing/mirror", "does not exist; mount"), ("", "where the run itself")]
)
def test_a_folder_that_cannot_be_a_mirror_is_an_error(tiny_data, tmp_path, name, message):
    recipe = TINY.override({"train.mirror_dir": str(tmp_path / name)})
    with pytest.raises(StoryLLMError, match=rf"mirror_dir is .*{message}"):
        train(recipe, tiny_data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
