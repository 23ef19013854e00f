"""The recipe of the specification, the checks of every field, and overriding by name."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from storyllm.config import RECIPES, DataConfig, GPTConfig, Recipe, StoryLLMError, TrainConfig, get_recipe

# What the specification says in numbers (and, for the sources, in words).
SPECIFICATION = {
    "model.vocab_size": 50257,
    "model.block_size": 128,
    "model.n_layer": 6,
    "model.n_head": 6,
    "model.n_embd": 384,
    "model.dropout": 0.1,
    "data.source": "roneneldan/TinyStories",
    "data.tokenizer": "gpt2",
    "data.clean": False,
    "train.max_iters": 20_000,
    "train.batch_size": 32,
    "train.gradient_accumulation_steps": 32,
    "train.learning_rate": 1e-4,
    "train.min_lr": 5e-4,
    "train.warmup_iters": 1_000,
    "train.weight_decay": 0.1,
    "train.beta1": 0.9,
    "train.beta2": 0.95,
    "train.grad_clip": 0.5,
    "train.eval_interval": 500,
}

# For every field: a value that is not the default, then values that must be refused.
FIELDS: dict[str, tuple[Any, list[Any]]] = {
    "model.vocab_size": (1024, [0, -1, 1.5, "50257", True, None]),
    "model.block_size": (64, [0, -128, 128.0, "128"]),
    "model.n_layer": (4, [0, "6", None]),
    "model.n_head": (8, [0, 5, 7, 385, 6.0]),
    "model.n_embd": (192, [0, 385, -384, "wide"]),
    "model.dropout": (0, [1, 1.0, -0.1, math.nan, math.inf, "0.1", False]),
    "model.bias": (False, [0, 1, "no", None]),
    "model.flash_attention": (False, [0, "yes"]),
    "model.gradient_checkpointing": (True, [1, "yes"]),
    "data.source": ("stories.txt", ["", None, 3, b"stories.txt"]),
    "data.tokenizer": (
        "bpe:4096",
        [
            *("", "GPT2", "gpt-2", "bpe", "bpe:", "bpe:256", "bpe:65537", "bpe:-300", "bpe:3e2", "bpe: 300"),
            *("bpe:300\n", "bpe:٣٠٠", "bpe:³³³", "bpe:" + "9" * 5_000, 4096, None),
        ],
    ),
    "data.text_column": ("story", [None, 1]),
    "data.validation_fraction": (0.5, [0, 1, -0.5, 1.5, math.nan, math.inf, "half"]),
    "data.clean": (True, [1, "yes"]),
    "data.builtin_stories": (10, [0, -1, 2.0]),
    "data.builtin_seed": (7, [-1, 0.5]),
    "train.max_iters": (10, [0, -5, 1e4, "20000"]),
    "train.stop_at": (100, [0, -1, 1.0, "end"]),
    "train.batch_size": (1, [0, 2.5]),
    "train.gradient_accumulation_steps": (1, [0, -1]),
    "train.micro_batch_size": (4, [0, "all", 4.0, None, True]),
    "train.learning_rate": (1, [0, -1e-4, math.nan, math.inf, "1e-4", 10**400]),
    "train.min_lr": (0, [-1e-9, math.nan, math.inf]),
    "train.warmup_iters": (0, [-1, 0.5]),
    "train.warmup_start": (1, [-0.1, 1.1, math.nan]),
    "train.weight_decay": (0, [-0.1, math.inf]),
    "train.beta1": (0, [1, 1.5, -0.1, math.nan]),
    "train.beta2": (0.999, [1.0, math.nan]),
    "train.grad_clip": (0, [-1, math.nan, math.inf]),
    "train.eval_interval": (1, [0, -1]),
    "train.eval_windows": (1, [0]),
    "train.checkpoint_minutes": (0, [-1, math.nan, math.inf]),
    "train.windows": ("shuffled", ["Random", "", None]),
    "train.optimizer": ("muon", ["Muon", "sgd", None]),
    "train.schedule": ("flat", ["wsd", "", None]),
    "train.decay_share": (0.5, [-0.1, 1.1, math.nan, None]),
    "train.muon_lr_scale": (2.0, [0, -1.0, math.nan, math.inf]),
    "train.keep_checkpoints": (5, [-1, 1.0, None, 1_001]),
    "train.dtype": ("bfloat16", ["fp16", "", None, 16]),
    "train.device": ("cpu", [None, 0]),
    "train.compile": (False, ["yes", 0, 1, None]),
    "train.seed": (1337, [-1, 0.0, 2**64, None]),
}
BAD = [(name, value) for name, (_, values) in FIELDS.items() for value in values]
EVERY_FIELD = [f"{part}.{name}" for part, values in Recipe().to_dict().items() for name in values]


def field_of(recipe: Recipe, name: str) -> Any:
    part, _, field_name = name.partition(".")
    return getattr(getattr(recipe, part), field_name)


@pytest.mark.parametrize("name", SPECIFICATION)
def test_faithful_is_the_specification(name: str) -> None:
    value = field_of(RECIPES["faithful"], name)
    assert value == SPECIFICATION[name]
    assert type(value) is type(SPECIFICATION[name])


def test_a_recipe_without_arguments_is_the_faithful_one() -> None:
    assert Recipe() == RECIPES["faithful"]


def test_recipes_can_be_had_by_name_and_no_other_name() -> None:
    assert {"faithful", "demo", "context-512", "context-1024"} <= set(RECIPES)
    for name, recipe in RECIPES.items():
        assert get_recipe(name) is recipe
    with pytest.raises(StoryLLMError, match="faithful") as caught:
        get_recipe("faithfull")
    assert "faithfull" in str(caught.value)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_sound(name: str) -> None:
    recipe = RECIPES[name]
    assert Recipe.from_dict(recipe.to_dict()) == recipe  # made anew, so every check runs again
    if recipe.data.tokenizer == "gpt2":
        assert recipe.model.vocab_size == 50257
    else:
        assert recipe.data.tokenizer == f"bpe:{recipe.model.vocab_size}"
    assert recipe.train.warmup_iters < recipe.train.max_iters
    assert recipe.train.eval_interval <= recipe.train.max_iters


def test_longer_contexts_keep_the_tokens_of_an_iteration() -> None:
    faithful = RECIPES["faithful"]
    tokens = faithful.model.block_size * faithful.train.batch_size
    for name, block_size in {"context-512": 512, "context-1024": 1024}.items():
        assert RECIPES[name].model.block_size == block_size
        assert RECIPES[name].model.block_size * RECIPES[name].train.batch_size == tokens


def test_the_table_of_this_test_has_every_field() -> None:
    assert set(FIELDS) == set(EVERY_FIELD)


@pytest.mark.parametrize("name", FIELDS)
def test_override_changes_that_field_and_nothing_else(name: str) -> None:
    value = FIELDS[name][0]
    before = Recipe()
    after = before.override({name: value})
    assert field_of(after, name) == value
    assert field_of(before, name) != value
    assert type(field_of(after, name)) is (float if type(field_of(before, name)) is float else type(value))
    for other in set(EVERY_FIELD) - {name}:
        assert field_of(after, other) == field_of(before, other)


def test_override_takes_changes_that_are_only_valid_together() -> None:
    recipe = Recipe().override({"model.n_head": 7, "model.n_embd": 70, "train.stop_at": None})
    assert (recipe.model.n_head, recipe.model.n_embd) == (7, 70)


def test_override_with_nothing_is_the_same_recipe() -> None:
    assert Recipe().override({}) == Recipe()


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("model.n_layers", "model.n_layer"),
        ("train.learning_rat", "train.learning_rate"),
        ("train.max_iter", "train.max_iters"),
        ("n_layer", "model.n_layer"),
        ("model.learning_rate", "train.learning_rate"),
        ("model.n_lyaer", "model.n_layer"),
        ("data.column", "data.text_column"),
    ],
)
def test_an_unknown_name_lists_near_ones(name: str, near: str) -> None:
    with pytest.raises(StoryLLMError) as caught:
        Recipe().override({name: 1})
    message = str(caught.value)
    assert repr(name) in message
    assert near in message
    assert sum(other in message for other in EVERY_FIELD) <= 4  # not a list of everything
    assert "\n" not in message


@pytest.mark.parametrize("name", ["", ".", "model", "model.", ".n_layer", "model.n_layer.x", "zzz", "train.__class__"])
def test_other_unknown_names_are_refused_too(name: str) -> None:
    with pytest.raises(StoryLLMError, match="no field"):
        Recipe().override({name: 1})


def test_a_name_that_is_no_text_is_refused_too() -> None:
    with pytest.raises(StoryLLMError, match="the recipe has no field 1: did you mean"):
        Recipe().override({1: 2})  # type: ignore[dict-item]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}={str(value)[:20]!r}" for name, value in BAD])
def test_a_bad_value_is_one_line_with_the_field_and_what_was_got(name: str, value: Any) -> None:
    with pytest.raises(StoryLLMError) as caught:
        Recipe().override({name: value})
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message
    field_name = name.split(".")[1]
    if field_name == "n_head" and type(value) is int and value > 0:
        assert "n_embd" in message  # either may be changed
    assert field_name in message
    got = repr(value) if isinstance(value, str) and value else str(value)
    assert (got if len(got) < 30 else "bits" if type(value) is int else got[:10]) in message  # a long one is cut


@pytest.mark.parametrize("name", ["model.n_head", "train.compile", "train.learning_rate", "data.source"])
def test_an_array_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(StoryLLMError, match="expected") as caught:
        Recipe().override({name: np.eye(3)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("n_embd", "n_head"), [(385, 6), (1, 6), (100, 7), (5, 4)])
def test_a_width_that_heads_cannot_share_comes_with_one_that_they_can(n_embd: int, n_head: int) -> None:
    with pytest.raises(StoryLLMError, match=r"take \d+") as caught:
        GPTConfig(n_embd=n_embd, n_head=n_head)
    proposed = int(str(caught.value).split("take ")[1])
    assert GPTConfig(n_embd=proposed, n_head=n_head).n_embd >= n_embd


@pytest.mark.parametrize("edge", [257, 65536])
def test_vocabularies_of_every_size_that_16_bits_hold(edge: int) -> None:
    assert DataConfig(tokenizer=f"bpe:{edge}").tokenizer == f"bpe:{edge}"


def test_a_recipe_is_made_of_its_three_parts_only() -> None:
    for parts in ({"model": 3}, {"data": GPTConfig()}, {"train": None}):
        with pytest.raises(StoryLLMError, match="expected"):
            Recipe(**parts)


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip_through_json(name: str) -> None:
    recipe = RECIPES[name].override({"train.stop_at": 7, "train.micro_batch_size": 2, "train.compile": False})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_from_dict_fills_what_is_left_out_with_defaults() -> None:
    assert Recipe.from_dict({}) == Recipe()
    assert Recipe.from_dict({"model": {"n_layer": 2}}) == Recipe().override({"model.n_layer": 2})


@pytest.mark.parametrize(
    "values",
    [
        *({"modle": {"n_layer": 2}}, {"model": {"n_lay": 2}}, {"model": {"n_layer": "2"}}),
        *({"model": 3}, {"model": None}, {"train": ["max_iters"]}, [], None),
    ],
)
def test_from_dict_refuses_what_to_dict_did_not_write(values: Any) -> None:
    with pytest.raises(StoryLLMError):
        Recipe.from_dict(values)


@pytest.mark.parametrize("config", [Recipe(), GPTConfig(), DataConfig(), TrainConfig()])
def test_frozen(config: Any) -> None:
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))


def test_to_dict_gives_a_copy() -> None:
    recipe = Recipe()
    recipe.to_dict()["model"]["n_layer"] = 99
    assert recipe == Recipe()


def test_the_error_is_a_value_error() -> None:
    assert issubclass(StoryLLMError, ValueError)
