"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .config import TrainConfig


def lr_at(iteration: int, config: TrainConfig) -> float:
    """The learning rate while batch `iteration` (from 0) is taken: a pure function, so a run can continue anywhere.

    Linear warm-up from `warmup_start * learning_rate`, then half a cosine (Loshchilov and Hutter 2017) from
    `learning_rate` to `min_lr`, which it reaches at `max_iters` and keeps.
    """
    if iteration < config.warmup_iters:
        share = config.warmup_start + (1 - config.warmup_start) * iteration / config.warmup_iters
        return config.learning_rate * share
    progress = (iteration - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))  # 1 -> 0
    return config.min_lr + (config.learning_rate - config.min_lr) * cosine


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and embeddings with weight decay; biases and layer norms, which only shift and scale, without."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over the model's parameters; fused into one kernel, but not on MPS."""
    groups = parameter_groups(model, config.weight_decay)
    on_mps = next(model.parameters()).device.type == "mps"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=not on_mps)


def restore_optimizer(optimizer: torch.optim.AdamW, saved: dict[str, Any]) -> None:
    """Gives an optimizer the moments of the state dict `saved`; its settings stay the recipe's.

    Raises ValueError unless they are those of its parameters, each in its shape, or none, as before the first update.
    """
    state = saved["state"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if state and set(state) != set(range(len(parameters))):
        raise ValueError("the optimizer's state is of other parameters")
    for index, moments in state.items():
        if set(moments) != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"the optimizer's state of parameter {index} is not AdamW's")
        for name, value in moments.items():
            if value.shape not in (parameters[index].shape, torch.Size([])):
                raise ValueError(f"{name} of parameter {index} has shape {tuple(value.shape)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
