"""What more than one test module uses. Nothing here goes to a network: what is not on the machine is skipped, aloud."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the models here are small: a second thread costs more than it brings

BESIDE = Path(__file__).resolve().parents[2] / "shared"

NAMES = ("Ada", "Ben", "Mia", "Tom", "Zoë", "Little Bear", "the red fox", "Grandma")
THINGS = ("kite", "drum", "apple", "snail", "boat", "lantern", "blanket", "puddle", "cake", "ladder")
PLACES = ("garden", "forest", "kitchen", "river", "meadow", "old barn", "beach")
DEEDS = ("found", "lost", "painted", "carried", "shared", "hid", "washed", "mended")
FEELINGS = ("happy", "sad", "proud", "sleepy", "brave", "a bit shy", "very cold")


def synthetic_story(rng: random.Random) -> str:
    """A few sentences put together by chance: text with the shape of a story, and nothing of anybody's."""
    name, friend = rng.sample(NAMES, 2)
    sentences = [f"One day {name} went to the {rng.choice(PLACES)}."]
    for _ in range(rng.randint(3, 6)):
        who = rng.choice((name, friend))
        sentences.append(f"{who} {rng.choice(DEEDS)} a {rng.choice(THINGS)} and was {rng.choice(FEELINGS)}.")
    sentences.append(f'"Let us go home," said {friend}.')
    return rng.choice((" ", "\n", "\n\n")).join(sentences)


def synthetic_stories(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [synthetic_story(rng) for _ in range(count)]


@pytest.fixture(scope="session")
def sample_stories() -> Path:
    """The folder of real TinyStories, or a skip."""
    folder = BESIDE / "tinystories"
    if not folder.is_dir() or not any(folder.rglob("*")):
        pytest.skip("the sample data (real TinyStories) is not on this machine")
    return folder


@pytest.fixture
def gpt2_cache(monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiktoken finds GPT-2's vocabulary in its cache, or a skip."""
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or BESIDE / "tiktoken")
    if not folder.is_dir() or not any(folder.iterdir()):
        pytest.skip("GPT-2's vocabulary is not in a tiktoken cache on this machine")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder made by `prepare` from 400 synthetic stories (a tenth held out) with `bpe:300`. To be read only."""
    import storyllm

    folder = tmp_path_factory.mktemp("tiny_data")
    text = folder / "stories.txt"
    text.write_bytes("\n<|endoftext|>\n".join(synthetic_stories(400)).encode())
    recipe = storyllm.DataConfig(source=str(text), tokenizer="bpe:300", validation_fraction=0.1)
    info = storyllm.prepare(recipe, folder / "prepared")
    assert info.train.tokens > 2_000
    assert info.validation.tokens > 2_000
    return folder / "prepared"
