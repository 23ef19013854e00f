"""Speed on an idle and on a busy CPU, for several settings of how OpenMP's threads wait for each other.

    python benchmarks/shared_cpu.py
    python benchmarks/shared_cpu.py --settings GOMP_SPINCOUNT=1000 OMP_NUM_THREADS=1

On the busy CPU, each of the other processes keeps a core busy. A process with as many threads as there are cores then
has a fair share of cores / (cores + busy processes) of its speed on the idle CPU.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from common import describe_machine, make_update, run_cli

import storyllm
from storyllm.openmp import SPIN_COUNT

# What is measured: recipe, and whether it is trained or generates one story.
TASKS = {
    "train demo (batches/s)": ("demo", "train"),
    "train fast (batches/s)": ("fast", "train"),
    "generate demo (tokens/s)": ("demo", "generate"),
    "generate faithful (tokens/s)": ("faithful", "generate"),
}


def main(
    settings: tuple[str, ...] = (f"GOMP_SPINCOUNT={SPIN_COUNT}", "OMP_WAIT_POLICY=PASSIVE"),
    busy: int = os.cpu_count() or 1,
    seconds: float = 4.0,
    rounds: int = 3,
    tasks: tuple[str, ...] = tuple(TASKS),
    measure: str | None = None,
) -> None:
    """Measures each task with each environment variable (NAME=VALUE) and without any.

    The first of the `settings` is the package's own, which has no effect here, since PyTorch is imported first.
    `busy` is the number of busy processes. `measure` is for the processes that this script starts: it measures one task
    in the current environment.
    """
    if measure is not None:
        recipe, kind = TASKS[measure]
        print(rate_of_training(recipe, seconds) if kind == "train" else rate_of_generation(recipe, seconds))
        return
    cores = os.cpu_count() or 1
    print(f"{describe_machine()}, {busy} busy processes, medians of {rounds}")
    print(f"a fair share of the busy CPU is {cores / (cores + busy):.0%}")
    for task in tasks:
        print(f"\n{task:<44} {'idle':>10} {'busy':>10}")
        rates: dict[tuple[str, bool], list[float]] = {}
        for _ in range(rounds):
            for load in (False, True):
                for setting in ("", *settings):
                    with busy_processes(busy if load else 0):
                        rates.setdefault((setting, load), []).append(measure_in_process(task, seconds, setting))
        for setting in ("", *settings):
            idle, loaded = (statistics.median(rates[setting, load]) for load in (False, True))
            name = setting or "PyTorch's default"
            print(f"  {name:<42} {idle:>10.4g} {loaded:>10.4g}  ({loaded / idle:.0%} of idle)")
        sys.stdout.flush()


def measure_in_process(task: str, seconds: float, setting: str) -> float:
    """The rate of a task in a new process with this environment variable, if any."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if setting:
        name, _, value = setting.partition("=")
        environment[name] = value
    command = [sys.executable, __file__, "--measure", task, "--seconds", str(seconds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Runs that many processes, each of which keeps a core busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rate_of_training(recipe: str, seconds: float) -> float:
    """Batches per second."""
    config = storyllm.get_recipe(recipe)
    config = replace(config, train=replace(config.train, device="cpu", gradient_accumulation_steps=1))
    x, y = torch.randint(config.model.vocab_size, (2, config.train.batch_size, config.model.block_size))
    step = make_update(config, x, y)
    step()
    started, count = time.monotonic(), 0
    while time.monotonic() < started + seconds:
        step()
        count += 1
    return count / (time.monotonic() - started)


def rate_of_generation(recipe: str, seconds: float) -> float:
    """Tokens per second of one story, within the context."""
    model = storyllm.GPT(storyllm.get_recipe(recipe).model).eval()
    idx = torch.zeros(1, 1, dtype=torch.int64)
    new_tokens = 100
    model.generate(idx, 8)
    started, count = time.monotonic(), 0
    while time.monotonic() < started + seconds:
        model.generate(idx, new_tokens)
        count += new_tokens
    return count / (time.monotonic() - started)


if __name__ == "__main__":
    run_cli(main)
