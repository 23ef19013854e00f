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
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Largest logit at 0 first, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.size(-1):
        largest, ids = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, ids, largest)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        largest, ids = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays while those before it hold less than top_p; the first always does.
        largest = largest.masked_fill(largest.cumsum(-1) - largest >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, ids, largest)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def sample(probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws one token id for each row: (B, vocab_size) probabilities to (B,) ids."""
    return torch.multinomial(probs, num_samples=1, generator=generator).squeeze(1)
