"""Faults of the machine during a run: signals, other processes, full disks, missing memory, diverging numbers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    SAVE_EVERY_UPDATE,
    TINY,
    TINY_MODEL_OPTIONS,
    assert_one_line_error,
    environment,
    folder_contents,
    iteration_of,
    losses,
    start,
    weights,
)

import storyllm
from storyllm import DataConfig, Recipe, StoryLLMError, load, read_log, train
from storyllm.checkpoint import load_checkpoint, save_checkpoint
from storyllm.cli import main

# A run that does not end before a signal does it. `stop_at` may change when it resumes.
ENDLESS = TINY.override({"train.max_iters": 1_000_000, "train.eval_interval": 1_000})
SYNTHETIC = DataConfig(source="synthetic", synthetic_stories=60, tokenizer="bpe:300")


def command_line_options(recipe: Recipe) -> list[str]:
    """The options of `storyllm train` for a recipe."""
    options = []
    values = recipe.to_dict()
    del values["model"]["vocab_size"]  # that of the data
    for part in ("model", "train"):
        for name, value in values[part].items():
            flag = f"{part}.{name}".replace("_", "-")
            if isinstance(value, bool):
                options.append(f"--{flag}" if value else f"--{part}.no-{flag.removeprefix(f'{part}.')}")
            else:
                options += [f"--{flag}", str(value)]
    return options


def start_training(tiny_data: Path, folder: Path, **options: Any) -> subprocess.Popen[str]:
    """Starts a run of ENDLESS in a subprocess, and waits until it has logged some updates."""
    folders = ["--data-dir", tiny_data, "--checkpoint-dir", folder]
    process = start("train", *command_line_options(ENDLESS), *folders, **options)
    log = folder / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 20):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    return process


def last_logged(folder: Path) -> int:
    return read_log(folder / "log.jsonl").updates[-1]["iteration"]


def assert_same_run(folder: Path, uninterrupted: Path) -> None:
    """Checks for the same updates in the log and the same weights."""
    assert losses(folder)[0] == losses(uninterrupted)[0]
    assert weights(folder) == weights(uninterrupted)


def assert_resumes_like_uninterrupted(folder: Path, tiny_data: Path, other: Path) -> None:
    """Resumes a run of ENDLESS for some updates and compares it with one that was never interrupted."""
    recipe = ENDLESS.override({"train.stop_at": iteration_of(folder / "last.pt") + 20})
    train(recipe, tiny_data, folder)
    train(recipe, tiny_data, other)
    assert_same_run(folder, other)


# Signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_sets_the_exit_code(tiny_data, tmp_path, signum, code):
    process = start_training(tiny_data, tmp_path / "run")
    process.send_signal(signum)
    out, error = process.communicate(timeout=100)
    assert process.returncode == code
    assert "Traceback" not in error
    iteration = iteration_of(tmp_path / "run" / "last.pt")
    assert iteration == last_logged(tmp_path / "run") > 0
    assert f"saved iteration {iteration:,}" in out
    assert "run the same command again" in out
    assert_resumes_like_uninterrupted(tmp_path / "run", tiny_data, tmp_path / "uninterrupted")


def test_a_second_signal_exits_immediately_and_the_last_save_remains(tiny_data, tmp_path):
    process = start_training(tiny_data, tmp_path / "run")
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # stopped, so both signals are pending before either is handled
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        process.send_signal(signum)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 143
    assert error.splitlines()[-1] == "storyllm: terminated"
    assert "Traceback" not in error
    assert iteration_of(tmp_path / "run" / "last.pt") == 0  # saved when the run began; the next save is not due yet
    assert not list((tmp_path / "run").glob("*.part"))
    assert_resumes_like_uninterrupted(tmp_path / "run", tiny_data, tmp_path / "uninterrupted")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_while_saving_keeps_the_previous_save(unfinished, tiny_run, tiny_data, monkeypatch, signum):
    save, saves = torch.save, []

    def interrupted_save(contents: Any, file: Any) -> None:
        saves.append(contents)
        if len(saves) == 2:
            file.write(b"an incomplete checkpoint")
            signal.raise_signal(signum)
            signal.raise_signal(signum)
        save(contents, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted_save)
        with pytest.raises(KeyboardInterrupt):
            train(TINY.override(SAVE_EVERY_UPDATE), tiny_data, unfinished)
    assert len(saves) == 2
    assert not list(unfinished.glob("*.part"))
    train(TINY, tiny_data, unfinished)
    assert_same_run(unfinished, tiny_run)


def test_a_signal_during_the_final_save_does_not_count_as_an_interruption(unfinished, tiny_data, monkeypatch):
    save, finals = torch.save, []

    def interrupted_save(contents: dict[str, Any], file: Any) -> None:
        if contents.get("state", {}).get("last_evaluation") == 22:
            finals.append(signal.raise_signal(signal.SIGINT))
        save(contents, file)

    monkeypatch.setattr(torch, "save", interrupted_save)
    assert train(TINY, tiny_data, unfinished).interrupted == 0
    assert len(finals) == 1


def test_a_terminated_preparation_leaves_no_files_and_excludes_other_processes(tmp_path):
    options = "--source synthetic --synthetic-stories 10000000 --tokenizer bpe:300 --out".split()
    process = start("prepare", *options, tmp_path / "data")
    assert process.stdout.read(1)  # the progress bar: it has begun
    with pytest.raises(StoryLLMError, match="in use by another process"):
        storyllm.prepare(SYNTHETIC, tmp_path / "data")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert (process.returncode, error.splitlines()[-1]) == (143, "storyllm: terminated")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_notebook_cell_that_was_stopped_resumes_when_it_runs_again(tiny_data, tmp_path):
    manager = pytest.importorskip("jupyter_client.manager")
    folder, other = tmp_path / "run", tmp_path / "uninterrupted"
    setup = "import os, pathlib, signal, storyllm, threading, time, torch; torch.set_num_threads(1)"
    press_stop = f"""
def press_stop():
    log = pathlib.Path({str(folder / "log.jsonl")!r})
    while not log.exists() or b'"update"' not in log.read_bytes():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=press_stop).start()
"""
    cell = f"log = storyllm.train(recipe, {str(tiny_data)!r}, {str(folder)!r})\nprint('interrupted:', log.interrupted)"
    kernel, client = manager.start_new_kernel(kernel_name="python3")
    try:

        def execute(code: str) -> str:
            printed = []
            reply = client.execute_interactive(
                code, output_hook=lambda message: printed.append(message["content"].get("text", "")), timeout=100
            )
            assert reply["content"]["status"] == "ok", reply
            return "".join(printed)

        execute(f"{setup}\nrecipe = storyllm.Recipe.from_dict({ENDLESS.to_dict()})")
        assert "interrupted: 2" in execute(press_stop + cell)
        recipe = ENDLESS.override({"train.stop_at": last_logged(folder) + 20})
        execute(f"recipe = storyllm.Recipe.from_dict({recipe.to_dict()})")
        resumed = execute(cell)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert "resuming at iteration" in resumed
    assert "interrupted: 0" in resumed
    train(recipe, tiny_data, other)
    assert_same_run(folder, other)


# Output that nobody reads


@pytest.mark.parametrize("interrupt", [False, True])
def test_a_closed_pipe_ends_the_run_with_everything_saved(tiny_data, tmp_path, interrupt):
    """As Ctrl-C does with `storyllm train | tee log.txt`, which ends `tee` too."""
    process = start_training(tiny_data, tmp_path)
    process.stdout.close()
    if interrupt:
        process.send_signal(signal.SIGINT)
    process.wait(100)
    error = process.stderr.read()
    process.stderr.close()
    assert process.returncode == 130
    assert "Traceback" not in error and "Exception ignored" not in error
    assert iteration_of(tmp_path / "last.pt") == last_logged(tmp_path) > 0


def test_a_closed_terminal_ends_the_run_with_everything_saved(tiny_data, tmp_path):
    terminal, output = os.openpty()
    process = start_training(tiny_data, tmp_path, stdout=output)
    os.close(output)
    os.close(terminal)
    _, error = process.communicate(timeout=100)
    assert_one_line_error(subprocess.CompletedProcess(process.args, process.returncode, "", error), "output")
    assert iteration_of(tmp_path / "last.pt") == last_logged(tmp_path) > 0


@pytest.mark.parametrize(
    "redirection",
    ["<&- >&- 2>&-", "2> /dev/full", "> /dev/full", pytest.param(">&-", marks=pytest.mark.campaign)],
)
def test_training_without_usable_standard_streams(tiny_data, tmp_path, redirection):
    recipe = TINY.override({"train.max_iters": 6})
    options = [*command_line_options(recipe), "--data-dir", tiny_data, "--checkpoint-dir", tmp_path / "run"]
    done = shell("train", *options, redirection=redirection)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if redirection == "> /dev/full":
        assert_one_line_error(done, "output", "No space left on device")
    else:
        assert done.returncode == 0
        assert iteration_of(tmp_path / "run" / "last.pt") == 6


def test_output_that_cannot_be_written_is_a_one_line_error(tiny_data):
    done = shell("prepare", "--verify", "--out", tiny_data, redirection="> /dev/full")
    assert_one_line_error(done, "output", "No space left on device")


def shell(*arguments: object, redirection: str) -> subprocess.CompletedProcess[str]:
    """Runs `storyllm` in a shell with its standard streams redirected."""
    line = shlex.join([sys.executable, "-m", "storyllm", *map(str, arguments)])
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 100, "env": environment()}
    return subprocess.run(f"{line} {redirection}", shell=True, **options)


# Other processes


def test_a_second_process_in_the_same_folder_is_refused(tiny_data, tmp_path, capsys):
    folder = tmp_path / "run"
    first = start_training(tiny_data, folder)
    try:
        with pytest.raises(StoryLLMError, match="in use by another process"):
            train(TINY, tiny_data, folder)
        options = ["--recipe", "demo", "--data-dir", str(tiny_data), "--checkpoint-dir", str(folder)]
        assert main(["train", *options]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert load(folder / "best_model_params.pt")  # reading is allowed
    finally:
        first.send_signal(signal.SIGINT)
        _, error = first.communicate(timeout=100)
    assert first.returncode == 130, error
    iterations = [entry["iteration"] for entry in read_log(folder / "log.jsonl").updates]
    assert iterations == list(range(4, iterations[-1] + 1, 4))  # nothing of the others is in the log


# Disks


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: writes fail as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stdout(io.StringIO()):  # standard output may be a file too
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def assert_one_line(error: pytest.ExceptionInfo[StoryLLMError]) -> None:
    assert len(str(error.value).splitlines()) == 1


def test_a_full_disk_while_saving_keeps_the_previous_save(tiny_data, tiny_run, tmp_path):
    with pytest.raises(StoryLLMError, match=r"cannot write .*last\.pt .*space") as caught, file_size_limit(100):
        train(TINY, tiny_data, tmp_path)
    assert_one_line(caught)
    assert list(tmp_path.iterdir()) == []
    train(TINY.override({"train.stop_at": 8}), tiny_data, tmp_path)
    before = folder_contents(tmp_path)
    with pytest.raises(StoryLLMError, match=r"cannot write .*\.pt .*space") as caught, file_size_limit(60_000):
        train(TINY.override(SAVE_EVERY_UPDATE), tiny_data, tmp_path)
    assert_one_line(caught)
    after = folder_contents(tmp_path)
    assert after.pop("log.jsonl").startswith(before.pop("log.jsonl"))
    assert after == before
    train(TINY, tiny_data, tmp_path)
    assert_same_run(tmp_path, tiny_run)


def test_a_full_disk_while_logging_keeps_the_save(tiny_data, tmp_path):
    # A log that is larger than the checkpoints, so that a limit on file sizes stops only the log.
    recipe = TINY.override({"model.n_layer": 1, "model.n_embd": 4, "train.gradient_accumulation_steps": 1})
    recipe = recipe.override({"train.max_iters": 220, "train.eval_interval": 1_000})
    train(recipe, tiny_data, tmp_path / "uninterrupted")
    folder, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    train(recipe.override({"train.stop_at": 200}), tiny_data, folder)
    limit = log.stat().st_size + 3_100  # the first line that describes the run fits, a later one partly
    assert all(path.stat().st_size < limit for path in folder.glob("*.pt"))
    with pytest.raises(StoryLLMError, match=r"cannot write .*log\.jsonl .*space") as caught, file_size_limit(limit):
        train(recipe, tiny_data, folder)
    assert_one_line(caught)
    assert log.stat().st_size == limit  # nearly always in the middle of a line
    assert iteration_of(folder / "last.pt") == 200
    train(recipe, tiny_data, folder)
    assert_same_run(folder, tmp_path / "uninterrupted")


@pytest.mark.parametrize("size", [10, 3_000, 7_000])
def test_a_full_disk_while_preparing_leaves_no_partial_file(tmp_path, size):
    with pytest.raises(StoryLLMError, match=r"cannot write .*space") as caught, file_size_limit(size):
        storyllm.prepare(SYNTHETIC, tmp_path)
    assert_one_line(caught)
    assert not list(tmp_path.glob("*.part"))
    storyllm.prepare(SYNTHETIC, tmp_path)
    storyllm.verify(tmp_path)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A mounted disk of 4 MB. Skips if nothing can be mounted, which needs an administrator."""
    folder = Path(tempfile.mkdtemp())
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        folder.rmdir()
        pytest.skip("no disk can be mounted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def test_a_disk_that_is_really_full(small_disk, tiny_data):
    filler, run_folder, data_folder = (small_disk / name for name in ("filler", "run", "data"))
    filler.write_bytes(bytes(2_900_000))
    recipe = TINY.override({**SAVE_EVERY_UPDATE, "model.n_embd": 64})
    with pytest.raises(StoryLLMError, match=r"cannot write .*space") as caught:
        train(recipe, tiny_data, run_folder)
    assert_one_line(caught)
    assert load(run_folder / "last.pt")
    filler.unlink()
    train(recipe.override({"train.keep_checkpoints": 0}), tiny_data, run_folder)
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 8_192))
    with pytest.raises(StoryLLMError, match=r"cannot write .*space"):
        storyllm.prepare(SYNTHETIC, data_folder)
    assert not list(data_folder.glob("*.part"))


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Gives up an administrator's privileges for a while, so that permissions apply."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def accessible_folder() -> Iterator[Path]:
    """A temporary folder that every user can read; those of pytest are private."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_a_read_only_folder_is_a_one_line_error_and_can_be_read(tiny_run, tiny_data, accessible_folder):
    data, run_folder = accessible_folder / "data", accessible_folder / "run"
    shutil.copytree(tiny_data, data)
    shutil.copytree(tiny_run, run_folder)
    before = folder_contents(run_folder)
    storyllm.plot_losses(run_folder / "log.jsonl", accessible_folder / "before.png")  # imports matplotlib
    for path in (accessible_folder, *accessible_folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        with without_privileges():
            for call in (
                lambda: train(TINY, data, accessible_folder / "new"),
                lambda: train(TINY.override({"train.max_iters": 30}), data, run_folder),
                lambda: storyllm.prepare(SYNTHETIC, accessible_folder / "new"),
                lambda: storyllm.plot_losses(run_folder / "log.jsonl", accessible_folder / "losses.png"),
            ):
                with pytest.raises(StoryLLMError, match=r"Permission denied.*permissions") as caught:
                    call()
                assert_one_line(caught)
            assert train(TINY, data, run_folder).updates  # complete: nothing to write
            assert storyllm.verify(data)
            assert load(run_folder / "last.pt").generate("One day", max_new_tokens=3, seed=0)
    finally:
        for path in (accessible_folder, *accessible_folder.rglob("*")):
            path.chmod(0o755)
    assert folder_contents(run_folder) == before


def test_an_unreadable_checkpoint_is_not_treated_as_corrupted(unfinished, tiny_data, accessible_folder):
    run_folder = Path(shutil.copytree(unfinished, accessible_folder / "run"))
    shutil.copytree(tiny_data, accessible_folder / "data")
    run_folder.chmod(0o777)
    (run_folder / "last.pt").chmod(0o000)
    with without_privileges(), pytest.raises(StoryLLMError, match=r"last\.pt .*Permission denied"):
        train(TINY, accessible_folder / "data", run_folder)
    assert not list(run_folder.glob("*.corrupted"))


def test_a_filesystem_without_fsync_and_locks_works_with_warnings(tiny_run, tiny_data, tmp_path, monkeypatch):
    def not_supported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", not_supported)
    monkeypatch.setattr(os, "fsync", not_supported)
    with pytest.warns(UserWarning, match="cannot be locked") as caught:
        train(TINY, tiny_data, tmp_path)
    assert any("power loss" in str(warning.message) for warning in caught)
    assert_same_run(tmp_path, tiny_run)


def test_too_many_open_files_is_a_one_line_error(unfinished, tiny_run, tiny_data):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    refused = 0
    for free in range(12):
        descriptors = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    descriptors.append(os.open(os.devnull, os.O_RDONLY))
            for _ in range(free):
                os.close(descriptors.pop())
            train(TINY.override({"train.stop_at": 20}), tiny_data, unfinished)
        except StoryLLMError as error:
            refused += 1
            assert "Too many open files" in str(error)  # noqa: PT017
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert 2 <= refused < 12
    assert not list(unfinished.glob("*.corrupted"))
    train(TINY, tiny_data, unfinished)
    assert_same_run(unfinished, tiny_run)


# Losses and weights that are not finite


@pytest.mark.parametrize(
    ("learning_rate", "problem"),
    [(1e3, "the loss is"), (1e10, "validation loss nan"), (1e39, "weights contain NaN or infinity")],
)
def test_a_run_that_diverges_stops_and_never_saves_it(tiny_data, tmp_path, learning_rate, problem):
    changes = {"train.learning_rate": learning_rate, "train.warmup_iters": 0, "train.keep_checkpoints": 9}
    with pytest.raises(StoryLLMError, match=rf"{problem}.*iteration \d+, learning rate .*learning_rate") as caught:
        train(TINY.override({**changes, **SAVE_EVERY_UPDATE}), tiny_data, tmp_path)
    assert_one_line(caught)
    for path in tmp_path.glob("*.pt"):
        assert all(weight.isfinite().all() for weight in load_checkpoint(path)["model"].values())


def test_an_infinite_gradient_stops_the_run_before_it_is_saved(unfinished, tiny_data, monkeypatch):
    before = {path.name: path.read_bytes() for path in unfinished.glob("*.pt")}
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(StoryLLMError, match=r"gradient norm inf at iteration 20, learning rate .*learning_rate"):
        train(TINY.override(SAVE_EVERY_UPDATE), tiny_data, unfinished)
    assert {path.name: path.read_bytes() for path in unfinished.glob("*.pt")} == before


def test_fp16_updates_that_overflow_are_skipped_and_counted(tiny_data, tmp_path, monkeypatch):
    class LargeScale(torch.amp.GradScaler):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, init_scale=2.0**40)

    monkeypatch.setattr(torch.amp, "GradScaler", LargeScale)
    recipe = TINY.override({"train.dtype": "float16", "train.max_iters": 160, "train.eval_interval": 100})
    train(recipe.override({"train.stop_at": 20}), tiny_data, tmp_path)
    log = train(recipe, tiny_data, tmp_path)  # the count survives resuming
    skipped = [entry["skipped_updates"] for entry in log.updates]
    assert skipped == sorted(skipped)
    assert 10 < skipped[-1] < 40
    assert sum(entry["grad_norm"] is None for entry in log.updates) == skipped[-1]
    assert log.updates[-1]["grad_norm"] is not None


# Memory


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("first forward pass", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        ("update", RuntimeError("MPS backend out of memory (MPS allocated: 1.2 GB)")),
        ("evaluation", RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")),
    ],
)
def test_running_out_of_memory_halves_the_micro_batch_size(tiny_data, tmp_path, monkeypatch, where, error):
    recipe = TINY.override({"model.dropout": 0.0, "train.micro_batch_size": 12, "train.eval_windows": 12})
    recipe = recipe.override({"train.max_iters": 10})
    expected = train(recipe, tiny_data, tmp_path / "enough").updates
    embedding, sizes = torch.nn.functional.embedding, []

    def limited_embedding(ids: torch.Tensor, *args: Any) -> torch.Tensor:
        """The first operation of a forward pass, on a device with memory for 4 windows."""
        if ids.dim() == 2:  # (windows, T) token ids
            kind = "evaluation" if not torch.is_grad_enabled() else "update" if len(sizes) > 2 else "first forward pass"
            sizes.append(len(ids))
            if len(ids) > 4 and kind == where:
                raise error
        return embedding(ids, *args)

    monkeypatch.setattr(torch.nn.functional, "embedding", limited_embedding)
    with pytest.warns(UserWarning, match=r"out of memory with micro-batch size 6.* 3$"):
        log = train(recipe, tiny_data, tmp_path / "short")
    losses_before, losses_after = ([entry["train_loss"] for entry in part] for part in (expected, log.updates))
    assert losses_after == pytest.approx(losses_before, abs=1e-5)  # the mathematics is the same
    assert set(sizes[sizes.index(3) :]) == {1, 3} or set(sizes[sizes.index(3) :]) == {3}
    assert load_checkpoint(tmp_path / "short" / "last.pt")["micro_batch_size"] == 3
    assert [entry["message"] for entry in log.warnings if "micro-batch size 6" in entry["message"]]


def test_out_of_memory_with_a_single_window_names_the_fields_to_lower(unfinished, tiny_data, monkeypatch):
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    before = folder_contents(unfinished)
    monkeypatch.setattr(torch.nn.functional, "embedding", no_memory)
    with (
        pytest.warns(UserWarning, match="retrying with 1"),
        pytest.raises(StoryLLMError, match=r"out of memory \(CUDA out of memory\).*n_embd.*batch_size") as caught,
    ):
        train(TINY, tiny_data, unfinished)
    assert_one_line(caught)
    assert folder_contents(unfinished) == before


MEMORY_LIMIT = """
import json, resource, sys, torch, storyllm
torch.set_num_threads(1)
recipe, data, folder = storyllm.Recipe.from_dict(json.loads(sys.argv[1])), *sys.argv[2:]
storyllm.train(recipe.override({"train.stop_at": 4, "train.micro_batch_size": 64}), data, folder)  # loads everything
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 200 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
log = storyllm.train(recipe, data, folder)
print([entry["message"] for entry in log.warnings])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does")
def test_a_process_with_a_memory_limit_trains_in_smaller_micro_batches(tiny_data, tmp_path):
    recipe = TINY.override({"train.batch_size": 128, "model.block_size": 64, "train.stop_at": 8})
    recipe = recipe.override({"train.micro_batch_size": 512})
    command = [sys.executable, "-c", MEMORY_LIMIT, json.dumps(recipe.to_dict()), tiny_data, tmp_path]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "out of memory with micro-batch size 512" in done.stdout.splitlines()[-1]
    assert iteration_of(tmp_path / "last.pt") == 8


def test_the_micro_batch_size_found_on_one_device_is_not_used_on_another(unfinished, tiny_data):
    contents = load_checkpoint(unfinished / "last.pt")
    save_checkpoint(unfinished / "last.pt", {**contents, "device": "cuda", "micro_batch_size": 7})
    assert train(TINY, tiny_data, unfinished).run["micro_batch_size"] == 12


@pytest.mark.parametrize(
    "option",
    [
        "--train.eval-windows=100000000000",
        "--train.batch-size=100000000000",
        "--model.n-embd=400000000",
        "--model.n-layer=1000000000",
        "--model.n-layer=99999999999999999999",
        "--model.block-size=10000000000000",
    ],
)
def test_absurd_sizes_are_a_one_line_error(tiny_data, tmp_path, capsys, option):
    options = ["--recipe", "demo", *TINY_MODEL_OPTIONS, "--train.device", "cpu", option]
    assert main(["train", *options, "--data-dir", str(tiny_data), "--checkpoint-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# The clock


def test_clock_changes_do_not_affect_a_run(unfinished, tiny_run, tiny_data, monkeypatch):
    now = iter(range(2_000_000_000, 0, -100_000))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(now)))
        patch.setenv("TZ", "Pacific/Kiritimati")
        time.tzset()
        log = train(TINY, tiny_data, unfinished)
    time.tzset()
    assert_same_run(unfinished, tiny_run)
    assert all(0 <= entry["seconds"] < 600 for entry in log.updates)
