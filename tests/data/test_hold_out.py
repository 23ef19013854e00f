"""The validation split that is held out of a source: the usual stories of a large one, enough text of a small one."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator

import pytest
from helpers import random_stories
from hypothesis import given, settings
from hypothesis import strategies as st

from storyllm.data.formats import Piece
from storyllm.data.hold_out import MIN_VALIDATION_CHARACTERS, hold_out

BOOK = " ".join(random_stories(200))  # about 50,000 characters


def pieces_of(story: str, words: int) -> list[Piece]:
    """The story in pieces of some words."""
    found = re.split(r"(?=[ \n])", story)
    parts = ["".join(found[start : start + words]) for start in range(0, len(found), words)]
    return [(part, False) for part in parts[:-1]] + [(parts[-1], True)]


def splits(stories: list[str], fraction: float, words: int = 1_000_000) -> tuple[list[str], list[str]]:
    """The training and the validation stories, if each story comes in pieces of `words` words."""

    def read() -> Iterator[Piece]:
        return itertools.chain.from_iterable(pieces_of(story, words) for story in stories)

    found: dict[str, list[str]] = {}
    for split in ("train", "validation"):
        pieces = list(hold_out(read, split, fraction, "stories.txt"))
        assert not pieces or pieces[-1][1], "the last story does not end"
        text = "".join(text + "\0" * ends_story for text, ends_story in pieces)
        found[split] = text.split("\0")[:-1]
    return found["train"], found["validation"]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1 / 3, 0.5, 0.77, 0.999])
def test_a_large_source_holds_out_the_fraction_evenly_spaced(fraction: float) -> None:
    stories = [f"{i:04} {'x' * 1_000}" for i in range(1_000)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, validation = splits(stories, fraction)
    assert validation == [s for i, s in enumerate(stories) if int((i + 1) * fraction) > int(i * fraction)]
    assert sorted(train + validation) == stories


@pytest.mark.parametrize(
    ("lengths", "fraction", "held_out"),
    [
        ([300] * 40, 0.01, [4, 9, 14, 19, 24, 29, 34, 39]),  # a fifth of the text
        ([300] * 40, 0.1, [4, 9, 14, 19, 24, 29, 34, 39]),
        ([300] * 40, 0.25, [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]),  # as requested
        ([1_000] * 90, 0.01, [11, 22, 33, 44, 56, 67, 78, 89]),  # 8,000 characters
        ([100_000] * 3, 0.01, [2]),  # one story
        ([0] * 3, 0.01, [2]),
    ],
)
def test_a_small_source_holds_out_more_stories(lengths: list[int], fraction: float, held_out: list[int]) -> None:
    stories = [f"{i:02}".ljust(length, "x")[:length] for i, length in enumerate(lengths)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train, validation = splits(stories, fraction)
    assert validation == [stories[i] for i in held_out]
    assert train == [story for i, story in enumerate(stories) if i not in held_out]
    share = sum(map(len, validation)) / max(sum(lengths), 1)
    assert [str(w.message) for w in caught] == [
        f"stories.txt is small: {share:.1%} of the text ({len(held_out)} of {len(stories)} stories) is held out for "
        f"validation instead of {fraction:.1%}"
    ] * (share > fraction)


@pytest.mark.parametrize("words", [1, 100, 1_000_000])
@pytest.mark.parametrize(
    ("stories", "fraction", "characters"),
    [
        ([BOOK], 0.01, MIN_VALIDATION_CHARACTERS),
        ([BOOK[:2_000]], 0.01, 400),
        ([BOOK], 0.3, int(0.3 * len(BOOK))),
        ([BOOK, "The end."], 0.01, MIN_VALIDATION_CHARACTERS),  # the second story is too short
        (["Preface", BOOK], 0.01, MIN_VALIDATION_CHARACTERS),  # the second story is almost all of the text
    ],
)
@pytest.mark.filterwarnings("ignore:stories.txt is small")
def test_the_end_of_a_text_is_held_out_if_there_are_too_few_stories(
    stories: list[str], fraction: float, characters: int, words: int
) -> None:
    train, validation = splits(stories, fraction, words)
    assert characters <= len("".join(validation)) <= characters + 20
    assert "".join(train + validation) == "".join(stories)
    assert validation[0][0].isspace()  # no word is cut
    assert len(train + validation) == len(stories) + 1


def test_the_warning_for_a_book() -> None:
    with pytest.warns(UserWarning, match=r"20\.0% of the text \(its end\).* instead of 1\.0%$") as caught:
        splits([BOOK[:2_000]], 0.01)
    assert len(caught) == 1  # from one split only


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.text("ab \n", max_size=40), max_size=30), st.floats(0.001, 0.999), st.sampled_from([1, 5, 100]))
@pytest.mark.filterwarnings("ignore:stories.txt is small")
def test_no_text_is_lost_or_used_twice(stories: list[str], fraction: float, words: int) -> None:
    train, validation = splits(stories, fraction, words)
    total = sum(map(len, stories))
    assert sorted("".join(train + validation)) == sorted("".join(stories))
    assert len(stories) <= len(train + validation) <= len(stories) + 1
    if stories:
        assert validation
        assert len("".join(validation)) >= min(MIN_VALIDATION_CHARACTERS, total / 5)


def test_a_large_source_is_not_read_completely_to_decide() -> None:
    endless = (("x" * 1_000, True) for _ in itertools.count())
    assert next(hold_out(lambda: endless, "validation", 0.1, "stories.txt"))[1]
