"""Memory and disk space of the recipe `faithful`.

    python benchmarks/memory.py                         # on the device that training would use
    python benchmarks/memory.py --device cpu --repeats 3

Each figure comes from new processes. On a GPU it is PyTorch's peak allocated memory, on a CPU the peak resident memory
of the process, including the libraries (the row "import").
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import make_update, peak_memory_mb, run_cli, run_in_subprocess

import storyllm
from storyllm.checkpoint import model_contents, save_checkpoint
from storyllm.data.tokenizer import train_bpe
from storyllm.device import resolve_device, resolve_device_config
from storyllm.training.optimizer import make_optimizer

RECIPE = storyllm.RECIPES["faithful"]


def train(device: str, gradient_checkpointing: bool = False) -> None:
    """One update on two micro-batches of the size that "auto" selects."""
    changes = {"train.device": device, "train.compile": False, "model.gradient_checkpointing": gradient_checkpointing}
    recipe = RECIPE.override(changes)
    windows = 2 * resolve_device_config(recipe.train, recipe.model).micro_batch_size
    make_update(recipe, *torch.randint(recipe.model.vocab_size, (2, windows, recipe.model.block_size)))()


def generate(device: str) -> None:
    """Generates 200 tokens."""
    model = storyllm.GPT(RECIPE.model).to(resolve_device(device)).eval()
    model.generate(torch.zeros(1, 1, dtype=torch.long, device=resolve_device(device)), 200)


TASKS: dict[str, Callable[[str], object]] = {
    "import": resolve_device,
    "generate": generate,
    "train": train,
    "train, gradient_checkpointing": lambda device: train(device, gradient_checkpointing=True),
}


def print_file_sizes() -> None:
    """Prints the sizes of a run's checkpoints. GPT-2's vocabulary would add 0.5 MB to each."""
    model = storyllm.GPT(RECIPE.model)
    tokenizer = train_bpe([], 257)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        contents = model_contents(model, tokenizer, RECIPE)
        save_checkpoint(path, contents)
        print(f"best_model_params.pt {path.stat().st_size / 1e6:>18,.0f} MB")
        optimizer = make_optimizer(model, RECIPE.train)
        model.loss(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)).backward()
        optimizer.step()
        save_checkpoint(path, {**contents, "optimizer": optimizer.state_dict()})
        print(f"last.pt {path.stat().st_size / 1e6:>31,.0f} MB")


def main(device: str = "auto", repeats: int = 3, memory_of: str | None = None) -> None:
    """Prints the median peak memory of each task over `repeats` processes.

    `memory_of` is for these processes: it runs that task and prints its peak memory.
    """
    if memory_of is not None:
        TASKS[memory_of](device)
        on_gpu = resolve_device(device).type == "cuda"
        print(torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_memory_mb())
        return
    config = resolve_device_config(dataclasses.replace(RECIPE.train, device=device), RECIPE.model)
    print(f"{config.description}, torch {torch.__version__}, medians of {repeats}")
    for name in TASKS:
        peaks = [run_in_subprocess(__file__, "--device", device, "--memory-of", name)[0] for _ in range(repeats)]
        print(f"{name:<30} {statistics.median(peaks):>8,.0f} MB")
    print_file_sizes()


if __name__ == "__main__":
    run_cli(main)
