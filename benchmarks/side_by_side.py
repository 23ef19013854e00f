"""What the benchmarks share: ours and its peers are run in turn in one process, and medians are compared."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import tyro
from torch import Tensor

import storyllm
from storyllm.device import choose_machine
from storyllm.optim import make_optimizer
from storyllm.training import train_step


def command_line(main: Callable[..., int | None]) -> NoReturn:
    """Runs `main` with the command line's options and leaves; bad input is one line and exit code 2."""
    try:
        sys.exit(tyro.cli(main))
    except storyllm.StoryLLMError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def in_turn(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median wall seconds of each function over `repeats` rounds; a round before them does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            _wait()
            started = time.perf_counter()
            function()
            _wait()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def print_table(title: str, unit: str, figures: dict[str, float], less_is_better: bool = True) -> None:
    """A row for each figure, with what it is as a multiple of ours (or the other way round, where more is better)."""
    print(f"\n{title}")
    for name, figure in figures.items():
        factor = figure / figures["ours"] if less_is_better else figures["ours"] / figure
        print(f"  {name:<42} {figure:>12,.4g} {unit}" + (f"   ours: {factor:.2f}x" if name != "ours" else ""))
    sys.stdout.flush()


def update(recipe: storyllm.Recipe, x: Tensor, y: Tensor) -> Callable[[], object]:
    """What takes an update of a new model of `recipe` on (windows, T) inputs and targets, as training would here."""
    machine = choose_machine(recipe.train, recipe.model)
    model = storyllm.GPT(recipe.model).to(machine.device).train()
    optimizer, scaler = make_optimizer(model, recipe.train), machine.grad_scaler()
    loss_of = torch.compile(model.loss, dynamic=False) if machine.compile else model.loss
    parts = [tuple(part.to(machine.device).split(machine.micro_batch_size)) for part in (x, y)]
    rate = recipe.train.learning_rate
    return lambda: train_step(loss_of, zip(*parts, strict=True), optimizer, scaler, machine, recipe.train, rate)


def in_own_process(script: str, *arguments: str) -> list[float]:
    """The numbers in the last line that this script prints in a process of its own."""
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


def peak_memory() -> float:
    """The most memory that this process has had, in MB."""
    # Linux's getrusage also counts what the parent had when it started this process: VmHWM does not.
    if "VmHWM" in (fields := _status()):
        return float(fields["VmHWM"].split()[0]) * 1024 / 1e6
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def resident_memory() -> dict[str, float]:
    """What the process has now, in MB, by Linux's kinds: anonymous, and mapped from files; not a number elsewhere."""
    return {kind: float(_status().get(kind, "nan").split()[0]) * 1024 / 1e6 for kind in ("RssAnon", "RssFile")}


def _status() -> dict[str, str]:
    path = Path("/proc/self/status")
    return dict(line.split(":", 1) for line in path.read_text().splitlines()) if path.exists() else {}


def machine() -> str:
    """Hardware and versions in one line."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
