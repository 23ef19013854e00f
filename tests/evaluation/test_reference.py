"""BLEU, chrF and ROUGE."""

import itertools

import numpy as np
import pytest
from helpers import random_stories
from hypothesis import given, settings
from hypothesis import strategies as st

from storyllm import StoryLLMError
from storyllm.evaluation.reference import SacreBLEU, ngrams, rouge_l, rouge_n

A, B = "the cat sat on the mat", "the cat lay on the red mat"


@pytest.fixture(scope="module")
def metrics():
    pytest.importorskip("sacrebleu", reason='sacrebleu is not installed (pip install "storyllm[judge]")')
    return SacreBLEU()


def test_ngrams_are_counted():
    assert ngrams("abab", 2) == {("a", "b"): 2, ("b", "a"): 1}
    assert ngrams("a", 2) == {}


def test_rouge_2_by_hand():
    # "the cat" and "on the" are common: 2 of 5 and of 6 bigrams.
    assert rouge_n(A, B, 2) == pytest.approx(2 * 2 / (5 + 6))
    assert rouge_n("a b a b", "a b", 2) == pytest.approx(2 * 1 / (3 + 1))  # "a b" counts once, as in the reference


def test_rouge_l_by_hand():
    # "the cat on the mat": 5 words of 6 and of 7.
    assert rouge_l(A, B) == pytest.approx(2 * 5 / (6 + 7))


@pytest.mark.parametrize("score", [lambda a, b: rouge_n(a, b, 2), rouge_l])
def test_rouge_of_equal_different_and_empty_texts(score):
    assert score(A, A.upper() + "!") == 1
    assert score(A, "dogs bark loudly") == score("", A) == score(A, "") == score("", "") == 0


def longest_common_subsequence(a, b):
    """By trying all subsequences of the shorter text."""
    short, long = sorted((a, b), key=len)
    for length in range(len(short), 0, -1):
        for part in itertools.combinations(short, length):
            rest = iter(long)
            if all(word in rest for word in part):
                return length
    return 0


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_rouge_l_agrees_with_trying_all_subsequences(a, b):
    expected = 2 * longest_common_subsequence(a, b) / (len(a) + len(b)) if a or b else 0
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


def test_bleu_by_hand(metrics):
    # 1-grams 5/6, 2-grams 2/5; 3- and 4-grams have no match: 1 / (2 x 4) and 1 / (4 x 3) by smoothing.
    counts = metrics.bleu_counts(A, B)
    assert counts == [5, 2, 0, 0, 6, 5, 4, 3, 6, 7]
    precision = (5 / 6 * 2 / 5 * 1 / 8 * 1 / 12) ** 0.25
    assert metrics.bleu(np.array(counts)) == pytest.approx(100 * np.exp(1 - 7 / 6) * precision)


def test_bleu_of_summed_counts_is_that_of_the_corpus(metrics):
    from sacrebleu.metrics import BLEU

    stories, others = random_stories(30), random_stories(30, seed=1)
    sums = np.sum([metrics.bleu_counts(*pair) for pair in zip(stories, others, strict=True)], axis=0)
    assert metrics.bleu(sums) == pytest.approx(BLEU().corpus_score(stories, [others]).score)


def test_an_empty_completion_has_nothing_in_common(metrics):
    assert metrics.bleu_counts("", B) == [0] * 9 + [7]
    assert metrics.bleu(np.array(metrics.bleu_counts("", B))) == metrics.chrf("", B) == 0
    assert metrics.self_bleu(["", A, B])[0] == 0


def test_chrf_is_that_of_sacrebleu(metrics):
    from sacrebleu import sentence_chrf

    assert metrics.chrf(A, B) == sentence_chrf(A, [B]).score
    assert metrics.chrf(A, A) == 100


def test_self_bleu(metrics):
    from sacrebleu import sentence_bleu

    assert metrics.self_bleu([A, A, A]) == pytest.approx([100] * 3)
    first, *_ = metrics.self_bleu([A, B, "a dog ran"])
    assert first == pytest.approx(sentence_bleu(A, [B, "a dog ran"], use_effective_order=True).score)


def test_signatures_name_the_settings(metrics):
    assert "tok:13a|smooth:exp|version:" in metrics.signatures["BLEU"]
    assert "nc:6|nw:0" in metrics.signatures["chrF"]


def test_without_sacrebleu_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    with pytest.raises(StoryLLMError, match=r'pip install "storyllm\[judge\]"'):
        SacreBLEU()
