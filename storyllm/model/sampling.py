"""From logits to probabilities to the next token, as pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import StoryLLMError, plain_number, shown


def check_sampling(
    temperature: float, top_k: int | None, top_p: float | None
) -> tuple[float, int | None, float | None]:
    """The sampling parameters, as Python numbers. Raises StoryLLMError if one is invalid."""
    temperature, top_k, top_p = map(plain_number, (temperature, top_k, top_p))
    if type(temperature) not in (int, float) or not 0 <= temperature < math.inf:
        raise StoryLLMError(f"temperature is {shown(temperature)}, must be 0 (greedy) or greater")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise StoryLLMError(f"top_k is {shown(top_k)}, must be an integer of at least 1, or None")
    if top_p is not None and (type(top_p) not in (int, float) or not 0 < top_p <= 1):
        raise StoryLLMError(f"top_p is {shown(top_p)}, must be greater than 0 and at most 1, or None")
    return temperature, top_k, top_p


def next_token_probs(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution of the next token: (..., vocab_size) logits to (..., vocab_size) float32 probabilities.

    The parameters apply in this order:
    - `temperature` divides the logits; 0 selects the most likely token (greedy);
    - `top_k` keeps exactly the k most likely tokens, even with ties (Fan et al. 2018);
    - `top_p` keeps the smallest set of most likely tokens with at least that probability (Holtzman et al. 2020).

    Raises StoryLLMError if a parameter is invalid.
    """
    temperature, top_k, top_p = check_sampling(temperature, top_k, top_p)
    probs, ids = _filtered_probs(logits, temperature, top_k, top_p)
    probs = probs / probs.sum(-1, keepdim=True)
    return probs if ids is None else torch.zeros_like(logits, dtype=torch.float32).scatter(-1, ids, probs)


def _filtered_probs(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor | None]:
    """Unnormalized probabilities of the remaining tokens and their ids, (..., k) each.

    The ids are None if all tokens remain, in the order of the vocabulary.
    """
    logits, ids = logits.float(), None
    if temperature == 0:
        largest, ids = logits.max(-1, keepdim=True)
        return torch.where(largest.isnan(), largest, 1.0), ids
    if temperature != 1:
        # Subtracting the maximum and limiting the temperature keep the quotient within float32.
        logits = (logits - logits.max(-1, keepdim=True).values) / min(max(temperature, 1e-30), 1e30)
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k, dim=-1)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        if ids is None:
            # Tokens below (1 - top_p) / V together hold less than 1 - top_p, so only the others need sorting. Half of
            # that allows for rounding. (On a GPU, counting them synchronizes.)
            likely = probs >= 0.5 * (1 - top_p) / probs.size(-1)
            probs, ids = probs.topk(max(1, int(likely.sum(-1).max())), dim=-1)
        # Keep a token if those before it hold less than top_p, so the first is always kept.
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= max(top_p, 1e-30), 0.0)
    return probs, ids


def sample_next(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Samples the next token of each row from `next_token_probs`: (B, vocab_size) logits to (B,) ids.

    Inverse transform sampling: one uniform number per row, looked up in the cumulative sum of the probabilities.
    Raises StoryLLMError on a CPU if the logits are not finite.
    """
    probs, ids = _filtered_probs(logits, temperature, top_k, top_p)
    # On a CPU, cumsum accumulates in float64 anyway.
    sums = probs.cumsum(-1, dtype=torch.float64 if probs.device.type == "cuda" else torch.float32)
    if sums.device.type == "cpu" and not sums[:, -1].isfinite().all():  # on a GPU this would synchronize
        raise StoryLLMError("the model's logits are not finite (its weights contain NaN); load another checkpoint")
    point = torch.rand(len(sums), 1, dtype=sums.dtype, device=sums.device, generator=generator) * sums[:, -1:]
    chosen = torch.searchsorted(sums, point, right=True)  # (B, 1): the first cumulative sum greater than the point
    chosen = chosen.clamp(max=sums.size(-1) - 1)  # with NaN, a GPU would otherwise index out of range
    return (chosen if ids is None else ids.gather(-1, chosen)).squeeze(1)
