"""Which stories are compared: the beginnings of held-out stories, and what each model makes of them.

After the TinyStories paper (Eldan and Li 2023): a story is cut in the middle of a sentence, and a model completes it.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import tiktoken

from ..config import StoryLLMError, shown
from ..data.token_file import TokenFile
from ..model.sampling import check_sampling
from ..storyteller import Storyteller, UnfinishedStory

REAL = "real stories"  # the name of the held-out stories among those of the models
MIN_WORDS = 40  # shorter stories have too little to complete
BEGINNING = 0.4  # of a story's words, at least


@dataclass(frozen=True)
class Settings:
    """How the beginnings are chosen and completed. Everything random depends on `seed` and the number of a story."""

    beginnings: int = 50
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)
        if type(self.beginnings) is not int or self.beginnings < 2:
            raise StoryLLMError(f"beginnings is {shown(self.beginnings)}, must be an integer of at least 2")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63 - self.beginnings:
            raise StoryLLMError(f"seed is {shown(self.seed)}, must be an integer from 0 to 2**63 - 1 - beginnings")


@dataclass(frozen=True)
class Beginning:
    """The beginning of a held-out story and its real ending."""

    text: str
    ending: str


@dataclass(frozen=True)
class Story:
    """A completed story, by a model or a real one."""

    id: str  # does not tell who wrote it
    model: str  # or REAL
    number: int  # of the beginning, from 0
    beginning: str
    completion: str
    compared: str  # the completion, cut to as many words as the real ending has: what the text metrics read
    ended: bool  # by an end-of-text token, not by max_new_tokens
    seed: int | None  # of `Storyteller.generate`; None for a real story


def story_texts(tokens: TokenFile, tokenizer: tiktoken.Encoding) -> list[str]:
    """The texts of the stories of a `.bin`."""
    ends = np.flatnonzero(tokens.ids == tokenizer.eot_token)
    starts = np.append(0, ends[:-1] + 1)
    return [tokenizer.decode(tokens.ids[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


def choose_beginnings(stories: list[str], count: int, seed: int) -> list[Beginning]:
    """The beginnings of `count` random stories. The same stories, count and seed give the same ones.

    Raises StoryLLMError if there are too few that `cut_in_sentence` can cut.
    """
    found = []
    for number in np.random.default_rng(seed).permutation(len(stories)):
        if (beginning := cut_in_sentence(stories[number])) is not None:
            found.append(beginning)
            if len(found) == count:
                return found
    raise StoryLLMError(
        f"{len(found)} of {len(stories)} validation stories have the {MIN_WORDS} words it takes, must be {count}; "
        "lower --beginnings, or hold out more stories"
    )


def cut_in_sentence(story: str) -> Beginning | None:
    """The story cut in the middle of a sentence, or None if it is too short.

    It is cut after the first word, from 40% of the words on, that is neither the first nor the last of a sentence.
    """
    found = list(re.finditer(r"\S+", story))
    if len(found) < MIN_WORDS:
        return None
    for before, word in pairwise(found[int(BEGINNING * len(found)) - 1 : -1]):
        if before[0][-1].isalnum() and word[0][-1].isalnum():  # no mark that ends a sentence, or a part of it
            return Beginning(story[: word.end()], story[word.end() :])
    return None


def first_words(text: str, count: int) -> str:
    """`text` up to the end of its word number `count`, or all of it."""
    found = re.match(rf"(?:\s*\S+){{0,{count}}}", text)
    return found[0] if found else ""


def real_stories(beginnings: Iterable[Beginning]) -> list[Story]:
    """The beginnings with their real endings."""
    return [_story(REAL, number, b, b.ending, True, None) for number, b in enumerate(beginnings)]


def complete(storyteller: Storyteller, name: str, number: int, beginning: Beginning, settings: Settings) -> Story:
    """The story that a model makes of a beginning. `Storyteller.generate` with its seed gives the same."""
    seed = settings.seed + number
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = storyteller.generate(
            beginning.text,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=seed,
        )
    ended = not any(issubclass(warning.category, UnfinishedStory) for warning in caught)
    return _story(name, number, beginning, text[len(beginning.text) :], ended, seed)


def _story(model: str, number: int, beginning: Beginning, completion: str, ended: bool, seed: int | None) -> Story:
    compared = first_words(completion, len(beginning.ending.split()))
    identity = "\0".join((model, str(number), beginning.text, completion))
    story_id = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return Story(story_id, model, number, beginning.text, completion, compared, ended, seed)
