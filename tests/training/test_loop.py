"""The training step, and runs: what they compute, how they resume, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SAVE_EVERY_UPDATE,
    TINY,
    TINY_EVALUATIONS,
    TINY_UPDATES,
    folder_contents,
    interrupted_in_the_third_update,
    iteration_of,
    losses,
    weights,
)
from torch import Tensor

import storyllm
from storyllm import GPT, RECIPES, StoryLLMError, load, lr_at, read_log, train
from storyllm.checkpoint import load_checkpoint, save_checkpoint
from storyllm.device import PEAK_FLOPS, resolve_device_config
from storyllm.training import loop
from storyllm.training.loop import dropout_seed, evaluations_due, train_step
from storyllm.training.optimizer import make_optimizer
from storyllm.training.run_folder import TrainState

# train_step


@dataclasses.dataclass
class Step:
    """The outcome of one training step."""

    loss: float
    grad_norm: float
    gradients: Tensor  # as the optimizer saw them
    weights: Tensor


def fixed_windows() -> Tensor:
    """8 windows of inputs and targets."""
    return torch.randint(300, (2, 8, 16), generator=torch.Generator().manual_seed(1))


def new_model(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(dataclasses.replace(TINY.model, dropout=dropout))


def step(micro_batch_size: int = 8, windows: int = 8, init_scale: float = 2.0**16, **changes: object) -> Step:
    """One update of a new model on the first of the fixed windows, in updates of 8."""
    config = dataclasses.replace(TINY.train, batch_size=4, gradient_accumulation_steps=2, **changes)
    model = new_model()
    optimizer = make_optimizer(model, config)
    device = resolve_device_config(config, model.config)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, enabled=config.dtype == "float16")
    gradients: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.flatten() for p in model.parameters()))
    x, y = fixed_windows()[:, :windows]
    micro_batches = zip(x.split(micro_batch_size), y.split(micro_batch_size), strict=True)
    loss, norm = train_step(model.loss, micro_batches, optimizer, 0.01, config, device, scaler)
    assert all(p.grad is None for p in model.parameters())
    seen = torch.cat(gradients) if gradients else torch.zeros(0)
    return Step(loss.item(), norm.item(), seen, torch.cat([p.detach().flatten() for p in model.parameters()]))


@pytest.mark.parametrize("size", [4, 2, 1, 3])  # 3 leaves a smaller micro-batch at the end
def test_micro_batches_do_not_change_loss_or_gradients(size):
    full, split = step(8), step(size)
    assert split.loss == pytest.approx(full.loss, rel=1e-6)
    assert split.grad_norm == pytest.approx(full.grad_norm, rel=1e-4)
    torch.testing.assert_close(split.gradients, full.gradients, atol=1e-7, rtol=1e-4)


def test_each_window_of_a_short_last_update_keeps_its_weight():
    short = step(windows=2, grad_clip=0.0)
    model = new_model()
    loss = model.loss(*fixed_windows()[:, :2])
    loss.backward()
    assert short.loss == pytest.approx(loss.item())  # the loss is the mean over the 2 windows
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]) * 2 / 8  # the gradient that of a full update
    torch.testing.assert_close(short.gradients, expected, atol=1e-7, rtol=1e-4)


def test_gradients_are_clipped_after_unscaling():
    plain, scaled = step(grad_clip=0.05), step(grad_clip=0.05, dtype="float16")
    assert plain.grad_norm > 0.05  # before clipping
    assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=0.02)
    for result in (plain, scaled):
        assert result.gradients.norm().item() == pytest.approx(0.05, rel=0.02)


def test_zero_disables_clipping():
    result = step(grad_clip=0.0)
    assert result.gradients.norm().item() == pytest.approx(result.grad_norm, rel=1e-4)
    assert step(grad_clip=1e9).gradients.equal(result.gradients)


def test_an_fp16_overflow_skips_the_update_and_halves_the_scale():
    config = dataclasses.replace(TINY.train, dtype="float16")
    model = new_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer, scaler = make_optimizer(model, config), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    device = resolve_device_config(config, model.config)
    _, norm = train_step(model.loss, [tuple(fixed_windows())], optimizer, 0.01, config, device, scaler)
    assert not math.isfinite(norm)
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def test_parameter_groups_scale_the_learning_rate():
    small, large = (step(optimizer="muon", weight_decay=0.0, muon_lr_scale=scale) for scale in (1.0, 2.0))
    start = torch.cat([p.detach().flatten() for p in new_model().parameters()])
    changes = [(result.weights - start).abs() for result in (small, large)]
    ratios = (changes[1] / changes[0])[changes[0] > 1e-4]
    assert {round(ratio) for ratio in ratios.tolist()} == {1, 2}  # AdamW's parameters and Muon's


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_built_and_trained(name):
    """In its full shape, except for the vocabulary."""
    changes = {"model.vocab_size": 300, "model.dropout": 0.0, "train.device": "cpu", "train.warmup_iters": 0}
    recipe = RECIPES[name].override({**changes, "train.batch_size": 1, "train.gradient_accumulation_steps": 1})
    torch.manual_seed(0)
    model = GPT(recipe.model)
    optimizer, device = make_optimizer(model, recipe.train), resolve_device_config(recipe.train, recipe.model)
    x, y = fixed_windows()[:, :1]
    learning_rate, scaler = lr_at(0, recipe.train), device.grad_scaler()
    loss, _ = train_step(model.loss, [(x, y)], optimizer, learning_rate, recipe.train, device, scaler)
    assert model.loss(x, y).item() < loss.item()


# evaluations_due


@pytest.mark.parametrize(
    ("iteration", "last_evaluation", "next_iteration", "stop_at", "due"),
    [
        (0, -1, 4, None, [0]),
        (0, 0, 4, None, []),  # just resumed
        (4, 0, 8, None, [5]),  # within an update: evaluated before it
        (8, 5, 12, None, [10]),
        (20, 15, 22, None, [20]),
        (22, 20, 22, None, [22]),  # the end
        (22, 22, 22, None, []),
        (8, 5, 12, 9, [9]),  # stops within an update
        (8, 5, 12, 11, [10, 11]),
        (8, 10, 12, None, []),  # resumed after stop_at=10 within an update
        (12, 10, 16, 12, [12]),
        (0, -1, 22, None, [0, 5, 10, 15, 20]),  # an update of all iterations
    ],
)
def test_evaluations_due_match_the_table(iteration, last_evaluation, next_iteration, stop_at, due):
    config = dataclasses.replace(TINY.train, stop_at=stop_at)
    assert evaluations_due(TrainState(iteration, last_evaluation), next_iteration, config) == due


# A run


def test_a_run_learns_and_is_logged(tiny_run, tiny_data):
    log = read_log(tiny_run / "log.jsonl")
    assert [entry["iteration"] for entry in log.evaluations] == TINY_EVALUATIONS
    assert [entry["iteration"] for entry in log.updates] == TINY_UPDATES
    assert [entry["learning_rate"] for entry in log.updates] == [lr_at(i - 1, TINY.train) for i in TINY_UPDATES]
    assert [entry["learning_rate"] for entry in log.evaluations] == [lr_at(i, TINY.train) for i in TINY_EVALUATIONS]
    first, last = log.evaluations[0], log.evaluations[-1]
    assert first["val_loss"] == pytest.approx(math.log(300), abs=0.3)
    assert last["val_loss"] < first["val_loss"] - 0.5
    info = storyllm.open_token_file(tiny_data / "validation.bin").info
    assert last["val_bits_per_byte"] == pytest.approx(last["val_loss"] / math.log(2) * info.tokens / info.bytes)
    assert all(entry["tokens_per_second"] > 0 and entry["seconds_left"] >= 0 for entry in log.updates)
    assert log.updates[-1]["seconds_left"] < log.updates[0]["seconds_left"] + 1
    seconds = [entry["seconds"] for entry in log.updates]
    assert seconds == sorted(seconds)
    assert log.warnings == []


def test_a_run_describes_itself(tiny_run, tiny_data):
    run = json.loads((tiny_run / "log.jsonl").read_text().splitlines()[0])
    assert run["event"] == "run"
    assert run["recipe"]["train"] == dataclasses.asdict(TINY.train)
    assert run["recipe"]["data"]["tokenizer"] == "bpe:300"  # that of the data, not the recipe's
    assert run["parameters"] == GPT(TINY.model).num_parameters()
    assert (run["iteration"], run["device"], run["dtype"]) == (0, "CPU", "float32")
    assert (run["compiled"], run["micro_batch_size"]) == (False, 12)
    assert run["device_description"].startswith("CPU, float32, micro-batch size 12, not compiled")
    assert run["data"]["train"] == dataclasses.asdict(storyllm.open_token_file(tiny_data / "train.bin").info)
    assert run["versions"]["torch"] == torch.__version__


def test_the_best_model_is_that_of_the_lowest_validation_loss(tiny_run, tiny_data):
    log, best = read_log(tiny_run / "log.jsonl"), load_checkpoint(tiny_run / "best_model_params.pt")
    lowest = min(log.evaluations, key=lambda entry: entry["val_loss"])
    assert (best["iteration"], best["val_loss"]) == (lowest["iteration"], lowest["val_loss"])
    report = storyllm.evaluate(load(tiny_run / "best_model_params.pt"), tiny_data / "validation.bin")
    assert report.loss == pytest.approx(best["val_loss"], abs=0.3)  # the complete file, not only the windows


@pytest.mark.parametrize("name", ["fast", "small-vocab"])
def test_fast_recipes_learn_in_twenty_updates(tiny_data, tmp_path, name):
    changes = {"train.max_iters": 20, "train.warmup_iters": 3, "train.batch_size": 4, "train.eval_interval": 20}
    changes |= {"train.eval_windows": 8, "train.device": "cpu", "model.n_layer": 2, "model.n_embd": 96}
    log = train(RECIPES[name].override(changes), tiny_data, tmp_path)
    assert log.evaluations[0]["val_loss"] == pytest.approx(math.log(300), abs=0.2)
    assert log.evaluations[-1]["val_loss"] < 3


@pytest.mark.parametrize(("stop_at", "iteration"), [(10, 8), (11, 8), (8, 8), (20, 20), (21, 20)])
def test_only_complete_updates_count_before_the_end(tiny_data, tmp_path, stop_at, iteration):
    """An evaluation within an update sees the weights before it."""
    log = train(TINY.override({"train.stop_at": stop_at}), tiny_data, tmp_path / "run")
    assert [log.updates[-1]["iteration"], log.evaluations[-1]["iteration"]] == [iteration, stop_at]
    assert iteration_of(tmp_path / "run" / "last.pt") == iteration
    train(TINY.override({"train.stop_at": iteration}), tiny_data, tmp_path / "other")
    assert weights(tmp_path / "run") == weights(tmp_path / "other")


def test_evaluating_more_often_changes_nothing_else(tiny_run, tiny_data, tmp_path):
    train(TINY.override({"train.eval_interval": 1}), tiny_data, tmp_path)
    updates, evaluations = losses(tmp_path)
    assert weights(tmp_path) == weights(tiny_run)
    assert updates == losses(tiny_run)[0]
    assert len(evaluations) == 23
    assert [entry for entry in evaluations if entry["iteration"] in TINY_EVALUATIONS] == losses(tiny_run)[1]


def test_the_seed_determines_the_run(tiny_run, tiny_data, tmp_path):
    train(TINY, tiny_data, tmp_path / "same")
    assert weights(tmp_path / "same") == weights(tiny_run)
    assert losses(tmp_path / "same") == losses(tiny_run)
    train(TINY.override({"train.seed": 1, "train.stop_at": 4}), tiny_data, tmp_path / "other")
    assert losses(tmp_path / "other")[1][0] != losses(tiny_run)[1][0]


def test_every_update_of_every_seed_has_its_own_dropout():
    seeds = [dropout_seed(seed, iteration) for seed in (0, 1, 2**63 - 1) for iteration in range(100)]
    assert len(set(seeds)) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)  # as PyTorch's generators require


def test_training_leaves_the_global_generators_alone(tiny_data, tmp_path):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    train(TINY.override({"train.stop_at": 4}), tiny_data, tmp_path)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert numpy_state == np.random.get_state()[1].tolist()


def test_the_default_dtype_changes_nothing(tiny_run, tiny_data, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        train(TINY, tiny_data, tmp_path)
        assert torch.get_default_dtype() == torch.float64
        stories = load(tmp_path / "last.pt", device="cpu").generate(["One day", "A"], max_new_tokens=20, seed=0)
        loss = storyllm.evaluate(load(tmp_path / "last.pt", device="cpu"), tiny_data / "validation.bin").loss
    finally:
        torch.set_default_dtype(torch.float32)
    assert weights(tmp_path) == weights(tiny_run)
    assert losses(tmp_path) == losses(tiny_run)
    storyteller = load(tmp_path / "last.pt", device="cpu")
    assert stories == storyteller.generate(["One day", "A"], max_new_tokens=20, seed=0)
    assert loss == storyllm.evaluate(storyteller, tiny_data / "validation.bin").loss


def test_mfu_is_logged_if_the_peak_flops_are_known(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(PEAK_FLOPS, "CPU", 1e9)
    log = train(TINY.override({"train.stop_at": 8, "train.dtype": "bfloat16"}), tiny_data, tmp_path)
    assert all(entry["mfu"] > 0 for entry in log.updates)


@pytest.mark.timeout(600)  # for the C++ compiler on a busy machine
def test_a_compiled_run_agrees_up_to_rounding(tiny_data, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler found")
    # The compiler draws dropout in another order.
    recipe = TINY.override({"model.dropout": 0.0, "train.micro_batch_size": 5, "train.stop_at": 8, "model.n_layer": 1})
    plain = train(recipe, tiny_data, tmp_path / "plain")
    compiled = train(recipe.override({"train.compile": True}), tiny_data, tmp_path / "compiled")
    assert compiled.run["compiled"] and compiled.warnings == []
    for one, two in zip(plain.updates, compiled.updates, strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-4)
    assert not [name for name in weights(tmp_path / "compiled") if "_orig_mod" in name]


def test_a_run_whose_compilation_fails_trains_without_it(tiny_run, tiny_data, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", lambda function, **_: fail)
    with pytest.warns(UserWarning, match=r"torch\.compile failed"):
        log = train(TINY.override({"train.compile": True}), tiny_data, tmp_path)
    assert not log.run["compiled"]
    assert "RuntimeError" in log.run["device_description"]
    assert "torch.compile failed" in log.warnings[0]["message"]
    assert weights(tmp_path) == weights(tiny_run)


# Resuming


@pytest.mark.parametrize("stops", [[1], [4, 8, 12, 16, 20], [7], [10, 13, 21]])
def test_an_interrupted_run_equals_an_uninterrupted_one(tiny_run, tiny_data, tmp_path, stops):
    for stop_at in stops:
        train(TINY.override({"train.stop_at": stop_at}), tiny_data, tmp_path)
    train(TINY, tiny_data, tmp_path)
    updates, evaluations = losses(tmp_path)
    assert weights(tmp_path) == weights(tiny_run)
    assert weights(tmp_path, "best_model_params.pt") == weights(tiny_run, "best_model_params.pt")
    assert updates == losses(tiny_run)[0]
    assert [entry for entry in evaluations if entry["iteration"] in TINY_EVALUATIONS] == losses(tiny_run)[1]


MUON_SHUFFLED = {"train.optimizer": "muon", "train.windows": "shuffled", "train.schedule": "wsd"}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({**MUON_SHUFFLED, "train.decay_fraction": 0.4}, id="muon"),
        pytest.param({**MUON_SHUFFLED, "train.dtype": "float16"}, id="muon-fp16"),
        pytest.param({"train.dtype": "float16"}, id="adamw-fp16"),
    ],
)
def test_other_optimizers_and_formats_resume_too(tiny_data, tmp_path, changes):
    recipe = TINY.override(changes)
    train(recipe, tiny_data, tmp_path / "uninterrupted")
    for stop_at in (9, 17, 22):
        train(recipe.override({"train.stop_at": stop_at}), tiny_data, tmp_path / "interrupted")
    assert weights(tmp_path / "interrupted") == weights(tmp_path / "uninterrupted")
    assert losses(tmp_path / "interrupted")[0] == losses(tmp_path / "uninterrupted")[0]
    assert bool(load_checkpoint(tmp_path / "interrupted" / "last.pt")["scaler"]) == ("train.dtype" in changes)


def test_after_a_crash_the_log_is_truncated_to_the_saved_state(tiny_run, tiny_data, tmp_path):
    """The state is that of iteration 8; the log is further, and ends within a line."""
    train(TINY.override({"train.stop_at": 8}), tiny_data, tmp_path)
    state = (tmp_path / "last.pt").read_bytes()
    train(TINY.override({"train.stop_at": 16}), tiny_data, tmp_path)
    (tmp_path / "last.pt").write_bytes(state)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"event": "upd')
    train(TINY, tiny_data, tmp_path)
    assert weights(tmp_path) == weights(tiny_run)
    assert losses(tmp_path)[0] == losses(tiny_run)[0]


def test_a_run_without_its_log_starts_a_new_one(tiny_run, tiny_data, tmp_path):
    train(TINY.override({"train.stop_at": 8}), tiny_data, tmp_path)
    (tmp_path / "log.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"log\.jsonl"):
        log = train(TINY, tiny_data, tmp_path)
    assert [entry["iteration"] for entry in log.updates] == [12, 16, 20, 22]
    assert [entry["iteration"] for entry in log.warnings] == [8]
    assert weights(tmp_path) == weights(tiny_run)


def test_a_run_without_its_best_model_writes_a_new_one(tiny_data, tmp_path):
    train(TINY.override({"train.stop_at": 8}), tiny_data, tmp_path)
    (tmp_path / "best_model_params.pt").unlink()
    with pytest.warns(UserWarning, match="best_model_params"):
        train(TINY, tiny_data, tmp_path)
    assert load(tmp_path / "best_model_params.pt")


def test_a_run_falls_back_to_the_previous_state(tiny_run, tiny_data, tmp_path):
    train(TINY.override({"train.stop_at": 16, **SAVE_EVERY_UPDATE}), tiny_data, tmp_path)
    (tmp_path / "last.pt").write_bytes(b"corrupted")
    with pytest.warns(UserWarning, match="corrupted"):
        log = train(TINY, tiny_data, tmp_path)
    assert "last.1.pt" in log.warnings[0]["message"]
    assert weights(tmp_path) == weights(tiny_run)
    assert losses(tmp_path)[0] == losses(tiny_run)[0]


def test_an_interrupt_saves_and_returns_the_log_so_far(tiny_run, tiny_data, tmp_path, capsys):
    with interrupted_in_the_third_update():
        log = train(TINY, tiny_data, tmp_path)
    assert log.interrupted == signal.SIGINT
    assert [entry["iteration"] for entry in log.updates] == [4, 8, 12]  # the update is completed
    assert iteration_of(tmp_path / "last.pt") == 12
    assert log.evaluations[-1]["iteration"] == 12  # its weights are evaluated
    assert load_checkpoint(tmp_path / "best_model_params.pt")["iteration"] == 12
    assert "interrupted" in capsys.readouterr().out
    log = train(TINY, tiny_data, tmp_path)
    assert log.interrupted == 0
    assert "resuming at iteration 12" in capsys.readouterr().out
    assert weights(tmp_path) == weights(tiny_run)


def test_a_second_interrupt_skips_the_evaluation_after_the_first(tiny_data, tmp_path, monkeypatch):
    clip, evaluate = torch.nn.utils.clip_grad_norm_, loop.estimate_loss

    def interrupt_after_the_start(*arguments: object) -> dict[str, float]:
        if iteration_of(tmp_path / "last.pt") == 4:  # the run has stopped and saved
            signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: signal.raise_signal(signal.SIGINT) or clip(*a))
    monkeypatch.setattr(loop, "estimate_loss", interrupt_after_the_start)  # no other function runs just then
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tiny_data, tmp_path)
    assert iteration_of(tmp_path / "last.pt") == 4
    assert [entry["iteration"] for entry in read_log(tmp_path / "log.jsonl").evaluations] == [0]


def test_the_evaluation_interval_may_change_when_a_run_resumes(tiny_run, tiny_data, tmp_path):
    train(TINY.override({"train.stop_at": 8}), tiny_data, tmp_path)
    log = train(TINY.override({"train.eval_interval": 2}), tiny_data, tmp_path)
    assert [entry["iteration"] for entry in log.evaluations] == [0, 5, *range(8, 23, 2)]
    assert weights(tmp_path) == weights(tiny_run)


def test_the_micro_batch_size_is_kept_when_a_run_resumes(tiny_data, tmp_path):
    train(TINY.override({"train.micro_batch_size": 5, "train.stop_at": 8}), tiny_data, tmp_path)
    assert train(TINY.override({"train.stop_at": 12}), tiny_data, tmp_path).run["micro_batch_size"] == 5
    resized = train(TINY.override({"train.micro_batch_size": 6}), tiny_data, tmp_path)
    assert resized.run["micro_batch_size"] == 6  # unless another one is requested


def test_a_finished_run_returns_its_log_and_changes_nothing(tiny_run, tiny_data, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    before = folder_contents(folder)
    for stop_at in (None, 22, 12):
        log = train(TINY.override({"train.stop_at": stop_at}), tiny_data, folder)
        assert "already finished" in capsys.readouterr().out
        assert log == read_log(tiny_run / "log.jsonl")
    assert folder_contents(folder) == before


def test_a_finished_run_with_an_empty_log_returns(tiny_run, tiny_data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    (folder / "log.jsonl").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"log\.jsonl lost"):
        assert train(TINY, tiny_data, folder).evaluations == []


def test_a_larger_max_iters_extends_the_schedule_with_a_warning(tiny_data, tmp_path):
    train(TINY.override({"train.max_iters": 20}), tiny_data, tmp_path)
    longer = TINY.override({"train.max_iters": 32})
    with pytest.warns(UserWarning, match="max_iters was 20, now 32"):
        log = train(longer, tiny_data, tmp_path)
    assert log.evaluations[-1]["iteration"] == 32
    assert log.updates[-1]["learning_rate"] == lr_at(31, longer.train)
    assert [(entry["iteration"], "max_iters" in entry["message"]) for entry in log.warnings] == [(20, True)]


# Errors


def test_another_recipe_or_other_data_is_refused(tiny_run, tiny_data, tmp_path):
    before = folder_contents(tiny_run)
    with pytest.raises(StoryLLMError, match=r"train\.seed was 0, now 1"):
        train(TINY.override({"train.seed": 1}), tiny_data, tiny_run)
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(f"The pig ate {n} figs." for n in range(500)))
    config = storyllm.DataConfig(source=str(tmp_path / "stories.txt"), tokenizer="bpe:300")
    storyllm.prepare(config, tmp_path / "data")
    with pytest.raises(StoryLLMError, match="other data"):
        train(TINY, tmp_path / "data", tiny_run)
    assert folder_contents(tiny_run) == before


@pytest.mark.parametrize("name", ["best_model_params.pt", "log.jsonl"])
def test_a_new_run_does_not_overwrite_the_files_of_another(tiny_run, tiny_data, tmp_path, name):
    shutil.copy(tiny_run / name, tmp_path)
    before = folder_contents(tmp_path)
    with pytest.raises(StoryLLMError, match=name):
        train(TINY, tiny_data, tmp_path)
    assert folder_contents(tmp_path) == before


def test_missing_data_is_an_error_and_creates_no_folder(tmp_path):
    with pytest.raises(StoryLLMError, match="storyllm prepare"):
        train(TINY, tmp_path / "missing", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_context_longer_than_the_data_is_an_error(tiny_data, tmp_path):
    with pytest.raises(StoryLLMError, match=r"\.bin: .*100001.*block_size"):
        train(TINY.override({"model.block_size": 100_000}), tiny_data, tmp_path)


@pytest.mark.parametrize("wrong", ["demo", TINY.train, None])
def test_anything_but_a_recipe_is_an_error(tiny_data, tmp_path, wrong):
    with pytest.raises(StoryLLMError, match=f"{type(wrong).__name__}.*Recipe"):
        train(wrong, tiny_data, tmp_path)


def test_a_second_run_in_another_thread_is_refused(tiny_run, tiny_data, tmp_path, monkeypatch):
    """Both would draw dropout from the same generator."""
    clip, errors = torch.nn.utils.clip_grad_norm_, []

    def second_run() -> None:
        with pytest.raises(StoryLLMError, match="another thread") as caught:
            train(TINY, tiny_data, tmp_path / "second")
        errors.append(caught.value)

    def start_another_run_in_the_first_update(*arguments: object) -> Tensor:
        if not errors:
            thread = threading.Thread(target=second_run)
            thread.start()
            thread.join()
        return clip(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", start_another_run_in_the_first_update)
        train(TINY, tiny_data, tmp_path / "first")
    assert errors
    assert weights(tmp_path / "first") == weights(tiny_run)
    assert not (tmp_path / "second").exists()
    train(TINY.override({"train.stop_at": 4}), tiny_data, tmp_path / "second")  # free again


# What notices a NaN in the weights first: a loss, the validation loss, or saving.
@pytest.mark.parametrize("changes", [{"train.eval_interval": 100}, {"train.eval_interval": 5}, SAVE_EVERY_UPDATE])
def test_a_loss_or_weights_that_are_not_finite_are_never_saved(tiny_data, tmp_path, changes):
    recipe = TINY.override(changes)
    train(recipe.override({"train.stop_at": 8}), tiny_data, tmp_path)
    saved: Path = tmp_path / "last.pt"
    poisoned = load_checkpoint(saved)
    poisoned["optimizer"]["state"][0]["exp_avg"].fill_(math.nan)
    save_checkpoint(saved, poisoned)
    before = weights(tmp_path), weights(tmp_path, "best_model_params.pt")
    with pytest.raises(StoryLLMError, match=r"(nan|NaN).* at iteration 1\d.*train\.learning_rate"):
        train(recipe, tiny_data, tmp_path)
    assert (weights(tmp_path), weights(tmp_path, "best_model_params.pt")) == before
