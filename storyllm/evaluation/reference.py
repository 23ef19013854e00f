"""How much a completion has in common with the real ending: BLEU, chrF and ROUGE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import missing_extra
from .vocabulary import words


def ngrams(items: Sequence[Any], n: int) -> Counter[tuple[Any, ...]]:
    """The n-grams of a sequence and how often each occurs."""
    return Counter(zip(*(items[i:] for i in range(n)), strict=False))


def rouge_n(completion: str, reference: str, n: int) -> float:
    """ROUGE-N: the F1 score of the words' n-grams that both texts have, each as often as in both (Lin 2004)."""
    found, expected = ngrams(words(completion), n), ngrams(words(reference), n)
    return _f1((found & expected).total(), found.total(), expected.total())


def rouge_l(completion: str, reference: str) -> float:
    """ROUGE-L: the F1 score of the longest common subsequence of words (Lin 2004)."""
    found, expected = words(completion), words(reference)
    lengths = [0] * (len(expected) + 1)  # of the subsequences of the words so far and the first j expected words
    for word in found:
        diagonal = 0
        for j, other in enumerate(expected, 1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if word == other else max(lengths[j], lengths[j - 1])
    return _f1(lengths[-1], len(found), len(expected))


def _f1(matches: int, found: int, expected: int) -> float:
    return 2 * matches / (found + expected) if found + expected else 0.0


class SacreBLEU:
    """BLEU (Papineni et al. 2002) and chrF (Popović 2015) by sacrebleu (Post 2018), from 0 to 100.

    Raises StoryLLMError if sacrebleu is not installed.
    """

    def __init__(self) -> None:
        try:
            from sacrebleu.metrics import BLEU, CHRF
        except ImportError as error:
            raise missing_extra("judge", "sacrebleu", "judge") from error
        self._bleu = BLEU(effective_order=True)  # orders that a short text does not have do not count
        self._chrf = CHRF(references=[[""]])
        self.signatures = {
            "BLEU": str(BLEU(references=[[""]]).get_signature()),
            "chrF": f"{self._chrf.get_signature()} (mean over stories)",
        }

    def bleu_counts(self, completion: str, reference: str) -> list[int]:
        """What a story adds to BLEU: matching and all 1- to 4-grams, the length of completion and reference (10,)."""
        score = self._bleu.sentence_score(completion, [reference])
        return [*score.counts, *score.totals, score.sys_len, score.ref_len]

    def bleu(self, sums: np.ndarray) -> float:
        """Corpus BLEU of several stories, from the sums of their counts."""
        correct, total, lengths = np.split(sums, [4, 8])
        return self._bleu.compute_bleu(correct.tolist(), total.tolist(), *lengths, smooth_method="exp").score

    def chrf(self, completion: str, reference: str) -> float:
        """chrF of one story: the F2 score of the 1- to 6-grams of its characters."""
        return self._chrf.sentence_score(completion, [reference]).score

    def self_bleu(self, texts: Sequence[str]) -> list[float]:
        """BLEU of each text with all other texts as references (Zhu et al. 2018). High means that texts are alike."""
        others = [[*texts[:i], *texts[i + 1 :]] for i in range(len(texts))]
        return [self._bleu.sentence_score(text, rest).score for text, rest in zip(texts, others, strict=True)]
