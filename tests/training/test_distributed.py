"""Several processes train one model: the same mathematics, joint decisions, one writer.

The processes are forked by a subprocess of the test, since a process that has trained cannot be forked. They use gloo.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, assert_one_line_error, fork_ranks, iteration_of, losses, run_in_subprocess, weights

import storyllm
from storyllm import Recipe, StoryLLMError, read_log, train
from storyllm.cli import main
from storyllm.training import distributed
from storyllm.training.distributed import torchrun_processes

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes"),
]

# 10 windows per update: 5 and 5, or 4, 3 and 3, in micro-batches of 2. Without dropout, whose masks depend on the rank.
RECIPE = TINY.override(
    {
        "model.dropout": 0.0,
        "train.max_iters": 100,
        "train.batch_size": 5,
        "train.gradient_accumulation_steps": 2,
        "train.micro_batch_size": 2,
        "train.eval_interval": 20,
        "train.eval_windows": 7,
    }
)
SHORT = RECIPE.override({"train.max_iters": 20, "train.eval_interval": 10})


def train_on(size: int, recipe: Recipe, data: str, folder: Path, **options: Any) -> list[int]:
    """Trains on `size` processes; returns their exit codes."""
    return fork_ranks(size, lambda rank: train(recipe, data, folder, **options).interrupted)


def differences(folder: Path, other: Path) -> dict[str, float]:
    """The largest differences between two runs."""
    (updates, evaluations), (other_updates, other_evaluations) = losses(folder), losses(other)
    assert [u["iteration"] for u in updates] == [u["iteration"] for u in other_updates]
    result = {}
    for name, ones, twos in (
        ("train_loss", updates, other_updates),
        ("grad_norm", updates, other_updates),
        ("val_loss", evaluations, other_evaluations),
    ):
        result[name] = max(abs(one[name] - two[name]) for one, two in zip(ones, twos, strict=True))
    ours, theirs = weights(folder), weights(other)
    result["weights"] = max(float(np.abs(np.subtract(ours[name], theirs[name])).max()) for name in ours)
    return result


def train_on_1_2_and_3(data: str, changes: dict[str, Any]) -> None:
    recipe = RECIPE.override(changes)
    for size in (1, 2, 3):
        assert train_on(size, recipe, data, Path(f"{size}")) == [0] * size
    print(json.dumps([differences(Path(f"{size}"), Path("1")) for size in (2, 3)]))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_the_losses_and_weights_are_those_of_one_process(tiny_data, tmp_path, optimizer, dtype, tolerance):
    changes = {"train.optimizer": optimizer, "train.dtype": dtype}
    out = run_in_subprocess(train_on_1_2_and_3, str(tiny_data), changes, cwd=tmp_path, timeout=200)
    print(out)
    for found in json.loads(out):
        assert all(difference < tolerance for difference in found.values()), found
