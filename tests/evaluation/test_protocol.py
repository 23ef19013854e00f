"""Beginnings of held-out stories, and their completions."""

import re
import warnings

import pytest
from helpers import random_stories, stories_in
from hypothesis import given, settings
from hypothesis import strategies as st

import storyllm
from storyllm import StoryLLMError
from storyllm.data.synthetic import synthetic_stories
from storyllm.evaluation.protocol import (
    REAL,
    Beginning,
    Settings,
    choose_beginnings,
    complete,
    cut_in_sentence,
    first_words,
    real_stories,
    story_texts,
)

STORIES = list(synthetic_stories(0, "validation", 60))


def test_texts_are_those_of_the_stories(tiny_data):
    tokens = storyllm.open_token_file(tiny_data / "validation.bin")
    tokenizer = storyllm.load_tokenizer(tiny_data)
    assert story_texts(tokens, tokenizer) == stories_in(tiny_data / "validation.bin", tokenizer)


def test_a_story_is_cut_by_hand():
    story = "One two. " * 8 + "Here is a cat and it sat on a mat today. " + "Three four. " * 10
    # 47 words, so from word number 18 (from 0) on: "a" of "is a cat" is the first that is within a sentence.
    beginning = cut_in_sentence(story)
    assert beginning == Beginning(story[: story.index(" cat and")], story[story.index(" cat and") :])


def test_beginnings_end_within_a_sentence_and_after_40_percent_of_the_words():
    for story in STORIES:
        beginning = cut_in_sentence(story)
        assert beginning.text + beginning.ending == story
        assert re.search(r"\w\s+\w+$", beginning.text) and re.match(r"\s+\S", beginning.ending)
        assert 0.4 <= len(beginning.text.split()) / len(story.split()) <= 0.7


@pytest.mark.parametrize("story", ["", "Too short.", "word " * 39, "No. Sentence. Here. " * 20])
def test_a_story_that_is_too_short_or_has_no_place_is_not_cut(story):
    assert cut_in_sentence(story) is None


def test_beginnings_are_fixed_by_the_seed():
    chosen = choose_beginnings(STORIES, 10, seed=1)
    assert chosen == choose_beginnings(STORIES, 10, seed=1) != choose_beginnings(STORIES, 10, seed=2)
    assert len({beginning.text for beginning in chosen}) == 10
    assert chosen[:4] == choose_beginnings(STORIES, 4, seed=1)


def test_too_few_stories_are_an_error():
    with pytest.raises(StoryLLMError, match=r"60 of 61 validation stories.*must be 61; lower --beginnings"):
        choose_beginnings([*STORIES, "Too short."], 61, 0)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.text(" \nab.", max_size=30), st.integers(0, 9))
def test_first_words_are_a_prefix(text, count):
    cut = first_words(text, count)
    assert text.startswith(cut)
    assert cut.split() == text.split()[:count]


def test_real_stories_have_their_own_endings():
    (story,) = real_stories([Beginning("Once upon", " a time.")])
    assert (story.model, story.completion, story.compared, story.ended) == (REAL, " a time.", " a time.", True)


@pytest.fixture(scope="module")
def storyteller(tiny_run):
    return storyllm.load(tiny_run / "best_model_params.pt", "cpu")


def test_a_completion_is_what_generate_gives_with_its_seed(storyteller):
    beginning = cut_in_sentence(max(random_stories(20), key=len))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warnings of single stories are not shown
        story = complete(storyteller, "tiny", 3, beginning, Settings(max_new_tokens=90, temperature=0.9, seed=5))
    expected = storyteller.generate(beginning.text, max_new_tokens=90, temperature=0.9, seed=8)
    assert story.beginning + story.completion == expected
    assert (story.model, story.number, story.seed) == ("tiny", 3, 8)
    assert story.compared == first_words(story.completion, len(beginning.ending.split()))


def test_a_completion_knows_whether_it_ended(storyteller, monkeypatch):
    beginning = Beginning("One day", " Ada sang.")
    assert not complete(storyteller, "tiny", 0, beginning, Settings(max_new_tokens=3, temperature=0)).ended
    first = storyteller.generate(beginning.text, max_new_tokens=1, temperature=0)[len(beginning.text) :]
    (token,) = storyteller.tokenizer.encode_ordinary(first)
    monkeypatch.setattr(type(storyteller.tokenizer), "eot_token", token)  # the greedy choice now ends the story
    story = complete(storyteller, "tiny", 0, beginning, Settings(max_new_tokens=3, temperature=0))
    assert (story.ended, story.completion) == (True, "")


def test_ids_do_not_tell_the_model():
    beginning = Beginning("Once upon", " a time.")
    ids = {story.id for story in real_stories([beginning, beginning])}
    assert len(ids) == 2 and all(re.fullmatch("[0-9a-f]{16}", story_id) for story_id in ids)


@pytest.mark.parametrize("seed", [-1, 1.5, 2**63 - 50, None])
def test_the_seed_is_checked(seed):
    with pytest.raises(StoryLLMError, match=r"seed is .*, must be an integer from 0"):
        Settings(seed=seed)


@pytest.mark.parametrize("beginnings", [1, 0, -3, 2.5, "many"])
def test_the_number_of_beginnings_is_checked(beginnings):
    with pytest.raises(StoryLLMError, match=r"beginnings is .*, must be an integer of at least 2"):
        Settings(beginnings=beginnings)
