"""Names and pronouns that fit the characters of a story."""

import pytest

from storyllm.data.synthetic import NAMES, synthetic_stories
from storyllm.evaluation.consistency import GENDERS, names_in, new_names, pronoun_agreement
from storyllm.evaluation.protocol import cut_in_sentence

KNOWN = frozenset(GENDERS)
BEGINNING = "Once there was a fox named Mia. She had a friend named Tom. One day, Mia"


def test_all_built_in_stories_are_consistent():
    for story in synthetic_stories(3, "validation", 400):
        beginning = cut_in_sentence(story)
        assert not new_names(beginning.text, beginning.ending, KNOWN), story
        assert not new_names("", story, KNOWN), story
        agreeing, checked = pronoun_agreement("", story)
        assert agreeing == checked > 0, story


@pytest.mark.parametrize(
    ("completion", "names"),
    [
        (' went home. "Hello," said Tom.', set()),
        (' went home. "Hello," said Leo.', {"Leo"}),
        (" met a duck named Leo. Leo ran.", set()),
        (" saw a duck. His name was Leo, and Zoe ran.", {"Zoe"}),
        (" was a good friend. But Leo came by. It was Ben, a bear.", set()),
    ],
)
def test_names_that_nobody_introduced_by_hand(completion, names):
    assert new_names(BEGINNING, completion, KNOWN) == names


def test_names_of_other_stories_are_capitalized_words_within_a_sentence():
    assert names_in("Then Pip saw Rex. The dog and Mom ran to Rex, I think.") == {"Pip", "Rex"}
    assert new_names("Pip ran.", ' He saw a girl, Lulu, and "Oh," said Rex to Pip.') == {"Rex"}


@pytest.mark.parametrize(
    ("beginning", "completion", "counts"),
    [
        (BEGINNING, " took her bag and gave him a pie.", (2, 2)),
        ("A fox named Mia", " took his bag. She ran.", (1, 2)),
        ("A fox", " took his bag.", (0, 0)),  # nobody's gender is known
        ("A boy named Pip", " ran. His mom called him. Her voice was kind.", (3, 3)),
        ("A cat. Her name was Pip. Pip", " ran to his house.", (0, 1)),
        ("A bear met Mia. He", " sat down.", (0, 0)),  # pronouns of the beginning do not count
    ],
)
def test_pronoun_agreement_by_hand(beginning, completion, counts):
    assert pronoun_agreement(beginning, completion) == counts


def test_every_built_in_name_has_a_gender():
    assert set(GENDERS) == {name for names in NAMES.values() for name in names}
