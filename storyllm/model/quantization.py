"""Linear layers with smaller weights, for generation: decoding a story is bound by the time to read the weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import StoryLLMError


class BFloat16Linear(nn.Module):
    """A linear layer with bfloat16 weights for float32 inputs and outputs."""

    weight: Tensor  # (out, in) bfloat16
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach().bfloat16())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight, self.bias).float()


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale for each output, for float32 inputs and outputs.

    Each input row is rounded to int8 too, with its own scale, so a story does not depend on the others of its batch.
    """

    weight: Tensor  # (out, in) int8
    scale: Tensor  # (out,) float32
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, scale = to_int8(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        rows, row_scale = to_int8(x.reshape(-1, x.size(-1)))
        y = torch._int_mm(rows, self.weight.t()) * row_scale * self.scale  # int32 sums are exact
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, m) numbers to (n, m) int8 and an (n, 1) scale for each row: `x` is about their product."""
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round().to(torch.int8), scale


FORMATS: dict[str, type[BFloat16Linear] | type[Int8Linear]] = {"bfloat16": BFloat16Linear, "int8": Int8Linear}


def convert_linear_layers(model: nn.Module, weights: str) -> None:
    """Replaces all linear layers of a model on a CPU, its head included, by layers with "bfloat16" or "int8" weights.

    Embeddings keep their float32 weights. Raises StoryLLMError for another format or device.
    """
    if weights not in FORMATS:
        raise StoryLLMError(f"weights is {weights!r}, must be 'auto', 'float32' or one of {', '.join(FORMATS)}")
    if (device := next(model.parameters()).device).type != "cpu":
        raise StoryLLMError(
            f"weights {weights!r} are for a CPU, the model is on {device}; use 'float32', or device 'cpu'"
        )
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, FORMATS[weights](layer))
    model.requires_grad_(False)
