"""A batch of the recipe `faithful` learned from: ours against the plain loop, on a CPU. Time in turn, and peak memory.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --recipe demo

Both take the same batch, forward, backward and an update; the peer's loss is looked at, as it does after every batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import plain_loop
import torch
from side_by_side import command_line, in_own_process, in_turn, machine, peak_memory, print_table, update

import storyllm


def steps(recipe: storyllm.Recipe) -> dict[str, Callable[[], Callable[[], object]]]:
    """Makers of a model and what takes a step of it, so that each can also be alone in a process."""
    config = dataclasses.replace(recipe.train, device="cpu", gradient_accumulation_steps=1, max_iters=1_000_000)
    shape = (2, config.batch_size, recipe.model.block_size)
    x, y = torch.randint(recipe.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def ours() -> Callable[[], object]:
        return update(dataclasses.replace(recipe, train=config), x, y)

    def plain() -> Callable[[], object]:
        losses = plain_loop.train(plain_loop.PlainGPT(recipe.model), lambda i: (x, y), config, "cpu")
        return lambda: next(losses)

    return {"ours": ours, "plain loop": plain}


def main(recipe: str = "faithful", repeats: int = 5, alone: str | None = None) -> None:
    """Times both in turn. `alone` is for the processes that it starts itself."""
    makers = steps(storyllm.get_recipe(recipe))
    if alone is not None:
        step = makers[alone]()
        step()
        step()
        print(peak_memory())
        return
    train = storyllm.RECIPES[recipe].train
    print(f"{machine()}, recipe {recipe}, a batch of {train.batch_size} windows, medians of {repeats}")
    print_table("a step", "s", in_turn({name: make() for name, make in makers.items()}, repeats))
    peaks = {name: in_own_process(__file__, "--recipe", recipe, "--alone", name)[0] for name in makers}
    print_table("peak memory of a process that takes two steps", "MB", peaks)


if __name__ == "__main__":
    command_line(main)
