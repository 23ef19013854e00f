"""k-grams, the longest copied span and the nearest story."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storyllm.evaluation import novelty
from storyllm.evaluation.novelty import MAX_K, Copies, CopySearch, story_chunks

END = 9


def search(stories, texts, chunk=1 << 20):
    ids = np.array([i for story in stories for i in (*story, END)], np.uint16)
    found = CopySearch(texts, END)
    for position, part in story_chunks(ids, END, chunk):
        found.read(part, position)
    return found.results()


def expected(stories, text):
    """The same from its definition. The nearest story is None if no story shares a bigram."""

    def grams(ids, k):
        return [tuple(ids[i : i + k]) for i in range(len(ids) - k + 1)]

    def occurs(gram):
        return any(gram in grams(story, len(gram)) for story in stories)

    found = tuple(sum(map(occurs, grams(text, k))) for k in range(1, MAX_K + 1))
    longest = max((k for k in range(1, len(text) + 1) if any(map(occurs, grams(text, k)))), default=0)
    bigrams, nearest, best, position = set(grams(text, 2)), (0, 0), 0, 0
    for story in stories:
        shared = len(bigrams & set(grams(story, 2)))
        if shared > best:
            best, nearest = shared, (position, position + len(story))
        position += len(story) + 1
    total = tuple(max(0, len(text) - k + 1) for k in range(1, MAX_K + 1))
    return Copies(found, total, longest, nearest, best / len(bigrams) if bigrams else 0.0)


def test_copies_by_hand():
    (copies,) = search([[1, 2, 3, 4], [5, 1, 2, 3]], [[1, 2, 3, 7, 5]])
    assert copies.found[:4] == (4, 2, 1, 0)  # 1 2 3 5, 12 23, 123
    assert copies.total[:6] == (5, 4, 3, 2, 1, 0)
    assert copies.longest == 3
    assert (copies.nearest, copies.rouge_2) == ((0, 4), 2 / 4)  # of two equally near stories, the first


def test_a_span_does_not_reach_into_the_next_story():
    (copies,) = search([[1, 2], [3, 4]], [[1, 2, 3, 4]])
    assert (copies.longest, copies.found[1], copies.rouge_2) == (2, 2, pytest.approx(1 / 3))


STORIES = st.lists(st.lists(st.integers(0, 3), max_size=14), min_size=1, max_size=6)
TEXTS = st.lists(st.lists(st.integers(0, 4), max_size=14), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(STORIES, TEXTS, st.sampled_from([1, 5, 1 << 20]))
def test_copies_agree_with_their_definition_whatever_the_chunks(stories, texts, chunk):
    for found, text in zip(search(stories, texts, chunk), texts, strict=True):
        correct = expected(stories, text)
        assert found.rouge_2 == pytest.approx(correct.rouge_2)
        assert dataclasses.replace(found, rouge_2=0) == dataclasses.replace(correct, rouge_2=0)


def test_long_copies_are_found(monkeypatch):
    rng = np.random.default_rng(0)
    story = rng.integers(0, 8, 400).tolist()
    (copies,) = search([[0] * 50, story, [1] * 50], [story[100:260]])
    assert (copies.longest, copies.nearest, copies.rouge_2) == (160, (51, 451), 1)
    monkeypatch.setattr(novelty, "FILTER_BITS", 2)  # collisions in the filter must not matter
    assert search([[0] * 50, story, [1] * 50], [story[100:260]]) == [copies]


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_chunks_hold_whole_stories_in_order(size):
    ids = np.array([1, 2, END, END, 3, 4, 5, 6, 7, 8, END, 1, END])
    chunks = list(story_chunks(ids, END, size))
    assert np.concatenate([chunk for _, chunk in chunks]).tolist() == ids.tolist()
    assert [position for position, _ in chunks] == np.cumsum([0, *(len(chunk) for _, chunk in chunks[:-1])]).tolist()
    assert all(chunk[-1] == END for _, chunk in chunks)
