"""The named recipes: `faithful` is the specification, and all are consistent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from storyllm import GPT, RECIPES, Recipe, StoryLLMError, get_recipe

# The numbers in the specification.
SPECIFICATION = {
    "model": {
        "vocab_size": 50257,
        "block_size": 128,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "dropout": 0.1,
        "bias": True,
    },
    "data": {"source": "roneneldan/TinyStories", "tokenizer": "gpt2", "clean": False},
    "train": {
        "max_iters": 20_000,
        "batch_size": 32,
        "gradient_accumulation_steps": 32,
        "windows": "random",
        "optimizer": "adamw",
        "schedule": "cosine",
        "learning_rate": 1e-4,
        "min_lr": 5e-4,
        "warmup_iters": 1_000,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 0.5,
    },
}


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, fields in SPECIFICATION.items() for name in fields])
def test_faithful_is_the_specification(part: str, name: str) -> None:
    expected: Any = SPECIFICATION[part][name]
    value = RECIPES["faithful"].to_dict()[part][name]
    assert value == expected and type(value) is type(expected)
    assert RECIPES["faithful"].train.resolved_eval_interval == 500


def test_the_default_recipe_is_faithful() -> None:
    assert Recipe() == RECIPES["faithful"]


@pytest.mark.parametrize("name", RECIPES)
def test_get_recipe_returns_the_recipe_of_that_name(name: str) -> None:
    assert get_recipe(name) is RECIPES[name]


@pytest.mark.parametrize("name", ["faithfull", "", "Faithful"])
def test_an_unknown_recipe_is_rejected_with_the_known_names(name: str) -> None:
    with pytest.raises(StoryLLMError) as caught:
        get_recipe(name)
    assert all(known in str(caught.value) for known in (repr(name), *RECIPES))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_consistent(name: str) -> None:
    model, data, train = (getattr(RECIPES[name], part) for part in ("model", "data", "train"))
    assert data.tokenizer == ("gpt2" if model.vocab_size == 50257 else f"bpe:{model.vocab_size}")
    assert train.warmup_iters < train.max_iters
    assert 8 <= train.max_iters / train.resolved_eval_interval <= 40
    assert train.warmup_iters <= train.max_iters * (1 - train.decay_fraction)
    with torch.device("meta"):
        assert GPT(model)(torch.zeros(1, model.block_size, dtype=torch.long))[0].size(-1) == model.vocab_size


@pytest.mark.parametrize(("name", "block_size"), [("context-512", 512), ("context-1024", 1024), ("gpt2-small", 1024)])
def test_longer_contexts_keep_the_tokens_per_iteration(name: str, block_size: int) -> None:
    recipe, faithful = RECIPES[name], RECIPES["faithful"]
    assert recipe.model.block_size == block_size
    assert block_size * recipe.train.batch_size == faithful.model.block_size * faithful.train.batch_size


@pytest.mark.parametrize("name", ["demo", "demo-fast"])
def test_the_demos_need_no_network(name: str) -> None:
    assert (RECIPES[name].data.source, RECIPES[name].data.tokenizer) == ("synthetic", "bpe:1024")


def test_demo_fast_trains_the_model_of_demo_on_the_same_data() -> None:
    assert RECIPES["demo-fast"].model == RECIPES["demo"].model
    assert RECIPES["demo-fast"].data == RECIPES["demo"].data
