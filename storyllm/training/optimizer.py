"""The optimizer and the learning rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig
from .distributed import Processes
from .muon import Muon


def lr_at(iteration: int, config: TrainConfig) -> float:
    """The learning rate while batch `iteration` (from 0) is processed. A pure function, so a run can resume anywhere.

    Linear warmup from `warmup_start_factor * learning_rate`, then from `learning_rate` to `min_lr` by `schedule`:
    - "cosine": half a cosine (Loshchilov and Hutter 2017);
    - "wsd": constant, then linear over the last `decay_fraction` of max_iters (Hu et al. 2024, Hägele et al. 2024).

    Both reach `min_lr` at `max_iters` and stay there, unless warmup takes all iterations.
    """
    if iteration < config.warmup_iters:
        factor = config.warmup_start_factor + (1 - config.warmup_start_factor) * iteration / config.warmup_iters
        return config.learning_rate * factor
    if config.schedule == "cosine":
        progress = (iteration - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
        factor = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))  # 1 -> 0
    else:
        decay_iters = min(config.decay_fraction * config.max_iters, config.max_iters - config.warmup_iters)
        factor = min(max(config.max_iters - iteration, 0) / max(1.0, decay_iters), 1.0)  # 1 -> 0
    return config.min_lr + (config.learning_rate - config.min_lr) * factor


def parameter_groups(model: nn.Module, config: TrainConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The parameter groups of Muon (empty unless `optimizer` is "muon") and of AdamW.

    Muon orthogonalizes an update, so it is for the matrices within the blocks, not for embeddings, whose rows belong to
    different tokens. Queries, keys and values share a matrix, but have different purposes: each is orthogonalized on
    its own. Matrices and embeddings have weight decay; biases and LayerNorm gains have none.
    """
    named = list(model.named_parameters())
    muon_names = {n for n, p in named if config.optimizer == "muon" and p.ndim == 2 and n.startswith("transformer.h.")}
    qkv = [p for name, p in named if name in muon_names and "c_attn" in name]
    hidden = [p for name, p in named if name in muon_names and "c_attn" not in name]
    matrices = [p for name, p in named if p.ndim >= 2 and name not in muon_names]
    vectors = [p for _, p in named if p.ndim < 2]
    decay = config.weight_decay
    muon = [
        {"params": qkv, "weight_decay": decay, "lr_scale": config.muon_lr_scale, "parts": 3},
        {"params": hidden, "weight_decay": decay, "lr_scale": config.muon_lr_scale},
    ]
    adamw = [
        {"params": matrices, "weight_decay": decay, "lr_scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return muon if muon_names else [], adamw


def make_optimizer(
    model: nn.Module,
    config: TrainConfig,
    dtype: torch.dtype = torch.float32,
    processes: Processes | None = None,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), fused except on MPS, optionally with Muon (Jordan et al. 2024).

    `dtype` is that of the run's matrix products, and of Muon's, which are divided among `processes`.
    """
    muon_groups, adamw_groups = parameter_groups(model, config)
    on_mps = next(model.parameters()).device.type == "mps"
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(adamw_groups, lr=config.learning_rate, betas=betas, fused=not on_mps)
    if not muon_groups:
        return adamw
    return MuonAndAdamW(Muon(muon_groups, config.learning_rate, dtype=dtype, processes=processes), adamw)


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers as one, so that a gradient scaler skips the step of both when fp16 overflows."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share_state()

    def _share_state(self) -> None:
        """Makes both optimizers work on this one's parameter groups and state."""
        n_muon = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:n_muon], self.param_groups[n_muon:]
        self.muon.state = self.adamw.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps both optimizers."""
        self.muon.step()
        self.adamw.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, as any optimizer does."""
        super().load_state_dict(state_dict)
        self._share_state()


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads the state tensors of the state dict `saved`, and keeps the optimizer's own hyperparameters.

    Raises ValueError unless the state matches the optimizer's parameters, or is empty, as before the first update.
    """
    state = saved["state"]
    parameters = [(p, "momentum" in group) for group in optimizer.param_groups for p in group["params"]]
    if state and set(state) != set(range(len(parameters))):
        raise ValueError("the optimizer state has other parameters")
    for index, tensors in state.items():
        parameter, is_muon = parameters[index]
        if set(tensors) != ({"momentum_buffer"} if is_muon else {"step", "exp_avg", "exp_avg_sq"}):
            raise ValueError(f"the state of parameter {index} is that of another optimizer")
        for name, value in tensors.items():
            if value.shape not in (parameter.shape, torch.Size([])):
                raise ValueError(f"{name} of parameter {index} has shape {tuple(value.shape)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
