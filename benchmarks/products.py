"""Linear layers on a CPU: `storyllm.linear.Linear`, by oneDNN, against `torch.nn.Linear`, by whatever PyTorch takes.

    python benchmarks/products.py

The shapes are `faithful`'s: the MLP's first layer, and the head; rows are tokens. Rates count the products alone.
"""

from __future__ import annotations

import torch
from side_by_side import command_line, in_turn, machine, print_table
from torch import nn

from storyllm import RECIPES
from storyllm.linear import Linear


def main(rows: tuple[int, ...] = (1, 32, 128, 1_024), repeats: int = 15) -> None:
    """Times forward passes without a gradient, and forward and backward of the most rows."""
    config = RECIPES["faithful"].model
    shapes = {"MLP": (config.n_embd, 4 * config.n_embd), "head": (config.n_embd, config.vocab_size)}
    print(f"{machine()}, medians of {repeats}")
    for name, (n_in, n_out) in shapes.items():
        layers = {"ours": Linear(n_in, n_out, bias=False), "torch.nn.Linear": nn.Linear(n_in, n_out, bias=False)}
        for count in rows:
            x = torch.randn(count, n_in)
            operations = 2 * count * n_in * n_out
            with torch.no_grad():
                seconds = in_turn({key: lambda layer=layer, x=x: layer(x) for key, layer in layers.items()}, repeats)
            rates = {key: operations / value / 1e9 for key, value in seconds.items()}
            print_table(f"{name}, {count:,} rows", "GFLOP/s", rates, less_is_better=False)
        x = torch.randn(max(rows), n_in, requires_grad=True)
        slope = torch.randn(max(rows), n_out)
        seconds = in_turn(
            {key: lambda layer=layer, x=x, slope=slope: layer(x).backward(slope) for key, layer in layers.items()},
            repeats,
        )
        rates = {key: 6 * max(rows) * n_in * n_out / value / 1e9 for key, value in seconds.items()}
        print_table(f"{name}, {max(rows):,} rows, forward and backward", "GFLOP/s", rates, less_is_better=False)


if __name__ == "__main__":
    command_line(main)
