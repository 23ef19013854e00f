"""A small model and random token ids for the tests of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import TINY
from torch import Tensor

from storyllm import GPT
from storyllm.model import linear


@pytest.fixture(autouse=True)
def onednn_for_small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise these small models would test PyTorch's products only."""
    monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 1)


@pytest.fixture
def make_model() -> Callable[..., GPT]:
    """Creates a model of TINY's size without dropout, in evaluation mode: `make_model(n_layer=3, seed=1)`."""

    def make(seed: int = 0, **changes: Any) -> GPT:
        torch.manual_seed(seed)
        model = GPT(dataclasses.replace(TINY.model, **{"dropout": 0.0, **changes})).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases of 0 and gains of 1 would hide one that is not used
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
            elif name.startswith("transformer.h."):  # with its initial weights a model repeats the last token
                parameter.data.mul_(8)
        return model

    return make


@pytest.fixture
def random_ids() -> Callable[..., Tensor]:
    """Returns (batch, length) ids below TINY's vocabulary size: `random_ids(3, 16, seed=1)`."""

    def ids(batch: int = 3, length: int = TINY.model.block_size, seed: int = 0) -> Tensor:
        return torch.randint(TINY.model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))

    return ids
