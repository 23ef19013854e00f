"""Training on one batch on a CPU: StoryLLM against the plain loop, time and peak memory.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --recipe demo

Both run forward, backward and an update on the same batch. The plain loop also reads the loss after every batch. Each
measurement is a process of its own, since StoryLLM changes how a process that trains manages its memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable

import plain_loop
import torch
from common import (
    STORYLLM,
    describe_machine,
    make_update,
    median_seconds,
    peak_memory_mb,
    print_table,
    run_cli,
    run_in_subprocess,
)

import storyllm
from storyllm.training.execution import process_state

IMPLEMENTATIONS = (STORYLLM, "plain loop")


def make_step(implementation: str, recipe: storyllm.Recipe) -> Callable[[], object]:
    """Creates a model and returns a function that trains it on the batch."""
    config = dataclasses.replace(
        recipe.train, device="cpu", dtype="float32", gradient_accumulation_steps=1, max_iters=1_000_000
    )
    shape = (2, config.batch_size, recipe.model.block_size)
    x, y = torch.randint(recipe.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    if implementation == STORYLLM:
        return make_update(dataclasses.replace(recipe, train=config), x, y)
    losses = plain_loop.train(plain_loop.PlainGPT(recipe.model), lambda i: (x, y), config, "cpu")
    return lambda: next(losses)


def measure(implementation: str, recipe: storyllm.Recipe, repeats: int) -> None:
    """Prints the median seconds of a batch and the peak memory of this process."""
    with contextlib.ExitStack() as stack:
        if implementation == STORYLLM:
            stack.enter_context(process_state())
        seconds = median_seconds({"": make_step(implementation, recipe)}, repeats)[""]
    print(seconds, peak_memory_mb())


def main(recipe: str = "faithful", repeats: int = 5, rounds: int = 3, only: str | None = None) -> None:
    """Measures both implementations in turn, `rounds` times, in new processes with `repeats` batches each.

    `only` is for these processes: the implementation that they measure.
    """
    settings = storyllm.get_recipe(recipe)
    if only is not None:
        measure(only, settings, repeats)
        return
    found: dict[str, list[list[float]]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(rounds):
        for name in IMPLEMENTATIONS:
            found[name].append(
                run_in_subprocess(__file__, "--recipe", recipe, "--repeats", str(repeats), "--only", name)
            )
    print(
        f"{describe_machine()}, recipe {recipe}, a batch of {settings.train.batch_size} windows, medians of {rounds} "
        f"processes with {repeats} batches each"
    )
    seconds, peaks = (
        {name: statistics.median(values[i] for values in found[name]) for name in IMPLEMENTATIONS} for i in (0, 1)
    )
    print_table("one batch", "s", seconds)
    print_table("peak memory of the process", "MB", peaks)


if __name__ == "__main__":
    run_cli(main)
