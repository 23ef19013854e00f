"""Timing, memory measurements, tables and the command line, shared by the benchmarks."""

from __future__ import annotations

import csv
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import torch
import tyro
from torch import Tensor

import storyllm
from storyllm.device import resolve_device_config
from storyllm.training.loop import train_step
from storyllm.training.optimizer import make_optimizer

STORYLLM = "StoryLLM"  # the row of a table that the others are compared with


def run_cli(main: Callable[..., int | None]) -> NoReturn:
    """Runs `main` with options from the command line and exits. Invalid input prints one line and exits with 2."""
    try:
        sys.exit(tyro.cli(main))
    except storyllm.StoryLLMError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def median_seconds(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median wall-clock seconds of each function.

    All functions run once per round, so that a machine's varying speed affects them alike. A first round is a warmup.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            _synchronize()
            started = time.perf_counter()
            function()
            _synchronize()
            if i > 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def print_table(title: str, unit: str, values: dict[str, float]) -> None:
    """Prints a row per value, and how StoryLLM compares: a multiple of that speed, or a percentage of that memory.

    A unit of "s", "ms" or "us" means times, "MB" means memory, and anything else a rate.
    """
    print(f"\n{title}")
    for name, value in values.items():
        number = f"{value:,.0f}" if value >= 1_000 else f"{value:.4g}"
        row = f"  {name:<44} {number:>10} {unit}"
        if name != STORYLLM:
            ratio = values[STORYLLM] / value
            if unit == "MB":
                row += f"  ({STORYLLM}: {ratio:.0%} of the memory)"
            else:
                row += f"  ({STORYLLM}: {1 / ratio if unit in ('s', 'ms', 'us') else ratio:.2f}x)"
        print(row)
    sys.stdout.flush()


def make_update(recipe: storyllm.Recipe, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A function that updates a new model of `recipe` on (windows, T) inputs and targets, as `storyllm.train` would."""
    device = resolve_device_config(recipe.train, recipe.model)
    model = storyllm.GPT(recipe.model).to(device.device).train()
    optimizer, scaler = make_optimizer(model, recipe.train, device.dtype), device.grad_scaler()
    loss_fn: Callable[[Tensor, Tensor], Tensor] = model.loss
    if device.compile:
        loss_fn = torch.compile(model.loss, dynamic=False)
    x, y = x.to(device.device), y.to(device.device)
    micro_batches = list(zip(x.split(device.micro_batch_size), y.split(device.micro_batch_size), strict=True))
    learning_rate = recipe.train.learning_rate
    return lambda: train_step(loss_fn, micro_batches, optimizer, learning_rate, recipe.train, device, scaler)


def published_curve() -> list[dict[str, float]]:
    """The rows of published_curve.csv: iterations and losses in nats per token of two runs, A and B."""
    lines = Path(__file__).with_name("published_curve.csv").read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return [{name: float(value) for name, value in row.items()} for row in rows]


def run_in_subprocess(script: str, *arguments: str) -> list[float]:
    """Runs a script in a new process and returns the numbers in the last line that it prints."""
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


def peak_memory_mb() -> float:
    """The peak resident memory of this process."""
    # On Linux, getrusage includes the memory of the parent when it started this process. VmHWM does not.
    if "VmHWM" in (fields := _proc_status()):
        return float(fields["VmHWM"].split()[0]) * 1024 / 1e6
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def resident_memory_mb() -> dict[str, float]:
    """The resident memory of this process: "RssAnon" (anonymous) and "RssFile" (mapped files). NaN except on Linux."""
    fields = _proc_status()
    return {kind: float(fields.get(kind, "nan").split()[0]) * 1024 / 1e6 for kind in ("RssAnon", "RssFile")}


def _proc_status() -> dict[str, str]:
    path = Path("/proc/self/status")
    if not path.exists():
        return {}
    rows = (line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return {name: value.strip() for name, value in rows}


def describe_machine() -> str:
    """Hardware and versions in one line."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor_name()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
