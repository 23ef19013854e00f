"""How varied the stories of a model are, and how much each repeats itself."""

from __future__ import annotations

import gzip
from collections.abc import Sequence

from .reference import ngrams
from .vocabulary import words


def distinct_n(texts: Sequence[str], n: int, vocabulary_size: int) -> float:
    """Expectation-adjusted distinct-n (Liu et al. 2022): the number of different n-grams over the expected number.

    Expected is what as many n-grams drawn uniformly would have: V (1 - ((V - 1) / V)^C), for C n-grams of V possible
    ones, `vocabulary_size`^n. So the value depends less on the length of the texts than distinct-n (Li et al. 2016),
    which divides by C. NaN without n-grams.
    """
    found = sum((ngrams(words(text), n) for text in texts), start=ngrams((), n))
    possible, total = vocabulary_size**n, found.total()
    expected = possible * (1 - ((possible - 1) / possible) ** total)
    return len(found) / expected if expected else float("nan")


def compression_ratio(texts: Sequence[str]) -> float:
    """The size of the texts over their size compressed by gzip (Shaib et al. 2024). High means repetition."""
    data = "\n".join(texts).encode()
    return len(data) / len(gzip.compress(data, mtime=0))


def repeated_ngrams(text: str, n: int = 4) -> tuple[int, int]:
    """The number of a text's n-grams that occurred in it before, and of all (seq-rep-n, Welleck et al. 2020)."""
    found = ngrams(words(text), n)
    return found.total() - len(found), found.total()
