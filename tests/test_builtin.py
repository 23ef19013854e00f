"""The built-in stories: the same for ever, all different, in plain correct English, and each about one thing."""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Iterator

import pytest

from storyllm import builtin
from storyllm.builtin import SHAPES, Noun, builtin_stories, builtin_story, choose, table, tell
from storyllm.config import StoryLLMError

NAMES = {name: he for he, names in builtin.NAMES.items() for name in names}
NAME = re.compile(rf"\b(?:{'|'.join(NAMES)})\b")


@pytest.fixture(scope="module")
def train() -> list[str]:
    return list(builtin_stories(0, "train", 20_000))


@pytest.fixture(scope="module")
def validation() -> list[str]:
    return list(builtin_stories(0, "validation", 1_000))


def told(shape: str) -> Iterator[tuple[str, str]]:
    """Stories of one shape, each with its hero's name."""
    for index in range(200):
        story = tell(random.Random(f"{shape}/{index}"), shape)
        yield story, NAME.search(story)[0]


def test_stories_never_change(train: list[str], validation: list[str]) -> None:
    digest = hashlib.sha256("\0".join(train[:1_000] + validation).encode()).hexdigest()
    assert digest == "59da78df755f741ce9b469266a41f472d5900aa22da5140b2db246bdbfe0b14a"
    assert builtin_story(0, "train", 7) == train[7] == tuple(builtin_stories(0, "train", 8))[7]


def test_seeds_and_splits_differ(train: list[str]) -> None:
    assert builtin_story(1, "train", 0) not in train
    assert builtin_story(0, "validation", 0) not in train
    with pytest.raises(StoryLLMError, match=r"'test'.*'train' or 'validation'"):
        builtin_story(0, "test", 0)


def test_stories_hardly_repeat(train: list[str], validation: list[str]) -> None:
    assert len(set(train)) > 0.999 * len(train)
    assert len(set(validation)) > 0.999 * len(validation)
    assert not set(train) & set(validation)
    words = " ".join(train[:2_000]).split()
    assert len({tuple(words[i : i + 8]) for i in range(len(words) - 7)}) > 0.2 * len(words)


def test_vocabulary_is_compact(train: list[str]) -> None:
    words = set(re.findall(r"[a-z]+", " ".join(train).lower()))
    assert 500 < len(words) < 1_200
    lengths = [len(story.split()) for story in train]
    assert min(lengths) >= 80 and max(lengths) <= 200


def test_openings(train: list[str]) -> None:
    assert 0.4 < sum(story.startswith("Once upon a time") for story in train) / len(train) < 0.8
    assert sum(story.startswith("Once upon a time there was a pumpkin.") for story in train) >= 50
    for shape in SHAPES:
        assert any(story.startswith("Once upon a time") for story, _ in told(shape))


def test_text_is_clean(train: list[str], validation: list[str]) -> None:
    for story in train + validation:
        assert story.isascii() and story == story.strip()
        assert not re.search(r"[^A-Za-z ,.?!'\"\n]", story), story  # so no blank or choice is left over
        assert not re.search(r"  | [,.?!]|[,.?!]{2}|(?<!\n)\n(?!\n)|\n{3}", story), story


def test_sentences_begin_and_end(train: list[str], validation: list[str]) -> None:
    for story in train + validation:
        for paragraph in story.split("\n\n"):
            assert re.fullmatch(r'["A-Z].*[.!?]"?', paragraph), paragraph
            lower_case_start = re.search(r'[.!?] "?[a-z]|\." [a-z]', paragraph)
            assert not lower_case_start, paragraph
            assert not re.search(r', "(?!but\b|and\b)[a-z]', paragraph), paragraph  # speech that goes on: , "but first
            assert not re.search(r"\b(a|an|the|and|to|was|of|in|it) \1\b", paragraph), paragraph


def test_quotes_balance(train: list[str], validation: list[str]) -> None:
    for story in train + validation:
        for paragraph in story.split("\n\n"):
            outside, inside = paragraph.split('"')[::2], paragraph.split('"')[1::2]
            assert len(outside) == len(inside) + 1, paragraph
            assert all(re.fullmatch(r"[A-Za-z].*[,.?!]", speech) for speech in inside), paragraph
            assert all(text in ("", " ") or text[0] == " " for text in outside[1:]), paragraph


def test_articles(train: list[str]) -> None:
    for article, word in re.findall(r"\b([Aa]n?) (\w+)", " ".join(train)):
        assert (article.lower() == "an") == (word[0] in "aeiou"), f"{article} {word}"


def test_hero_stays_through_the_story(train: list[str], validation: list[str]) -> None:
    for story in train + validation:
        names = NAME.findall(story)
        assert len(set(names)) <= 2, story
        assert names[0] in story[-len(story) // 3 :], story


@pytest.mark.parametrize("shape", ["lost", "learn", "wish"])
def test_pronouns_of_a_lone_hero(shape: str) -> None:
    others = {"she": r"\b(?:he|him|his)\b", "he": r"\b(?:she|her|hers)\b"}
    for story, hero in told(shape):
        assert set(NAME.findall(story)) == {hero}
        assert not re.search(others[NAMES[hero]], story, re.IGNORECASE), story


@pytest.mark.parametrize("shape", ["gift", "quarrel", "promise", "rain", "share"])
def test_two_friends_have_different_pronouns(shape: str) -> None:
    for story, _ in told(shape):
        assert {NAMES[name] for name in NAME.findall(story)} == {"she", "he"}, story


@pytest.mark.parametrize(
    ("shape", "opening"),
    [
        ("lost", r"had an? ([a-z ]+)\."),
        ("learn", r"wanted to learn to ([a-z ]+)\."),
        ("gift", r"wanted to make an? ([a-z ]+) for"),
        ("quarrel", r"they found an? ([a-z]+ [a-z]+) "),
        ("rain", r"the two friends wanted to ([a-z ]+)\."),
        ("share", r"got a big [a-z]+ of [a-z ]*?(\w+)\."),
    ],
)
def test_what_is_wished_for_comes_back_at_the_end(shape: str, opening: str) -> None:
    for story, _ in told(shape):
        assert re.search(opening, story)[1] in story[-len(story) // 3 :], story


def test_promised_task_is_the_one_that_was_asked_for() -> None:
    tasks = [row["task"] for row in builtin.PROMISES]
    for story, _ in told("promise"):
        asked = re.search(r'"Please ([a-z ]+?)(?: today)?,"', story)[1]
        assert asked in tasks and asked.split()[-1] in story[len(story) // 2 :], story


def test_lost_thing_is_found_where_the_helper_saw_it() -> None:
    for story, _ in told("lost"):
        color, spot = re.search(r'"I saw something (\w+) ([a-z ]+)\."', story).groups()
        assert re.search(rf"The {color} [a-z ]+ was {spot}\.", story), story
        assert story.count(spot) == 2, story  # nobody has looked there before


def test_nobody_learns_from_their_own_kind_or_what_they_know() -> None:
    for story, _ in told("learn"):
        kind, skill = re.search(r"(\w+)(?: named|\. H| who| lived)", story)[1], re.search(r"learn to (\w+)", story)[1]
        assert not re.search(rf"\bthe {kind}\b", story), story
        assert (kind, skill) not in {("duck", "swim"), ("frog", "swim"), ("bird", "sing")}


def test_unusual_heroes_have_their_own_wish() -> None:
    wishes = {(row["kind"], row["wish"]) for row in builtin.WISHERS}
    for story, _ in told("wish"):
        kind = re.search(rf"\b({'|'.join(kind for kind, _ in wishes)})\b", story)[1]
        assert (kind, re.search(r"wanted to ([a-z ]+)\.", story)[1]) in wishes, story


def test_every_row_is_told_and_fits_its_script() -> None:
    for shape, (_, tables) in SHAPES.items():
        text = " ".join(story for story, _ in told(shape))
        for row in (row for rows in tables for row in rows):
            assert all(row.values()), row
            first = next(iter(row.values()))  # what the row is about
            assert max(re.split(r"[\[\]/]|{color}", first), key=len) in text, (shape, first)


def test_choices_and_tables() -> None:
    assert {choose(random.Random(i), "[a[b/]/c\n/d] [e/]") for i in range(99)} == {
        f"{first} {second}" for first in ("ab", "a", "c", "d") for second in ("e", "")
    }
    assert table("\n a | b\n 1 | 2\n 3 |\n   4\n") == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    with pytest.raises(ValueError, match="shorter"):
        table("a | b\n1")
    assert (Noun("red kite").a, Noun("old key").a) == ("a red kite", "an old key")


def test_writing_is_fast() -> None:
    start = time.perf_counter()
    assert sum(1 for _ in builtin_stories(3, "train", 1_000)) == 1_000
    assert time.perf_counter() - start < 2
