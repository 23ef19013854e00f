"""Files with arbitrary content, with valid checksums too, are used correctly or refused in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import string
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from storyllm import Recipe, StoryLLMError, load, load_tokenizer, open_token_file, plot_losses, read_log, train, verify
from storyllm.checkpoint import load_checkpoint
from storyllm.data.token_file import TokenFileInfo, read_info
from storyllm.files import read_json, write_json

# Examples in the ordinary tests, and in the campaign.
sample_and_campaign = pytest.mark.parametrize(
    "examples", [40, pytest.param(600, marks=[pytest.mark.campaign, pytest.mark.timeout(1_000)])]
)

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8)
JSON = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def properties(examples: int) -> settings:
    """The same examples in each run of the ordinary tests, other ones in each campaign."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples < 100,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def accepted_or_refused(call: Callable[[], object]) -> None:
    """Checks that `call` succeeds, or raises a StoryLLMError of one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run may warn about what is odd but valid
        try:
            call()
        except StoryLLMError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017


READERS: dict[str, Callable[[Path], object]] = {
    "last.pt": load_checkpoint,
    "train.json": read_info,
    "vocabulary.json": lambda path: load_tokenizer(path.parent),
    "log.jsonl": read_log,
    "train.bin": open_token_file,
}


@sample_and_campaign
@pytest.mark.parametrize("name", READERS)
def test_arbitrary_bytes(tmp_path, examples, name):
    @properties(examples)
    @given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
    def check(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        accepted_or_refused(lambda: READERS[name](tmp_path / name))

    check()


@sample_and_campaign
def test_arbitrary_values_in_a_description(tiny_data, tmp_path, examples):
    names = [field.name for field in dataclasses.fields(TokenFileInfo)]
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    original = read_json(data / "train.json")

    @properties(examples)
    @given(st.dictionaries(st.sampled_from([*names, "more"]), JSON, min_size=1, max_size=2))
    def check(changes: dict[str, Any]) -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        write_json(data / "train.json", {**original, **changes})
        accepted_or_refused(lambda: verify(data))
        accepted_or_refused(lambda: train(TINY.override({"train.stop_at": 1}), data, tmp_path / "run"))

    check()


@sample_and_campaign
def test_arbitrary_values_in_a_vocabulary(tiny_data, tmp_path, examples):
    original = read_json(tiny_data / "vocabulary.json")

    @properties(examples)
    @given(st.dictionaries(st.sampled_from(["name", "tokens", "request", "more"]), JSON, min_size=1))
    def check(changes: dict[str, Any]) -> None:
        write_json(tmp_path / "vocabulary.json", {**original, **changes})
        accepted_or_refused(lambda: load_tokenizer(tmp_path))

    check()


@sample_and_campaign
def test_arbitrary_values_in_a_log_can_be_plotted_or_are_refused(tiny_run, tmp_path, examples):
    lines = [json.loads(line) for line in (tiny_run / "log.jsonl").read_bytes().splitlines()]
    for line in lines:
        del line["chained_crc32"]
    names = ["iteration", "train_loss", "val_loss", "learning_rate", "recipe", "device", "seconds"]

    @properties(examples)
    @given(st.sampled_from(["run", "update", "evaluation", "warning"]), st.dictionaries(st.sampled_from(names), JSON))
    def check(event: str, values: dict[str, Any]) -> None:
        example = {"event": event, "iteration": 0, "message": ""}
        entry = {**next((line for line in lines if line["event"] == event), example), **values}
        content = "".join(json.dumps(line) + "\n" for line in [*lines[:3], entry, *lines[3:]])
        (tmp_path / "log.jsonl").write_text(content)
        accepted_or_refused(lambda: plot_losses(tmp_path / "log.jsonl"))

    check()


@sample_and_campaign
def test_arbitrary_values_in_a_recipe(examples):
    recipe = TINY.to_dict()
    keys = st.sampled_from(sorted({*recipe, *recipe["model"], *recipe["data"], *recipe["train"]})) | st.text(max_size=5)
    nested = st.dictionaries(keys, st.dictionaries(keys, JSON, max_size=4) | JSON, max_size=3)
    changed = st.sampled_from([(part, name) for part in recipe for name in recipe[part]])

    @properties(5 * examples)
    @given(nested | JSON, changed, JSON)
    def check(values: Any, field: tuple[str, str], value: Any) -> None:
        part, name = field
        for candidate in (values, {**recipe, part: {**recipe[part], name: value}}):
            # What is accepted survives JSON, as in the log and in checkpoints.
            accepted_or_refused(lambda candidate=candidate: assert_survives_json(Recipe.from_dict(candidate)))

    check()


def assert_survives_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


TENSORS = st.sampled_from(
    [
        torch.zeros(0),
        torch.zeros(300, 32, dtype=torch.float64),
        torch.zeros(1).expand(300, 32),
        torch.zeros(300, 32).t(),
        torch.full((300, 32), float("nan")),
        torch.zeros(300, 32, dtype=torch.int64),
        torch.eye(3).to_sparse(),
    ]
)


def keys_in(values: dict[Any, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested dictionaries, as a tuple of keys."""
    for key, inner in values.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from keys_in(inner, (*path, key))


@sample_and_campaign
@pytest.mark.parametrize("name", ["last.pt", "best_model_params.pt"])
def test_arbitrary_values_in_a_checkpoint(tiny_run, tiny_data, tmp_path, examples, name):
    places = sorted(keys_in(load_checkpoint(tiny_run / name)), key=str)
    path = tmp_path / "run" / name

    @properties(examples)
    @given(st.sampled_from(places), st.none() | st.tuples(JSON | TENSORS))
    @example(("tokenizer",), (torch.zeros(300, 32),))  # indexing a tensor with a name is an IndexError
    @example(("optimizer",), (torch.zeros(300, 32),))
    def check(place: tuple[Any, ...], replacement: tuple[Any] | None) -> None:
        contents = inner = load_checkpoint(tiny_run / name)
        for key in place[:-1]:
            inner = inner[key]
        if replacement is None:
            del inner[place[-1]]
        else:
            inner[place[-1]] = replacement[0]
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        torch.save(contents, path)
        accepted_or_refused(lambda: load(path).generate("One day", max_new_tokens=2, seed=0))
        if name == "last.pt":
            accepted_or_refused(lambda: train(TINY.override({"train.max_iters": 24}), tiny_data, path.parent))

    check()
