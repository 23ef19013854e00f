"""Logits -> probabilities -> next token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import StoryLLMError


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises StoryLLMError unless the three make sense together or alone."""
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf:
        raise StoryLLMError(f"temperature is {temperature}, expected 0 (greedy) or more; 1.0 is the model's own")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise StoryLLMError(f"top_k is {top_k}, expected a whole number of at least 1, or None for all tokens")
    if top_p is not None and (not isinstance(top_p, (int, float)) or not 0 < top_p <= 1):
        raise StoryLLMError(f"top_p is {top_p}, expected a share over 0 and at most 1, or None for all tokens")


def next_token_probs(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The probabilities to draw the next token from: (..., vocab_size) logits to (..., vocab_size) float32.

    The rules apply in this order, each on what the one before left:
    - `temperature` divides the logits; 0 puts all the probability on the largest (greedy);
    - `top_k` keeps exactly the k likeliest tokens, ties or not (Fan et al. 2018);
    - `top_p` keeps the smallest set of likeliest tokens that holds at least that probability (Holtzman et al. 2020).

    Raises StoryLLMError for a value out of range.
    """
    check_sampling(temperature, top_k, top_p)
    probs, ids = _kept(logits, temperature, top_k, top_p)
    probs = probs / probs.sum(-1, keepdim=True)
    return probs if ids is None else torch.zeros_like(logits, dtype=torch.float32).scatter(-1, ids, probs)


def _kept(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor | None]:
    """Probabilities, not summing to one, of the tokens that the rules leave, and their ids: (..., k) both.

    No ids stand for the whole vocabulary in its order.
    """
    logits, ids = logits.float(), None
    if temperature == 0:
        largest, ids = logits.max(-1, keepdim=True)
        return torch.where(largest.isnan(), largest, 1.0), ids
    if temperature != 1:
        # From the largest down, so that no quotient is too large for float32; the limits are greedy and even enough.
        logits = (logits - logits.max(-1, keepdim=True).values) / min(max(temperature, 1e-30), 1e30)
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k, dim=-1)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        if ids is None:
            # Tokens under (1 - top_p) / V hold less than 1 - top_p together, so the others hold top_p: only they need
            # sorting (a GPU is waited for to say how many). Half of it leaves room for rounding.
            likely = probs >= 0.5 * (1 - top_p) / probs.size(-1)
            probs, ids = probs.topk(max(1, int(likely.sum(-1).max())), dim=-1)
        # A token stays while those before it hold less than top_p; the first always does.
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= max(top_p, 1e-30), 0.0)
    return probs, ids


def draw(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws the next token of each row by `next_token_probs`: (B, vocab_size) logits to (B,) ids.

    One uniform number a row points into the running sum of the probabilities, among what the rules leave. On a CPU,
    raises StoryLLMError where the logits are not numbers.
    """
    probs, ids = _kept(logits, temperature, top_k, top_p)
    # On a CPU, cumsum adds up in float64 by itself.
    sums = probs.cumsum(-1, dtype=torch.float64 if probs.device.type == "cuda" else torch.float32)
    if sums.device.type == "cpu" and not sums[:, -1].isfinite().all():  # looking would mean waiting for a GPU
        raise StoryLLMError("the model gives no probabilities (its weights hold NaN): load another checkpoint")
    point = torch.rand(len(sums), 1, dtype=sums.dtype, device=sums.device, generator=generator) * sums[:, -1:]
    chosen = torch.searchsorted(sums, point, right=True)  # (B, 1): the first whose running sum is beyond the point
    chosen = chosen.clamp(max=sums.size(-1) - 1)  # a GPU must not be asked for an id that is not there, even by NaN
    return (chosen if ids is None else ids.gather(-1, chosen)).squeeze(1)
