"""The synthetic stories never change, hardly repeat, and are grammatical and consistent."""

from __future__ import annotations

import hashlib
import random
import re

import pytest

from storyllm import StoryLLMError
from storyllm.data import synthetic
from storyllm.data.synthetic import (
    SPACE,
    TEMPLATES,
    Noun,
    choose,
    story_from_template,
    synthetic_stories,
    synthetic_story,
    table,
)

PRONOUN_OF = {name: pronoun for pronoun, names in synthetic.NAMES.items() for name in names}
NAME = re.compile(rf"\b(?:{'|'.join(PRONOUN_OF)})\b")


@pytest.fixture(scope="module")
def train() -> list[str]:
    return list(synthetic_stories(0, "train", 5_000))


@pytest.fixture(scope="module")
def validation() -> list[str]:
    return list(synthetic_stories(0, "validation", 1_000))


@pytest.fixture(scope="module")
def space() -> list[str]:
    return list(synthetic_stories(0, "train", 2_000, "space"))


@pytest.fixture(scope="module")
def by_template() -> dict[str, list[tuple[str, str]]]:
    """For each template, 200 stories with the names of their heroes."""

    def stories(name: str) -> list[tuple[str, str]]:
        texts = [story_from_template(random.Random(f"{name}/{i}"), name) for i in range(200)]
        return [(text, NAME.search(text)[0]) for text in texts]

    return {name: stories(name) for name in TEMPLATES}


def ending(story: str) -> str:
    return story[-len(story) // 3 :]


def test_stories_never_change(train: list[str], validation: list[str]) -> None:
    digest = hashlib.sha256("\0".join(train[:1_000] + validation).encode()).hexdigest()
    assert digest == "59da78df755f741ce9b469266a41f472d5900aa22da5140b2db246bdbfe0b14a"
    assert synthetic_story(0, "train", 7) == train[7] == list(synthetic_stories(0, "train", 8))[7]


def test_seeds_and_splits_differ(train: list[str], validation: list[str]) -> None:
    assert synthetic_story(1, "train", 0) not in train
    assert not set(train) & set(validation)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(StoryLLMError, match=r"'test'.*'train'.*'validation'"):
        synthetic_story(0, "test", 0)


def test_stories_hardly_repeat(train: list[str]) -> None:
    assert len(set(train)) > 0.999 * len(train)
    words = " ".join(train[:2_000]).split()
    assert len({tuple(words[i : i + 8]) for i in range(len(words) - 7)}) > 0.2 * len(words)


def test_vocabulary_and_length(train: list[str]) -> None:
    assert 500 < len(set(re.findall(r"[a-z]+", " ".join(train).lower()))) < 1_200
    lengths = [len(story.split()) for story in train]
    assert min(lengths) >= 80 and max(lengths) <= 200


def test_openings(train: list[str], by_template: dict[str, list[tuple[str, str]]]) -> None:
    assert 0.4 < sum(story.startswith("Once upon a time") for story in train) / len(train) < 0.8
    assert sum(story.startswith("Once upon a time there was a pumpkin.") for story in train) >= 10
    for stories in by_template.values():
        assert any(story.startswith("Once upon a time") for story, _ in stories)


def test_text_has_only_plain_characters_and_spacing(train: list[str], validation: list[str], space: list[str]) -> None:
    for story in train + validation + space:
        assert story == story.strip()
        assert not re.search(r"[^A-Za-z ,.?!'\"\n]", story), story  # no placeholder or choice is left
        assert not re.search(r"  | [,.?!]|[,.?!]{2}|(?<!\n)\n(?!\n)|\n{3}", story), story


def test_sentences_begin_and_end(train: list[str], validation: list[str], space: list[str]) -> None:
    for story in train + validation + space:
        for paragraph in story.split("\n\n"):
            assert re.fullmatch(r'["A-Z].*[.!?]"?', paragraph), paragraph
            assert not re.search(r'[.!?] "?[a-z]|\." [a-z]', paragraph), paragraph
            # A quotation may be resumed in lower case only with a conjunction: ..., "but first ..."
            assert not re.search(r', "(?!but\b|and\b)[a-z]', paragraph), paragraph
            assert not re.search(r"\b(a|an|the|and|to|was|of|in|it) \1\b", paragraph), paragraph


def test_quotation_marks_balance(train: list[str], validation: list[str], space: list[str]) -> None:
    for story in train + validation + space:
        for paragraph in story.split("\n\n"):
            parts = paragraph.split('"')
            outside, inside = parts[::2], parts[1::2]
            assert len(outside) == len(inside) + 1, paragraph
            assert all(re.fullmatch(r"[A-Za-z].*[,.?!]", speech) for speech in inside), paragraph
            assert all(text == "" or text[0] == " " for text in outside[1:]), paragraph


def test_articles_agree_with_nouns(train: list[str], space: list[str]) -> None:
    for article, word in re.findall(r"\b([Aa]n?) (\w+)", " ".join(train + space)):
        assert (article.lower() == "an") == (word[0] in "aeiou"), f"{article} {word}"


def test_hero_appears_at_the_beginning_and_the_end(train: list[str], validation: list[str], space: list[str]) -> None:
    for story in train + validation + space:
        names = NAME.findall(story)
        assert len(set(names)) <= 2, story
        assert names[0] in ending(story), story


@pytest.mark.parametrize("template", ["lost", "learn", "wish"])
def test_pronouns_of_a_single_hero(by_template: dict[str, list[tuple[str, str]]], template: str) -> None:
    others = {"she": r"\b(?:he|him|his)\b", "he": r"\b(?:she|her|hers)\b"}
    for story, hero in by_template[template]:
        assert set(NAME.findall(story)) == {hero}
        assert not re.search(others[PRONOUN_OF[hero]], story, re.IGNORECASE), story


@pytest.mark.parametrize("template", ["gift", "quarrel", "promise", "rain", "share"])
def test_two_friends_have_different_pronouns(by_template: dict[str, list[tuple[str, str]]], template: str) -> None:
    for story, _ in by_template[template]:
        assert {PRONOUN_OF[name] for name in NAME.findall(story)} == {"she", "he"}, story


@pytest.mark.parametrize(
    ("template", "subject"),
    [
        ("lost", r"had an? ([a-z ]+)\."),
        ("learn", r"wanted to learn to ([a-z ]+)\."),
        ("gift", r"wanted to make an? ([a-z ]+) for"),
        ("quarrel", r"they found an? ([a-z]+ [a-z]+) "),
        ("rain", r"the two friends wanted to ([a-z ]+)\."),
        ("share", r"got a big [a-z]+ of [a-z ]*?(\w+)\."),
    ],
)
def test_ending_returns_to_the_subject(
    by_template: dict[str, list[tuple[str, str]]], template: str, subject: str
) -> None:
    for story, _ in by_template[template]:
        assert re.search(subject, story)[1] in ending(story), story


def test_promised_task_is_remembered(by_template: dict[str, list[tuple[str, str]]]) -> None:
    tasks = [row["task"] for row in synthetic.PROMISES]
    for story, _ in by_template["promise"]:
        task = re.search(r'"Please ([a-z ]+?)(?: today)?,"', story)[1]
        assert task in tasks and task.split()[-1] in story[len(story) // 2 :], story


def test_lost_thing_is_found_where_the_finder_saw_it(by_template: dict[str, list[tuple[str, str]]]) -> None:
    for story, _ in by_template["lost"]:
        color, spot = re.search(r'"I saw something (\w+) ([a-z ]+)\."', story).groups()
        assert re.search(rf"The {color} [a-z ]+ was {spot}\.", story), story
        assert story.count(spot) == 2, story  # the hero did not search there before


def test_hero_does_not_learn_a_skill_of_its_kind_or_from_its_kind(
    by_template: dict[str, list[tuple[str, str]]],
) -> None:
    for story, _ in by_template["learn"]:
        kind, skill = re.search(r"(\w+)(?: named|\. H| who| lived)", story)[1], re.search(r"learn to (\w+)", story)[1]
        assert not re.search(rf"\bthe {kind}\b", story), story
        assert (kind, skill) not in {("duck", "swim"), ("frog", "swim"), ("bird", "sing")}


def test_unusual_heroes_have_their_own_wishes(by_template: dict[str, list[tuple[str, str]]]) -> None:
    wishes = {(row["kind"], row["wish"]) for row in synthetic.WISHERS}
    for story, _ in by_template["wish"]:
        kind = re.search(rf"\b({'|'.join(kind for kind, _ in wishes)})\b", story)[1]
        assert (kind, re.search(r"wanted to ([a-z ]+)\.", story)[1]) in wishes, story


def test_every_table_row_is_complete_and_used(by_template: dict[str, list[tuple[str, str]]]) -> None:
    for name, (_, tables) in TEMPLATES.items():
        text = " ".join(story for story, _ in by_template[name])
        for row in (row for rows in tables for row in rows):
            assert all(row.values()), row
            subject = max(re.split(r"[\[\]/]|{color}", next(iter(row.values()))), key=len)
            assert subject in text, (name, subject)


# The second genre


def test_stories_about_space_are_varied_and_of_their_own(space: list[str], train: list[str]) -> None:
    assert len(set(space)) > 0.99 * len(space)
    assert not set(space) & set(train)
    lengths = [len(story.split()) for story in space]
    assert min(lengths) >= 100 and max(lengths) <= 250
    words, everyday = (set(re.findall("[a-z]+", " ".join(stories).lower())) for stories in (space, train))
    assert {"rocket", "planet", "robot", "moon", "space"} <= words and len(words - everyday) > 150
    assert not set(space) & set(synthetic_stories(0, "validation", 100, "space"))


@pytest.mark.parametrize(
    ("template", "subject", "times"),
    [
        ("repair", r"wanted to fly to (the [a-z ]+)\.", 2),
        ("repair", r'"My ([a-z ]+) is broken!"', 2),
        ("language", r'"([A-Z]\w+(?: \w+)?)," said', 3),
        ("star", r"You belong to the (\w+)!", 4),
        ("race", r"The prize was (an? [a-z ]+|three [a-z ]+)\.", 2),
        ("garden", r"It was the seed of an? ([a-z ]+)\.", 2),
        ("garden", r'"It needs ([a-z ]+)!"', 1),
        ("homesick", r'"I miss (the [a-z ]+),"', 1),
    ],
)
def test_a_story_about_space_keeps_to_its_subject(template: str, subject: str, times: int) -> None:
    found = 0
    for i in range(200):
        story = story_from_template(random.Random(f"{template}/{i}"), template, SPACE)
        if match := re.search(subject, story):
            assert story.count(match[1]) >= times, story
            found += 1
    assert found > 50


@pytest.mark.parametrize("template", SPACE.templates)
def test_every_row_of_the_second_genre_is_used(template: str) -> None:
    text = " ".join(story_from_template(random.Random(f"{template}/{i}"), template, SPACE) for i in range(300))
    for row in (row for rows in SPACE.templates[template][1] for row in rows):
        assert all(row.values()), row
        assert next(iter(row.values())) in text, row


def test_choices_are_nested_and_may_be_empty() -> None:
    found = {choose(random.Random(i), "[a[b/]/c\n/d] [e/]") for i in range(99)}
    assert found == {f"{first} {second}" for first in ("ab", "a", "c", "d") for second in ("e", "")}


def test_table_rows_may_break_lines_and_must_be_complete() -> None:
    assert table("\n a | b\n 1 | 2\n 3 |\n   4\n") == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    with pytest.raises(ValueError, match="shorter"):
        table("a | b\n1")


def test_indefinite_article() -> None:
    assert (Noun("red kite").a, Noun("old key").a) == ("a red kite", "an old key")
