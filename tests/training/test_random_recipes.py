"""Runs of random recipes do what their recipe says, and every field of a recipe has its effect and no other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, losses, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storyllm import Log, Recipe, load, lr_at, read_log, train
from storyllm.checkpoint import load_checkpoint

few_or_many_examples = pytest.mark.parametrize(
    "examples", [12, pytest.param(500, marks=[pytest.mark.campaign, pytest.mark.timeout(7_200)])]
)


def example_settings(examples: int) -> settings:
    """The same examples in every run of the normal suite, others in each campaign."""
    checks = [HealthCheck.too_slow]  # on a busy machine
    return settings(
        max_examples=examples, deadline=None, derandomize=examples < 100, database=None, suppress_health_check=checks
    )


# Values of every field of model and training for a run of a moment.
VALUES = {
    "model.vocab_size": st.integers(1, 60_000),  # replaced by that of the data
    "model.block_size": st.integers(2, 16),
    "model.n_layer": st.integers(1, 2),
    "model.n_head": st.sampled_from([1, 2, 4]),
    "model.n_embd": st.sampled_from([8, 16]),
    "model.dropout": st.sampled_from([0.0, 0.1, 0.5]),
    "model.bias": st.booleans(),
    "model.activation": st.sampled_from(["gelu", "gelu_tanh"]),
    "model.flash_attention": st.booleans(),
    "model.embedding_std": st.floats(0.01, 1),  # with 0, the seed would not matter
    "model.position_std": st.floats(0.01, 1),
    "model.final_norm_gain": st.floats(0.01, 1),
    "model.copy_strength": st.floats(0, 1),
    "model.gradient_checkpointing": st.booleans(),
    "train.max_iters": st.integers(1, 9),
    "train.stop_at": st.none() | st.integers(1, 10),
    "train.batch_size": st.integers(1, 3),
    "train.gradient_accumulation_steps": st.integers(1, 4),
    "train.micro_batch_size": st.just("auto") | st.integers(1, 7),
    "train.windows": st.sampled_from(["random", "shuffled"]),
    "train.optimizer": st.sampled_from(["adamw", "muon"]),
    "train.schedule": st.sampled_from(["cosine", "wsd"]),
    "train.learning_rate": st.floats(1e-6, 1e-2),
    "train.min_lr": st.floats(0, 1e-2),
    "train.warmup_iters": st.integers(0, 10),
    "train.warmup_start_factor": st.floats(0, 1),
    "train.decay_fraction": st.floats(0, 1),
    "train.muon_lr_scale": st.floats(0.1, 2),
    "train.weight_decay": st.floats(0, 1),
    "train.beta1": st.floats(0, 0.9),
    "train.beta2": st.floats(0.9, 0.999),  # near 0, a small gradient after a large one makes a huge update
    "train.grad_clip": st.floats(0, 1),
    "train.eval_interval": st.integers(1, 10),
    "train.eval_windows": st.integers(1, 5),
    "train.sample_interval": st.integers(0, 10),
    "train.sample_prompt": st.text(max_size=30),
    "train.report_to": st.just("none"),  # the others are optional packages
    "train.mirror_dir": st.none(),
    "train.mirror_minutes": st.sampled_from([0.0, 10.0]),
    "train.checkpoint_minutes": st.sampled_from([0.0, 2.0]),
    "train.keep_checkpoints": st.integers(0, 2),
    "train.dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    "train.device": st.just("cpu"),  # where runs agree to the bit
    "train.compile": st.sampled_from(["auto", False]),  # compiling takes longer than all the rest
    "train.seed": st.integers(0, 2**63 - 1),
}
RECIPES = st.fixed_dictionaries(VALUES).map(Recipe().override)


def flat(recipe: Recipe) -> dict[str, Any]:
    return {f"{part}.{name}": value for part, fields in recipe.to_dict().items() for name, value in fields.items()}


def test_every_field_has_random_values():
    fields = {name for name in flat(Recipe()) if not name.startswith("data.")}
    assert set(VALUES) == fields, "add or remove a field in VALUES and EFFECTS"


def expected_parameters(recipe: Recipe) -> int:
    model, C = recipe.model, recipe.model.n_embd
    norm = 2 * C if model.bias else C
    block = 12 * C**2 + 2 * norm + (9 * C if model.bias else 0)
    return (300 + model.block_size) * C + model.n_layer * block + norm


@few_or_many_examples
def test_a_run_follows_its_recipe(examples, tiny_data, tmp_path_factory):
    @example_settings(examples)
    @given(RECIPES)
    def follows(recipe):
        folder = tmp_path_factory.mktemp("run")
        log = train(recipe, tiny_data, folder)
        model, config = dataclasses.replace(recipe.model, vocab_size=300), recipe.train
        assert log.run["recipe"]["model"] == dataclasses.asdict(model)
        assert log.run["recipe"]["train"] == dataclasses.asdict(config)
        assert log.run["parameters"] == expected_parameters(recipe)
        assert log.run["dtype"] == ("float32" if config.dtype == "auto" else config.dtype)
        size = log.run["micro_batch_size"]
        assert size == config.micro_batch_size or (
            config.micro_batch_size == "auto" and 1 <= size <= config.windows_per_update
        )
        end, steps = config.last_iteration, config.gradient_accumulation_steps
        due = sorted({*range(steps, end + 1, steps), *([end] if end == config.max_iters else [])})
        assert [entry["iteration"] for entry in log.updates] == due
        assert [entry["iteration"] for entry in log.evaluations] == sorted({*range(0, end, config.eval_interval), end})
        assert [entry["learning_rate"] for entry in log.updates] == [lr_at(i - 1, config) for i in due]
        assert all(entry["learning_rate"] == lr_at(entry["iteration"], config) for entry in log.evaluations)
        assert load(folder / "best_model_params.pt").model.config == model
        assert load_checkpoint(folder / "last.pt")["recipe"] == log.run["recipe"]

    follows()


@few_or_many_examples
def test_the_seed_determines_an_interrupted_or_uninterrupted_run(examples, tiny_data, tmp_path_factory):
    @example_settings(examples)
    @given(RECIPES, st.integers(0, 2**63 - 1), st.integers(1, 9))
    def holds(recipe, other_seed, stop_at):
        folder = tmp_path_factory.mktemp("seeds")
        train(recipe, tiny_data, folder / "one")
        stop_at = min(stop_at, recipe.train.last_iteration)
        train(recipe.override({"train.stop_at": stop_at}), tiny_data, folder / "interrupted")
        train(recipe, tiny_data, folder / "interrupted")
        assert losses(folder / "interrupted")[0] == losses(folder / "one")[0]
        assert weights(folder / "interrupted") == weights(folder / "one")
        if other_seed != recipe.train.seed:
            train(recipe.override({"train.seed": other_seed}), tiny_data, folder / "other")
            assert losses(folder / "other")[1][0] != losses(folder / "one")[1][0]
            assert weights(folder / "other") != weights(folder / "one")

    holds()


# A run in which every hyperparameter matters.
BASE = TINY.override(
    {
        **{"model.block_size": 8, "model.n_layer": 1, "model.n_embd": 8},
        **{"train.max_iters": 6, "train.batch_size": 2, "train.gradient_accumulation_steps": 2},
        **{"train.warmup_iters": 3, "train.eval_windows": 3, "train.eval_interval": 10},
        **{"train.optimizer": "muon", "train.schedule": "wsd", "train.decay_fraction": 0.4},
    }
)
# The effect of another value on the final weights: "changed", "same", or "rounding", at most.
EFFECTS = {
    "model.vocab_size": (1000, "same"),  # replaced by that of the data
    "model.block_size": (9, "changed"),
    "model.n_layer": (2, "changed"),
    "model.n_head": (4, "changed"),
    "model.n_embd": (16, "changed"),
    "model.dropout": (0.2, "changed"),
    "model.bias": (False, "changed"),
    "model.activation": ("gelu_tanh", "changed"),
    "model.flash_attention": (False, "rounding"),
    "model.embedding_std": (0.5, "changed"),
    "model.position_std": (0.1, "changed"),
    "model.final_norm_gain": (0.1, "changed"),
    "model.copy_strength": (0.3, "changed"),
    "model.gradient_checkpointing": (True, "rounding"),
    "data.source": ("synthetic", "same"),  # the data is prepared already
    "data.tokenizer": ("bpe:400", "same"),
    "data.text_column": ("story", "same"),
    "data.validation_fraction": (0.5, "same"),
    "data.max_stories": (7, "same"),
    "data.clean": (True, "same"),
    "data.synthetic_stories": (7, "same"),
    "data.synthetic_seed": (7, "same"),
    "data.synthetic_genre": ("space", "same"),
    "train.max_iters": (7, "changed"),
    "train.stop_at": (4, "changed"),
    "train.batch_size": (3, "changed"),
    "train.gradient_accumulation_steps": (3, "changed"),
    "train.micro_batch_size": (1, "rounding"),
    "train.windows": ("shuffled", "changed"),
    "train.optimizer": ("adamw", "changed"),
    "train.schedule": ("cosine", "changed"),
    "train.decay_fraction": (0.5, "changed"),
    "train.muon_lr_scale": (0.5, "changed"),
    "train.learning_rate": (9e-3, "changed"),
    "train.min_lr": (2e-3, "changed"),
    "train.warmup_iters": (2, "changed"),
    "train.warmup_start_factor": (0.5, "changed"),
    "train.weight_decay": (0.2, "changed"),
    "train.beta1": (0.8, "changed"),
    "train.beta2": (0.9, "changed"),
    "train.grad_clip": (0.4, "changed"),
    "train.eval_interval": (2, "same"),
    "train.eval_windows": (4, "same"),
    "train.sample_interval": (2, "same"),
    "train.sample_prompt": ("One day", "same"),
    "train.report_to": ("tensorboard", "same"),
    "train.mirror_dir": ("mirror", "same"),
    "train.mirror_minutes": (0.0, "same"),
    "train.checkpoint_minutes": (0.0, "same"),
    "train.keep_checkpoints": (0, "same"),
    "train.dtype": ("bfloat16", "changed"),
    "train.device": ("cpu:0", "same"),
    "train.compile": (False, "same"),
    "train.seed": (1, "changed"),
}

Outcome = tuple[Log, dict[str, Any]]  # the log and the final weights


@pytest.fixture(scope="module")
def outcome(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Outcome]:
    """Runs a recipe, each one only once."""

    @functools.cache
    def run(recipe: Recipe) -> Outcome:
        folder = tmp_path_factory.mktemp("once")
        train(recipe, tiny_data, folder)
        return read_log(folder / "log.jsonl"), weights(folder)

    return run


def test_the_effect_of_every_field_is_known():
    assert set(EFFECTS) == set(flat(Recipe())), "add or remove a field in EFFECTS"


@pytest.mark.parametrize("name", EFFECTS)
def test_a_field_has_its_effect_and_no_other(name, outcome, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the relative path of mirror_dir
    value, effect = EFFECTS[name]
    if value == "tensorboard":
        pytest.importorskip("tensorboard")
    # Dropout depends on how a batch is split.
    base = BASE.override({"model.dropout": 0.0}) if effect == "rounding" else BASE
    changed = base.override({name: value})
    assert flat(changed)[name] != flat(base)[name]
    (log, before), (changed_log, after) = outcome(base), outcome(changed)
    if effect == "rounding":
        expected = [entry["train_loss"] for entry in log.updates]
        assert [entry["train_loss"] for entry in changed_log.updates] == pytest.approx(expected, rel=1e-5)
    else:
        assert (before == after) == (effect == "same")
