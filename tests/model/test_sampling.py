"""The rules of `next_token_probs`, one by one and on random logits, and sampling from it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from storyllm import StoryLLMError, next_token_probs
from storyllm.model.sampling import sample_next

PROBS = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
LOGITS = PROBS.log() + 3.0  # softmax ignores the shift
ORDER = torch.tensor([3, 0, 4, 2, 1])


def largest(kept: int) -> torch.Tensor:
    """PROBS with only the `kept` largest, renormalized."""
    probs = PROBS.clone()
    probs[kept:] = 0
    return probs / probs.sum()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_temperature_one_keeps_the_distribution_of_the_model():
    torch.testing.assert_close(next_token_probs(LOGITS), PROBS)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2, 2.0])
def test_temperature_divides_the_logits(temperature):
    expected = PROBS ** (1 / temperature)
    torch.testing.assert_close(next_token_probs(LOGITS, temperature), expected / expected.sum())


@pytest.mark.parametrize("temperature", [0, 0.0])
def test_temperature_zero_is_greedy(temperature):
    assert next_token_probs(LOGITS, temperature).tolist() == [1, 0, 0, 0, 0]


def test_temperature_zero_keeps_one_token_with_ties_and_other_rules():
    assert next_token_probs(torch.zeros(2, 5), 0.0, top_k=3, top_p=0.5).sort().values.tolist() == [[0, 0, 0, 0, 1]] * 2


def test_tiny_temperature_does_not_overflow():
    assert next_token_probs(LOGITS * 1e3, 1e-30).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("top_k", [1, 2, 4, 5, 99])
def test_top_k_keeps_the_k_most_likely_tokens_in_proportion(top_k):
    torch.testing.assert_close(next_token_probs(LOGITS, top_k=top_k), largest(top_k))


def test_top_k_keeps_exactly_k_tokens_with_ties():
    assert (next_token_probs(torch.zeros(3, 10), top_k=4) > 0).sum(-1).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, 1), (0.499, 1), (0.501, 2), (0.74, 2), (0.76, 3), (0.96, 4), (0.98, 5), (1, 5), (1.0, 5)]
)
def test_top_p_keeps_the_smallest_set_that_holds_p(top_p, kept):
    torch.testing.assert_close(next_token_probs(LOGITS, top_p=top_p), largest(kept))


def test_top_p_does_not_depend_on_the_order_of_the_tokens():
    torch.testing.assert_close(next_token_probs(LOGITS[ORDER], top_p=0.8), next_token_probs(LOGITS, top_p=0.8)[ORDER])


def test_top_p_applies_after_top_k():
    # Of the two tokens that top_k keeps, the first holds two thirds: enough for 0.6, unlike its 0.5 of all tokens.
    torch.testing.assert_close(next_token_probs(LOGITS, top_k=2, top_p=0.6), largest(1))


def test_top_p_applies_after_temperature():
    # At temperature 0.5 the first token holds 0.73.
    torch.testing.assert_close(next_token_probs(LOGITS, 0.5, top_p=0.7), largest(1))


def test_top_p_of_a_large_vocabulary():
    logits = torch.randn(2, 5000, generator=seeded()) * 6
    for row, everything in zip(next_token_probs(logits, top_p=0.9), logits.softmax(-1), strict=True):
        descending = everything.sort(descending=True).values
        kept = int((descending.cumsum(0) < 0.9).sum()) + 1
        assert (row > 0).sum() == kept
        torch.testing.assert_close(row.sort(descending=True).values[:kept], descending[:kept] / descending[:kept].sum())


def test_half_precision_logits_give_float32_probabilities():
    probs = next_token_probs(LOGITS.bfloat16())
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, PROBS, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.1, math.inf, math.nan, "hot", None)),
        *(("top_k", value) for value in (0, -1, 2.5, True, "3")),
        *(("top_p", value) for value in (0.0, -0.1, 1.1, math.nan, "0.9")),
    ],
)
def test_an_invalid_parameter_is_rejected_by_name(field, value):
    with pytest.raises(StoryLLMError, match=f"^{field} .*{value}"):
        next_token_probs(LOGITS, **{field: value})


@pytest.mark.parametrize(
    "rules", [{}, {"temperature": 0.5}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.9}]
)
def test_samples_follow_the_probabilities(rules):
    ids = sample_next(LOGITS[ORDER].expand(20_000, 5), **rules, generator=seeded())
    assert ids.shape == (20_000,)
    expected, counts = next_token_probs(LOGITS[ORDER], **rules), ids.bincount(minlength=5)
    torch.testing.assert_close(counts / 20_000, expected, atol=0.012, rtol=0)
    assert not counts[expected == 0].any()


def test_each_row_is_sampled_from_its_own_logits():
    logits = torch.full((3, 4), -math.inf)
    logits[[0, 1, 2], [2, 0, 3]] = 0.0
    assert sample_next(logits).tolist() == [2, 0, 3]


def test_rows_of_equal_logits_are_sampled_independently():
    assert len(set(sample_next(torch.zeros(20, 1000), generator=seeded()).tolist())) > 10


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (1 - 2**-24, 3)])  # torch.rand returns 0 but never 1
def test_extreme_random_numbers_select_the_first_and_last_possible_token(monkeypatch, number, token):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, number))
    assert sample_next(torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).log()).tolist() == [token]


@pytest.mark.parametrize("rules", [{}, {"temperature": 0.0}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.9}])
def test_logits_that_are_not_finite_are_rejected(rules):
    with pytest.raises(StoryLLMError, match="not finite"):
        sample_next(torch.full((2, 5), math.nan), **rules)


# The same rules on random logits

LARGEST = torch.finfo(torch.float32).max
LOGIT = st.one_of(
    st.integers(-2, 2).map(float),  # ties
    st.floats(-30, 30, width=32),
    st.floats(-LARGEST, LARGEST, width=32),
    st.just(-math.inf),  # an impossible token
)
TEMPERATURE = st.one_of(st.sampled_from([0, 0.0, 1, 1.0, 1e-30, 1e30]), st.floats(0.05, 20))
TOP_K = st.none() | st.integers(1, 14) | st.integers(15, 500)
TOP_P = st.one_of(st.none(), st.sampled_from([1, 0.5, 0.25, 1e-30, 1 - 1e-9]), st.floats(0.001, 1))
PROPERTY = settings(
    max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@st.composite
def random_logits(draw):
    """(rows, vocab_size) logits of any kind, with at least one finite logit in each row."""
    if draw(st.booleans()):  # like a model's: too many to draw one by one
        shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 400)))
        logits = torch.randn(shape, generator=seeded(draw(st.integers(0, 999))))
        logits *= draw(st.sampled_from([0.0, 0.1, 3.0, 20.0]))
        return logits.round() if draw(st.booleans()) else logits
    size = draw(st.integers(1, 12))
    row = st.lists(LOGIT, min_size=size, max_size=size).filter(lambda row: max(row) > -math.inf)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))


def assert_follows_the_rules(logits, probs, temperature, top_k, top_p):
    """Compares `probs` with the rules, computed naively in double precision."""
    assert min(probs) >= 0
    assert math.fsum(probs) == pytest.approx(1, abs=1e-5)
    kept = [token for token, probability in enumerate(probs) if probability > 0]
    if temperature == 0:
        assert [logits[token] for token in kept] == [max(logits)]
        return
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    likeliest = sorted(weights, reverse=True)[:top_k]
    likeliest = [weight / math.fsum(likeliest) for weight in likeliest]
    # Probabilities between these bounds may or may not round to 0 in float32.
    fewest, most = sum(p > 1e-34 for p in likeliest), sum(p > 1e-47 for p in likeliest)
    if top_p is not None and top_p < 1:
        # The cumulative sum is rounded: a set that holds top_p up to 1e-5 may count as either.
        sums = list(itertools.accumulate(likeliest))
        fewest = 1 + sum(held < top_p - 1e-5 for held in sums[:-1])
        most = min(most, 1 + sum(held < top_p + 1e-5 for held in sums[:-1]))
    assert fewest <= len(kept) <= most
    dropped = [weight for token, weight in enumerate(weights) if token not in kept]
    assert min(weights[token] for token in kept) >= max(dropped, default=0) * (1 - 1e-4)
    total = math.fsum(weights[token] for token in kept)
    for token in kept:
        assert probs[token] == pytest.approx(weights[token] / total, rel=1e-4, abs=1e-9)


@PROPERTY
@given(random_logits(), TEMPERATURE, TOP_K, TOP_P)
def test_probabilities_follow_the_rules(logits, temperature, top_k, top_p):
    probs = next_token_probs(logits, temperature, top_k, top_p)
    assert (probs.shape, probs.dtype) == (logits.shape, torch.float32)
    for row, row_probs in zip(logits.tolist(), probs.tolist(), strict=True):
        assert_follows_the_rules(row, row_probs, temperature, top_k, top_p)


@PROPERTY
@given(random_logits(), TEMPERATURE, TOP_K, TOP_P)
def test_rows_do_not_affect_each_other(logits, temperature, top_k, top_p):
    batch = (
        next_token_probs(logits, temperature, top_k, top_p).sort().values
    )  # which of several ties is kept may differ
    for row, probs in zip(logits, batch, strict=True):
        alone = next_token_probs(row, temperature, top_k, top_p).sort().values
        torch.testing.assert_close(probs, alone, rtol=1e-5, atol=1e-9)


@PROPERTY
@given(random_logits(), TOP_K.filter(bool))
def test_top_k_keeps_exactly_k_tokens_of_random_logits(logits, top_k):
    kept = (next_token_probs(logits.clamp(-40, 40), top_k=top_k) > 0).sum(-1)  # clamped: none rounds to 0
    assert kept.tolist() == [min(top_k, logits.size(-1))] * len(logits)


@PROPERTY
@given(st.integers(0, 8), st.data())
def test_top_p_of_a_uniform_distribution_keeps_the_exact_number(power, data):
    """Sums of 2**-power are exact, so the smallest set is known to the token."""
    size = 2**power
    kept = data.draw(st.integers(1, size))
    less = data.draw(st.sampled_from([0, 1e-3, 0.5, 0.999]))
    assert (next_token_probs(torch.zeros(size), top_p=(kept - less) / size) > 0).sum() == kept


@PROPERTY
@given(random_logits(), st.floats(0, allow_infinity=False), TOP_K, st.floats(0, 1, exclude_min=True))
@example(torch.tensor([[0.0, 1.0]]), 1.0, None, 1e-46)  # 0 in float32
@example(torch.tensor([[3e38, 0.0]]), 0.5, None, 1.0)
@example(torch.tensor([[-math.inf, 0.0]]), 1e39, None, 1.0)
def test_extreme_parameters_give_probabilities(logits, temperature, top_k, top_p):
    probs = next_token_probs(logits, temperature, top_k, top_p)
    assert (probs >= 0).all()
    assert probs.sum(-1).tolist() == pytest.approx([1] * len(logits), abs=1e-5)
    ids = sample_next(logits, temperature, top_k, top_p, seeded())
    assert (probs.gather(-1, ids[:, None]) > 0).all()


@PROPERTY
@given(random_logits(), TEMPERATURE, TOP_K, TOP_P, st.integers(0, 2**63 - 1))
def test_impossible_tokens_are_never_sampled_and_a_seed_repeats(logits, temperature, top_k, top_p, seed):
    probs = next_token_probs(logits, temperature, top_k, top_p)
    generators = seeded(seed), seeded(seed)
    for _ in range(5):
        ids, again = (sample_next(logits, temperature, top_k, top_p, generator) for generator in generators)
        assert (probs.gather(-1, ids[:, None]) > 0).all()
        assert torch.equal(ids, again)


@PROPERTY
@given(random_logits(), TEMPERATURE, TOP_K, TOP_P, st.sampled_from([0.0, 1 - 2**-24]) | st.floats(0, 1 - 2**-24))
@example(torch.tensor([[-math.inf, 0.0, -math.inf]]), 1.0, None, None, 0.0)
@example(torch.tensor([[-math.inf, 0.0, -math.inf]]), 1.0, None, None, 1 - 2**-24)
def test_no_random_number_selects_an_impossible_token(logits, temperature, top_k, top_p, number):
    probs = next_token_probs(logits, temperature, top_k, top_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, dtype=torch.float32, **_: torch.full(shape, number, dtype=dtype))
        ids = sample_next(logits, temperature, top_k, top_p)
    assert (probs.gather(-1, ids[:, None]) > 0).all()
