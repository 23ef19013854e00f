"""Throughput, MFU, time left, and the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..config import GPTConfig, Recipe
from ..data.prepare import ProgressBar
from ..device import flops_per_token

LONG_RUN = 4 * 3_600  # seconds; longer runs come with a hint
BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}{postfix}]"  # tqdm's {remaining} is naive


class Progress:
    """Measures a run and shows a progress bar within its `with` block. Times are in seconds.

    `peak_flops` are those of the device, if known; each of the processes has one.
    """

    def __init__(self, recipe: Recipe, iteration: int, peak_flops: float | None, processes: int = 1) -> None:
        self.recipe = recipe
        self.peak_flops = None if peak_flops is None else peak_flops * processes
        self.processes = processes
        self.iteration = iteration  # where the bar starts
        self.bar: ProgressBar | None = None
        self.windows = 0
        self.training_seconds = 0.0
        self.evaluations = 0
        self.evaluation_seconds = 0.0

    def __enter__(self) -> Progress:
        total = self.recipe.train.last_iteration
        self.bar = ProgressBar(
            total=total, initial=self.iteration, bar_format=BAR_FORMAT, mininterval=0.5, file=sys.stdout
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def print(self, message: str) -> None:
        """Prints a line above the bar."""
        tqdm.write(message, sys.stdout)

    def track(self, micro_batches: Iterable[tuple[Tensor, Tensor]], iteration: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the micro-batches of an update that starts at `iteration`, advancing the bar after each.

        The other processes are assumed to be as far as this one.
        """
        windows = 0
        for x, y in micro_batches:
            yield x, y
            windows += len(x) * self.processes
            if self.bar is not None:
                self.bar.n = min(iteration + windows / self.recipe.train.batch_size, self.bar.total)
                self.bar.update(0)

    def add_windows(self, windows: int, seconds: float) -> None:
        """Records the training time of some windows."""
        self.windows += windows
        self.training_seconds += seconds

    def add_evaluation(self, seconds: float) -> None:
        """Records the time of an evaluation."""
        self.evaluations += 1
        self.evaluation_seconds += seconds

    def seconds_left(self, iteration: int, last_evaluation: int) -> float:
        """An estimate for the rest of the run, evaluations included, from the mean times so far.

        Before the first evaluation, its forward passes are assumed to take a third of a training step.
        """
        config = self.recipe.train
        seconds_per_window = self.training_seconds / max(1, self.windows)
        if self.evaluations:
            seconds_per_evaluation = self.evaluation_seconds / self.evaluations
        else:
            seconds_per_evaluation = 2 * config.eval_windows * seconds_per_window / 3
        end, interval = config.last_iteration, config.resolved_eval_interval
        evaluations = end // interval - last_evaluation // interval + (end % interval > 0)  # one at the end
        return (end - iteration) * config.batch_size * seconds_per_window + evaluations * seconds_per_evaluation

    def update_metrics(self, windows: int, seconds: float, iteration: int, last_evaluation: int) -> dict[str, float]:
        """Records an update of `windows` windows; returns tokens_per_second, mfu (if known) and seconds_left."""
        self.add_windows(windows, seconds)
        tokens_per_second = windows * self.recipe.model.block_size / seconds
        metrics = {"tokens_per_second": round(tokens_per_second, 1)}
        if self.peak_flops is not None:
            mfu = model_flops_utilization(tokens_per_second, self.recipe.model, self.peak_flops)
            metrics["mfu"] = round(mfu, 4)
        metrics["seconds_left"] = round(self.seconds_left(iteration, last_evaluation), 1)
        return metrics

    def estimate(self, seconds_per_window: float, iteration: int, last_evaluation: int) -> None:
        """Prints an estimate of the run's duration, from the measured time of one window."""
        self.add_windows(1, seconds_per_window)
        seconds = self.seconds_left(iteration, last_evaluation)
        iterations = self.recipe.train.last_iteration - iteration
        self.print(f"estimated time: {format_duration(seconds)} for {iterations:,} iterations")
        if seconds > LONG_RUN and iteration == 0:
            self.print("this is a long run; the recipe demo takes minutes on a CPU, small-vocab a few hours")

    def show_update(self, entry: dict[str, Any]) -> None:
        """Shows the figures of an "update" log entry in the bar."""
        if self.bar is None:
            return
        loss = "overflow" if entry["train_loss"] is None else f"{entry['train_loss']:.3f}"
        parts = [f"loss {loss}", f"lr {entry['learning_rate']:.1e}", f"{entry['tokens_per_second']:,.0f} tokens/s"]
        if entry["iteration"] < self.recipe.train.last_iteration:
            parts.insert(0, f"{self.bar.format_interval(entry['seconds_left'])} left")
        if "mfu" in entry:
            parts.append(f"{entry['mfu']:.0%} MFU")
        self.bar.set_postfix_str(", ".join(parts), refresh=False)

    def show_evaluation(self, iteration: int, losses: dict[str, float]) -> None:
        """Prints the losses of an evaluation."""
        original = losses.get("original_bits_per_byte")
        self.print(
            f"iteration {iteration:>6,}: train loss {losses['train_loss']:.4f}, "
            f"val loss {losses['val_loss']:.4f} ({losses['val_bits_per_byte']:.3f} bits per byte)"
            + ("" if original is None else f", original data {original:.3f} bits per byte")
        )


def model_flops_utilization(tokens_per_second: float, config: GPTConfig, peak_flops: float) -> float:
    """MFU: the fraction of the device's peak FLOP/s used by the model (Chowdhery et al. 2022).

    Recomputation (gradient checkpointing) does not count.
    """
    return tokens_per_second * flops_per_token(config) / peak_flops


def format_duration(seconds: float) -> str:
    """A duration such as "48 seconds", "3.5 minutes" or "2.1 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5_400 else f"{seconds / 3_600:.1f} hours"
