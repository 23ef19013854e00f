"""Windows of token ids: inputs, and targets that are the inputs shifted by one token.

The windows of a batch are a function of the data, the recipe and the iteration, so an interrupted run reads the same
ones when it resumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..config import StoryLLMError, TrainConfig
from .stories import SPLITS
from .token_file import Dataset, TokenFile

# The first number of the seed sequence of each random generator in a run, which keeps their streams independent.
TRAINING, EVALUATION, DROPOUT = 0, 1, 2


def training_batch(
    tokens: TokenFile, block_size: int, config: TrainConfig, iteration: int
) -> tuple[np.ndarray, np.ndarray]:
    """The batch of an iteration: (batch_size, block_size) int64 inputs and targets.

    Raises StoryLLMError if there are too few tokens for one window.
    """
    seed = (TRAINING, config.seed)
    with _prefix_errors(tokens.path):
        if config.windows == "random":
            rng = np.random.default_rng((*seed, iteration))
            return random_windows(tokens.ids, block_size, config.batch_size, rng)
        return shuffled_windows(tokens.ids, block_size, config.batch_size, seed, iteration)


def evaluation_windows(
    dataset: Dataset, block_size: int, config: TrainConfig
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The windows of each split that every evaluation of a run reads: (eval_windows, block_size) inputs and targets.

    If the dataset has original data, its windows are under "original". Raises StoryLLMError if there are too few tokens
    for one window.
    """
    rng = np.random.default_rng((EVALUATION, config.seed))
    windows = {}
    files = {split: dataset[split] for split in SPLITS}
    if dataset.original is not None:
        files["original"] = dataset.original
    for split, tokens in files.items():
        with _prefix_errors(tokens.path):
            windows[split] = random_windows(tokens.ids, block_size, config.eval_windows, rng)
    return windows


def random_windows(
    ids: np.ndarray, block_size: int, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`count` windows at uniformly random positions: (count, block_size) int64 inputs and targets.

    Raises StoryLLMError if there are too few tokens for one window.
    """
    _check_one_window(ids, block_size)
    return _windows_at(rng.integers(len(ids) - block_size, size=count), ids, block_size)


def shuffled_windows(
    ids: np.ndarray, block_size: int, count: int, seed: tuple[int, ...], batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Batch number `batch`, from 0, of non-overlapping windows in random order: (count, block_size) inputs and targets.

    Windows are drawn without replacement. Each epoch has its own order and its own offset of the first window. Raises
    StoryLLMError if there are too few tokens for one window.
    """
    _check_one_window(ids, block_size)
    windows_per_epoch = max(1, len(ids) // block_size - 1)  # one fewer than fit, which leaves room for the offset
    positions = np.arange(batch * count, (batch + 1) * count)
    epochs = positions // windows_per_epoch
    starts = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        order, offset = _epoch(windows_per_epoch, len(ids) - windows_per_epoch * block_size, (*seed, int(epoch)))
        in_epoch = epochs == epoch
        starts[in_epoch] = offset + order[positions[in_epoch] % windows_per_epoch] * block_size
    return _windows_at(starts, ids, block_size)


def sequential_windows(ids: np.ndarray, block_size: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields all of `ids` in order as non-overlapping windows: (<= count, block_size) int64 inputs and targets.

    Every token except the first is a target exactly once. The remainder comes last, as one shorter window.
    """
    targets = max(len(ids) - 1, 0)
    full_windows = targets // block_size
    for first in range(0, full_windows, count):
        start, stop = first * block_size, min(first + count, full_windows) * block_size
        chunk = ids[start : stop + 1].astype(np.int64)
        yield chunk[:-1].reshape(-1, block_size), chunk[1:].reshape(-1, block_size)
    if targets % block_size:
        remainder = ids[full_windows * block_size :].astype(np.int64)
        yield remainder[None, :-1], remainder[None, 1:]


@lru_cache(maxsize=2)  # consecutive batches are of the same epoch, or span two
def _epoch(windows: int, offsets: int, seed: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The order of an epoch's windows, and the offset of the first one in tokens."""
    rng = np.random.default_rng(seed)
    return rng.permutation(windows), int(rng.integers(offsets))


def _windows_at(starts: np.ndarray, ids: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    every_window = np.lib.stride_tricks.sliding_window_view(np.asarray(ids), block_size + 1)  # a view, not a copy
    windows = every_window[starts].astype(np.int64)  # (count, block_size + 1)
    return windows[:, :-1], windows[:, 1:]


def _check_one_window(ids: np.ndarray, block_size: int) -> None:
    if len(ids) <= block_size:
        raise StoryLLMError(
            f"the data has {len(ids)} tokens, must have at least {block_size + 1} for a window of {block_size}; "
            "prepare more stories, raise data.validation_fraction if this is the validation split, or lower "
            "model.block_size"
        )


@contextmanager
def _prefix_errors(path: Path) -> Iterator[None]:
    """Prefixes the message of a StoryLLMError with `path`."""
    try:
        yield
    except StoryLLMError as error:
        raise StoryLLMError(f"{path}: {error}") from error
