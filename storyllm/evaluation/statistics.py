"""Intervals for statistics of a set of stories, paired differences, and the agreement of raters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1_000
CONFIDENCE = 0.95
Z = 1.959964  # quantile of the normal distribution for that confidence


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval. NaN stands for what is undefined."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero. Only then may a difference be claimed."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Statistic:
    """A statistic of a set of stories, and its values on other sets that tell how much it varies.

    The replicates of two models belong to the same sets, so `a.minus(b)` is a paired difference.
    """

    value: float
    replicates: np.ndarray  # of `bootstrap`, or of `jackknife`, which leaves out one story at a time
    is_jackknife: bool = False

    def estimate(self) -> Estimate:
        """The value with its interval: percentiles of a bootstrap, or a normal interval by the jackknife."""
        replicates = self.replicates[np.isfinite(self.replicates)]
        if not len(replicates) or not np.isfinite(self.value):
            return Estimate(self.value, np.nan, np.nan)
        if self.is_jackknife:
            n = len(replicates)
            margin = Z * np.sqrt((n - 1) / n * ((replicates - replicates.mean()) ** 2).sum())
            return Estimate(self.value, self.value - margin, self.value + margin)
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(replicates, [tail, 1 - tail])
        return Estimate(self.value, float(low), float(high))

    def map(self, function: Callable[[Any], Any]) -> Statistic:
        """The statistic `function(self)`; `function` works on arrays."""
        return Statistic(float(function(self.value)), function(self.replicates), self.is_jackknife)

    def minus(self, other: Statistic) -> Statistic:
        """The paired difference. `other` must be of the same stories, by the same method."""
        return Statistic(self.value - other.value, self.replicates - other.replicates, self.is_jackknife)


def ratio(sums: np.ndarray) -> np.ndarray:
    """(..., 2) sums -> the quotient of the first and the second, NaN for 0 / 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def bootstrap(counts: np.ndarray, function: Callable[[np.ndarray], Any] = ratio, seed: int = 0) -> Statistic:
    """The statistic `function(counts.sum(0))` with a bootstrap over stories (Efron and Tibshirani 1993).

    `counts` is (n, d): what each story adds to the sums, such as the nats and the bytes for bits per byte. A resample
    draws n stories with replacement. The same n and seed give the same resamples.
    """
    rng, n = np.random.default_rng(seed), len(counts)
    drawn = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(RESAMPLES))
    sums = np.stack([times @ counts for times in drawn])
    return Statistic(float(function(counts.sum(0))), np.asarray([function(row) for row in sums], float))


def jackknife(texts: Sequence[str], function: Callable[[list[str]], float]) -> Statistic:
    """The statistic `function(texts)` with the values that leave out one text (Quenouille 1956, Tukey 1958).

    For statistics of diversity: a bootstrap draws some texts twice, which would count as repetition.
    """
    texts = list(texts)
    replicates = [function(texts[:i] + texts[i + 1 :]) for i in range(len(texts))]
    return Statistic(function(texts), np.array(replicates), is_jackknife=True)


def krippendorff_alpha(ratings: np.ndarray) -> float:
    """Krippendorff's alpha for ordinal ratings, (raters, stories) with NaN where a rater gave none.

    1 is perfect agreement, 0 what chance gives; NaN if no two ratings differ. Alpha is 1 - observed / expected
    disagreement. In the coincidence matrix, each pair of ratings of one story counts 1 / (its number of ratings - 1).
    The difference of two values is the number of ratings from one to the other, half of those at the ends, squared
    (K. Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011).
    """
    values = np.unique(ratings[np.isfinite(ratings)])
    counts = (ratings[:, :, None] == values).sum(0)  # (stories, values)
    counts = counts[counts.sum(1) >= 2]  # a single rating has nothing to agree with
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(values), dtype=int)
    coincidences = (pairs / (counts.sum(1) - 1)[:, None, None]).sum(0)  # (values, values)
    totals = coincidences.sum(0)
    up_to = totals.cumsum() - totals / 2  # the ratings below a value, and half of those at it
    differences = (up_to[:, None] - up_to) ** 2
    expected = (np.outer(totals, totals) * differences).sum()
    if not expected:
        return float("nan")
    return float(1 - (totals.sum() - 1) * (coincidences * differences).sum() / expected)
