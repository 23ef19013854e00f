"""Figures of colored text: what they say, read back from the figure."""

from __future__ import annotations

import math
import re

import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle

import storyllm
from storyllm import StoryLLMError, plot_nearest_story, plot_surprisal, plot_tokens
from storyllm.plots.text import COLUMNS, COPIED

STORY = "One day, Tom went to the big red barn to find his dog.\n\nThe dog was asleep. Tom laughed and sat down."


@pytest.fixture
def storyteller(tiny_run):
    return storyllm.load(tiny_run / "last.pt", device="cpu")


def placed(axes) -> list[tuple[int, float, str]]:
    """(row, column, text) of each piece of text, in reading order."""
    found = [(int(text.get_position()[1]), text.get_position()[0], text.get_text()) for text in axes.texts]
    return sorted(piece for piece in found if piece[2])


def highlighted(axes, color) -> list[str]:
    """The pieces of text on a background of that color."""
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle) and to_hex(patch.get_facecolor()) == color]
    corners = {(int(box.get_y()), box.get_x()) for box in boxes}
    return [text for row, column, text in placed(axes) if (row, column) in corners]


def test_tokens_are_shown_in_order_with_their_ids(storyteller):
    tokenizer = storyteller.tokenizer
    (axes,) = plot_tokens(STORY, tokenizer).axes
    pieces = [text for _, _, text in placed(axes)]
    ids = [int(text) for text in pieces if text.isdigit()]
    assert sorted(ids) == sorted(tokenizer.encode_ordinary(STORY))
    letters = "".join(text for text in pieces if not text.isdigit())
    assert sorted(letters.replace(" ", "")) == sorted(STORY.replace(" ", "").replace("\n", ""))
    assert f"{len(ids)} tokens" in axes.get_title(loc="left")


def test_lines_have_a_maximum_length_and_break_at_newlines(storyteller):
    text = "a word " * 40 + "\n" + "x" * 250
    (axes,) = plot_surprisal(storyteller, text).axes
    pieces = placed(axes)
    assert all(column + len(piece) <= COLUMNS for _, column, piece in pieces)
    joined = "".join(piece for _, _, piece in pieces)
    assert joined.replace(" ", "") == text.replace(" ", "").replace("\n", "")
    row_of_x = [row for row, _, piece in pieces if "x" in piece]
    assert min(row_of_x) > max(row for row, _, piece in pieces if "w" in piece)


def test_surprisal_is_that_of_score_and_darker_where_higher(storyteller):
    (axes,) = plot_surprisal(storyteller, STORY).axes
    score = storyteller.score(STORY)
    bits = [-log_prob / math.log(2) for log_prob in score.log_probs]
    assert f"{sum(bits) / len(bits):.2f} bits per token" in axes.get_title(loc="left")
    colors = [sum(to_rgb(patch.get_facecolor())) for patch in axes.patches]
    assert len(colors) >= len(bits)
    darkest = sorted({to_hex(patch.get_facecolor()): 0 for patch in axes.patches}, key=lambda c: sum(to_rgb(c)))[0]
    most_surprising = score.tokens[max(range(len(bits)), key=bits.__getitem__)]
    assert most_surprising.strip() in [text.strip() for text in highlighted(axes, darkest)]


def test_the_nearest_story_shares_the_highlighted_phrases():
    others = [
        "A cat sat on a mat and was happy all day long.",
        "Once, Tom WENT to the big, red barn to find a cow. It was not there.",
        "The dog was asleep.",
    ]
    first, second = plot_nearest_story(STORY, others).axes
    shared = ["Tom", "went", "to", "the", "big", "red", "barn", "to", "find"]
    assert [re.sub(r"\W", "", word) for word in highlighted(first, COPIED.lower())] == shared
    assert [re.sub(r"\W", "", word).lower() for word in highlighted(second, COPIED.lower())] == [
        word.lower() for word in shared
    ]
    assert first.get_title(loc="left").startswith(f"the given story: {len(shared)} of {len(STORY.split())} words")


def test_punctuation_between_words_does_not_hide_a_phrase():
    first, _ = plot_nearest_story("one two - three four five six seven", ["One two three four; five six."]).axes
    assert len(highlighted(first, COPIED.lower())) == 7  # six words and the dash


def test_without_a_shared_phrase_nothing_is_highlighted():
    first, second = plot_nearest_story(STORY, ["a completely different story about a fox"]).axes
    assert not first.patches
    assert not second.patches


def test_no_other_stories_are_an_error():
    with pytest.raises(StoryLLMError, match="no stories were given"):
        plot_nearest_story(STORY, [])


@pytest.mark.parametrize("text", ["", "\n\n", "日本語 $x^2$ \x1b[31m \ud800".encode("utf-8", "replace").decode()])
def test_any_text_can_be_drawn_and_saved(storyteller, tmp_path, text):
    plot_tokens(text, storyteller.tokenizer, tmp_path / "tokens.svg")
    plot_nearest_story(text, [text], tmp_path / "nearest.svg")
    assert (tmp_path / "tokens.svg").stat().st_size > 0
