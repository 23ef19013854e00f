"""Does a completion keep to the characters of its story? Names and pronouns, by rules.

Exact for the built-in stories, whose names and phrases are known: all of them pass. For other stories the rules are
approximate: real stories fail some of them, so compare a model with the real stories, not with 100%.
"""

from __future__ import annotations

import re

from ..data.synthetic import NAMES, PRONOUNS

GENDERS = {name: gender for gender, names in NAMES.items() for name in names}  # name -> "she" or "he"
PRONOUN_GENDERS = {form.lower(): gender for gender, forms in PRONOUNS.items() for form in forms.values()}
PRONOUN_GENDERS |= {"hers": "she", "herself": "she", "himself": "he"}
NOUN_GENDERS = {
    **dict.fromkeys("girl woman lady sister mom mommy mother grandma queen princess aunt daughter".split(), "she"),
    **dict.fromkeys("boy man brother dad daddy father grandpa king prince uncle son".split(), "he"),
}

# Capitalized words within a sentence that are not names.
NOT_NAMES = frozenset(
    "I I'm I'll I've I'd Mom Mommy Mum Mummy Mama Dad Daddy Papa Grandma Grandpa Mr Mrs Miss Ms Dr God Oh Yes No Hello "
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Christmas End".split()
)
WITHIN_SENTENCE = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+\b")
INTRODUCTION = (
    r"(?:\b(?:named|called|name (?:is|was)|friend|sister|brother|girl|boy|dog|cat|puppy|kitten),? {name}\b"
    r"|\b{name}(?: and [A-Z]\w+)? (?:was|were) (?:a|an|best|friends?|good|two|twins)\b"
    r"|\b(?:It was|But) {name}(?:,| came by))"
)


def names_in(text: str, known: frozenset[str] | None = None) -> set[str]:
    """The names in a text: those of `known`, or else the capitalized words that are not at the start of a sentence."""
    if known is not None:
        return set(known).intersection(re.findall(r"\w+", text))
    return set(WITHIN_SENTENCE.findall(text)) - NOT_NAMES


def new_names(beginning: str, completion: str, known: frozenset[str] | None = None) -> set[str]:
    """The names in a completion that neither occur in its beginning nor are introduced, as in "a fox named Mia"."""
    names = names_in(completion, known) - set(re.findall(r"\w+", beginning))
    return {name for name in names if not re.search(INTRODUCTION.replace("{name}", re.escape(name)), completion)}


def pronoun_agreement(beginning: str, completion: str) -> tuple[int, int]:
    """The number of pronouns in a completion that agree with a character, and of those that can be checked.

    A pronoun is checked if the story, up to the end of the pronoun's sentence, has somebody whose gender is known: by a
    name of the built-in stories, by a phrase such as "a boy named Sam", or by a noun such as "mom". It agrees if one
    of them has its gender.
    """
    story = beginning + completion
    genders = GENDERS | {
        name: NOUN_GENDERS[noun] for noun, name in re.findall(rf"\b({'|'.join(NOUN_GENDERS)}) named ([A-Z]\w+)", story)
    }
    genders |= {
        name: PRONOUN_GENDERS[his.lower()]
        for his, name in re.findall(r"(?i:\b(his|her)) name (?:is|was) ([A-Z]\w+)", story)
    }
    agreeing = checked = 0
    known: set[str] = set()
    for sentence in re.finditer(r"[^.!?]+[.!?]*", story):
        found = re.findall(r"\w+", sentence[0])
        known |= {genders[word] for word in found if word in genders}
        known |= {NOUN_GENDERS[word.lower()] for word in found if word.lower() in NOUN_GENDERS}
        for word in re.finditer(r"\w+", sentence[0]):
            gender = PRONOUN_GENDERS.get(word[0].lower())
            if gender and known and sentence.start() + word.start() >= len(beginning):
                checked += 1
                agreeing += gender in known
    return agreeing, checked
