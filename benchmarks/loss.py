"""The loss over GPT-2's vocabulary: `model.loss` against all the logits and cross-entropy.

    python benchmarks/loss.py

Time in turn; memory in a process of its own each: the peak above what the process had before (a GPU: allocated).
Where PyTorch has it (from 2.13 on), its `linear_cross_entropy` in chunks is a third row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from side_by_side import command_line, in_own_process, in_turn, machine, peak_memory, print_table, resident_memory
from torch import Tensor

import storyllm
from storyllm.linear import linear_cross_entropy

CONFIG = storyllm.RECIPES["faithful"].model


def all_logits(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def pytorch_chunks(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if x.device.type == "cuda":  # it does not look at autocast by itself
        x, weight = x.half(), weight.half()
    return F.linear_cross_entropy(x, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


LOSSES = {"ours": linear_cross_entropy, "all the logits": all_logits}
if hasattr(F, "linear_cross_entropy"):
    LOSSES["PyTorch's linear_cross_entropy, chunks"] = pytorch_chunks


def problem(tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(tokens, CONFIG.n_embd, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(CONFIG.vocab_size, CONFIG.n_embd, device=device)).requires_grad_()
    return x, weight, torch.randint(CONFIG.vocab_size, (tokens,), device=device)


def with_gradients(loss_of: Callable[..., Tensor], x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    autocast = torch.autocast(x.device.type, dtype=torch.float16, enabled=x.device.type == "cuda")
    with autocast:
        loss = loss_of(x, weight, targets)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]


def main(tokens: int = 4_096, device: str = "cpu", repeats: int = 3, alone: str | None = None) -> None:
    """Compares loss and gradients of `tokens` tokens. `alone` is for the processes that it starts itself."""
    inputs = problem(tokens, device)
    if alone is not None:
        on_gpu = device == "cuda"
        before = torch.cuda.memory_allocated() / 1e6 if on_gpu else sum(resident_memory().values())
        with_gradients(LOSSES[alone], *inputs)
        print((torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_memory()) - before)
        return
    print(f"{machine()}, {tokens:,} tokens, {CONFIG.n_embd} channels, {CONFIG.vocab_size:,} ids, medians of {repeats}")
    expected = with_gradients(all_logits, *inputs)
    for name, loss_of in LOSSES.items():
        differences = [
            ((one - other).norm() / other.norm()).item()
            for one, other in zip(with_gradients(loss_of, *inputs), expected, strict=True)
        ]
        print(f"  {name}: loss and gradients differ by {', '.join(f'{d:.0e}' for d in differences)} of their norm")
    functions = {name: lambda loss_of=loss_of: with_gradients(loss_of, *inputs) for name, loss_of in LOSSES.items()}
    print_table("loss and gradients", "s", in_turn(functions, repeats))
    if device == "cuda":
        torch.cuda.empty_cache()  # the processes that come now need it
    arguments = ("--tokens", str(tokens), "--device", device)
    peaks = {name: in_own_process(__file__, *arguments, "--alone", name)[0] for name in LOSSES}
    print_table("peak memory above the inputs, gradients included", "MB", peaks)


if __name__ == "__main__":
    command_line(main)
