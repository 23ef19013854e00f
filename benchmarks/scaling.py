"""Estimates how training scales to many GPUs, from stated rates. Prints the tables of docs/scaling.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from common import run_cli

from storyllm import GPT, GPTConfig, Recipe, get_recipe
from storyllm.device import (
    GPU_BYTES_PER_TOKEN,
    GPU_TOKENS,
    PEAK_FLOPS,
    REFERENCE_SIZE,
    TYPICAL_MFU,
    flops_per_token,
)
from storyllm.training.muon import STEPS

RECIPES = ("faithful", "fast", "gpt2-small")
COUNTS = (1, 2, 4, 8, 16, 32, 64)  # of GPUs
BYTES_PER_WEIGHT = 18  # weight, gradient, two moments (float32), and a 16-bit copy of the weight for autocast
OPTIMIZER_BYTES = 28  # AdamW reads weight, gradient and two moments, and writes all but the gradient


@dataclass(frozen=True)
class Cluster:
    """GPUs in machines, and their rates in bytes per second and direction, from data sheets."""

    name: str
    gpu: str  # in PEAK_FLOPS
    memory: float  # bytes
    memory_rate: float
    gpus_per_machine: int
    link: float  # of a GPU, to the others in its machine
    network: float  # of a machine, to the others

    @property
    def flops(self) -> float:
        """Assumed FLOP/s of a GPU."""
        return TYPICAL_MFU * PEAK_FLOPS[self.gpu]

    def rate(self, gpus: int) -> float:
        """Bytes per second over the slowest link of rings of GPUs, as many of them as a machine has network links."""
        return self.link if gpus <= self.gpus_per_machine else min(self.link, self.network)


CLUSTERS = (
    Cluster("T4, PCIe, 10 Gb/s", "T4", 16e9, 320e9, 2, 15.75e9, 1.25e9),
    Cluster("A100, NVLink, 8 x 200 Gb/s", "A100", 80e9, 2_039e9, 8, 300e9, 8 * 25e9),
    Cluster("H100, NVLink, 8 x 400 Gb/s", "H100", 80e9, 3_350e9, 8, 450e9, 8 * 50e9),
    Cluster("H100, NVLink, 1 x 400 Gb/s", "H100", 80e9, 3_350e9, 8, 450e9, 50e9),
)

GPT2 = {
    "GPT-2 small": GPTConfig(block_size=1024, n_layer=12, n_head=12, n_embd=768),
    "GPT-2 medium": GPTConfig(block_size=1024, n_layer=24, n_head=16, n_embd=1024),
    "GPT-2 large": GPTConfig(block_size=1024, n_layer=36, n_head=20, n_embd=1280),
    "GPT-2 XL": GPTConfig(block_size=1024, n_layer=48, n_head=25, n_embd=1600),
    "GPT-3 6.7B": GPTConfig(block_size=2048, n_layer=32, n_head=32, n_embd=4096),
}


@cache
def parameters(model: GPTConfig) -> int:
    """The number of parameters."""
    with torch.device("meta"):  # allocates nothing
        return GPT(model).num_parameters()


def embedding_parameters(model: GPTConfig) -> int:
    """Those of the embeddings, whose gradients are complete only at the end of the backward pass."""
    return (model.vocab_size + model.block_size) * model.n_embd


def update_flops(recipe: Recipe) -> int:
    """FLOPs of the forward and backward passes of an update."""
    return recipe.train.windows_per_update * recipe.model.block_size * flops_per_token(recipe.model)


def muon_share(recipe: Recipe, gpus: int) -> dict[tuple[int, int], int]:
    """How many matrices of which shape Muon orthogonalizes, on the GPU with the most of each."""
    if recipe.train.optimizer != "muon":
        return {}
    C, layers = recipe.model.n_embd, recipe.model.n_layer
    counts = {(C, C): 4 * layers, (C, 4 * C): 2 * layers}  # queries, keys, values, projection; the two of the MLP
    return {shape: math.ceil(count / gpus) for shape, count in counts.items()}


def muon_flops(recipe: Recipe, gpus: int = 1) -> int:
    """FLOPs of Muon's Newton-Schulz iterations in an update, on the GPU with the most matrices of each shape."""
    return STEPS * sum(
        n * (4 * rows**2 * columns + 2 * rows**3) for (rows, columns), n in muon_share(recipe, gpus).items()
    )


def gather_seconds(cluster: Cluster, recipe: Recipe, gpus: int) -> float:
    """The time to send the 16-bit updates of Muon's matrices to all GPUs of a ring, without latency."""
    weights = sum(n * rows * columns for (rows, columns), n in muon_share(recipe, gpus).items())
    return (gpus - 1) * 2 * weights / cluster.rate(gpus)


def reduce_seconds(cluster: Cluster, weights: int, gpus: int) -> float:
    """The time to sum float32 gradients over a ring of GPUs (Patarasuk and Yuan 2009), without latency."""
    return 2 * (gpus - 1) / gpus * 4 * weights / cluster.rate(gpus)


def update_seconds(cluster: Cluster, recipe: Recipe, gpus: int) -> float:
    """The time of an update. Gradients of the blocks are reduced during the last backward pass, as far as it lasts."""
    model, total = recipe.model, parameters(recipe.model)
    tokens = math.ceil(recipe.train.windows_per_update / gpus) * model.block_size
    micro_batch = min(int(cluster.memory) // GPU_BYTES_PER_TOKEN, GPU_TOKENS)
    micro_batch = micro_batch * REFERENCE_SIZE // (model.n_layer * model.n_embd)
    seconds_per_token = flops_per_token(model) / cluster.flops
    optimizer = OPTIMIZER_BYTES * total / cluster.memory_rate + muon_flops(recipe, gpus) / cluster.flops
    optimizer += gather_seconds(cluster, recipe, gpus)
    embeddings = reduce_seconds(cluster, embedding_parameters(model), gpus)
    blocks = reduce_seconds(cluster, total - embedding_parameters(model), gpus)
    overlap = 2 / 3 * min(tokens, micro_batch) * seconds_per_token  # the backward pass is two thirds
    return tokens * seconds_per_token + optimizer + embeddings + max(0.0, blocks - overlap)


def break_even_tokens(cluster: Cluster, recipe: Recipe, gpus: int) -> float:
    """Tokens of a GPU in an update whose arithmetic takes as long as the reduction."""
    return reduce_seconds(cluster, parameters(recipe.model), gpus) * cluster.flops / flops_per_token(recipe.model)


def state_bytes(model: GPTConfig) -> int:
    """Memory of weights, gradients and optimizer without sharding."""
    return BYTES_PER_WEIGHT * parameters(model)


def activation_bytes(model: GPTConfig) -> int:
    """Activations of one window (Korthikanti et al. 2022, without the attention scores, which are not stored)."""
    return 34 * model.block_size * model.n_embd * model.n_layer


# Tables


def print_table(*rows: list[str]) -> None:
    """Prints a table in Markdown; the first row is its header."""
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print("|" + "|".join(row if row[0] == "---" else [f" {cell} " for cell in row]) + "|")
    print()


def print_arithmetic() -> None:
    header = "recipe,parameters,MFLOPs per token,tokens per update,TFLOPs per update,of Muon,gradients,of embeddings"
    rows = []
    for name in RECIPES:
        recipe = get_recipe(name)
        model = recipe.model
        tokens = recipe.train.windows_per_update * model.block_size
        cells = [f"`{name}`", f"{parameters(model):,}", f"{flops_per_token(model) / 1e6:,.0f}", f"{tokens:,}"]
        cells += [f"{update_flops(recipe) / 1e12:.3g}", f"{muon_flops(recipe) / 1e12:.3g}"]
        cells += [f"{4 * parameters(model) / 1e6:,.0f} MB", f"{embedding_parameters(model) / parameters(model):.0%}"]
        rows.append(cells)
    print_table(header.split(","), *rows)


def print_speedups() -> None:
    rows = []
    for name in RECIPES:
        recipe = get_recipe(name)
        for cluster in CLUSTERS:
            one = update_seconds(cluster, recipe, 1)
            cells = [f"`{name}`", cluster.name, f"{1_000 * one:,.1f} ms"]
            for gpus in COUNTS[1:]:
                speedup = one / update_seconds(cluster, recipe, gpus)
                possible = gpus <= recipe.train.windows_per_update
                cells.append(f"{speedup:.3g} ({speedup / gpus:.0%})" if possible else "no window")
            rows.append(cells)
    print_table(["recipe", "GPUs", "update on 1", *(f"{gpus}" for gpus in COUNTS[1:])], *rows)


def print_break_even() -> None:
    rows = []
    for cluster in CLUSTERS:
        for gpus in sorted({cluster.gpus_per_machine, COUNTS[-1]} - {1}):
            tokens = [f"{break_even_tokens(cluster, get_recipe(name), gpus):,.0f}" for name in RECIPES]
            rows.append([cluster.name, f"{gpus}", *tokens])
    print_table(["tokens per GPU and update", "GPUs", *(f"`{name}`" for name in RECIPES)], *rows)


def print_memory() -> None:
    rows = []
    for name, model in GPT2.items():
        state, activations = state_bytes(model) / 1e9, activation_bytes(model) / 1e9
        fits = ["yes" if state + activations < memory else "no" for memory in (16, 80)]
        cells = [f"{state:.1f} GB", f"{activations:.1f} GB", *fits, f"{state / 8 + activations:.1f} GB"]
        rows.append([name, f"{parameters(model) / 1e6:,.0f}M", *cells])
    header = ["model", "parameters", "states", "one window", "fits 16 GB", "fits 80 GB", "FSDP on 8 GPUs"]
    print_table(header, *rows)


def main() -> None:
    """Prints all tables."""
    for print_one in (print_arithmetic, print_speedups, print_break_even, print_memory):
        print_one()


if __name__ == "__main__":
    run_cli(main)
