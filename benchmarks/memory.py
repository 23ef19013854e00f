"""How much memory and disk the faithful recipe takes, each figure in a process of its own.

    python benchmarks/memory.py            # on the best device here
    python benchmarks/memory.py --device cpu --repeats 3

On a GPU the figure is the most that PyTorch had allocated on it; on a CPU it is the process's peak resident memory,
PyTorch's own libraries included (the row "import" shows how much that is).
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from pathlib import Path

import torch
from side_by_side import command_line, in_own_process, peak_memory, update

import storyllm
from storyllm.checkpoint import model_contents, save_checkpoint
from storyllm.device import choose_device, choose_machine
from storyllm.optim import make_optimizer
from storyllm.tokenizer import train_bpe

RECIPE = storyllm.RECIPES["faithful"]


def step(device: str, gradient_checkpointing: bool) -> None:
    """Two micro-batches of the size that "auto" takes here, and an update."""
    changes = {"train.device": device, "train.compile": False, "model.gradient_checkpointing": gradient_checkpointing}
    recipe = RECIPE.override(changes)
    windows = 2 * choose_machine(recipe.train, recipe.model).micro_batch_size
    update(recipe, *torch.randint(recipe.model.vocab_size, (2, windows, recipe.model.block_size)))()


def tell(device: str) -> None:
    """Two hundred tokens from a model of the recipe's shape, on random ids."""
    model = storyllm.GPT(RECIPE.model).to(choose_device(device)).eval()
    model.generate(torch.zeros(1, 1, dtype=torch.long, device=choose_device(device)), 200)


TASKS = {
    "import": lambda device: choose_device(device),
    "tell": tell,
    "train": lambda device: step(device, gradient_checkpointing=False),
    "train, gradient_checkpointing": lambda device: step(device, gradient_checkpointing=True),
}


def files() -> None:
    """Sizes of what a run keeps on disk; the vocabulary in them is a stand-in of bytes, GPT-2's takes 0.5 MB."""
    model = storyllm.GPT(RECIPE.model)
    tokenizer = train_bpe([], 257)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "best_model_params.pt"
        save_checkpoint(path, model_contents(model, tokenizer, RECIPE))
        best = path.stat().st_size
        optimizer = make_optimizer(model, RECIPE.train)
        model.loss(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)).backward()
        optimizer.step()
        contents = {**model_contents(model, tokenizer, RECIPE), "optimizer": optimizer.state_dict()}
        save_checkpoint(path, contents)
        print(f"best_model_params.pt {best / 1e6:>8,.0f} MB\nlast.pt {path.stat().st_size / 1e6:>21,.0f} MB")


def main(device: str = "auto", repeats: int = 3, task: str | None = None) -> None:
    """Prints the median of `repeats` processes for each task (or does one `task` and prints its figure in MB)."""
    if task is not None:
        TASKS[task](device)
        if choose_device(device).type == "cuda":
            print(torch.cuda.max_memory_allocated() / 1e6)
        else:
            print(peak_memory())
        return
    machine = choose_machine(dataclasses.replace(RECIPE.train, device=device), RECIPE.model)
    print(f"{machine.why}, torch {torch.__version__}, medians of {repeats}")
    for name in TASKS:
        figures = [in_own_process(__file__, "--device", device, "--task", name)[0] for _ in range(repeats)]
        print(f"{name:<30} {statistics.median(figures):>8,.0f} MB")
    files()


if __name__ == "__main__":
    command_line(main)
