"""Which settings learn most from few tokens? Trains one run a row, and prints what each came to on held-out stories.

    storyllm prepare --source TRAINING_STORIES --tokenizer bpe:2048 --validation-fraction 0.03 --out sweep_data
    python benchmarks/sweep.py --data-dir sweep_data --base "model.n_layer=3 model.n_embd=192" --tokens 1000000 \\
        --rows "train.learning_rate=2e-3" "train.learning_rate=4e-3" "train.optimizer=adamw train.learning_rate=2e-3"

A row is fields of the recipe with their values, on top of --base; `try=NAME` in it changes what no field does (see
TRIALS). The schedule is made for --tokens: warm-up and decay are shares of it. Runs are kept in --folder: a sweep that
was cut off continues, and no run is made twice.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from side_by_side import command_line, machine

import storyllm
from storyllm import training


def initialised(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[storyllm.GPTConfig], storyllm.GPT]:
    """Makes a GPT whose matrices are then changed, by name."""

    def make(config: storyllm.GPTConfig) -> storyllm.GPT:
        model = storyllm.GPT(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.copy_(change(name, parameter))
        return model

    return make


def zero_projections(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Each block begins as the identity."""
    return torch.zeros_like(weight) if "c_proj" in name else weight


def by_width(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Matrices within the blocks are drawn with 1/sqrt(inputs), the projections as GPT-2 shrinks them."""
    return weight / (0.02 * weight.size(1) ** 0.5) if ".h." in name else weight


def small_embeddings(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight if ".h." in name else weight / 4


def large_embeddings(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight if ".h." in name else weight * 2


def from_story_starts(
    ids: np.ndarray, block_size: int, count: int, seed: tuple[int, ...], batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Windows that start where a story does, or a whole number of windows after that: batches as shuffled_windows'."""
    starts = np.flatnonzero(ids == ids.max()) + 1  # the end-of-text mark is the last id of a vocabulary
    ends = np.append(starts[1:], len(ids))
    places = np.concatenate([np.arange(a, b, block_size) for a, b in zip(starts, ends, strict=True)])
    places = places[places < len(ids) - block_size]
    first = batch * count
    epochs = range(first // len(places), (first + count - 1) // len(places) + 1)
    order = np.concatenate([np.random.default_rng((*seed, epoch)).permutation(places) for epoch in epochs])
    first -= epochs[0] * len(places)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(ids), block_size + 1)[order[first : first + count]]
    return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)


# What no field of the recipe does: {name: (what it takes the place of in training, itself)}.
TRIALS = {
    "zero_projections": ("GPT", initialised(zero_projections)),
    "by_width": ("GPT", initialised(by_width)),
    "small_embeddings": ("GPT", initialised(small_embeddings)),
    "large_embeddings": ("GPT", initialised(large_embeddings)),
    "from_story_starts": ("shuffled_windows", from_story_starts),
}


def fields(row: str) -> dict[str, object]:
    """{name: value} of "name=value name=value"; values as in JSON, or plain words."""
    found: dict[str, object] = {}
    for assignment in row.split():
        name, _, value = assignment.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def main(
    rows: list[str],
    data_dir: Path = Path("sweep_data"),
    recipe: str = "faithful",
    base: str = "",
    tokens: int = 1_000_000,
    warmup: float = 0.05,
    decay: float = 0.6,
    seeds: int = 1,
    folder: Path = Path("checkpoints/sweep"),
) -> int:
    """Trains a run for each row and seed on `tokens` tokens; prints its loss on the whole held-out file."""
    print(f"{machine()}\n{recipe}, {base}, {tokens:,} tokens, warm-up {warmup:g}, decay {decay:g} of them")
    print(f"{'loss':>8} {'bits/byte':>10} {'minutes':>8}  row")
    for row in rows:
        for seed in range(seeds):
            settings = {**fields(base), **fields(row), "train.seed": seed}
            trial = settings.pop("try", None)
            changed = storyllm.get_recipe(recipe).override(settings)
            iterations = max(1, tokens // (changed.train.batch_size * changed.model.block_size))
            schedule: dict[str, float] = {"warmup_iters": int(warmup * iterations), "decay_share": decay}
            schedule |= {"max_iters": iterations, "eval_interval": iterations, "eval_windows": 64}
            changed = changed.override({f"train.{name}": value for name, value in schedule.items()})
            name = hashlib.sha256(json.dumps(changed.to_dict()).encode()).hexdigest()[:12]
            name += f"_{trial}" if trial else ""
            started = time.monotonic()
            with redirect_stdout(StringIO()), ExitStack() as changes:
                if trial:
                    changes.enter_context(patch.object(training, *TRIALS[trial]))
                log = storyllm.train(changed, data_dir, folder / name)
            if log.interrupted:
                return 128 + log.interrupted
            minutes = (log.updates[-1]["seconds"] if log.updates else time.monotonic() - started) / 60
            report = storyllm.evaluate(storyllm.load(folder / name / "last.pt"), data_dir / "validation.bin")
            seed_shown = f", seed {seed}" if seeds > 1 else ""
            print(f"{report.loss:>8.4f} {report.bits_per_byte:>10.4f} {minutes:>8.1f}  {row}{seed_shown}", flush=True)
    return 0


if __name__ == "__main__":
    command_line(main)
