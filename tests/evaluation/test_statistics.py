"""Intervals, paired differences and Krippendorff's alpha."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storyllm.evaluation.statistics import Estimate, bootstrap, jackknife, krippendorff_alpha, ratio

NAN = math.nan


def test_a_ratio_of_sums_by_hand():
    statistic = bootstrap(np.array([[1, 2], [3, 2], [0, 1]]))
    assert statistic.value == 4 / 5
    assert math.isnan(ratio(np.array([0.0, 0.0])))


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(10, 2, 400)
    estimate = bootstrap(np.stack([values, np.ones(400)], 1)).estimate()
    error = values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert estimate.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_bootstrap_and_jackknife_contain_the_truth_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), {"bootstrap": 0, "jackknife": 0}
    for _ in range(200):
        values = rng.exponential(1, 40)
        by_bootstrap = bootstrap(np.stack([values, np.ones(40)], 1)).estimate()
        by_jackknife = jackknife([str(v) for v in values], lambda texts: float(np.mean([float(t) for t in texts])))
        covered["bootstrap"] += by_bootstrap.low < 1 < by_bootstrap.high
        covered["jackknife"] += by_jackknife.estimate().low < 1 < by_jackknife.estimate().high
    assert all(175 <= times <= 199 for times in covered.values()), covered  # of 200; 190 are expected


def test_jackknife_of_a_mean_is_its_standard_error():
    estimate = jackknife(["1", "2", "6"], lambda texts: sum(map(float, texts)) / len(texts)).estimate()
    margin = 1.959964 * np.std([1, 2, 6], ddof=1) / math.sqrt(3)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((3, 3 - margin, 3 + margin))


def test_differences_are_paired():
    """Two models that differ by the same amount on every story differ by exactly that."""
    values = np.random.default_rng(0).normal(0, 5, 50)
    a, b = (bootstrap(np.stack([values + shift, np.ones(50)], 1)) for shift in (0.1, 0.0))
    difference = a.minus(b).estimate()
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert difference.excludes_zero and not a.estimate().excludes_zero


@pytest.mark.parametrize(("low", "high", "excludes"), [(0.1, 2, True), (-2, -0.1, True), (-1, 1, False), (0, 1, False)])
def test_a_difference_is_claimed_only_if_its_interval_excludes_zero(low, high, excludes):
    assert Estimate(0.5, low, high).excludes_zero == excludes
    assert not Estimate(NAN, NAN, NAN).excludes_zero


def test_an_undefined_statistic_has_no_interval():
    estimate = bootstrap(np.zeros((3, 2))).estimate()
    assert math.isnan(estimate.value) and math.isnan(estimate.low) and math.isnan(estimate.high)


# K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: four observers, twelve units.
EXAMPLE = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)


def test_alpha_of_the_published_example():
    assert krippendorff_alpha(EXAMPLE) == pytest.approx(0.815, abs=5e-4)


def test_alpha_by_hand():
    """Two raters, three stories: (1, 1), (2, 2), (1, 2).

    Values: three times 1, three times 2. The difference of 1 and 2 is 3/2 + 3/2 = 3, squared 9. Observed: one story of
    three, both orders, 2 x 9 = 18. Expected: 2 x 3 x 3 x 9 / (6 - 1) = 162 / 5. Alpha = 1 - 18 / (162 / 5) = 4 / 9.
    """
    assert krippendorff_alpha(np.array([[1.0, 2, 1], [1, 2, 2]])) == pytest.approx(4 / 9)


def test_alpha_of_perfect_agreement_of_one_value_and_of_a_single_rater():
    assert krippendorff_alpha(np.array([[1.0, 5, 9], [1, 5, 9]])) == 1
    assert math.isnan(krippendorff_alpha(np.array([[4.0, 4], [4, 4]])))
    assert math.isnan(krippendorff_alpha(np.array([[4.0, 5, 6]])))


def alpha_from_pairs(ratings):
    """Alpha from its definition: the mean difference within stories over that of all pairs of ratings."""
    stories = [column[np.isfinite(column)].tolist() for column in ratings.T]
    stories = [story for story in stories if len(story) > 1]
    pool = [value for story in stories for value in story]

    def difference(a, b):
        low, high = min(a, b), max(a, b)
        return (sum(low <= value <= high for value in pool) - (pool.count(a) + pool.count(b)) / 2) ** 2 if a != b else 0

    n = len(pool)
    observed = sum(
        sum(difference(a, b) for a, b in itertools.permutations(story, 2)) / (len(story) - 1) for story in stories
    )
    expected = sum(difference(a, b) for a, b in itertools.permutations(pool, 2)) / (n - 1)
    return 1 - observed / expected if expected else NAN


RATINGS = st.integers(2, 4).flatmap(
    lambda raters: st.lists(st.tuples(*[st.integers(0, 10) | st.none()] * raters), min_size=1, max_size=6)
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(RATINGS)
def test_alpha_agrees_with_its_definition(rows):
    ratings = np.array(rows, float).T
    assert krippendorff_alpha(ratings) == pytest.approx(alpha_from_pairs(ratings), nan_ok=True)


def test_alpha_agrees_with_nltk():
    agreement = pytest.importorskip("nltk.metrics.agreement", reason="nltk is not installed")
    pool = EXAMPLE[:, (np.isfinite(EXAMPLE).sum(0) > 1)]
    values = pool[np.isfinite(pool)].tolist()

    def distance(a, b):
        low, high = min(a, b), max(a, b)
        return (sum(low <= v <= high for v in values) - (values.count(a) + values.count(b)) / 2) ** 2 if a != b else 0.0

    data = [
        (str(rater), str(story), value)
        for (rater, story), value in np.ndenumerate(EXAMPLE)
        if np.isfinite(value) and np.isfinite(EXAMPLE[:, story]).sum() > 1
    ]
    assert agreement.AnnotationTask(data, distance=distance).alpha() == pytest.approx(krippendorff_alpha(EXAMPLE))
