"""Random windows for a batch: `random_windows` against opening a memory map for each batch and stacking slices of it.

    python benchmarks/windows.py --data data/train.bin  # a file written by `storyllm prepare`
    python benchmarks/windows.py                        # random ids, as many as TinyStories has

It also draws 100,000 batches and prints the resident memory of the process before and after (Linux).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import plain_loop
import torch
from common import STORYLLM, describe_machine, median_seconds, print_table, resident_memory_mb, run_cli

from storyllm.data.token_file import TOKEN_DTYPE
from storyllm.data.windows import random_windows

BLOCK_SIZE = 128
BATCH_SIZE = 32
TINYSTORIES_TOKENS = 473_992_236


def main(
    data: Path | None = None, repeats: int = 200, batches: int = 100_000, tokens: int = TINYSTORIES_TOKENS
) -> None:
    """Times drawing 32 and 1,024 windows, and measures memory over `batches` batches of 32.

    Without `data`, the ids are `tokens` random ones.
    """
    print(f"{describe_machine()}, medians of {repeats}")
    with tempfile.TemporaryDirectory() as folder:
        path = data or Path(folder) / "train.bin"
        if data is None:
            np.random.default_rng(0).integers(50_257, size=tokens, dtype=np.uint16).tofile(path)
        ids = np.memmap(path, dtype=TOKEN_DTYPE, mode="r")
        rng = np.random.default_rng(0)

        def draw(count: int) -> list[torch.Tensor]:
            return [torch.from_numpy(part) for part in random_windows(ids, BLOCK_SIZE, count, rng)]

        def draw_plainly(count: int) -> None:
            for _ in range(count // BATCH_SIZE):
                plain_loop.get_batch(path, BATCH_SIZE, BLOCK_SIZE)

        for count in (BATCH_SIZE, 1_024):
            functions: dict[str, Callable[[], object]] = {
                STORYLLM: partial(draw, count),
                "plain loop": partial(draw_plainly, count),
            }
            seconds = median_seconds(functions, repeats)
            microseconds = {name: 1e6 * value for name, value in seconds.items()}
            print_table(f"{count:,} windows of {BLOCK_SIZE + 1} ids out of {len(ids):,}", "us", microseconds)
        print_memory(partial(draw, BATCH_SIZE), batches, path.stat().st_size)


def print_memory(draw: Callable[[], object], batches: int, file_size: int) -> None:
    """Draws `batches` batches and prints the resident memory before and after."""
    before = resident_memory_mb()
    for _ in range(batches):
        draw()
    after = resident_memory_mb()
    print(
        f"\nresident memory over {batches:,} batches of {BATCH_SIZE} windows from a file of {file_size / 1e6:,.0f} MB"
    )
    for kind, name in (("RssAnon", "anonymous"), ("RssFile", "mapped files")):
        print(f"  {name:<14} {before[kind]:>8,.0f} -> {after[kind]:>8,.0f} MB")


if __name__ == "__main__":
    run_cli(main)
