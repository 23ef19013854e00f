"""The loss over GPT-2's vocabulary: StoryLLM's `linear_cross_entropy` against cross-entropy of all logits.

    python benchmarks/loss.py

Compares values, time and peak memory. PyTorch 2.13 and later add a third row, its own chunked `linear_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import (
    STORYLLM,
    describe_machine,
    median_seconds,
    peak_memory_mb,
    print_table,
    resident_memory_mb,
    run_cli,
    run_in_subprocess,
)
from torch import Tensor

import storyllm
from storyllm.model.loss import linear_cross_entropy

CONFIG = storyllm.RECIPES["faithful"].model


def all_logits(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the complete (N, V) logits."""
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def pytorch_chunked(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's chunked loss."""
    if x.device.type == "cuda":  # it ignores autocast
        x, weight = x.half(), weight.half()
    return F.linear_cross_entropy(x, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    STORYLLM: linear_cross_entropy,
    "all logits": all_logits,
}
if hasattr(F, "linear_cross_entropy"):
    LOSSES["torch linear_cross_entropy, chunked"] = pytorch_chunked


def make_inputs(tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random (tokens, C) hidden states, (V, C) weights and (tokens,) targets."""
    torch.manual_seed(0)
    x = torch.randn(tokens, CONFIG.n_embd, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(CONFIG.vocab_size, CONFIG.n_embd, device=device)).requires_grad_()
    return x, weight, torch.randint(CONFIG.vocab_size, (tokens,), device=device)


def loss_and_gradients(
    loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, targets: Tensor
) -> list[Tensor]:
    """The loss and its gradients, on a GPU with fp16 autocast."""
    with torch.autocast(x.device.type, dtype=torch.float16, enabled=x.device.type == "cuda"):
        loss = loss_fn(x, weight, targets)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]


def main(
    tokens: int = 4_096, device: str = "cpu", repeats: int = 3, memory: bool = True, memory_of: str | None = None
) -> None:
    """Compares the losses of `tokens` tokens, and with `memory` the peak memory of each in a new process.

    `memory_of` is for these processes: it prints the peak memory of that loss above the memory of its inputs.
    """
    inputs = make_inputs(tokens, device)
    if memory_of is not None:
        on_gpu = device == "cuda"
        before = torch.cuda.memory_allocated() / 1e6 if on_gpu else sum(resident_memory_mb().values())
        loss_and_gradients(LOSSES[memory_of], *inputs)
        print((torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_memory_mb()) - before)
        return
    print(f"{describe_machine()}, medians of {repeats}")
    print(f"{tokens:,} tokens, hidden size {CONFIG.n_embd}, vocabulary size {CONFIG.vocab_size:,}")
    expected = loss_and_gradients(all_logits, *inputs)
    for name, loss_fn in LOSSES.items():
        results = loss_and_gradients(loss_fn, *inputs)
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=True)]
        print(f"  {name}: relative error of loss and gradients {', '.join(f'{error:.0e}' for error in errors)}")
    functions = {name: partial(loss_and_gradients, loss_fn, *inputs) for name, loss_fn in LOSSES.items()}
    print_table("loss and gradients", "s", median_seconds(functions, repeats))
    if memory:
        if device == "cuda":
            torch.cuda.empty_cache()  # for the other processes
        arguments = ("--tokens", str(tokens), "--device", device)
        peaks = {name: run_in_subprocess(__file__, *arguments, "--memory-of", name)[0] for name in LOSSES}
        print_table("peak memory above the inputs, including gradients", "MB", peaks)


if __name__ == "__main__":
    run_cli(main)
