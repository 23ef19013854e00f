"""Recipes: every field's checks, overriding by name, and the round trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from storyllm import RECIPES, DataConfig, GPTConfig, Recipe, StoryLLMError, TrainConfig
from storyllm.config import printable

# For every field: a valid value other than the default, then invalid values.
FIELDS: dict[str, tuple[Any, list[Any]]] = {
    "model.vocab_size": (1024, [0, -1, 1.5, "50257", True, None, 2**31]),
    "model.block_size": (64, [0, -128, 128.0, "128", 2**31]),
    "model.n_layer": (4, [0, "6", None, 10_001]),
    "model.n_head": (8, [0, 5, 7, 385, 6.0]),
    "model.n_embd": (192, [0, 385, -384, "wide"]),
    "model.dropout": (0, [1, 1.0, -0.1, math.nan, math.inf, "0.1", False]),
    "model.bias": (False, [0, 1, "no", None]),
    "model.embedding_std": (0.5, [-0.1, math.nan, math.inf, None]),
    "model.position_std": (0.1, [-0.1, math.nan]),
    "model.final_norm_gain": (0.1, [-1.0, math.inf]),
    "model.copy_strength": (0.3, [-0.3, math.nan]),
    "model.activation": ("gelu_tanh", ["GELU", "gelu_new", "relu", "", None]),
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
    "data.max_stories": (10, [0, -1, 2.0, "10"]),
    "data.clean": (True, [1, "yes"]),
    "data.synthetic_stories": (10, [0, -1, 2.0]),
    "data.synthetic_seed": (7, [-1, 0.5]),
    "data.synthetic_genre": ("space", ["horror", "", 3]),
    "train.max_iters": (10, [0, -5, 1e4, "20000", np.float64(10), np.True_]),
    "train.stop_at": (100, [0, -1, 1.0, "end"]),
    "train.batch_size": (1, [0, 2.5, 2**31]),
    "train.gradient_accumulation_steps": (1, [0, -1]),
    "train.micro_batch_size": (4, [0, "all", 4.0, None, True, 2**31]),
    "train.windows": ("shuffled", ["Random", "", None]),
    "train.optimizer": ("muon", ["Muon", "sgd", None]),
    "train.schedule": ("wsd", ["WSD", "", None]),
    "train.learning_rate": (1, [0, -1e-4, math.nan, math.inf, "1e-4", 10**400]),
    "train.min_lr": (0, [-1e-9, math.nan, math.inf]),
    "train.warmup_iters": (0, [-1, 0.5]),
    "train.warmup_start_factor": (1, [-0.1, 1.1, math.nan]),
    "train.decay_fraction": (0.5, [-0.1, 1.1, math.nan, None]),
    "train.muon_lr_scale": (2.0, [0, -1.0, math.nan, math.inf]),
    "train.weight_decay": (0, [-0.1, math.inf]),
    "train.beta1": (0, [1, 1.5, -0.1, math.nan]),
    "train.beta2": (0.999, [1.0, math.nan]),
    "train.grad_clip": (0, [-1, math.nan, math.inf]),
    "train.eval_interval": (1, [0, -1, "never", None]),
    "train.eval_windows": (1, [0, 2**31]),
    "train.sample_interval": (100, [-1, 1.5, "auto", None]),
    "train.sample_prompt": ("", [None, 3, b"One day"]),
    "train.report_to": ("tensorboard", ["TensorBoard", "", None, "mlflow"]),
    "train.mirror_dir": ("/content/drive/MyDrive/runs", ["", 3, Path("runs")]),
    "train.mirror_minutes": (0, [-1, math.nan, math.inf, None]),
    "train.checkpoint_minutes": (0, [-1, math.nan, math.inf]),
    "train.keep_checkpoints": (5, [-1, 1.0, None, 1_001]),
    "train.dtype": ("bfloat16", ["fp16", "", None, 16]),
    "train.device": ("cpu", [None, 0]),
    "train.compile": (False, ["yes", 0, 1, None]),
    "train.seed": (1337, [-1, 0.0, 2**63, None]),
}
INVALID = [(name, value) for name, (_, values) in FIELDS.items() for value in values]


def field_of(recipe: Recipe, name: str) -> Any:
    part, _, field_name = name.partition(".")
    return getattr(getattr(recipe, part), field_name)


def flat(recipe: Recipe) -> dict[str, Any]:
    return {f"{part}.{name}": value for part, values in recipe.to_dict().items() for name, value in values.items()}


def override_error(changes: Any) -> str:
    """The one-line message that rejects these changes."""
    with pytest.raises(StoryLLMError) as caught:
        Recipe().override(changes)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("eval_interval", "max_iters", "expected"), [("auto", 20_000, 500), ("auto", 192, 9), ("auto", 3, 1), (70, 192, 70)]
)
def test_short_runs_are_evaluated_more_often(eval_interval: Any, max_iters: int, expected: int) -> None:
    config = Recipe().override({"train.eval_interval": eval_interval, "train.max_iters": max_iters}).train
    assert config.resolved_eval_interval == expected


def test_a_notebook_shows_an_error_as_one_line() -> None:
    assert StoryLLMError("a\nb")._render_traceback_() == [r"StoryLLMError: a\nb"]


def test_every_field_is_tested() -> None:
    assert set(FIELDS) == set(flat(Recipe()))


@pytest.mark.parametrize("name", FIELDS)
def test_override_changes_only_that_field(name: str) -> None:
    value = FIELDS[name][0]
    before = Recipe()
    after = before.override({name: value})
    assert flat(before) == flat(Recipe()) != flat(after)
    assert flat(after) == {**flat(before), name: value}
    assert type(field_of(after, name)) is (float if type(field_of(before, name)) is float else type(value))


@pytest.mark.parametrize(("name", "value"), INVALID, ids=[f"{name}={str(value)[:20]!r}" for name, value in INVALID])
def test_an_invalid_value_is_rejected_with_field_and_value(name: str, value: Any) -> None:
    message = override_error({name: value})
    assert name.split(".")[1] in message
    shown = str(value).strip()
    if type(value) is int and abs(value) > 2**100:
        shown = "bits"
    assert shown[:10] in message
    assert len(message) < 200  # long values are shortened


@pytest.mark.parametrize("name", ["model.n_head", "train.compile", "train.learning_rate", "data.source"])
def test_an_array_is_rejected_in_one_line(name: str) -> None:
    assert name.split(".")[1] in override_error({name: np.eye(3)})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("train.max_iters", number) for number in (np.int64(7), np.uint8(7))),
        *(("train.learning_rate", number) for number in (np.float64(0.5), np.float32(0.5), np.int32(1))),
        *(("train.stop_at", np.int64(3)), ("train.micro_batch_size", np.int64(3))),
    ],
)
def test_numpy_numbers_become_python_numbers(name: str, value: Any) -> None:
    stored = field_of(Recipe().override({name: value}), name)
    assert stored == value
    assert type(stored) is (float if name == "train.learning_rate" else int)


def test_fields_that_are_only_valid_together_can_be_changed_together() -> None:
    recipe = Recipe().override({"model.n_head": 7, "model.n_embd": 70, "train.stop_at": None})
    assert (recipe.model.n_head, recipe.model.n_embd) == (7, 70)


def test_override_without_changes_returns_an_equal_recipe() -> None:
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
def test_an_unknown_name_is_rejected_with_close_matches(name: str, near: str) -> None:
    message = override_error({name: 1})
    assert repr(name) in message and near in message
    assert sum(other in message for other in FIELDS) <= 4  # not a list of all fields


@pytest.mark.parametrize(
    "name", ["", ".", "model", "model.", ".n_layer", "model.n_layer.x", "zzz", "train.__class__", 1]
)
def test_any_other_unknown_name_is_rejected(name: Any) -> None:
    assert repr(name) in override_error({name: 1})


@pytest.mark.parametrize(("n_embd", "n_head"), [(385, 6), (1, 6), (100, 7), (5, 4)])
def test_the_error_for_a_width_proposes_one_that_works(n_embd: int, n_head: int) -> None:
    with pytest.raises(StoryLLMError, match=r"use \d+") as caught:
        GPTConfig(n_embd=n_embd, n_head=n_head)
    proposed = int(str(caught.value).split("use ")[1])
    assert GPTConfig(n_embd=proposed, n_head=n_head).n_embd >= n_embd


@pytest.mark.parametrize("size", [257, 999, 65536])
def test_bpe_vocabularies_may_have_any_size_that_16_bit_ids_allow(size: int) -> None:
    assert DataConfig(tokenizer=f"bpe:{size}").tokenizer == f"bpe:{size}"


@pytest.mark.parametrize(
    ("max_iters", "stop_at", "last"), [(100, None, 100), (100, 30, 30), (100, 100, 100), (100, 200, 100)]
)
def test_last_iteration_is_the_earlier_of_max_iters_and_stop_at(max_iters, stop_at, last) -> None:
    assert TrainConfig(max_iters=max_iters, stop_at=stop_at).last_iteration == last


def test_an_update_has_a_largest_number_of_windows() -> None:
    assert TrainConfig(batch_size=32, gradient_accumulation_steps=2**15).windows_per_update == 2**20
    assert "32,000,000,000, must be at most 1,048,576" in override_error({"train.gradient_accumulation_steps": 10**9})


def test_windows_per_update_is_batch_size_times_accumulation_steps() -> None:
    assert TrainConfig(batch_size=3, gradient_accumulation_steps=5).windows_per_update == 15


@pytest.mark.parametrize("parts", [{"model": 3}, {"data": GPTConfig()}, {"train": None}])
def test_a_recipe_needs_the_right_configurations(parts: dict[str, Any]) -> None:
    with pytest.raises(StoryLLMError, match=next(iter(parts))):
        Recipe(**parts)


@pytest.mark.parametrize("config", [Recipe(), GPTConfig(), DataConfig(), TrainConfig()])
def test_configurations_are_frozen(config: Any) -> None:
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name: str) -> None:
    recipe = RECIPES[name].override({"train.stop_at": 7, "train.micro_batch_size": 2, "train.compile": False})
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_to_dict_returns_a_copy() -> None:
    recipe = Recipe()
    recipe.to_dict()["model"]["n_layer"] = 99
    assert recipe == Recipe()


def test_from_dict_uses_defaults_for_missing_fields() -> None:
    assert Recipe.from_dict({}) == Recipe()
    assert Recipe.from_dict({"model": {"n_layer": 2}}) == Recipe().override({"model.n_layer": 2})


@pytest.mark.parametrize(
    "values",
    [
        *({"modle": {"n_layer": 2}}, {"model": {"n_lay": 2}}, {"model": {"n_layer": "2"}}),
        *({"model": 3}, {"model": None}, {"train": ["max_iters"]}, [], None),
    ],
)
def test_from_dict_rejects_what_is_not_a_recipe(values: Any) -> None:
    with pytest.raises(StoryLLMError):
        Recipe.from_dict(values)


def test_story_llm_error_is_not_caught_as_a_value_error() -> None:
    assert StoryLLMError.__bases__ == (Exception,)


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\x1b[31mb", "a\u2028b", "a\u202eb", "a\x85b", "a\0b"])
def test_the_message_of_an_error_is_one_printable_line(text: str) -> None:
    message = str(StoryLLMError(text))
    assert message.isprintable() and message[0] == "a" and message[-1] == "b"
    assert str(StoryLLMError("Zoë 🐌")) == "Zoë 🐌"


@pytest.mark.parametrize("character", ["\x1b", "\r", "\0", "\x7f", "\x9b", "\u2028", "\u202e", "\u2066"])
def test_printable_escapes_control_characters(character: str) -> None:
    assert printable(f"a{character}b") == f"a{ascii(character)[1:-1]}b"


def test_printable_keeps_ordinary_text() -> None:
    assert printable("Zoë 🐌,\n\tsaid “hello”.") == "Zoë 🐌,\n\tsaid “hello”."


# Any values for any fields

HINTS = {
    f"{part}.{name}": hint
    for part, config in get_type_hints(Recipe).items()
    for name, hint in get_type_hints(config).items()
}
HUGE = st.sampled_from([10**400, -(10**5000)])  # beyond floats, and beyond what Python formats
BY_TYPE = {
    bool: st.booleans(),
    int: st.integers(-3, 64) | st.integers(-(2**70), 2**70) | HUGE,
    float: st.floats(0, 1) | st.floats() | st.integers(-3, 64) | HUGE,
    str: st.text()
    | st.sampled_from(["synthetic", "gpt2", "cpu", "auto"])
    | st.integers(0, 70_000).map("bpe:{}".format),
    type(None): st.none(),
}
ODD = [None, True, False, "auto", "a\nb", "a\u2028b", b"gpt2", (), [], {}, [[1], "\n"], np.eye(3), Path("a\nb")]
PROPERTY = settings(
    max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Mostly values of the field's type, valid or not."""
    hint = HINTS[name]
    options = [hint] if get_origin(hint) is Literal or not get_args(hint) else get_args(hint)
    typed = [st.sampled_from(get_args(o)) if get_origin(o) is Literal else BY_TYPE[o] for o in options]
    return st.one_of(*typed, *typed, st.sampled_from(ODD))


CHANGES = st.lists(st.sampled_from(list(HINTS)), min_size=1, max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: values_of(name) for name in names})
)


def assert_applied_or_rejected(recipe: Recipe, changes: dict[str, Any]) -> None:
    before = flat(recipe)
    try:
        after = recipe.override(changes)
    except StoryLLMError as error:
        message = str(error)
    else:
        message = "applied"
        assert flat(after) == {**before, **changes}
        for name, value in changes.items():  # True is not a number here
            assert isinstance(field_of(after, name), bool) == isinstance(value, bool)
        assert Recipe.from_dict(json.loads(json.dumps(after.to_dict()))) == after
    assert len(message.splitlines()) == 1
    assert flat(recipe) == before


@PROPERTY
@given(st.sampled_from(list(RECIPES.values())), CHANGES)
def test_any_override_is_applied_or_rejected(recipe: Recipe, changes: dict[str, Any]) -> None:
    assert_applied_or_rejected(recipe, changes)


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_any_type_is_applied_or_rejected(name: str) -> None:
    for value in ODD:
        assert_applied_or_rejected(Recipe(), {name: value})


@PROPERTY
@given(st.text() | st.sampled_from(list(FIELDS)).map(lambda name: name[:-1] + "\n"), st.none() | st.text())
def test_any_unknown_name_is_rejected_in_one_line(name: str, value: Any) -> None:
    assume(name not in FIELDS)
    override_error({name: value})
