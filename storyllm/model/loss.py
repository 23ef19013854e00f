"""Cross-entropy of a linear layer's output without materializing all logits.

The logits of a large vocabulary are by far the largest tensor of a small language model. Here they exist for a few rows
at a time, and their gradient is taken while they do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import linear

IGNORED = -100  # a target that does not count, as in `F.cross_entropy`

# Logits in a chunk. On a CPU a chunk should stay under 32 MiB: glibc returns larger blocks to the system after each
# use, which then has to clear them again. A GPU needs a few thousand rows to be busy.
CPU_LOGITS = 6_500_000
GPU_LOGITS = 150_000_000
CPU_CHUNKS_PER_SUM = 8  # chunks whose weight gradients a CPU sums in a single bf16 product

# In fp16 the weight gradient, a sum over rows, could exceed 65,504. The rows are scaled by this power of two first.
FP16_SCALE = 2.0**-4


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`F.cross_entropy(x @ weight.T, targets)` for (N, C) `x`, (V, C) `weight` and (N,) `targets`.

    The mean over the targets that are not -100; NaN if all are.

    If a gradient is required, it is computed in the forward pass, while the logits of a chunk exist (the idea of Liger
    Kernel, Hsu et al. 2024). Under autocast the products use its dtype; softmax and sums use float32.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    ignored = targets == IGNORED
    count = (~ignored).sum()  # a tensor: reading it would synchronize a GPU
    if torch.is_grad_enabled():
        x = x.masked_fill(ignored[:, None], 0)  # so that ignored rows get and give no gradient
        return _LinearCrossEntropy.apply(x, weight, targets, dtype) / count
    with torch.autocast(device, enabled=False):
        padded = _pad(weight, dtype)
        rows = _rows_per_chunk(padded)
        losses = [
            F.cross_entropy(linear(xc, padded)[:, : len(weight)].float(), yc, reduction="sum")
            for xc, yc in zip(x.to(dtype).split(rows), targets.split(rows), strict=True)
        ]
    return torch.stack(losses).sum() / count


def _rows_per_chunk(weight: Tensor) -> int:
    if weight.device.type == "cpu":
        return max(1, CPU_LOGITS // len(weight))
    return max(64, GPU_LOGITS // len(weight) // 64 * 64)


def _pad(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The (V, C) weights in `dtype`, on CUDA with V zero-padded to a multiple of 64 for the tensor cores."""
    padding = _padding(len(weight), weight.device)
    return F.pad(weight.to(dtype), (0, 0, 0, padding)) if padding else weight.to(dtype)


def _padding(vocab_size: int, device: torch.device) -> int:
    return -vocab_size % 64 if device.type == "cuda" else 0


class _LinearCrossEntropy(torch.autograd.Function):
    """The summed loss. `forward` also computes the gradients; `backward` scales them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            loss, grad_x, grad_weight = _loss_and_gradients(x.to(dtype), weight, targets)
        ctx.save_for_backward(grad_x.to(x.dtype), grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None, None


def _loss_and_gradients(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss and its gradients with respect to (N, C) `x`, in x's dtype, and (V, C) `weight`, in float32.

    Where the target is ignored, `x` must be 0, and its gradient is meaningless.
    """
    vocab_size, dtype = len(weight), x.dtype
    padded = _pad(weight, dtype)
    grad_weight = torch.zeros(padded.shape, dtype=torch.float32, device=x.device)
    loss, grads_x = torch.zeros((), dtype=torch.float32, device=x.device), []
    rows = _rows_per_chunk(padded)
    # In bf16 on a CPU, adding to the float32 weight gradient would take half the time, so it is done less often.
    rows_per_sum = CPU_CHUNKS_PER_SUM * rows if dtype != torch.float32 and x.device.type == "cpu" else rows
    for xs, ys in zip(x.split(rows_per_sum), targets.split(rows_per_sum), strict=True):
        grad_logits = torch.empty(len(xs), len(padded), dtype=dtype, device=x.device)
        for xc, yc, grad_chunk in zip(xs.split(rows), ys.split(rows), grad_logits.split(rows), strict=True):
            logits = linear(xc, padded).float()  # (rows, V)
            if len(padded) > vocab_size:
                logits[:, vocab_size:] = -math.inf
            log_probs = logits.log_softmax(-1)
            del logits
            loss = loss + F.nll_loss(log_probs, yc, reduction="sum")  # skips ignored targets
            ids = yc[:, None].clamp(min=0)  # (rows, 1)
            log_probs.exp_()  # the gradient of cross-entropy is softmax minus one-hot
            log_probs.scatter_add_(1, ids, torch.full_like(ids, -1, dtype=torch.float32))
            grad_chunk.copy_(log_probs)
            del log_probs  # free it before the next chunk is allocated
        grads_x.append(linear(grad_logits, padded.t()))
        if dtype == torch.float32:
            grad_weight.addmm_(grad_logits.t(), xs)
        elif dtype == torch.float16:
            grad_weight += (grad_logits.t() @ (xs * FP16_SCALE)).float() / FP16_SCALE
        else:
            grad_weight += grad_logits.t() @ xs
        del grad_logits
    return loss, torch.cat(grads_x), grad_weight[:vocab_size]
