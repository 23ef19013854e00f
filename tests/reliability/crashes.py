"""Kills a job at random moments, restarts it each time, and compares its result with that of an uninterrupted job.

Run `PYTHONPATH=tests python tests/reliability/crashes.py --help`. Each attempt runs in a forked process, which takes no
time to start. It is killed with SIGKILL after a random time or at a random line of the code that writes files, or
within a write, by a limit on the size of files. Prints a report as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

import numpy as np
import torch
from helpers import SAVE_EVERY_UPDATE, TINY, losses, weights

import storyllm
from storyllm import checkpoint, files
from storyllm.data import prepare, token_file
from storyllm.training import log, run_folder

RECIPE = TINY.override(
    {
        "train.max_iters": 40,
        "train.gradient_accumulation_steps": 2,
        "train.eval_interval": 10,
        **SAVE_EVERY_UPDATE,
    }
)
# The modules that write files. Kills at a random line concentrate on them.
WRITING = {module.__file__ for module in (files, checkpoint, prepare, token_file, log, run_folder)}

# How an attempt ends: after a time, at a line, within a write, or not at all.
KILLS = ("time", "line", "write")


class Job:
    """A job that can be killed and restarted, in its folder."""

    def __init__(self, run: Callable[[Path, Path], object], result: Callable[[Path], Any]) -> None:
        self.run = run  # from the data folder to the job's folder
        self.result = result  # everything in the job's folder that does not depend on time


def run_training(data: Path, folder: Path) -> None:
    storyllm.train(RECIPE, data / "prepared", folder)


def training_result(folder: Path) -> Any:
    return losses(folder), [weights(folder, name) for name in ("last.pt", "best_model_params.pt")]


def run_preparation(data: Path, folder: Path) -> None:
    storyllm.prepare(storyllm.DataConfig(source=str(data / "stories.txt"), tokenizer="bpe:300"), folder)


def preparation_result(folder: Path) -> Any:
    storyllm.verify(folder)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


JOBS = {"train": Job(run_training, training_result), "prepare": Job(run_preparation, preparation_result)}


# Faults that the campaign must find


@contextlib.contextmanager
def write_in_place(path: Path, keep: int = 0) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        yield file


def plant_torn_writes() -> None:
    """Files are written in place instead of atomically."""
    for module in (files, checkpoint, prepare):
        module.atomic_write = write_in_place  # type: ignore[assignment]


class GrowingLog(log.LogWriter):
    def open(self, size: int) -> log.LogWriter:
        return super().open(sys.maxsize)


def plant_growing_log() -> None:
    """The log is not truncated to what the saved state knows."""
    run_folder.LogWriter = GrowingLog  # type: ignore[misc]


def plant_one_generator() -> None:
    """All windows come from one generator, which starts again with each process."""
    generator = np.random.default_rng(0)
    np.random.default_rng = lambda *_: generator  # type: ignore[assignment]


def plant_forgotten_optimizer() -> None:
    """The optimizer's state is not restored."""
    run_folder.load_optimizer_state = lambda optimizer, state: None  # type: ignore[assignment]


def plant_late_description() -> None:
    """The description of a .bin is written after the .bin."""
    descriptions: list[tuple[Path, dict[str, Any]]] = []

    def write_json(path: Path, values: dict[str, Any]) -> None:
        if path.name == token_file.VOCABULARY:
            files.write_json(path, values)
        else:
            descriptions.append((path, values))

    @contextlib.contextmanager
    def atomic_write(path: Path, keep: int = 0) -> Iterator[IO[bytes]]:
        with files.atomic_write(path, keep) as file:
            yield file
        time.sleep(0.1)  # as on a slow disk, so that a kill is likely to fall in between
        while descriptions:
            files.write_json(*descriptions.pop())

    prepare.write_json, prepare.atomic_write = write_json, atomic_write  # type: ignore[assignment]


FAULTS: dict[str, Callable[[], None]] = {
    "torn": plant_torn_writes,
    "log": plant_growing_log,
    "windows": plant_one_generator,
    "optimizer": plant_forgotten_optimizer,
    "order": plant_late_description,
}


# The campaign


def attempt(run: Callable[[], object], before: Callable[[], object] = lambda: None, kill_after: float = -1) -> int:
    """Calls `before` and `run` in a forked process; returns its status as os.waitpid does.

    The process is killed after `kill_after` seconds if that is not negative.
    """
    pid = os.fork()
    if pid:
        if kill_after >= 0:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        before()
        with contextlib.redirect_stdout(io.StringIO()):
            run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill_at_line(number: int) -> None:
    """Kills this process at the `number`-th line that it executes in the modules that write files."""
    left = number

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in WRITING:
            return None
        if event == "line":
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def kill_at_size(size: int) -> None:
    """Kills this process when it writes a file beyond `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def count_lines(run: Callable[[], object]) -> int:
    """The lines that an uninterrupted job executes in the modules that write files."""
    reader, writer = os.pipe()
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in WRITING:
            return None
        lines += event == "line"
        return trace

    def traced_run() -> None:
        run()
        sys.settrace(None)
        os.write(writer, b"%d" % lines)

    if attempt(traced_run, before=lambda: sys.settrace(trace)):
        raise SystemExit("the uninterrupted job fails")
    return int(os.read(reader, 100))


def campaign(job: Job, data: Path, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kills the job until it was killed `kills` times or a fault was found."""

    def run() -> None:
        job.run(data, folder)

    started = time.monotonic()
    if attempt(run):
        raise SystemExit("the uninterrupted job fails")
    seconds = time.monotonic() - started
    expected = job.result(folder)
    size = 2 * max(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)
    lines = count_lines(run)
    shutil.rmtree(folder)

    def found_after(status: int) -> str:
        """What is wrong after an attempt that was not killed; "" if nothing is."""
        if status:
            return f"exit code {os.waitstatus_to_exitcode(status)}"
        try:
            return "" if job.result(folder) == expected else "another result"
        except storyllm.StoryLLMError as error:
            return str(error)

    rng = random.Random(seed)
    killed, completed = dict.fromkeys(KILLS, 0), 0
    while sum(killed.values()) < kills:
        kind = rng.choice(KILLS)
        if kind == "time":
            status = attempt(run, kill_after=rng.uniform(0, seconds))
        elif kind == "line":
            line = rng.randrange(1, max(2, lines // rng.choice((1, 10))))
            status = attempt(run, before=lambda line=line: kill_at_line(line))
        else:
            limit = rng.randrange(1, size)
            status = attempt(run, before=lambda limit=limit: kill_at_size(limit))
        if os.WIFSIGNALED(status):
            killed[kind] += 1
            continue
        completed += 1
        if problem := found_after(status):
            return {"killed": killed, "completed": completed, "found": f"{problem} (kind: {kind})"}
        shutil.rmtree(folder)
    return {"killed": killed, "completed": completed + 1, "found": found_after(attempt(run))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("data", type=Path, help="folder with stories.txt and prepared/")
    parser.add_argument("folder", type=Path, help="new folder for the job")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", choices=FAULTS, help="plants a fault that the campaign must find")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # imports much of PyTorch, which each attempt would otherwise do again
    if options.fault:
        FAULTS[options.fault]()
    print(json.dumps(campaign(JOBS[options.job], options.data, options.folder, options.kills, options.seed)))


if __name__ == "__main__":
    main()
