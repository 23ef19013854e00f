"""Each rule of `next_token_probs`, on distributions small enough to check by eye."""

import math

import pytest
import torch

from storyllm import StoryLLMError, next_token_probs
from storyllm.sampling import draw

PROBS = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
LOGITS = PROBS.log() + 3.0  # softmax does not see the shift


def test_temperature_one_is_the_models_own_distribution():
    torch.testing.assert_close(next_token_probs(LOGITS), PROBS)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    expected = PROBS ** (1 / temperature)
    torch.testing.assert_close(next_token_probs(LOGITS, temperature), expected / expected.sum())


def test_temperature_zero_is_greedy_even_with_ties_and_other_rules():
    assert next_token_probs(LOGITS, 0.0).tolist() == [1, 0, 0, 0, 0]
    tied = next_token_probs(torch.zeros(2, 5), 0.0, top_k=3, top_p=0.5)
    assert tied.sum(-1).tolist() == [1, 1]
    assert (tied == 1).sum() == 2


def test_a_tiny_temperature_does_not_overflow():
    probs = next_token_probs(LOGITS * 1e3, 1e-30)
    assert probs.tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_top_k_keeps_exactly_k_in_proportion(top_k):
    expected = PROBS.clone()
    expected[top_k:] = 0
    torch.testing.assert_close(next_token_probs(LOGITS, top_k=top_k), expected / expected.sum())


def test_top_k_keeps_exactly_k_among_ties():
    probs = next_token_probs(torch.zeros(3, 10), top_k=4)
    assert (probs > 0).sum(-1).tolist() == [4, 4, 4]


def test_top_k_beyond_the_vocabulary_keeps_all():
    torch.testing.assert_close(next_token_probs(LOGITS, top_k=99), PROBS)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, 1), (0.499, 1), (0.501, 2), (0.74, 2), (0.76, 3), (0.96, 4), (0.98, 5), (1.0, 5)]
)
def test_top_p_keeps_the_smallest_set_that_holds_p(top_p, kept):
    expected = PROBS.clone()
    expected[kept:] = 0
    torch.testing.assert_close(next_token_probs(LOGITS, top_p=top_p), expected / expected.sum())


def test_top_p_works_whatever_the_order_of_the_tokens():
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(next_token_probs(LOGITS[order], top_p=0.8), next_token_probs(LOGITS, top_p=0.8)[order])


def test_top_p_looks_at_what_top_k_left():
    # Of the two that top_k leaves, the first holds two thirds: enough for 0.6, though not for 0.6 of everything.
    assert (next_token_probs(LOGITS, top_k=2, top_p=0.6) > 0).tolist() == [True, False, False, False, False]


def test_all_rules_together_sum_to_one():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 5
    for temperature, top_k, top_p in [(1.0, None, None), (0.7, 50, 0.9), (2.0, None, 0.01), (1.3, 7, None)]:
        probs = next_token_probs(logits, temperature, top_k, top_p)
        torch.testing.assert_close(probs.sum(-1), torch.ones(64))
        assert (probs >= 0).all()
        assert ((probs > 0).sum(-1) >= 1).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.1, math.inf, math.nan)),
        *(("top_k", value) for value in (0, -1, 2.5)),
        *(("top_p", value) for value in (0.0, -0.1, 1.1, math.nan)),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(StoryLLMError, match=f"^{field} is .*expected"):
        next_token_probs(LOGITS, **{field: value})


@pytest.mark.parametrize(
    "rules", [{}, {"temperature": 0.5}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.9}]
)
def test_what_is_drawn_follows_the_probabilities(rules):
    order = torch.tensor([3, 0, 4, 2, 1])
    drawn = draw(LOGITS[order].expand(20_000, 5), **rules, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000,)
    expected = next_token_probs(LOGITS[order], **rules)
    torch.testing.assert_close(drawn.bincount(minlength=5) / 20_000, expected, atol=0.012, rtol=0)
    assert not (drawn.bincount(minlength=5)[expected == 0]).any()


def test_each_row_draws_by_itself():
    logits = torch.full((3, 4), -math.inf)
    logits[[0, 1, 2], [2, 0, 3]] = 0.0
    assert draw(logits).tolist() == [2, 0, 3]


def test_the_ends_of_the_uniform_number_draw_the_first_and_the_last_token(monkeypatch):
    for point, expected in [(0.0, 1), (1 - 2**-24, 3)]:  # torch.rand gives 0 but never 1
        monkeypatch.setattr(torch, "rand", lambda *shape, point=point, **_: torch.full(shape, point))
        probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
        assert draw(probs.log()).tolist() == [expected]


def test_top_p_of_a_large_vocabulary_sorts_only_what_it_needs(monkeypatch):
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) * 6
    sorted_tokens = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda t, k, dim: sorted_tokens.append(k) or topk(t, k, dim=dim))
    probs = next_token_probs(logits, top_p=0.9)
    assert sorted_tokens[0] < 1000
    for row, everything in zip(probs, logits.softmax(-1), strict=True):
        descending = everything.sort(descending=True).values
        kept = int((descending.cumsum(0) < 0.9).sum()) + 1
        torch.testing.assert_close(row.sort(descending=True).values[:kept], descending[:kept] / descending[:kept].sum())
        assert (row > 0).sum() == kept
