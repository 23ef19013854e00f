"""The matrix products that cost the most, where PyTorch's usual way is not the fast one.

On a CPU, PyTorch hands float32 products to MKL, which uses an AMD processor at half its rate and one core alone for a
single row; oneDNN, which comes with PyTorch as well, does not. And the logits of a large vocabulary are the largest
tensor of all: their loss is best taken, with its gradient, a few rows at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits that exist at a time. On a CPU they should take less than the 32 MiB from which glibc gives memory back to the
# system after each use, to be zeroed again; a GPU needs a few thousand rows to be busy.
CPU_LOGITS = 6_500_000
GPU_LOGITS = 150_000_000
CPU_CHUNKS = 8  # of those, that a CPU in bf16 sums up together

# The gradient of the weights is summed over rows in the products' format, and fp16 ends at 65,504: it is taken of so
# small a part (a power of two: exact), and multiplied again in float32.
FP16_PART = 2.0**-4


def _onednn_applies(x: Tensor, weight: Tensor) -> bool:
    """Is this a float32 product on a CPU, outside a compiler (which chooses for itself), in a PyTorch with oneDNN?"""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in) @ (out, in).T + (out,) by oneDNN: the operation that PyTorch's own compiler uses. Has no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Linear(nn.Linear):
    """`torch.nn.Linear`, equal to it to rounding, and on a CPU about twice as fast.

    Second derivatives and `torch.func` need PyTorch's own: `with torch.backends.mkldnn.flags(enabled=False):`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _onednn_applies(x, self.weight):
            return super().forward(x)
        if torch.is_grad_enabled():
            return _OneDNNLinear.apply(x, self.weight, self.bias)
        return _onednn(x, self.weight, self.bias)


class _OneDNNLinear(torch.autograd.Function):
    """The linear layer with its three products (output, gradient of the input, gradient of the weight) by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.size(-1)), grad.reshape(-1, grad.size(-1))  # (N, in), (N, out)
        grad_x = _onednn(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return grad_x, _onednn(grad_rows.t(), rows.t()), grad_rows.sum(0) if ctx.needs_input_grad[2] else None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`cross_entropy(x @ weight.T, targets)`, the mean over (N,) targets, for (N, C) rows and (V, C) weights.

    A few rows of logits exist at a time. Where a gradient is wanted it is taken at once, while the logits are there:
    they are neither kept nor made again (the idea of Liger Kernel, Hsu et al. 2024). Under autocast the products are
    in its number format, the softmax and the sums over rows in float32.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(x, weight, targets, dtype) / len(targets)
    with torch.autocast(device, enabled=False):
        padded = _padded(weight, dtype)
        rows = _rows_at_once(padded)
        losses = [
            F.cross_entropy(_product(xc, padded)[:, : len(weight)].float(), yc, reduction="sum")
            for xc, yc in zip(x.to(dtype).split(rows), targets.split(rows), strict=True)
        ]
    return torch.stack(losses).sum() / len(targets)


def _rows_at_once(weight: Tensor) -> int:
    if weight.device.type == "cpu":
        return max(1, CPU_LOGITS // len(weight))
    return max(64, GPU_LOGITS // len(weight) // 64 * 64)


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The (V, C) weights in the products' format, with rows of zeros where the device wants them."""
    padding = _padding(len(weight), weight.device)
    return F.pad(weight.to(dtype), (0, 0, 0, padding)) if padding else weight.to(dtype)


def _padding(vocab_size: int, device: torch.device) -> int:
    """Rows of zeros to add inside the product: a GPU's matrix units want sizes that are multiples of 64."""
    return -vocab_size % 64 if device.type == "cuda" else 0


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return _onednn(x, weight) if _onednn_applies(x, weight) else x @ weight.t()


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses. `forward` also takes the gradients, for `backward` to scale."""

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
    """The summed loss and its gradients with respect to (N, C) `x`, in the products' format, and (V, C) `weight`."""
    vocab_size, dtype = len(weight), x.dtype
    padded = _padded(weight, dtype)
    grad_weight = torch.zeros(padded.shape, dtype=torch.float32, device=x.device)
    loss, grads_x = torch.zeros((), device=x.device), []
    rows = _rows_at_once(padded)
    # Half a CPU's time would go into adding to the gradient of the weights in float32: it adds for more rows at a time.
    rows_of_sum = CPU_CHUNKS * rows if dtype != torch.float32 and x.device.type == "cpu" else rows
    for xs, ys in zip(x.split(rows_of_sum), targets.split(rows_of_sum), strict=True):
        chunks = []
        for xc, yc in zip(xs.split(rows), ys.split(rows), strict=True):
            logits = _product(xc, padded).float()  # (rows, V)
            if len(padded) > vocab_size:
                logits[:, vocab_size:] = -math.inf
            log_probs = logits.log_softmax(-1)
            del logits
            loss = loss - log_probs.gather(1, yc[:, None]).sum()
            grad_logits = log_probs.exp_()  # the gradient of cross-entropy: the probabilities, less one for the target
            grad_logits.scatter_add_(1, yc[:, None], torch.full_like(yc[:, None], -1, dtype=torch.float32))
            chunks.append(grad_logits.to(dtype))
            del log_probs, grad_logits  # before the next chunk's take their place beside them
        grad_logits = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
        del chunks
        grads_x.append(_product(grad_logits, padded.t()))
        if dtype == torch.float32:
            grad_weight.addmm_(grad_logits.t(), xs)
        elif dtype == torch.float16:
            grad_weight += (grad_logits.t() @ (xs * FP16_PART)).float() / FP16_PART
        else:
            grad_weight += grad_logits.t() @ xs
        del grad_logits
    return loss, torch.cat(grads_x), grad_weight[:vocab_size]
