"""torchrun restarts a run whose processes are killed, and stops one that is interrupted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import SAVE_EVERY_UPDATE, TINY, environment, iteration_of, losses, weights

from storyllm import read_log, train
from storyllm.training.launch import command_line_options

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc"),
]

RECIPE = TINY.override({"train.max_iters": 200, "train.eval_interval": 100, **SAVE_EVERY_UPDATE})


def train_rank(rank: int, data: str, folder: str) -> None:
    train(RECIPE, data, folder)


def start_torchrun(data: Path, folder: Path, *options: str, **changes: Any) -> subprocess.Popen[str]:
    """Starts a run of RECIPE on two processes."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    folders = ["--data-dir", str(data), "--checkpoint-dir", str(folder)]
    training = ["-m", "storyllm", "train", *command_line_options(RECIPE.override(changes)), *folders]
    command = [sys.executable, "-m", *torchrun, *training]
    with open(folder.with_suffix(".out"), "w") as out, open(folder.with_suffix(".err"), "w") as errors:
        return subprocess.Popen(command, env=environment(), stdout=out, stderr=errors, text=True)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def end(process: subprocess.Popen[str]) -> None:
    """Kills torchrun and its processes, if they still run."""
    for pid in [*workers(process), process.pid] if process.poll() is None else []:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def lines(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_randomly(data: Path, folder: Path, kills: int, rng: random.Random) -> int:
    """A run that torchrun restarts each time a random process is killed, in an update or while it starts."""
    process = start_torchrun(data, folder, f"--max-restarts={kills}")
    killed: set[int] = set()
    deadline = time.monotonic() + 100 * (kills + 1)
    while len(killed) < kills and process.poll() is None and time.monotonic() < deadline:
        candidates = sorted(set(workers(process)) - killed)
        if len(candidates) < 2:
            time.sleep(0.02)
            continue
        if rng.random() < 0.7:  # in an update
            before, updates = lines(folder), rng.randrange(1, 6)
            while lines(folder) < before + updates and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
        else:
            time.sleep(rng.uniform(0, 3))
        pid = rng.choice(candidates)
        os.kill(pid, signal.SIGKILL)
        killed |= set(candidates)  # the other one ends, too
        while set(candidates) & set(workers(process)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    try:
        process.wait(timeout=max(1.0, deadline - time.monotonic()))
    finally:
        end(process)
    assert process.returncode == 0, folder.with_suffix(".err").read_text()[-3_000:]
    return len(killed) // 2


@pytest.mark.parametrize(
    ("kills", "seed"), [(2, 0), pytest.param(20, 1, marks=[pytest.mark.campaign, pytest.mark.timeout(2_400)])]
)
def test_killed_processes_do_not_change_the_result(ranks, tiny_data, tmp_path, kills, seed):
    assert ranks.run(2, train_rank, tiny_data, "uninterrupted", cwd=tmp_path) == [0, 0]
    rng, killed, number = random.Random(seed), 0, 0
    while killed < kills:
        folder = tmp_path / f"killed-{number}"
        killed += kill_randomly(tiny_data, folder, kills - killed, rng)
        assert losses(folder) == losses(tmp_path / "uninterrupted")
        assert weights(folder) == weights(tmp_path / "uninterrupted")
        number += 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_saves_the_run(tiny_data, tmp_path, signum):
    folder = tmp_path / "run"
    endless = {"train.max_iters": 1_000_000, "train.eval_interval": 1_000_000, "train.checkpoint_minutes": 100.0}
    process = start_torchrun(tiny_data, folder, **endless)
    try:
        while lines(folder) < 10 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signum)
        process.wait(timeout=100)
    finally:
        end(process)
    assert "run the same command again to resume" in folder.with_suffix(".out").read_text()
    assert iteration_of(folder / "last.pt") == read_log(folder / "log.jsonl").updates[-1]["iteration"] > 0
    assert "storyllm: " not in folder.with_suffix(".err").read_text()
