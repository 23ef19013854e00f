"""The words of a text: how common and how long they are, and the length of its sentences."""

from __future__ import annotations

import re
from collections import Counter

COMMON_WORDS = 1_000  # the most frequent words of the training stories count as common

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
# A sentence ends at these marks, and quotes and brackets after them, before a capital letter or the end of the text.
SENTENCE = re.compile(r"\S.*?[.!?…]+[\"'”’)\]]*(?=\s+[\"'“‘(\[]*[A-Z]|\s*$)", re.DOTALL)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and digits; "don't" is one word."""
    return WORD.findall(text.lower())


def whole_sentences(completion: str) -> list[str]:
    """The sentences of a completion without the first, which its beginning started, and a last one without an end."""
    return SENTENCE.findall(completion)[1:]


def common_words(frequencies: Counter[str]) -> frozenset[str]:
    """The COMMON_WORDS most frequent words."""
    return frozenset(word for word, _ in frequencies.most_common(COMMON_WORDS))


def word_counts(text: str, frequencies: Counter[str], common: frozenset[str]) -> tuple[int, int, int]:
    """The number of a text's words that are in `common`, of those that are not in `frequencies`, and of all."""
    found = words(text)
    return sum(word in common for word in found), sum(word not in frequencies for word in found), len(found)


def readability_counts(sentences: list[str]) -> tuple[int, int, int]:
    """What `readability_grade` needs of some sentences: the number of letters, of words and of sentences."""
    found = words(" ".join(sentences))
    return sum(map(len, found)), len(found), len(sentences)


def readability_grade(letters: float, word_count: float, sentence_count: float) -> float:
    """The Automated Readability Index, about the school grade in the USA that can read a text. NaN without a sentence.

    4.71 letters / words + 0.5 words / sentences - 21.43 (Senter and Smith 1967). It needs no syllables, whose count
    is a guess for most words. 0 and less is below the first grade.
    """
    if not word_count or not sentence_count:
        return float("nan")
    return 4.71 * letters / word_count + 0.5 * word_count / sentence_count - 21.43
