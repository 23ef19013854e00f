"""Fine-tuning: a run starts from another model, remembers it, and measures what is forgotten."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, losses, random_stories, weights, write_stories

from storyllm import DataConfig, StoryLLMError, load, load_tokenizer, lr_at, open_token_file, prepare, read_log, train
from storyllm.checkpoint import load_checkpoint, save_checkpoint
from storyllm.cli import main
from storyllm.data.token_file import open_dataset
from storyllm.evaluation.likelihood import bits_per_byte
from storyllm.training.initial_model import initial_model

# Other values for every field of the model. Only some of them count.
RECIPE = TINY.override(
    {
        **{"model.n_layer": 1, "model.n_head": 4, "model.n_embd": 8, "model.bias": False, "model.dropout": 0.0},
        **{"model.activation": "gelu_tanh", "model.embedding_std": 0.5, "train.learning_rate": 1e-3},
    }
)


@pytest.fixture
def new_data(tiny_data: Path, tmp_path: Path) -> Path:
    """Other stories, prepared with the tokenizer of `tiny_data`."""
    source = write_stories(tmp_path / "new.txt", [f"Zap! {story}" for story in random_stories(80, seed=5)])
    config = DataConfig(source=str(source), validation_fraction=0.3)
    prepare(config, tmp_path / "new", tokenizer=load_tokenizer(tiny_data))
    return tmp_path / "new"


@pytest.fixture
def initial(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the best model of `tiny_run`."""
    return Path(shutil.copy(tiny_run / "best_model_params.pt", tmp_path / "initial.pt"))


def error_of(*arguments: Any, **options: Any) -> str:
    with pytest.raises(StoryLLMError) as caught:
        train(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_starts_with_the_weights_and_the_shape_of_the_model(tiny_run, tiny_data, tmp_path):
    log = train(RECIPE, tiny_data, tmp_path / "run", init_from=tiny_run)
    best = min(read_log(tiny_run / "log.jsonl").evaluations, key=lambda entry: entry["val_loss"])
    assert log.evaluations[0]["val_loss"] == best["val_loss"]  # on the same windows
    assert [entry["learning_rate"] for entry in log.updates[:2]] == [lr_at(i, RECIPE.train) for i in (3, 7)]
    expected = dataclasses.replace(TINY.model, dropout=0.0)
    assert load(tmp_path / "run").model.config == expected
    assert log.run["recipe"]["model"] == dataclasses.asdict(expected)
    assert log.run["init_from"]["name"] == str(tiny_run)


def test_a_shorter_context_crops_the_position_embeddings(tiny_run, tiny_data):
    config = dataclasses.replace(RECIPE.model, block_size=9)
    model = initial_model(config, open_dataset(tiny_data), str(tiny_run)).eval()
    assert model.config.block_size == 9
    idx = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(idx)[0], load(tiny_run, device="cpu").model(idx)[0])


def test_a_longer_context_is_refused(tiny_run, tiny_data, tmp_path):
    message = error_of(RECIPE.override({"model.block_size": 17}), tiny_data, tmp_path / "run", init_from=tiny_run)
    assert "block_size is 17" in message and "--model.block-size 16" in message


def test_data_with_another_tokenizer_is_refused(tiny_run, tmp_path):
    source = write_stories(tmp_path / "new.txt", random_stories(80, seed=5))
    prepare(DataConfig(source=str(source), tokenizer="bpe:310", validation_fraction=0.3), tmp_path / "new")
    message = error_of(RECIPE, tmp_path / "new", tmp_path / "run", init_from=tiny_run)
    assert "bpe:310" in message and "bpe:300" in message and "--tokenizer-from" in message


def test_a_missing_model_is_refused(tiny_data, tmp_path):
    assert "missing.pt not found" in error_of(RECIPE, tiny_data, tmp_path / "run", init_from=tmp_path / "missing.pt")


# Resuming


@pytest.mark.parametrize("again", ["nothing", "the model", "the name of the deleted model", "a copy of the model"])
def test_a_run_resumes_with_and_without_its_model(again, initial, tiny_data, tmp_path):
    run, name = tmp_path / "run", str(initial)
    train(RECIPE, tiny_data, tmp_path / "uninterrupted", init_from=initial)
    train(RECIPE.override({"train.stop_at": 8}), tiny_data, run, init_from=initial)
    if again == "the name of the deleted model":
        initial.unlink()
    elif again == "a copy of the model":
        name = str(initial.rename(tmp_path / "moved.pt"))
    train(RECIPE, tiny_data, run, init_from=None if again == "nothing" else name)
    assert weights(run) == weights(tmp_path / "uninterrupted")
    assert losses(run)[0] == losses(tmp_path / "uninterrupted")[0]  # one more evaluation, at stop_at
    assert read_log(run / "log.jsonl").run["init_from"]["name"] == str(initial)


@pytest.mark.parametrize("change", ["another name", "another content"])
def test_a_run_does_not_resume_with_another_model(change, initial, tiny_data, tmp_path):
    run = tmp_path / "run"
    train(RECIPE.override({"train.stop_at": 8}), tiny_data, run, init_from=initial)
    name = initial
    if change == "another name":
        name = tmp_path / "other.pt"
    else:
        save_checkpoint(initial, {**load_checkpoint(initial), "iteration": 999})
    message = error_of(RECIPE, tiny_data, run, init_from=name)
    assert f"started from {initial}, not from {name}" in message


def test_a_run_with_new_weights_does_not_resume_with_a_model(tiny_run, tiny_data, tmp_path):
    train(TINY.override({"train.stop_at": 8}), tiny_data, tmp_path / "run")
    assert "started from new weights" in error_of(TINY, tiny_data, tmp_path / "run", init_from=tiny_run)


@pytest.mark.parametrize("value", [3, {"name": "a"}, {"name": 3, "sha256": ""}, ["name"]])
def test_an_altered_state_is_refused(value, initial, tiny_data, tmp_path):
    run = tmp_path / "run"
    train(RECIPE.override({"train.stop_at": 8}), tiny_data, run, init_from=initial)
    save_checkpoint(run / "last.pt", {**load_checkpoint(run / "last.pt"), "init_from": value})
    assert "last.pt is corrupted" in error_of(RECIPE, tiny_data, run)


def test_other_settings_of_the_recipe_are_still_compared(initial, tiny_data, tmp_path):
    train(RECIPE.override({"train.stop_at": 8}), tiny_data, tmp_path / "run", init_from=initial)
    for name, value in {"model.dropout": 0.3, "model.block_size": 8, "train.seed": 7}.items():
        assert name in error_of(RECIPE.override({name: value}), tiny_data, tmp_path / "run")


# Forgetting


def test_the_original_data_is_evaluated_too(tiny_run, tiny_data, new_data, tmp_path):
    log = train(RECIPE, new_data, tmp_path / "run", init_from=tiny_run, original_data_dir=tiny_data)
    values = [entry["original_bits_per_byte"] for entry in log.evaluations]
    assert all(math.isfinite(value) for value in values) and len(set(values)) == len(values)
    info = open_token_file(tiny_data / "validation.bin").info
    best = min(read_log(tiny_run / "log.jsonl").evaluations, key=lambda entry: entry["val_loss"])
    assert values[0] == pytest.approx(
        bits_per_byte(best["val_loss"], info.tokens, info.bytes), rel=0.1
    )  # other windows
    without = train(RECIPE, new_data, tmp_path / "without", init_from=tiny_run)
    assert losses(tmp_path / "run") == losses(tmp_path / "without")  # it changes nothing else
    assert "original_bits_per_byte" not in without.evaluations[0]


def test_original_data_with_another_tokenizer_is_refused(tiny_run, tiny_data, tmp_path):
    source = write_stories(tmp_path / "new.txt", random_stories(80, seed=5))
    prepare(DataConfig(source=str(source), tokenizer="bpe:310", validation_fraction=0.3), tmp_path / "other")
    message = error_of(RECIPE, tiny_data, tmp_path / "run", init_from=tiny_run, original_data_dir=tmp_path / "other")
    assert "bpe:310" in message and "bpe:300" in message


def test_fine_tuning_from_the_command_line(tiny_run, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepared = ["prepare", "--source", "synthetic", "--synthetic-genre", "space", "--synthetic-stories", "60"]
    prepared += ["--tokenizer-from", str(tiny_run), "--out", "space"]
    assert main(prepared) == 0 == main(prepared)  # the second time, there is nothing to do
    assert (
        open_token_file("space/train.bin").info.tokenizer_hash
        == open_token_file(tiny_data / "train.bin").info.tokenizer_hash
    )
    command = ["train", "--recipe", "finetune", "--init-from", str(tiny_run), "--original-data-dir", str(tiny_data)]
    command += ["--data-dir", "space", "--checkpoint-dir", "run", "--model.block-size", "16", "--train.device", "cpu"]
    capsys.readouterr()
    assert main([*command, "--train.max-iters", "30", "--train.eval-windows", "8"]) == 0
    printed = capsys.readouterr().out
    for name in ("validation data", "original data"):
        assert f"{name}: " in printed
    assert "bits per byte before fine-tuning" in printed
    evaluations = read_log("run/log.jsonl").evaluations
    assert evaluations[-1]["val_bits_per_byte"] < evaluations[0]["val_bits_per_byte"]
