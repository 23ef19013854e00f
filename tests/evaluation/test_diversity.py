"""Distinct n-grams, compression and repetition."""

import gzip
import math
import random

import pytest

from storyllm.evaluation.diversity import compression_ratio, distinct_n, repeated_ngrams


def test_distinct_1_by_hand():
    # 3 different words of 4; drawing 4 of 10 words gives 10 (1 - 0.9^4) = 3.439 different ones.
    assert distinct_n(["The dog", "a dog"], 1, 10) == pytest.approx(3 / 3.439)


def test_distinct_2_by_hand():
    # 2 different bigrams of 3, which do not reach across texts; 100 are possible.
    assert distinct_n(["a b a b"], 2, 10) == pytest.approx(2 / (100 * (1 - 0.99**3)))
    assert math.isnan(distinct_n(["one", "two"], 2, 10))


def test_expectation_adjusted_distinct_depends_little_on_the_length():
    """Words drawn uniformly have a value of about 1 at every length; the share of different words falls."""
    rng = random.Random(0)
    for length in (100, 1_000, 5_000):
        text = " ".join("word" + "abcdefghij"[rng.randrange(10)] * rng.randrange(1, 40) for _ in range(length))
        assert distinct_n([text], 1, 390) == pytest.approx(1, abs=0.12)


def test_compression_ratio_by_hand():
    texts = ["abc" * 50, "abc" * 50]
    assert compression_ratio(texts) == 301 / len(gzip.compress("\n".join(texts).encode(), mtime=0))
    assert compression_ratio(texts) > compression_ratio(["once upon a time", "there was a bear"])


def test_repeated_4_grams_by_hand():
    assert repeated_ngrams("a b c d a b c d") == (1, 5)  # only "a b c d" occurs twice
    assert repeated_ngrams("a a a a a a") == (2, 3)
    assert repeated_ngrams("a b c") == (0, 0)
