"""Muon: momentum whose update of each matrix is orthogonalized (Jordan et al. 2024)."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from .distributed import Processes

# Coefficients of a Newton-Schulz iteration, from Jordan et al. 2024. Five steps bring singular values close to 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon for matrices, with updates of the size of AdamW's (Liu et al. 2025), so that both share a learning rate.

    A matrix in a group with `parts` > 1 is a stack of that many matrices, such as those of queries, keys and values,
    and each is orthogonalized on its own. `dtype` is that of the orthogonalization. Unlike `torch.optim.Muon`, all
    matrices of the same shape are orthogonalized in one batch, which is divided among `processes`.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "parts": 1})
        self.dtype = dtype
        self.processes = processes or Processes()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the matrices that have a gradient."""
        batches: dict[torch.Size, list[tuple[Tensor, Tensor, float]]] = defaultdict(list)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"])  # Nesterov
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                for matrix, part in zip(weight.chunk(group["parts"]), update.chunk(group["parts"]), strict=True):
                    if matrix.size(0) > matrix.size(1):
                        matrix, part = matrix.t(), part.t()
                    batches[matrix.shape].append((matrix, part, group["lr"]))
        for shape, batch in batches.items():
            stack = torch.stack([part for _, part, _ in batch])
            updates = self.processes.map_rows(lambda matrices: orthogonalize(matrices, self.dtype), stack)
            for (matrix, _, lr), update in zip(batch, updates, strict=True):
                matrix.add_(update, alpha=-lr * 0.2 * math.sqrt(max(shape)))  # alpha gives AdamW's root mean square


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About the nearest matrices with orthonormal rows, in `dtype`, to (n, rows, columns) matrices, rows <= columns."""
    a, b, c = COEFFICIENTS
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)  # first, since fp16 has a small range
    for _ in range(STEPS):
        gram = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
