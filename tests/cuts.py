"""Cuts a job off at random moments, starts it again each time, and tells how it ended: `python tests/cuts.py --help`.

A job runs in a process of its own, forked from one that has imported everything, so that a cut costs no start. It is
killed with SIGKILL after a random time, or when a random line of the code that writes files is reached, or within a
write, by a limit on the size of files. What it leaves at last is compared with what the same job leaves uncut.
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

import numpy as np
import torch
from test_training import TINY

import storyllm
from storyllm import checkpoint, files, log, tokens, training

RECIPE = TINY.override(
    {
        **{"train.max_iters": 40, "train.gradient_accumulation_steps": 2, "train.eval_interval": 10},
        "train.checkpoint_minutes": 0.0,  # after every update
    }
)
WRITING = {files.__file__, log.__file__, checkpoint.__file__, tokens.__file__}  # where a cut is aimed at


def do_train(data: Path, folder: Path) -> None:
    training.train(RECIPE, data / "prepared", folder)


def do_prepare(data: Path, folder: Path) -> None:
    tokens.prepare(storyllm.DataConfig(source=str(data / "stories.txt"), tokenizer="bpe:300"), folder)


def result_of_train(folder: Path) -> Any:
    """Losses and weights: everything that does not tell the time."""
    history = storyllm.read_log(folder / "log.jsonl")
    keep = ("iteration", "train_loss", "val_loss", "val_bits_per_byte", "learning_rate", "grad_norm")
    series = [{name: e[name] for name in keep if name in e} for e in (*history.updates, *history.evaluations)]
    weights = []
    for name in ("last.pt", "best_model_params.pt"):
        contents = checkpoint.load_checkpoint(folder / name)
        weights.append({key: hashlib.sha256(t.numpy().tobytes()).hexdigest() for key, t in contents["model"].items()})
    return series, weights


def result_of_prepare(folder: Path) -> Any:
    storyllm.verify(folder)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


JOBS: dict[str, tuple[Callable[[Path, Path], None], Callable[[Path], Any]]] = {
    "train": (do_train, result_of_train),
    "prepare": (do_prepare, result_of_prepare),  # its longest part is the training of a vocabulary
}


# Faults that the campaign has to find.


@contextlib.contextmanager
def torn_write(path: Path, keep: int = 0) -> Any:
    """As if files were written in their place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        yield file


class GrowingLog(log.LogWriter):
    """As if the log were not cut back to what the state knows of."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(path, sys.maxsize)


ONE_GENERATOR = np.random.default_rng(0)


def forgetful_windows(*_: Any) -> np.random.Generator:
    """As if all windows came from one generator, which starts anew with the process."""
    return ONE_GENERATOR


def plant(fault: str) -> None:
    if fault == "torn":
        for module in (files, checkpoint, tokens):
            setattr(module, "atomic_write", torn_write)  # noqa: B010
    elif fault == "log":
        training.LogWriter = GrowingLog  # type: ignore[misc]
    elif fault == "windows":
        np.random.default_rng = forgetful_windows  # type: ignore[assignment]
    elif fault == "order":  # the description of data after the data
        write_json, replace = files.write_json, os.replace
        tokens.write_json = lambda path, values: path.suffix == ".json" and deferred.append((path, values))
        deferred: list[Any] = []

        def and_then(source: Any, target: Any) -> None:
            replace(source, target)
            if deferred:
                time.sleep(0.1)  # a disk that is slow here: a cut meets it within a test's patience
            while deferred:
                write_json(*deferred.pop())

        files.os = type("os", (), {**vars(os), "replace": staticmethod(and_then)})  # type: ignore[assignment]


def attempt(job: Callable[[], None], rng: random.Random, seconds: float, lines: int, size: int, how: str) -> int:
    """Runs the job in a forked process, cut off somewhere; returns how that ended, as os.waitpid says it."""
    pid = os.fork()
    if pid:
        if how == "time":
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        if how == "line":
            cut_at_line(rng.randrange(1, lines))
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


def cut_at_line(number: int) -> None:
    """Kills this process at the `number`-th line of the modules that write."""
    left = number

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in WRITING:
            return None
        if event == "line":
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def lines_of(job: Callable[[], None]) -> int:
    """Lines in the modules that write, of the job uncut."""
    read, write = os.pipe()
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace if frame.f_code.co_filename in WRITING else None

    def traced() -> None:
        sys.settrace(trace)
        job()
        os.write(write, b"%d" % lines)

    run_uncut(traced)
    return int(os.read(read, 100))


def run_uncut(job: Callable[[], None]) -> float:
    """Seconds that the job takes."""
    started = time.monotonic()
    if attempt(job, random.Random(), 0, 0, 0, "not at all"):
        raise SystemExit("the job does not end well even when nobody cuts it off")
    return time.monotonic() - started


def difference(folder: Path, result: Callable[[Path], Any], expected: Any) -> list[str]:
    """What is to be said of a job that has ended: nothing, if it left what was expected."""
    try:
        return [] if result(folder) == expected else ["another result"]
    except storyllm.StoryLLMError as error:
        return [str(error)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("data", type=Path, help="folder with stories.txt and prepared/")
    parser.add_argument("folder", type=Path, help="folder to work in")
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", default="", help="torn, log, windows or order: a fault that is to be found")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plant(options.fault)
    run, result = JOBS[options.job]
    work = options.folder / options.job
    seconds = run_uncut(lambda: run(options.data, work))
    shutil.rmtree(work)
    lines = lines_of(lambda: run(options.data, work))
    size = 2 * max(path.stat().st_size for path in work.iterdir())
    expected = result(work)
    shutil.rmtree(work)
    rng = random.Random(options.seed)
    cuts, ended, found = dict.fromkeys(("time", "line", "write"), 0), 0, []
    while sum(cuts.values()) < options.cuts and not found:
        how = rng.choice(list(cuts))
        status = attempt(lambda: run(options.data, work), rng, seconds, lines // rng.choice((1, 10)), size, how)
        if os.WIFSIGNALED(status):
            cuts[how] += 1
        elif status:
            found.append(f"cut {sum(cuts.values())} ({how}): exit code {os.waitstatus_to_exitcode(status)}")
        else:
            ended += 1
            found += difference(work, result, expected)
            shutil.rmtree(work)
    if not found:
        if status := attempt(lambda: run(options.data, work), rng, 0, 0, 0, "not at all"):
            found.append(f"at the end: exit code {os.waitstatus_to_exitcode(status)}")
        else:
            found += difference(work, result, expected)
    print(json.dumps({"cuts": cuts, "ended": ended + 1, "found": found, "uncut_seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main()
