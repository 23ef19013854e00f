"""The initial weights of a GPT."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

STD = 0.02  # GPT-2's standard deviation of initial matrices and embeddings


@torch.no_grad()
def initialize(model: Any) -> None:
    """Initializes a GPT from PyTorch's global generator: like GPT-2, unless its config says otherwise.

    GPT-2 draws matrices and embeddings from N(0, 0.02), with the 2 * n_layer projections that add to the residual
    stream divided by sqrt(2 * n_layer). Biases are 0, and gains of LayerNorm 1.

    `copy_strength` replaces the value matrix V and the projection of each attention layer: V becomes a random
    orthogonal matrix and the projection its transpose, both times sqrt(copy_strength). Attention then adds what it
    attends to as it is, so it can copy a token from the first update on (the idea of mimetic initialization, Trockman
    and Kolter 2023, with the opposite sign).
    """
    config, transformer = model.config, model.transformer
    model.apply(partial(_initialize_module, n_layer=config.n_layer))
    transformer["wte"].weight.mul_(config.embedding_std / STD)
    transformer["wpe"].weight.mul_(config.position_std / STD)
    transformer["ln_f"].weight.fill_(config.final_norm_gain)
    if config.copy_strength:
        for block in transformer["h"].children():
            _initialize_copying(block.attn.c_attn.weight, block.attn.c_proj.weight, config.copy_strength)


def _initialize_module(module: nn.Module, n_layer: int) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    projection: Any = getattr(module, "c_proj", None)  # of attention or MLP
    if projection is not None:  # `apply` visits a module after its children
        nn.init.normal_(projection.weight, std=STD / math.sqrt(2 * n_layer))


def _initialize_copying(qkv: Tensor, projection: Tensor, strength: float) -> None:
    """Makes the product of the (C, C) projection and the value rows of (3 C, C) `qkv` the identity times `strength`."""
    orthogonal = nn.init.orthogonal_(torch.empty_like(projection))
    qkv[-len(projection) :] = math.sqrt(strength) * orthogonal
    projection.copy_(math.sqrt(strength) * orthogonal.t())
