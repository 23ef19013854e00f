"""A linear layer that uses oneDNN for large float32 products on a CPU.

PyTorch uses MKL for these products, which runs at about half of an AMD processor's speed and uses a single core for a
single row. oneDNN, which PyTorch includes, does neither.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A oneDNN call has about 15 us more overhead than an MKL call, so smaller products stay with MKL.
MIN_MULTIPLICATIONS = 1_000_000


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, `x @ weight.T + bias` for (..., in) `x` and (out, in) `weight`, with oneDNN where it applies."""
    if not _onednn_applies(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _OneDNNLinear.apply(x, weight, bias)
    return _onednn(x, weight, bias)


def _onednn_applies(x: Tensor, weight: Tensor) -> bool:
    """True for a float32 product on a CPU, in ordinary eager mode, if PyTorch includes a working oneDNN."""
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.size(0) >= MIN_MULTIPLICATIONS
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.shape[-1:] == weight.shape[1:]  # F.linear explains what is wrong with other shapes
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not _is_traced()
        and _onednn_works()
    )


def _is_traced() -> bool:
    """True within torch.func's transforms and modes such as FlopCounterMode, which do not know oneDNN's operator."""
    try:
        return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
    except AttributeError:  # both are private: a later PyTorch may rename them
        return True


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` with oneDNN, through the operator that torch.compile uses. Not differentiable."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def _onednn_works() -> bool:
    """Tries the operator once: it is private, so its signature or meaning may change with PyTorch's version."""
    numbers = torch.arange(12, dtype=torch.float32, device="cpu")  # small integers: any order of summation is exact
    x, weight, bias = numbers[:6].view(2, 3), numbers.view(4, 3), numbers[:4]
    try:
        with torch.inference_mode():
            return all(torch.equal(_onednn(x, weight, b), F.linear(x, weight, b)) for b in (None, bias))
    except Exception:  # missing operator, other arguments: use PyTorch's own product
        return False


class Linear(nn.Linear):
    """`torch.nn.Linear`, equal up to rounding; large products are faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _OneDNNLinear(torch.autograd.Function):
    """The forward product and the gradients of input and weight with oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.size(-1)), grad.reshape(-1, grad.size(-1))  # (N, in), (N, out)
        grad_x = linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        # `linear` is differentiable, so a gradient has gradients in turn.
        return grad_x, linear(grad_rows.t(), rows.t()), grad_rows.sum(0) if ctx.needs_input_grad[2] else None
