"""What machines do to a run: full disks, missing memory, second processes, signals. Done for real where it can be."""

import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from test_cli import SHORT, SMALL
from test_training import TINY, losses, weights

import storyllm
from storyllm import StoryLLMError, load, read_log, train, training
from storyllm.checkpoint import load_checkpoint
from storyllm.cli import main
from storyllm.device import is_out_of_memory
from storyllm.training import train_step

EVERY = {"train.checkpoint_minutes": 0.0}  # a state is saved after every update


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """The folder of the tiny run that nothing happens to."""
    folder = tmp_path_factory.mktemp("faults")
    train(TINY, tiny_data, folder)
    return folder


@pytest.fixture
def half(tiny_data, tmp_path):
    """A folder with the first 16 iterations of that run, and two earlier states."""
    train(TINY.override({"train.stop_at": 16, **EVERY}), tiny_data, tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").glob("last*")} == {"last.pt", "last.1.pt", "last.2.pt"}
    return tmp_path / "run"


def same(folder, whole):
    return weights(folder) == weights(whole) and losses(folder)[0] == losses(whole)[0]


def command(verb, *arguments):
    return [sys.executable, "-m", "storyllm", verb, *map(str, arguments)]


def start(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(*arguments), text=True, env=environment, **pipes, **options)


def long_training(tiny_data, folder):
    """A started process that trains until it is stopped, and has begun to."""
    options = [*SMALL, *SHORT[:-1], "1000000", "--data-dir", tiny_data, "--checkpoint-dir", folder]
    process = start("train", "--recipe", "demo", *options)
    log = folder / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 20):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    return process


# States


def damage(path, place):
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damaged", [["last.pt"], ["last.pt", "last.1.pt"]])
def test_a_damaged_state_falls_back_to_the_one_before_and_says_so(half, whole, tiny_data, damaged):
    for name in damaged:
        damage(half / name, (half / name).stat().st_size // 2)
    expected = f"last.{len(damaged)}.pt, an earlier state"
    with pytest.warns(UserWarning, match=rf"^{', '.join(damaged)} is damaged: going on from .*{expected}"):
        log = train(TINY, tiny_data, half)
    assert same(half, whole)
    assert "is damaged" in log.warnings[0]["message"]
    assert all((half / f"{name}.damaged").exists() for name in damaged)  # nothing is thrown away


def test_where_every_state_is_damaged_it_is_refused_and_left_alone(half, tiny_data):
    for path in half.glob("last*.pt"):
        path.write_bytes(path.read_bytes()[:-1000])
    before = {path.name: path.read_bytes() for path in half.iterdir()}
    with pytest.raises(StoryLLMError, match=r"last\.pt is damaged or not a checkpoint \(BadZipFile\): copy it again"):
        train(TINY, tiny_data, half)
    assert before == {path.name: path.read_bytes() for path in half.iterdir()}


def test_a_state_lost_between_two_names_is_no_loss(half, whole, tiny_data):
    """As where a process is killed when last.pt has become last.1.pt and the new one has no name yet."""
    (half / "last.2.pt").unlink()
    (half / "last.1.pt").rename(half / "last.2.pt")
    (half / "last.pt").rename(half / "last.1.pt")
    with pytest.warns(UserWarning, match=r"last\.pt is not there: going on from .*last\.1\.pt, an earlier state"):
        train(TINY, tiny_data, half)
    assert same(half, whole)


def test_a_state_of_no_number_is_none_of_ours(half, whole, tiny_data):
    shutil.copy(half / "last.pt", half / "last.0.pt")
    shutil.copy(half / "last.pt", half / "last.old.pt")
    damage(half / "last.pt", 5000)
    with pytest.warns(UserWarning, match=r"going on from .*last\.1\.pt"):
        train(TINY, tiny_data, half)
    assert same(half, whole)


@pytest.mark.parametrize("keep", [0, 1, 4])
def test_so_many_earlier_states_are_kept(tiny_data, tmp_path, keep):
    train(TINY.override({**EVERY, "train.keep_checkpoints": keep}), tiny_data, tmp_path)
    states = [tmp_path / "last.pt", *(tmp_path / f"last.{n}.pt" for n in range(1, keep + 1))]
    assert sorted(tmp_path.glob("last*")) == sorted(states)
    # The last update's state is saved twice: after the update, and with the evaluation at the end.
    assert [load_checkpoint(path)["iteration"] for path in states] == [22, 22, 20, 16, 12][: keep + 1]


def test_a_lost_best_is_replaced_with_a_warning(half, tiny_data):
    (half / "best_model_params.pt").unlink()
    with pytest.warns(UserWarning, match=r"best_model_params\.pt is not there: the best weights of later evaluations"):
        train(TINY, tiny_data, half)
    assert load(half / "best_model_params.pt")


@pytest.mark.parametrize("kept", [0, 1, 700])
def test_a_log_that_lost_lines_is_gone_on_with_and_says_so(half, whole, tiny_data, kept):
    log = half / "log.jsonl"
    log.write_bytes(log.read_bytes()[:kept])
    with pytest.warns(UserWarning, match="log.jsonl has lost .* bytes of what was logged"):
        train(TINY, tiny_data, half)
    assert weights(half) == weights(whole)
    assert [entry["iteration"] for entry in read_log(log).updates] == [20, 22]


def test_a_line_taken_out_of_the_log_is_missed(half, tiny_data):
    """What a kill left behind the last state makes the log long enough: its end must still be that of a line."""
    log = half / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(
        b"".join([*lines[:2], *lines[3:], b'{"event": "update", "iteration": 20, "learning_rate": 0.1}\n' * 9])
    )
    with pytest.warns(UserWarning, match="log.jsonl has lost .* bytes of what was logged"):
        train(TINY, tiny_data, half)
    assert read_log(log).updates[-1]["iteration"] == 22


def test_a_finished_run_with_an_empty_log_ends_well(whole, tiny_data, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").write_bytes(b"")
    with pytest.warns(UserWarning, match="has lost"):
        assert train(TINY, tiny_data, tmp_path / "run").evaluations == []


def test_what_is_finished_under_stop_at_says_so(half, tiny_data, capsys):
    train(TINY.override({"train.stop_at": 16}), tiny_data, half)
    assert "raise stop_at to go on" in capsys.readouterr().out


def test_a_damaged_log_is_refused_before_anything_is_done(half, tiny_data):
    log = half / "log.jsonl"
    damage(log, 700)
    before = {path.name: path.read_bytes() for path in half.iterdir()}
    with pytest.raises(StoryLLMError, match=r"log.jsonl line \d is damaged"):
        train(TINY, tiny_data, half)
    assert before == {path.name: path.read_bytes() for path in half.iterdir()}


def test_zeros_that_a_cut_of_power_left_in_the_log_are_cut_off(half, whole, tiny_data):
    with open(half / "log.jsonl", "ab") as log:
        log.write(bytes(5000))
    train(TINY, tiny_data, half)
    assert same(half, whole)


def test_another_stop_and_more_iterations_are_allowed(half, tiny_data, capsys):
    train(TINY.override({"train.stop_at": 20}), tiny_data, half)
    log = train(TINY.override({"train.max_iters": 40}), tiny_data, half)
    assert "max_iters was 22, now 40" in capsys.readouterr().out
    assert log.evaluations[-1]["iteration"] == 40


# Signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves_with_its_code(tiny_data, tmp_path, signum, code):
    process = long_training(tiny_data, tmp_path)
    process.send_signal(signum)
    out, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in error
    logged = read_log(tmp_path / "log.jsonl").updates[-1]["iteration"]
    assert load_checkpoint(tmp_path / "last.pt")["iteration"] == logged
    assert f"keeps {logged:,} iterations" in out
    assert "run the same command again to continue" in out


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once_and_the_state_before_stays(half, whole, tiny_data, monkeypatch, signum):
    def stopped_twice(*args, **kwargs):
        signal.raise_signal(signum)
        signal.raise_signal(signum)

    before = (half / "last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", stopped_twice)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, tiny_data, half)
    assert (half / "last.pt").read_bytes() == before
    train(TINY, tiny_data, half)
    assert same(half, whole)


def test_a_second_signal_within_the_saving_leaves_the_state_before(half, whole, tiny_data, monkeypatch):
    save, saved = torch.save, []

    def stopped_twice(contents, file):
        saved.append(contents)
        if len(saved) == 2:
            file.write(b"half of it")
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        save(contents, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stopped_twice)
        with pytest.raises(KeyboardInterrupt):
            train(TINY.override(EVERY), tiny_data, half)
    assert not list(half.glob("*.part"))
    train(TINY, tiny_data, half)
    assert same(half, whole)


def test_an_interrupt_after_the_last_update_is_none(tiny_data, tmp_path, monkeypatch):
    save = storyllm.checkpoint.save_checkpoint

    def interrupted(path, *args, **kwargs):
        if kwargs and read_log(tmp_path / "log.jsonl").evaluations[-1]["iteration"] == 22:
            signal.raise_signal(signal.SIGINT)
        save(path, *args, **kwargs)

    train(TINY.override({"train.stop_at": 16}), tiny_data, tmp_path)
    monkeypatch.setattr(training, "save_checkpoint", interrupted)
    assert train(TINY, tiny_data, tmp_path).interrupted == 0


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "Input/output error")])
def test_an_interrupt_saves_even_when_nobody_reads_what_is_printed(half, tiny_data, monkeypatch, error):
    """As Ctrl-C does with `| tee`, which it ends, too."""
    steps = []

    def stop_in_the_second_step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return train_step(*args, **kwargs)

    def closed(*args, **kwargs):
        raise error

    monkeypatch.setattr(training, "train_step", stop_in_the_second_step)
    monkeypatch.setattr(training.tqdm, "write", closed)
    with pytest.raises((BrokenPipeError, StoryLLMError)):
        train(TINY, tiny_data, half)
    assert load_checkpoint(half / "last.pt")["iteration"] == 20


@pytest.mark.parametrize("how", [">&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full"])
def test_training_without_a_place_to_print_loses_nothing(tiny_data, tmp_path, how):
    options = [*SMALL, *SHORT, "--recipe", "demo", "--data-dir", tiny_data, "--checkpoint-dir", tmp_path / "run"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"OMP_NUM_THREADS": "1"}
    line = " ".join(map(str, command("train", *options))) + f" {how}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=environment)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if how == "> /dev/full":
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "the output cannot be opened or written (No space left on device)" in done.stderr
    else:
        assert done.returncode == 0
        assert load_checkpoint(tmp_path / "run" / "last.pt")["iteration"] == 6


@pytest.mark.parametrize("verb", ["--version", "prepare --verify --out {data}"])
def test_output_that_cannot_be_written_is_one_line(tiny_data, verb):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    line = f"{sys.executable} -m storyllm {verb.format(data=tiny_data)} > /dev/full"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_terminated_preparation_leaves_nothing_behind(tmp_path):
    process = start(
        "prepare", "--source", "builtin", "--builtin-stories", "10000000", "--tokenizer", "bpe:300", cwd=tmp_path
    )
    while process.poll() is None and not (tmp_path / "data").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error.splitlines()[-1]) == (143, "storyllm: terminated")
    assert list((tmp_path / "data").iterdir()) == []


def test_in_a_notebook_a_stopped_cell_run_again_continues(tiny_data, tmp_path):
    manager = pytest.importorskip("jupyter_client.manager")
    kernel, client = manager.start_new_kernel(kernel_name="python3")
    try:
        said = []

        def run(code):
            def hear(message):
                content = message["content"]
                said.extend(filter(None, (content.get("text"), content.get("data", {}).get("text/plain"))))

            return client.execute_interactive(code, output_hook=hear, timeout=120)["content"]["status"]

        assert run("import storyllm, torch; torch.set_num_threads(1)") == "ok"
        recipe = TINY.override({"train.max_iters": 4000, "train.eval_interval": 1000})
        made = f"storyllm.Recipe.from_dict({recipe.to_dict()})"
        cell = f"log = storyllm.train({made}, {str(tiny_data)!r}, {str(tmp_path)!r})"
        stop = f"""
import os, pathlib, signal, threading, time

def when_it_trains():
    log = pathlib.Path({str(tmp_path / "log.jsonl")!r})
    while not log.exists() or b'"update"' not in log.read_bytes():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=when_it_trains).start()
{cell}"""
        assert run(stop) == "ok"
        assert run("log.interrupted, log.updates[-1]['iteration']") == "ok"
        assert said[-1].startswith("(2, ")
        assert run(cell) == "ok"
        assert "continuing at iteration" in "".join(said)
        assert run("log.interrupted, log.updates[-1]['iteration']") == "ok"
        assert said[-1] == "(0, 4000)"
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    train(recipe, tiny_data, tmp_path / "uncut")
    assert losses(tmp_path) == losses(tmp_path / "uncut")


# Two processes


def test_a_second_process_in_the_same_folder_is_told_so(tiny_data, tmp_path):
    first = long_training(tiny_data, tmp_path / "run")
    try:
        with pytest.raises(
            StoryLLMError, match="run is in use by another process: wait for it, stop it, or take another"
        ):
            train(TINY, tiny_data, tmp_path / "run")
        second = start("train", "--recipe", "demo", "--data-dir", tiny_data, "--checkpoint-dir", tmp_path / "run")
        out, error = second.communicate(timeout=60)
        assert (second.returncode, out, error.count("\n")) == (2, "", 1)
        assert "in use by another process" in error
        assert load(tmp_path / "run" / "best_model_params.pt")  # who only reads may
    finally:
        first.send_signal(signal.SIGINT)
        _, error = first.communicate(timeout=60)
    assert first.returncode == 130, error
    iterations = [entry["iteration"] for entry in read_log(tmp_path / "run" / "log.jsonl").updates]
    assert iterations == list(range(1, iterations[-1] + 1))


def test_a_second_preparation_in_the_same_folder_is_told_so(tmp_path):
    source = storyllm.DataConfig(source="builtin", builtin_stories=20, tokenizer="bpe:300")
    with storyllm.files.locked(tmp_path), pytest.raises(StoryLLMError, match="in use by another process"):
        storyllm.prepare(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


# Disks


def limited(size):
    """For a child process: files may not grow beyond `size` bytes, as if the disk were full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def one_line(process, *words):
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2, (out, error)
    assert "Traceback" not in error
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    return out


MODEL = "--model.block-size 16 --model.n-layer 2 --model.n-head 2 --model.n-embd 32 --train.eval-windows 4".split()


def test_a_full_disk_while_training_is_one_line_and_the_last_state_stays(tiny_data, tmp_path):
    folder = tmp_path / "run"
    options = ["--recipe", "demo", "--data-dir", tiny_data, "--checkpoint-dir", folder, "--train.checkpoint-minutes", 0]
    options += [*MODEL, "--train.device", "cpu", "--train.max-iters", 40]
    one_line(start("train", *options, preexec_fn=limited(100)), "last.pt cannot be written", "make room")
    assert list(folder.iterdir()) == []
    assert start("train", *options, "--train.stop-at", 8).wait(60) == 0  # a run that is under way
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    one_line(start("train", *options, preexec_fn=limited(60_000)), "last.pt cannot be written", "make room")
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.pt*")}
    assert start("train", *options).wait(60) == 0  # there is room again
    assert read_log(folder / "log.jsonl").updates[-1]["iteration"] == 40


def test_a_full_disk_while_logging_keeps_the_state(half, whole, tiny_data, monkeypatch):
    """The log may not grow any more; the states may."""
    size = (half / "log.jsonl").stat().st_size + 300
    write = storyllm.log.LogWriter.write

    def full(self, entry):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            write(self, entry)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, before)

    with monkeypatch.context() as patch:
        patch.setattr(storyllm.log.LogWriter, "write", full)
        with pytest.raises(StoryLLMError, match=r"log\.jsonl cannot be written \(File too large\): make room"):
            train(TINY, tiny_data, half)
    assert (half / "log.jsonl").stat().st_size == size  # part of a line
    train(TINY, tiny_data, half)
    assert same(half, whole)


@pytest.mark.parametrize("size", [10, 30_000])
def test_a_full_disk_while_preparing_is_one_line_and_leaves_no_half_file(tmp_path, size):
    options = ["--source", "builtin", "--builtin-stories", 400, "--tokenizer", "bpe:300", "--out", tmp_path / "data"]
    one_line(start("prepare", *options, preexec_fn=limited(size)), "cannot be written", "make room")
    assert not list((tmp_path / "data").glob("*.part"))
    assert start("prepare", *options).wait(60) == 0
    storyllm.verify(tmp_path / "data")


@pytest.fixture
def tmpfs():
    """A disk of four megabytes, or a skip."""
    folder = Path(tempfile.mkdtemp())
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        folder.rmdir()
        pytest.skip("no disk can be mounted here: that takes an administrator")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def test_a_disk_that_is_really_full(tmpfs, tiny_data):
    (tmpfs / "filler").write_bytes(bytes(2_900_000))
    recipe = TINY.override({**EVERY, "model.n_embd": 64, "model.n_head": 2})
    with pytest.raises(StoryLLMError, match=r"cannot be written .*make room") as caught:
        train(recipe, tiny_data, tmpfs / "run")
    assert "\n" not in str(caught.value)
    assert load(tmpfs / "run" / "last.pt")
    (tmpfs / "filler").unlink()
    train(recipe.override({"train.keep_checkpoints": 0}), tiny_data, tmpfs / "run")
    with pytest.raises(StoryLLMError, match=r"cannot be written .*make room"):
        storyllm.prepare(storyllm.DataConfig(source="builtin", tokenizer="bpe:300"), tmpfs / "data")
    assert not list((tmpfs / "data").glob("*.part"))


@contextlib.contextmanager
def as_nobody():
    """Whoever may do everything gives that up for a while, so that permissions count."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture
def open_folder():
    """A temporary folder that everybody can get to (pytest's own are private)."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_a_folder_that_may_not_be_written_is_one_line(whole, tiny_data, open_folder):
    shutil.copytree(tiny_data, open_folder / "data")
    shutil.copytree(whole, open_folder / "run")
    before = {path.name: path.read_bytes() for path in (open_folder / "run").iterdir()}
    storyllm.plot_losses(open_folder / "run" / "log.jsonl", open_folder / "before.png")  # what it needs is imported
    for path in (open_folder, *open_folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with as_nobody():
        for call in (
            lambda: train(TINY, open_folder / "data", open_folder / "new"),
            lambda: train(TINY.override({"train.max_iters": 30}), open_folder / "data", open_folder / "run"),
            lambda: storyllm.prepare(storyllm.DataConfig(source="builtin", builtin_stories=30), open_folder / "new"),
            lambda: storyllm.plot_losses(open_folder / "run" / "log.jsonl", open_folder / "losses.png"),
        ):
            with pytest.raises(
                StoryLLMError, match=r"Permission denied.*: take another folder, or change its"
            ) as caught:
                call()
            assert "\n" not in str(caught.value)
        assert train(TINY, open_folder / "data", open_folder / "run").updates  # finished already: nothing to write
        assert storyllm.verify(open_folder / "data")
        assert load(open_folder / "run" / "last.pt").tell("One day", max_new_tokens=3, seed=0)
    for path in (open_folder, *open_folder.rglob("*")):
        path.chmod(0o755)
    assert before == {path.name: path.read_bytes() for path in (open_folder / "run").iterdir()}


def test_a_file_that_may_not_be_read_is_not_called_damaged(half, tiny_data, open_folder):
    shutil.copytree(half, open_folder / "run")
    shutil.copytree(tiny_data, open_folder / "data")
    (open_folder / "run").chmod(0o777)
    (open_folder / "run" / "last.pt").chmod(0o000)
    with as_nobody(), pytest.raises(StoryLLMError, match=r"last\.pt cannot be read \(Permission denied\)"):
        train(TINY, open_folder / "data", open_folder / "run")
    assert not list((open_folder / "run").glob("*.damaged"))


def test_a_filesystem_without_fsync_or_locks_works(whole, tiny_data, tmp_path, monkeypatch):
    import errno
    import fcntl

    def not_here(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", not_here)
    monkeypatch.setattr(os, "fsync", not_here)
    with pytest.warns(UserWarning, match="cannot be locked here") as caught:
        train(TINY, tiny_data, tmp_path)
    assert any("a cut of power may cost" in str(warning.message) for warning in caught)
    assert same(tmp_path, whole)


def test_out_of_file_handles_is_one_line(half, whole, tiny_data):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    refused = 0
    for left in range(12):
        handles = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    handles.append(os.open(os.devnull, os.O_RDONLY))
            for handle in handles[:left]:
                os.close(handle)
            del handles[:left]
            train(TINY.override({"train.stop_at": 20}), tiny_data, half)
        except StoryLLMError as error:
            message = str(error)
            refused += 1
            assert "Too many open files" in message
        finally:
            for handle in handles:
                os.close(handle)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert 2 <= refused < 12
    assert not list(half.glob("*.damaged"))
    train(TINY, tiny_data, half)
    assert same(half, whole)


# Numbers


@pytest.mark.parametrize("where", ["loss", "gradient", "weights"])
def test_what_is_not_finite_stops_the_run_and_is_never_saved(half, tiny_data, monkeypatch, where):
    before = {path.name: path.read_bytes() for path in half.glob("*.pt")}
    calls = []

    def poisoned(loss_of, micro_batches, optimizer, *args):
        calls.append(1)
        loss, norm = train_step(loss_of, micro_batches, optimizer, *args)
        if where == "weights":
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0][0, 0] = math.nan
        return loss * (math.nan if where == "loss" else 1), norm * (math.inf if where == "gradient" else 1)

    monkeypatch.setattr(training, "train_step", poisoned)
    with pytest.raises(
        StoryLLMError, match=r"(hold NaN or infinity|the loss is .*) at iteration 20, learning rate"
    ) as caught:
        train(TINY.override(EVERY), tiny_data, half)
    assert "learning_rate" in str(caught.value)
    assert len(calls) == 1
    assert {path.name: path.read_bytes() for path in half.glob("*.pt")} == before


def test_a_rate_far_too_high_ends_in_one_line(tiny_data, tmp_path):
    recipe = TINY.override({"train.learning_rate": 1e30, "train.warmup_iters": 0, **EVERY})
    with pytest.raises(StoryLLMError, match=r"the loss is|hold NaN") as caught:
        train(recipe, tiny_data, tmp_path)
    assert "\n" not in str(caught.value)
    for path in tmp_path.glob("*.pt"):
        assert all(weight.isfinite().all() for weight in load_checkpoint(path)["model"].values())


def test_fp16_steps_that_overflow_are_skipped_and_counted(tiny_data, tmp_path, monkeypatch):
    class Overflowing(torch.amp.GradScaler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, init_scale=2.0**40)

    recipe = TINY.override({"train.dtype": "float16", "train.max_iters": 160, "train.eval_interval": 100})
    monkeypatch.setattr(torch.amp, "GradScaler", Overflowing)
    train(recipe.override({"train.stop_at": 20}), tiny_data, tmp_path)
    log = train(recipe, tiny_data, tmp_path)  # the count goes on
    skipped = [entry["skipped_updates"] for entry in log.updates]
    assert skipped == sorted(skipped)
    assert 10 < skipped[-1] < 40
    overflowed = [entry for entry in log.updates if entry["grad_norm"] is None]
    assert len(overflowed) == skipped[-1]
    assert log.updates[-1]["grad_norm"] is not None


# Data


def test_splits_that_were_not_made_together_are_refused(tmp_path):
    """As where a preparation that overwrites is stopped between the two."""
    source = storyllm.DataConfig(source="builtin", builtin_stories=60, tokenizer="bpe:300")
    storyllm.prepare(source, tmp_path / "one")
    storyllm.prepare(dataclasses.replace(source, validation_fraction=0.5), tmp_path / "other")
    for name in ("validation.bin", "validation.json"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "one" / name)
    for call in (lambda: storyllm.verify(tmp_path / "one"), lambda: train(TINY, tmp_path / "one", tmp_path / "run")):
        with pytest.raises(StoryLLMError, match=r"validation\.bin was not made together with train\.bin: prepare"):
            call()


def test_other_validation_data_is_noticed(tmp_path):
    (tmp_path / "train.txt").write_text("\n<|endoftext|>\n".join(f"The pig ate {n} figs." for n in range(200)))
    (tmp_path / "valid.txt").write_text("\n<|endoftext|>\n".join(f"The cow ate {n} figs." for n in range(200)))
    source = storyllm.DataConfig(source=str(tmp_path), tokenizer="bpe:300")
    storyllm.prepare(source, tmp_path / "data")
    train(TINY.override({"train.stop_at": 8}), tmp_path / "data", tmp_path / "run")
    (tmp_path / "valid.txt").write_text("\n<|endoftext|>\n".join(f"The fox ate {n} figs." for n in range(200)))
    storyllm.prepare(source, tmp_path / "data", overwrite=True)
    with pytest.raises(StoryLLMError, match="was trained on other data"):
        train(TINY, tmp_path / "data", tmp_path / "run")


def test_windows_at_once_belong_to_a_device(half, tiny_data):
    contents = load_checkpoint(half / "last.pt")
    storyllm.checkpoint.save_checkpoint(half / "last.pt", {**contents, "device": "cuda", "micro_batch_size": 7})
    assert train(TINY, tiny_data, half).run["micro_batch_size"] == 12


# Memory


def short_of_memory(limit, error):
    """`train_step` and `mean_loss` on a device that has memory for so many windows at once."""
    sizes = []

    def checked(pieces):
        for x, y in pieces:
            sizes.append(len(x))
            if len(x) > limit:
                raise error
            yield x, y

    def step(loss_of, micro_batches, *args):
        return train_step(loss_of, checked(micro_batches), *args)

    def mean(loss_of, micro_batches, machine):
        return storyllm.evaluation.mean_loss(loss_of, checked(micro_batches), machine)

    return step, mean, sizes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1.2 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_halves_the_windows_at_once_and_goes_on(tiny_data, tmp_path, monkeypatch, error):
    recipe = TINY.override({"model.dropout": 0.0, "train.micro_batch_size": 12})
    expected = train(recipe, tiny_data, tmp_path / "enough").updates
    step, mean, sizes = short_of_memory(4, error)
    monkeypatch.setattr(training, "train_step", step)
    monkeypatch.setattr(training, "mean_loss", mean)
    with pytest.warns(UserWarning, match="out of memory with 6 windows at once: going on with 3"):
        log = train(recipe, tiny_data, tmp_path / "short")
    for one, other in zip(log.updates, expected, strict=True):  # the mathematics are the same
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
    assert max(sizes[sizes.index(3) :]) == 3
    assert load_checkpoint(tmp_path / "short" / "last.pt")["micro_batch_size"] == 3
    assert log.warnings[-1]["message"].endswith("going on with 3")


def test_out_of_memory_with_one_window_names_what_to_lower(half, tiny_data, monkeypatch):
    before = (half / "last.pt").read_bytes()
    step, _, _ = short_of_memory(0, torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(training, "train_step", step)
    with (
        pytest.warns(UserWarning, match="going on with 1"),
        pytest.raises(StoryLLMError, match=r"out of memory \(CUDA out of memory\): lower model.n_embd, model.n_layer"),
    ):
        train(TINY, tiny_data, half)
    assert (half / "last.pt").read_bytes() == before


MEMORY_PROGRAM = """
import json, resource, sys, torch, storyllm
torch.set_num_threads(1)
recipe = storyllm.Recipe.from_dict(json.loads(sys.argv[1]))
few = recipe.override({"train.stop_at": 4, "train.micro_batch_size": 64})
storyllm.train(few, sys.argv[2], sys.argv[3])  # what is loaded only once is loaded
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 400 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
log = storyllm.train(recipe, sys.argv[2], sys.argv[3])
print("micro-batch:", log.run["micro_batch_size"], json.dumps([e["message"] for e in log.warnings]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does")
def test_a_process_that_may_take_no_more_memory_goes_on_with_less(tiny_data, tmp_path):
    recipe = TINY.override({"train.batch_size": 512, "model.block_size": 64, "train.stop_at": 8})
    recipe = recipe.override({"train.micro_batch_size": 2048})
    run = [sys.executable, "-c", MEMORY_PROGRAM, json.dumps(recipe.to_dict()), tiny_data, tmp_path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    said = done.stdout.splitlines()[-1]
    assert said.startswith("micro-batch: "), (done.stdout, done.stderr)
    assert "out of memory with 2048 windows at once: going on with 1024" in said


def test_absurd_sizes_end_in_one_line(tiny_data, tmp_path, capsys):
    options = ["--recipe", "demo", "--data-dir", str(tiny_data), "--checkpoint-dir", str(tmp_path / "run")]
    for change in (
        ["--train.eval-windows", "100000000000"],
        ["--train.batch-size", "100000000000"],
        ["--model.n-embd", "400000000"],
        ["--model.n-layer", "1000000000"],
        ["--model.n-layer", "99999999999999999999"],
        ["--model.block-size", "10000000000000"],
    ):
        assert main(["train", *options, *SMALL, *SHORT, *change]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_telling_too_much_ends_in_one_line(whole, capsys):
    assert main(["tell", "--checkpoint", str(whole / "last.pt"), "--max-new-tokens", "100000000000000", "One day"]) == 2
    assert capsys.readouterr().err == "storyllm: out of memory: ask for less at once, or close other programs\n"


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(StoryLLMError("out of memory"))


# Time


def test_a_clock_that_jumps_and_another_time_zone_change_nothing(half, whole, tiny_data, monkeypatch):
    now = iter(range(2_000_000_000, 0, -100_000))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(now)))
        patch.setenv("TZ", "Pacific/Kiritimati")
        time.tzset()
        log = train(dataclasses.replace(TINY), tiny_data, half)
    time.tzset()
    assert same(half, whole)
    assert all(0 <= entry["seconds"] < 600 for entry in log.updates)
