"""Random windows for a batch: `random_windows` against a memory map that is opened and stacked from for each batch.

    python benchmarks/windows.py --data data/train.bin       # a file that `storyllm prepare` made
    python benchmarks/windows.py                             # random ids, as many as all of TinyStories has

It also takes 100,000 batches and says what became of the process's memory (Linux).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plain_loop
import torch
from side_by_side import command_line, in_turn, machine, print_table, resident_memory

from storyllm.tokens import TOKEN_DTYPE, random_windows

BLOCK_SIZE = 128
TINYSTORIES_TOKENS = 473_992_236


def main(
    data: Path | None = None, repeats: int = 200, batches: int = 100_000, tokens: int = TINYSTORIES_TOKENS
) -> None:
    """Times batches of 32 and of 1,024 windows."""
    print(f"{machine()}, medians of {repeats}")
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            data = Path(folder) / "train.bin"
            np.random.default_rng(0).integers(50_257, size=tokens, dtype=np.uint16).tofile(data)
        ids = np.memmap(data, dtype=TOKEN_DTYPE, mode="r")
        rng = np.random.default_rng(0)

        def ours(count: int) -> list[torch.Tensor]:
            return [torch.from_numpy(part) for part in random_windows(ids, BLOCK_SIZE, count, rng)]

        def peer(count: int) -> None:
            for _ in range(count // 32):
                plain_loop.get_batch(data, 32, BLOCK_SIZE)

        for count in (32, 1_024):
            functions = {
                "ours": lambda n=count: ours(n),
                "a map opened for each batch, slices": lambda n=count: peer(n),
            }
            seconds = in_turn(functions, repeats)
            figures = {name: value * 1e6 for name, value in seconds.items()}
            print_table(f"{count:,} windows of {BLOCK_SIZE + 1} ids, of {len(ids):,}", "us", figures)
        memory(lambda: ours(32), batches, data.stat().st_size)


def memory(take: Callable[[], object], batches: int, file_size: int) -> None:
    """Takes `batches` batches and prints the resident memory before and after, by kind."""
    before = resident_memory()
    for _ in range(batches):
        take()
    after = resident_memory()
    print(f"\nresident memory over {batches:,} batches of 32 windows, of a file of {file_size / 1e6:,.0f} MB")
    for kind, name in (("RssAnon", "anonymous"), ("RssFile", "mapped files")):
        print(f"  {name:<14} {before[kind]:>8,.0f} -> {after[kind]:>8,.0f} MB")


if __name__ == "__main__":
    command_line(main)
