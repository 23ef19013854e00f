"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .config import StoryLLMError, TrainConfig


def lr_at(iteration: int, config: TrainConfig) -> float:
    """The learning rate while batch `iteration` (from 0) is taken: a pure function, so a run can continue anywhere.

    Linear warm-up from `warmup_start * learning_rate`, then from `learning_rate` to `min_lr`, by `schedule`:
    - "cosine": along half a cosine (Loshchilov and Hutter 2017);
    - "flat": not at all until `decay_share` of all is left, then along a line (Hu et al. 2024, Hägele et al. 2024).

    Both reach `min_lr` at `max_iters` and keep it, unless the warm-up takes all of them.
    """
    if iteration < config.warmup_iters:
        share = config.warmup_start + (1 - config.warmup_start) * iteration / config.warmup_iters
        return config.learning_rate * share
    if config.schedule == "cosine":
        progress = (iteration - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
        left = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))  # 1 -> 0
    else:
        decay_iters = min(config.decay_share * config.max_iters, config.max_iters - config.warmup_iters)
        left = min(max(config.max_iters - iteration, 0) / max(1.0, decay_iters), 1.0)  # 1 -> 0
    return config.min_lr + (config.learning_rate - config.min_lr) * left


def parameter_groups(model: nn.Module, config: TrainConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups of parameters for Muon and for AdamW, each parameter in one of them; by "adamw", Muon has none.

    Muon makes the rows and columns of a layer's update orthogonal, so it is for the matrices within the blocks: not for
    embeddings, the rows of which are tokens of their own. Matrices and embeddings have weight decay; biases and layer
    norms, which only shift and scale, have none.
    """
    named = list(model.named_parameters())
    of_muon = {n for n, p in named if config.optimizer == "muon" and p.ndim == 2 and n.startswith("transformer.h.")}
    hidden = [p for name, p in named if name in of_muon]
    matrices = [p for name, p in named if p.ndim >= 2 and name not in of_muon]
    vectors = [p for _, p in named if p.ndim < 2]
    decay = config.weight_decay
    muon = [{"params": hidden, "weight_decay": decay, "lr_scale": config.muon_lr_scale}]
    adamw = [
        {"params": matrices, "weight_decay": decay, "lr_scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return muon if hidden else [], adamw


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), fused into one kernel, but not on MPS; with Muon (Jordan et al. 2024) or not.

    Raises StoryLLMError where PyTorch is too old to have Muon.
    """
    muon_groups, adamw_groups = parameter_groups(model, config)
    on_mps = next(model.parameters()).device.type == "mps"
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(adamw_groups, lr=config.learning_rate, betas=betas, fused=not on_mps)
    if not muon_groups:
        return adamw
    if not hasattr(torch.optim, "Muon"):
        raise StoryLLMError(
            f"optimizer is 'muon', which PyTorch has from 2.9 on, and this is {torch.__version__}: take 'adamw'"
        )
    # match_rms_adamw: its steps are as long as AdamW's would be, so the two can share a rate (Liu et al. 2025).
    return MuonAndAdamW(torch.optim.Muon(muon_groups, config.learning_rate, adjust_lr_fn="match_rms_adamw"), adamw)


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers as one, so that gradients that overflow in fp16 hold both of them back."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Groups and state are this optimizer's, and the two work on them."""
        number = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:number], self.param_groups[number:]
        self.muon.state = self.adamw.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """A step of each."""
        self.muon.step()
        self.adamw.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state dict, as every optimizer does."""
        super().load_state_dict(state_dict)
        self._share()


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Gives an optimizer the moments of the state dict `saved`; its settings stay the recipe's.

    Raises ValueError unless they are those of its parameters, each in its shape, or none, as before the first update.
    """
    state = saved["state"]
    parameters = [(p, "ns_steps" in group) for group in optimizer.param_groups for p in group["params"]]
    if state and set(state) != set(range(len(parameters))):
        raise ValueError("the optimizer's state is of other parameters")
    for index, moments in state.items():
        parameter, is_muons = parameters[index]
        if set(moments) != ({"momentum_buffer"} if is_muons else {"step", "exp_avg", "exp_avg_sq"}):
            raise ValueError(f"the optimizer's state of parameter {index} is another optimizer's")
        for name, value in moments.items():
            if value.shape not in (parameter.shape, torch.Size([])):
                raise ValueError(f"{name} of parameter {index} has shape {tuple(value.shape)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
