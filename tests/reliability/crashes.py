"""Kills a job at random points, runs it again each time, and compares the result: `python crashes.py --help`.

Each attempt is a forked process, so that a kill does not cost another start of Python. It is killed by SIGKILL after a
random time or at a random line of the code that writes files, or by SIGXFSZ within a write. The final result must equal
that of the same job without kills.
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
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from helpers import SAVE_EVERY_UPDATE, TINY, losses, weights

import storyllm
from storyllm import checkpoint, files
from storyllm.data import prepare, token_file
from storyllm.training import log

RECIPE = TINY.override(
    {"train.max_iters": 40, "train.gradient_accumulation_steps": 2, "train.eval_interval": 10, **SAVE_EVERY_UPDATE}
)
WRITERS = {module.__file__ for module in (files, log, checkpoint, prepare, token_file)}  # the code that writes files


def run_training(data: Path, folder: Path) -> None:
    storyllm.train(RECIPE, data / "prepared", folder)


def run_preparation(data: Path, folder: Path) -> None:
    storyllm.prepare(storyllm.DataConfig(source=str(data / "stories.txt"), tokenizer="bpe:300"), folder)


def training_result(folder: Path) -> Any:
    return losses(folder), weights(folder), weights(folder, "best_model_params.pt")


def preparation_result(folder: Path) -> Any:
    storyllm.verify(folder)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


JOBS: dict[str, tuple[Callable[[Path, Path], None], Callable[[Path], Any]]] = {
    "train": (run_training, training_result),
    "prepare": (run_preparation, preparation_result),
}


# Bugs that the campaign must find


@contextlib.contextmanager
def write_in_place(path: Path, keep: int = 0) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        yield file


def open_without_truncating(writer: log.LogWriter, size: int) -> log.LogWriter:
    return open_log(writer, sys.maxsize)


open_log = log.LogWriter.open
GENERATOR = np.random.default_rng(0)


def plant(bug: str) -> None:
    """Plants a bug in the package."""
    if bug == "in-place":  # files are not written atomically
        for module in (files, checkpoint, prepare):
            setattr(module, "atomic_write", write_in_place)  # noqa: B010
    elif bug == "log":  # the log keeps the entries after the last save
        log.LogWriter.open = open_without_truncating  # type: ignore[method-assign]
    elif bug == "windows":  # one generator for all windows, seeded when the process starts
        np.random.default_rng = lambda *_: GENERATOR  # type: ignore[assignment]
    elif bug == "order":  # the .json is written after its .bin
        write_json, replace = files.write_json, os.replace
        delayed: list[tuple[Path, dict[str, Any]]] = []
        prepare.write_json = lambda path, values: delayed.append((path, values))  # type: ignore[attr-defined]

        def replace_then_write(source: Any, target: Any) -> None:
            replace(source, target)
            if delayed:
                time.sleep(0.1)  # as on a slow disk, so that a kill hits it sooner
            while delayed:
                write_json(*delayed.pop())

        files.os = type("os", (), {**vars(os), "replace": staticmethod(replace_then_write)})  # type: ignore[assignment]


# Running and killing


def attempt(job: Callable[[], None], rng: random.Random, seconds: float, lines: int, size: int, how: str) -> int:
    """Runs the job in a forked process that is killed at a random point, and returns its wait status."""
    pid = os.fork()
    if pid:
        if how == "time":
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        if how == "line":
            kill_at_line(rng.randrange(1, lines))
        elif how == "write":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            limit = rng.randrange(1, size)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with contextlib.redirect_stdout(io.StringIO()):
            job()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill_at_line(number: int) -> None:
    """Kills this process before the `number`-th line that it executes in the modules that write files."""
    remaining = number

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal remaining
        if frame.f_code.co_filename not in WRITERS:
            return None
        if event == "line":
            remaining -= 1
            if not remaining:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def count_lines(job: Callable[[], None]) -> int:
    """The number of lines that the job executes in the modules that write files."""
    read, write = os.pipe()
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace if frame.f_code.co_filename in WRITERS else None

    def traced_job() -> None:
        sys.settrace(trace)
        job()
        os.write(write, b"%d" % lines)

    run_to_the_end(traced_job)
    return int(os.read(read, 100))


def run_to_the_end(job: Callable[[], None]) -> float:
    """Runs the job without a kill, and returns its seconds."""
    started = time.monotonic()
    if attempt(job, random.Random(), 0, 0, 0, "never"):
        raise SystemExit("the job fails even if it is not killed")
    return time.monotonic() - started


def difference(folder: Path, result: Callable[[Path], Any], expected: Any) -> list[str]:
    """A description of what is wrong with a completed job, empty if nothing is."""
    try:
        return [] if result(folder) == expected else ["another result"]
    except storyllm.StoryLLMError as error:
        return [str(error)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("data", type=Path, help="folder with stories.txt and prepared/")
    parser.add_argument("folder", type=Path, help="folder to work in")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bug", default="", help="a bug to plant: in-place, log, windows or order")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plant(options.bug)
    job, result = JOBS[options.job]
    work = options.folder / options.job

    def run() -> None:
        job(options.data, work)

    seconds = run_to_the_end(run)
    shutil.rmtree(work)
    lines = count_lines(run)
    size = 2 * max(path.stat().st_size for path in work.iterdir())
    expected = result(work)
    shutil.rmtree(work)
    rng = random.Random(options.seed)
    kills, completed, problems = dict.fromkeys(("time", "line", "write"), 0), 0, []
    while sum(kills.values()) < options.kills and not problems:
        how = rng.choice(list(kills))
        status = attempt(run, rng, seconds, lines // rng.choice((1, 10)), size, how)
        if os.WIFSIGNALED(status):
            kills[how] += 1
        elif status:
            problems.append(f"after {sum(kills.values())} kills ({how}): exit code {os.waitstatus_to_exitcode(status)}")
        else:
            completed += 1
            problems += difference(work, result, expected)
            shutil.rmtree(work)
    if not problems:
        if status := attempt(run, rng, 0, 0, 0, "never"):
            problems.append(f"at the end: exit code {os.waitstatus_to_exitcode(status)}")
        else:
            problems += difference(work, result, expected)
    print(json.dumps({"kills": kills, "completed": completed + 1, "problems": problems}))


if __name__ == "__main__":
    main()
