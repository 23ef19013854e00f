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

MAX_SHUFFLED = 1 << 24  # windows that are shuffled at once, which bounds memory: 8 bytes each


def training_batch(
    tokens: TokenFile, block_size: int, config: TrainConfig, iteration: int
) -> tuple[np.ndarray, np.ndarray]:
    """The batch of an iteration: (batch_size, block_size) int64 inputs and targets.

    Raises StoryLLMError if there are too few tokens for one window, or if an id is not in the vocabulary.
    """
    seed = (TRAINING, config.seed)
    with _prefix_errors(tokens.path):
        if config.windows == "random":
            rng = np.random.default_rng((*seed, iteration))
            x, y = random_windows(tokens.ids, block_size, config.batch_size, rng)
        else:
            x, y = shuffled_windows(tokens.ids, block_size, config.batch_size, seed, iteration)
    _check_ids(tokens, x, y)
    return x, y


def evaluation_windows(
    dataset: Dataset, block_size: int, config: TrainConfig
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The windows of each split that every evaluation of a run reads: (eval_windows, block_size) inputs and targets.

    If the dataset has original data, its windows are under "original". Raises StoryLLMError if there are too few tokens
    for one window, or if an id is not in the vocabulary.
    """
    rng = np.random.default_rng((EVALUATION, config.seed))
    windows = {}
    files = {split: dataset[split] for split in SPLITS}
    if dataset.original is not None:
        files["original"] = dataset.original
    for split, tokens in files.items():
        with _prefix_errors(tokens.path):
            windows[split] = random_windows(tokens.ids, block_size, config.eval_windows, rng)
        _check_ids(tokens, *windows[split])
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

    Windows are drawn without replacement. Each epoch has its own order and its own offset of the first window. An epoch
    of more than MAX_SHUFFLED windows is read in parts, each of them every `parts`-th window in random order. Raises
    StoryLLMError if there are too few tokens for one window.
    """
    _check_one_window(ids, block_size)
    windows_per_epoch = max(1, len(ids) // block_size - 1)  # one fewer than fit, which leaves room for the offset
    parts = -(-windows_per_epoch // MAX_SHUFFLED)
    windows_per_part = windows_per_epoch // parts
    offsets = len(ids) - windows_per_part * parts * block_size
    positions = np.arange(batch * count, (batch + 1) * count)
    part_numbers = positions // windows_per_part  # counted through all epochs
    starts = np.empty(count, np.int64)
    for number in np.unique(part_numbers):
        epoch, part = divmod(int(number), parts)
        order, offset = _shuffled(windows_per_part, offsets, (*seed, int(number)))
        if part > 0:  # the windows of an epoch do not overlap
            _, offset = _shuffled(windows_per_part, offsets, (*seed, epoch * parts))
        in_part = part_numbers == number
        windows = order[positions[in_part] % windows_per_part] * parts + part
        starts[in_part] = offset + windows * block_size
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


@lru_cache(maxsize=3)  # consecutive batches are of the same part, or span two; the third has the offset of the epoch
def _shuffled(windows: int, offsets: int, seed: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The order of the windows of a part, and an offset of the first one in tokens."""
    rng = np.random.default_rng(seed)
    return rng.permutation(windows), int(rng.integers(offsets))


def _windows_at(starts: np.ndarray, ids: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    every_window = np.lib.stride_tricks.sliding_window_view(np.asarray(ids), block_size + 1)  # a view, not a copy
    windows = every_window[starts].astype(np.int64)  # (count, block_size + 1)
    return windows[:, :-1], windows[:, 1:]


def _check_ids(tokens: TokenFile, x: np.ndarray, y: np.ndarray) -> None:
    """Raises StoryLLMError if an id in the windows is not in the vocabulary."""
    tokens.check_ids(x)
    tokens.check_ids(y)


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
