"""Training on one batch on a CPU: StoryLLM against the plain loop, time and peak memory.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --recipe demo

Both run forward, backward and an update on the same batch. The plain loop also reads the loss after every batch.
"""

from __future__ import annotations

import dataclasses
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


def step_makers(recipe: storyllm.Recipe) -> dict[str, Callable[[], Callable[[], object]]]:
    """For each implementation, a function that creates a model and returns a function that trains it on the batch."""
    config = dataclasses.replace(
        recipe.train, device="cpu", dtype="float32", gradient_accumulation_steps=1, max_iters=1_000_000
    )
    shape = (2, config.batch_size, recipe.model.block_size)
    x, y = torch.randint(recipe.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def make_storyllm_step() -> Callable[[], object]:
        return make_update(dataclasses.replace(recipe, train=config), x, y)

    def make_plain_step() -> Callable[[], object]:
        losses = plain_loop.train(plain_loop.PlainGPT(recipe.model), lambda i: (x, y), config, "cpu")
        return lambda: next(losses)

    return {STORYLLM: make_storyllm_step, "plain loop": make_plain_step}


def main(recipe: str = "faithful", repeats: int = 5, memory: bool = True, memory_of: str | None = None) -> None:
    """Times one batch, and with `memory` measures the peak memory of each implementation in a new process.

    `memory_of` is for these processes: it prints the peak memory of two steps of that implementation.
    """
    makers = step_makers(storyllm.get_recipe(recipe))
    if memory_of is not None:
        step = makers[memory_of]()
        step()
        step()
        print(peak_memory_mb())
        return
    batch_size = storyllm.get_recipe(recipe).train.batch_size
    print(f"{describe_machine()}, recipe {recipe}, a batch of {batch_size} windows, medians of {repeats}")
    print_table("one batch", "s", median_seconds({name: make() for name, make in makers.items()}, repeats))
    if memory:
        peaks = {name: run_in_subprocess(__file__, "--recipe", recipe, "--memory-of", name)[0] for name in makers}
        print_table("peak memory of the process", "MB", peaks)


if __name__ == "__main__":
    run_cli(main)
