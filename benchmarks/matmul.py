"""Linear layers on a CPU: `storyllm.model.linear.Linear`, which uses oneDNN, against `torch.nn.Linear`.

    python benchmarks/matmul.py

The shapes are those of `faithful`: the first layer of the MLP, and the head. A row is a token.
"""

from __future__ import annotations

from functools import partial

import torch
from common import STORYLLM, describe_machine, median_seconds, print_table, run_cli
from torch import Tensor, nn

from storyllm import RECIPES
from storyllm.model.linear import Linear


def main(rows: tuple[int, ...] = (1, 32, 128, 1_024), repeats: int = 15) -> None:
    """Times the forward pass without gradients for each number of rows, and forward and backward for the largest."""
    config = RECIPES["faithful"].model
    shapes = {"MLP": (config.n_embd, 4 * config.n_embd), "head": (config.n_embd, config.vocab_size)}
    print(f"{describe_machine()}, medians of {repeats}")
    for name, (n_in, n_out) in shapes.items():
        layers = {STORYLLM: Linear(n_in, n_out, bias=False), "torch.nn.Linear": nn.Linear(n_in, n_out, bias=False)}
        for n_rows in rows:
            x = torch.randn(n_rows, n_in)
            flops = 2 * n_rows * n_in * n_out
            with torch.no_grad():
                seconds = median_seconds({key: partial(layer, x) for key, layer in layers.items()}, repeats)
            gflops = {key: flops / value / 1e9 for key, value in seconds.items()}
            print_table(f"{name}, {n_rows:,} rows", "GFLOP/s", gflops)
        x = torch.randn(max(rows), n_in, requires_grad=True)
        grad = torch.randn(max(rows), n_out)
        functions = {key: partial(forward_backward, layer, x, grad) for key, layer in layers.items()}
        seconds = median_seconds(functions, repeats)
        gflops = {key: 6 * max(rows) * n_in * n_out / value / 1e9 for key, value in seconds.items()}
        print_table(f"{name}, {max(rows):,} rows, forward and backward", "GFLOP/s", gflops)


def forward_backward(layer: nn.Linear, x: Tensor, grad: Tensor) -> None:
    """The output for `x`, and the gradients for the output gradient `grad`."""
    layer(x).backward(grad)


if __name__ == "__main__":
    run_cli(main)
