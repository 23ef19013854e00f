"""Windows are contiguous pieces of the data, with the targets one token ahead, and a function of the seed alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from storyllm import StoryLLMError, TrainConfig
from storyllm.data import windows as windows_module
from storyllm.data.token_file import Dataset, TokenFile, open_dataset
from storyllm.data.windows import (
    EVALUATION,
    TRAINING,
    evaluation_windows,
    random_windows,
    sequential_windows,
    shuffled_windows,
    training_batch,
)

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
IDS = st.lists(st.integers(0, 65535), max_size=60).map(lambda ids: np.array(ids, "<u2"))
SEEDS = st.integers(0, 2**63 - 1)
CONFIG = TrainConfig(batch_size=3, eval_windows=5)


@pytest.fixture
def dataset(tiny_data: Path) -> Dataset:
    return open_dataset(tiny_data)


def counting_ids(length: int) -> np.ndarray:
    """Ids that equal their positions."""
    return np.arange(length, dtype="<u2")


def assert_contiguous(x: np.ndarray, y: np.ndarray, shape: tuple[int, int]) -> None:
    """Checks the shape and type of windows of `counting_ids`, and that each is contiguous."""
    assert x.shape == y.shape == shape
    assert x.dtype == y.dtype == np.int64
    assert (x == x[:, :1] + np.arange(shape[1])).all()
    assert (y == x + 1).all()


# Random windows


@PROPERTY
@given(IDS, st.integers(1, 20), st.integers(0, 40), SEEDS)
def test_random_windows_are_pieces_of_the_data(ids: np.ndarray, block_size: int, count: int, seed: int) -> None:
    assume(len(ids) > block_size)
    before = ids.copy()
    x, y = random_windows(ids, block_size, count, np.random.default_rng(seed))
    assert x.shape == y.shape == (count, block_size)
    assert x.dtype == y.dtype == np.int64
    assert (x[:, 1:] == y[:, :-1]).all()
    pieces = {tuple(ids[start : start + block_size + 1].tolist()) for start in range(len(ids) - block_size)}
    assert {(*row, last) for row, last in zip(x.tolist(), y[:, -1].tolist(), strict=True)} <= pieces
    x[:] = 0  # windows are copies
    assert (ids == before).all()


def test_random_windows_are_uniformly_distributed() -> None:
    x, y = random_windows(counting_ids(12), 4, 8_000, np.random.default_rng(0))
    assert_contiguous(x, y, (8_000, 4))
    starts, counts = np.unique(x[:, 0], return_counts=True)
    assert starts.tolist() == list(range(8))
    assert y.max() == 11  # the last token can be a target
    assert counts.min() > 850  # 1,000 expected


def test_random_windows_depend_on_the_generator() -> None:
    def starts(seed: int) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return [random_windows(counting_ids(1_000), 8, 4, rng)[0][:, 0].tolist() for _ in range(3)]

    assert starts(1) == starts(1)
    assert starts(1) != starts(2)
    assert len({tuple(row) for row in starts(1)}) == 3


@pytest.mark.parametrize("tokens", [0, 1, 7, 8])
def test_too_few_tokens_for_one_window_are_refused(tokens: int) -> None:
    ids = counting_ids(tokens)
    for call in (
        lambda: random_windows(ids, 8, 2, np.random.default_rng(0)),
        lambda: shuffled_windows(ids, 8, 2, (0,), 0),
    ):
        with pytest.raises(StoryLLMError, match=rf"{tokens} tokens.*9.*block_size") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_just_enough_tokens_for_one_window() -> None:
    for x, y in (
        random_windows(counting_ids(9), 8, 3, np.random.default_rng(0)),
        shuffled_windows(counting_ids(9), 8, 3, (0,), 0),
    ):
        assert x.tolist() == [list(range(8))] * 3
        assert y.tolist() == [list(range(1, 9))] * 3


# Shuffled windows


@pytest.mark.parametrize(
    ("tokens", "block_size", "count"), [(1000, 8, 5), (1000, 8, 300), (17, 8, 4), (16, 8, 3), (9, 8, 2)]
)
def test_shuffled_windows_are_drawn_without_replacement(tokens: int, block_size: int, count: int) -> None:
    per_epoch = max(1, tokens // block_size - 1)
    batches = [
        shuffled_windows(counting_ids(tokens), block_size, count, (0, 1), i) for i in range(3 * per_epoch // count + 3)
    ]
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert_contiguous(x, y, (count * len(batches), block_size))
    epochs = [x[i * per_epoch : (i + 1) * per_epoch, 0] for i in range(len(x) // per_epoch)]
    for starts in epochs:
        assert (np.diff(np.sort(starts)) == block_size).all()  # no window twice, and no gaps
    if per_epoch > 10:
        assert (epochs[0] != epochs[1]).any()  # the order differs
        assert len({starts.min() for starts in epochs}) > 1  # and so does the offset


@PROPERTY
@given(st.integers(2, 200), st.integers(1, 20), st.integers(1, 10), SEEDS)
def test_shuffled_windows_do_not_depend_on_the_batch_size(tokens: int, block_size: int, count: int, seed: int) -> None:
    assume(tokens > block_size)
    ids, per_epoch = counting_ids(tokens), max(1, tokens // block_size - 1)
    batches = range(2 * per_epoch // count + 1)
    x = np.concatenate([shuffled_windows(ids, block_size, count, (0, seed), i)[0] for i in batches])
    one_by_one = [shuffled_windows(ids, block_size, 1, (0, seed), i)[0] for i in range(len(x))]
    assert (np.concatenate(one_by_one) == x).all()


@pytest.mark.parametrize(("tokens", "parts"), [(1_000, 1), (1_000, 2), (1_003, 4), (1_000, 7)])
def test_shuffled_windows_of_a_large_file_are_drawn_in_parts(
    monkeypatch: pytest.MonkeyPatch, tokens: int, parts: int
) -> None:
    windows = tokens // 8 - 1
    monkeypatch.setattr(windows_module, "MAX_SHUFFLED", -(-windows // parts))  # a real file has more than 2**27 tokens
    size = windows // parts
    per_epoch = size * parts  # the others are left out
    x, y = shuffled_windows(counting_ids(tokens), 8, 3 * per_epoch, (0, 1), 0)
    assert_contiguous(x, y, (3 * per_epoch, 8))
    orders = set()
    for starts in x[:, 0].reshape(3, per_epoch):
        assert (np.diff(np.sort(starts)) == 8).all()  # no window twice, and no gaps
        for part in starts.reshape(parts, size):
            assert (np.diff(np.sort(part)) == 8 * parts).all()  # spread over the complete file
            orders.add(tuple(part // (8 * parts)))
    assert len(orders) == 3 * parts  # every part of every epoch has its own order
    assert len({starts.min() for starts in x[:, 0].reshape(3, per_epoch)}) > 1


def test_shuffled_windows_depend_on_the_seed() -> None:
    one, two = (shuffled_windows(counting_ids(1_000), 8, 20, (0, seed), 0)[0] for seed in (1, 2))
    assert (one != two).any()


# Sequential windows


@PROPERTY
@given(IDS, st.integers(1, 20), st.integers(1, 10))
def test_sequential_windows_cover_every_token_once_in_order(ids: np.ndarray, block_size: int, count: int) -> None:
    windows = list(sequential_windows(ids, block_size, count))
    assert [token for x, _ in windows for token in x.ravel().tolist()] == ids[:-1].tolist()
    assert [token for _, y in windows for token in y.ravel().tolist()] == ids[1:].tolist()
    for x, y in windows:
        assert x.dtype == y.dtype == np.int64
        assert x.shape == y.shape
    full = [x.shape for x, _ in windows if x.shape[1] == block_size]
    assert full[:-1] == [(count, block_size)] * (len(full) - 1)  # only the last batch may be smaller
    assert not full or 1 <= full[-1][0] <= count
    remainder = max(len(ids) - 1, 0) % block_size
    assert [x.shape for x, _ in windows[len(full) :]] == ([(1, remainder)] if remainder else [])


def test_windows_of_a_memory_mapped_file(dataset: Dataset) -> None:
    ids = dataset.validation.ids
    content = np.array(ids)
    targets = np.concatenate([y.ravel() for _, y in sequential_windows(ids, 128, 4)])
    assert (targets == content[1:]).all()
    x, _ = random_windows(ids, 64, 10, np.random.default_rng(3))
    x[:] = 0
    assert (ids == content).all()


# The batches of a run


def first_tokens(tokens: TokenFile, length: int) -> TokenFile:
    return dataclasses.replace(tokens, ids=tokens.ids[:length])


@pytest.mark.parametrize("windows", ["random", "shuffled"])
def test_training_batch_is_a_function_of_seed_and_iteration(dataset: Dataset, windows: str) -> None:
    def inputs(seed: int, iteration: int) -> bytes:
        config = dataclasses.replace(CONFIG, windows=windows, seed=seed)
        x, y = training_batch(dataset.train, 16, config, iteration)
        assert x.shape == y.shape == (3, 16)
        assert (x[:, 1:] == y[:, :-1]).all()
        return x.tobytes()

    pairs = [(seed, iteration) for seed in (0, 1, 2**63 - 1) for iteration in (0, 1, 2, 99_999)]
    batches = [inputs(*pair) for pair in pairs]
    assert len(set(batches)) == len(pairs)
    assert [inputs(*pair) for pair in reversed(pairs)] == batches[::-1]


def test_training_batch_uses_the_configured_windows(dataset: Dataset) -> None:
    """These random numbers are part of a run's reproducibility, and must not change."""
    ids = dataset.train.ids
    expected = random_windows(ids, 16, 3, np.random.default_rng((TRAINING, 7, 5)))
    assert np.array_equal(training_batch(dataset.train, 16, dataclasses.replace(CONFIG, seed=7), 5), expected)
    shuffled = dataclasses.replace(CONFIG, seed=7, windows="shuffled")
    expected = shuffled_windows(ids, 16, 3, (TRAINING, 7), 5)
    assert np.array_equal(training_batch(dataset.train, 16, shuffled, 5), expected)


def test_evaluation_windows_are_fixed_and_independent_of_training(dataset: Dataset) -> None:
    windows = evaluation_windows(dataset, 16, CONFIG)
    again = evaluation_windows(dataset, 16, CONFIG)
    other_seed = evaluation_windows(dataset, 16, dataclasses.replace(CONFIG, seed=1))
    rng = np.random.default_rng((EVALUATION, CONFIG.seed))
    assert list(windows) == ["train", "validation"]
    for split, (x, y) in windows.items():
        assert x.shape == y.shape == (5, 16)
        assert np.array_equal((x, y), random_windows(dataset[split].ids, 16, 5, rng))
        assert np.array_equal(again[split], (x, y))
        assert not np.array_equal(other_seed[split], (x, y))


@pytest.mark.parametrize("windows", ["random", "shuffled"])
def test_file_with_too_few_tokens_is_named(dataset: Dataset, windows: str) -> None:
    config = dataclasses.replace(CONFIG, windows=windows)
    with pytest.raises(StoryLLMError, match=r"train\.bin.*16 tokens.*17"):
        training_batch(first_tokens(dataset.train, 16), 16, config, 0)
    short = dataclasses.replace(dataset, validation=first_tokens(dataset.validation, 16))
    with pytest.raises(StoryLLMError, match=r"validation\.bin.*16 tokens.*17"):
        evaluation_windows(short, 16, config)
