"""Words, sentences and readability."""

import math
from collections import Counter

import pytest

from storyllm.evaluation.vocabulary import (
    common_words,
    readability_counts,
    readability_grade,
    whole_sentences,
    word_counts,
    words,
)


def test_words_are_letters_in_lower_case():
    assert (
        words("Zoë's dog didn't eat 12 pies—it's full! O’Neil") == "zoë's dog didn't eat pies it's full o’neil".split()
    )


@pytest.mark.parametrize(
    ("completion", "sentences"),
    [
        (" went home. He was happy! They", ["He was happy!"]),
        (' went home. "Why?" asked Tom. The end', ['"Why?" asked Tom.']),
        (' said hello. "I am Tom." He sat... Then he slept.', ['"I am Tom."', "He sat...", "Then he slept."]),
        (" never ends", []),
        ("", []),
    ],
)
def test_whole_sentences_are_without_the_first_and_an_unfinished_last(completion, sentences):
    assert whole_sentences(completion) == sentences


def test_common_and_unknown_words_by_hand():
    frequencies = Counter({"the": 9, "dog": 5, "ran": 1})
    assert word_counts("The dog ran to the moon.", frequencies, frozenset({"the", "dog"})) == (3, 2, 6)


def test_common_words_are_the_thousand_most_frequent():
    frequencies = Counter({f"word{i}": 2_000 - i for i in range(1_500)})
    assert common_words(frequencies) == {f"word{i}" for i in range(1_000)}


def test_readability_by_hand():
    counts = readability_counts(["They played chess.", "Nobody won it."])
    assert counts == (4 + 6 + 5 + 6 + 3 + 2, 6, 2)
    assert readability_grade(*counts) == pytest.approx(4.71 * 26 / 6 + 0.5 * 6 / 2 - 21.43)
    assert math.isnan(readability_grade(0, 0, 0))
