"""Which settings learn the most from few tokens? Trains a model per row and prints its loss on held-out stories.

    storyllm prepare --source TRAINING_STORIES --tokenizer bpe:2048 --validation-fraction 0.03 --out sweep_data
    python benchmarks/sweep.py --data-dir sweep_data --base "model.n_layer=3 model.n_embd=192" --tokens 1000000 \\
        --rows "train.learning_rate=2e-3" "train.learning_rate=4e-3" "train.optimizer=adamw train.learning_rate=2e-3"

A row is a list of recipe fields and their values, in addition to --base. `try=NAME` selects a variant that no recipe
field offers (see VARIANTS). Warmup and decay are fractions of --tokens. Runs are kept in --folder: an interrupted sweep
resumes, and completed runs are not repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import describe_machine, run_cli

import storyllm
import storyllm.data.windows
import storyllm.training.initial_model


def initialized(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[storyllm.GPTConfig], storyllm.GPT]:
    """A constructor of GPTs that applies `change` to each initialized matrix and its name."""

    def make_model(config: storyllm.GPTConfig) -> storyllm.GPT:
        model = storyllm.GPT(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.copy_(change(name, parameter))
        return model

    return make_model


def zero_projections(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Each block is the identity at first."""
    return torch.zeros_like(weight) if "c_proj" in name else weight


def by_width(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Matrices in the blocks have standard deviation 1/sqrt(inputs). GPT-2's scaling of the projections remains."""
    return weight / (0.02 * weight.size(1) ** 0.5) if ".h." in name else weight


def small_embeddings(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Embeddings have a quarter of GPT-2's standard deviation."""
    return weight if ".h." in name else weight / 4


def large_embeddings(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Embeddings have twice GPT-2's standard deviation."""
    return weight if ".h." in name else weight * 2


def from_story_starts(
    ids: np.ndarray, block_size: int, count: int, seed: tuple[int, ...], batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Like `shuffled_windows`, but windows are aligned with the start of each story."""
    story_starts = np.flatnonzero(ids == ids.max()) + 1  # the end-of-text token has the largest id
    story_ends = np.append(story_starts[1:], len(ids))
    starts = np.concatenate([np.arange(a, b, block_size) for a, b in zip(story_starts, story_ends, strict=True)])
    starts = starts[starts < len(ids) - block_size]
    first = batch * count
    epochs = range(first // len(starts), (first + count - 1) // len(starts) + 1)
    order = np.concatenate([np.random.default_rng((*seed, epoch)).permutation(starts) for epoch in epochs])
    first -= epochs[0] * len(starts)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(ids), block_size + 1)[order[first : first + count]]
    return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)


# {name: (module, name in it, replacement during training)}
VARIANTS: dict[str, tuple[ModuleType, str, Callable[..., Any]]] = {
    "zero_projections": (storyllm.training.initial_model, "GPT", initialized(zero_projections)),
    "by_width": (storyllm.training.initial_model, "GPT", initialized(by_width)),
    "small_embeddings": (storyllm.training.initial_model, "GPT", initialized(small_embeddings)),
    "large_embeddings": (storyllm.training.initial_model, "GPT", initialized(large_embeddings)),
    "from_story_starts": (storyllm.data.windows, "shuffled_windows", from_story_starts),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    recipe: storyllm.Recipe
    variant: str | None

    @property
    def folder_name(self) -> str:
        """A name that identifies the settings."""
        digest = hashlib.sha256(json.dumps(self.recipe.to_dict()).encode()).hexdigest()[:12]
        return f"{digest}_{self.variant}" if self.variant else digest

    def train(self, data_dir: Path, folder: Path) -> storyllm.Log:
        """Trains without a progress bar, or resumes."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if self.variant is not None:
                stack.enter_context(patch.object(*VARIANTS[self.variant]))
            return storyllm.train(self.recipe, data_dir, folder)


def make_run(recipe: storyllm.Recipe, settings: dict[str, Any], tokens: int, warmup: float, decay: float) -> Run:
    """`recipe` with these settings and a schedule for `tokens` tokens."""
    settings = dict(settings)
    variant = settings.pop("try", None)
    if variant is not None and variant not in VARIANTS:
        raise storyllm.StoryLLMError(f"unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    recipe = recipe.override(settings)
    iterations = max(1, tokens // (recipe.train.batch_size * recipe.model.block_size))
    schedule = {
        "train.max_iters": iterations,
        "train.warmup_iters": int(warmup * iterations),
        "train.decay_fraction": decay,
        "train.eval_interval": iterations,
        "train.eval_windows": 64,
    }
    return Run(recipe.override(schedule), variant)


def parse_settings(row: str) -> dict[str, Any]:
    """{name: value} from "name=value name=value". Values are JSON or plain words."""
    settings: dict[str, Any] = {}
    for assignment in row.split():
        name, _, value = assignment.partition("=")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


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
    """Trains a model per row and seed on `tokens` tokens and prints its loss on the complete held-out file."""
    print(f"{describe_machine()}\nrecipe {recipe}, {base}, {tokens:,} tokens, warmup {warmup:g}, decay {decay:g}")
    print(f"{'loss':>8} {'bits/byte':>10} {'minutes':>8}  row")
    for row in rows:
        for seed in range(seeds):
            settings = {**parse_settings(base), **parse_settings(row), "train.seed": seed}
            run = make_run(storyllm.get_recipe(recipe), settings, tokens, warmup, decay)
            run_dir = folder / run.folder_name
            log = run.train(data_dir, run_dir)
            if log.interrupted:
                return 128 + log.interrupted
            report = storyllm.evaluate(storyllm.load(run_dir / "last.pt"), data_dir / "validation.bin")
            minutes = log.updates[-1]["seconds"] / 60
            label = f"{row}, seed {seed}" if seeds > 1 else row
            print(f"{report.loss:>8.4f} {report.bits_per_byte:>10.4f} {minutes:>8.1f}  {label}", flush=True)
    return 0


if __name__ == "__main__":
    run_cli(main)
