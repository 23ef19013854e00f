"""The training loop: what it computes, that it can be cut anywhere, and what it refuses."""

import dataclasses
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import storyllm
from storyllm import GPT, RECIPES, GPTConfig, Recipe, StoryLLMError, TrainConfig, load, lr_at, read_log, train, training
from storyllm.checkpoint import load_checkpoint
from storyllm.device import choose_machine
from storyllm.files import read_json, write_json
from storyllm.optim import make_optimizer
from storyllm.pace import flops_per_token
from storyllm.training import train_step

# 22 iterations in updates of 4: five whole updates, and two batches left over for a last one.
TINY = Recipe(
    model=GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.1),
    train=TrainConfig(
        max_iters=22,
        batch_size=3,
        gradient_accumulation_steps=4,
        learning_rate=1e-2,
        min_lr=1e-3,
        warmup_iters=4,
        eval_interval=5,
        eval_windows=6,
        device="cpu",
    ),
)


def weights(folder, name="last.pt"):
    return {key: tensor.tolist() for key, tensor in load_checkpoint(folder / name)["model"].items()}


def losses(folder):
    """Everything in the log that does not depend on the clock."""
    log = read_log(folder / "log.jsonl")
    keep = ("iteration", "train_loss", "val_loss", "val_bits_per_byte", "learning_rate", "grad_norm")
    return [[{k: entry[k] for k in keep if k in entry} for entry in part] for part in (log.updates, log.evaluations)]


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """The folder of the tiny run, never cut."""
    folder = tmp_path_factory.mktemp("whole")
    train(TINY, tiny_data, folder)
    return folder


@pytest.mark.parametrize("name", ["fast", "small-vocab"])
def test_the_recipes_that_learn_fast_do(tiny_data, tmp_path, name):
    """Twenty updates of two windows bring the loss from ln(300) = 5.7 to under 2; faithful would be in its warm-up."""
    changes = {"train.max_iters": 20, "train.warmup_iters": 3, "train.batch_size": 2, "train.eval_interval": 20}
    recipe = RECIPES[name].override({**changes, "train.eval_windows": 8, "train.device": "cpu"})
    log = train(recipe, tiny_data, tmp_path)
    assert log.evaluations[0]["val_loss"] == pytest.approx(math.log(300), abs=0.2)
    assert log.evaluations[-1]["val_loss"] < 2


# What a step computes


def step(micro_batch_size, dtype="float32", windows=8, **changes):
    """One update of a fresh model on `windows` fixed windows; returns loss, norm, gradients as clipped, weights."""
    config = dataclasses.replace(
        TINY.train, batch_size=4, gradient_accumulation_steps=2, dtype=dtype, micro_batch_size=micro_batch_size
    )
    config = dataclasses.replace(config, **changes)
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY.model, dropout=0.0)).train()
    optimizer = make_optimizer(model, config)
    machine = choose_machine(config, model.config)
    x, y = torch.randint(300, (2, 8, 16), generator=torch.Generator().manual_seed(1))
    pieces = zip(x[:windows].split(micro_batch_size), y[:windows].split(micro_batch_size), strict=True)
    gradients = []
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in model.parameters()))
    loss, norm = train_step(model.loss, pieces, optimizer, machine.grad_scaler(), machine, config, 0.01)
    return loss.item(), norm.item(), gradients, [p.detach() for p in model.parameters()]


def test_micro_batches_leave_loss_and_gradients_alone():
    one = step(8)
    for size in (4, 2, 1, 3):  # 3: the pieces need not be of one size
        other = step(size)
        assert other[0] == pytest.approx(one[0], rel=1e-6)
        for a, b in zip(one[2], other[2], strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_an_update_of_fewer_batches_is_divided_as_usual():
    full, part = step(8, windows=8, grad_clip=0.0), step(8, windows=2, grad_clip=0.0)
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY.model, dropout=0.0))
    x, y = torch.randint(300, (2, 8, 16), generator=torch.Generator().manual_seed(1))
    model.loss(x[:2], y[:2]).backward()
    for got, parameter in zip(part[2], model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad * 2 / 8, atol=1e-7, rtol=1e-4)
    assert part[0] == pytest.approx(model.loss(x[:2], y[:2]).item())  # the loss is still a mean
    assert full[0] != part[0]


def test_gradients_are_clipped_after_the_scale_is_taken_out():
    plain, scaled = step(8, grad_clip=0.05), step(8, dtype="float16", grad_clip=0.05)
    assert plain[1] > 0.05
    assert scaled[1] == pytest.approx(plain[1], rel=0.02)
    for _, _, gradients, _ in (plain, scaled):
        assert torch.cat([g.flatten() for g in gradients]).norm().item() == pytest.approx(0.05, rel=0.02)
    unclipped = step(8, grad_clip=0.0)
    assert torch.cat([g.flatten() for g in unclipped[2]]).norm().item() == pytest.approx(unclipped[1], rel=1e-4)


def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale():
    config = dataclasses.replace(TINY.train, dtype="float16")
    torch.manual_seed(0)
    model = GPT(TINY.model)
    before = [p.detach().clone() for p in model.parameters()]
    machine, optimizer = choose_machine(config, model.config), make_optimizer(model, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    x = torch.randint(300, (2, 4, 16))
    _, norm = train_step(model.loss, [(x[0], x[1])], optimizer, scaler, machine, config, 0.01)
    assert not math.isfinite(norm)
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_training_step_can_be_seen_whole():
    assert len(inspect.getsource(train_step).splitlines()) <= 40


# What a run does


def test_the_run_learns_and_says_what_it_is(whole, tiny_data):
    log = read_log(whole / "log.jsonl")
    first = json.loads((whole / "log.jsonl").read_text().splitlines()[0])
    assert first["event"] == "run"
    assert first["recipe"]["train"] == dataclasses.asdict(TINY.train)
    assert first["recipe"]["data"]["tokenizer"] == "bpe:300"  # the data's own, not the recipe's
    assert first["versions"]["torch"] == torch.__version__
    assert first["device"].startswith("CPU, float32")
    assert [entry["iteration"] for entry in log.evaluations] == [0, 5, 10, 15, 20, 22]
    assert [entry["iteration"] for entry in log.updates] == [4, 8, 12, 16, 20, 22]
    assert log.evaluations[0]["val_loss"] == pytest.approx(math.log(300), abs=0.3)
    assert log.evaluations[-1]["val_loss"] < log.evaluations[0]["val_loss"] - 0.5
    assert [entry["learning_rate"] for entry in log.updates] == [
        lr_at(i - 1, TINY.train) for i in (4, 8, 12, 16, 20, 22)
    ]
    info = json.loads((tiny_data / "validation.json").read_text())
    last = log.evaluations[-1]
    assert last["val_bits_per_byte"] == pytest.approx(last["val_loss"] / math.log(2) * info["tokens"] / info["bytes"])
    assert not log.interrupted


def test_the_best_weights_are_those_of_the_lowest_validation_loss(whole, tiny_data):
    log, best = read_log(whole / "log.jsonl"), load_checkpoint(whole / "best_model_params.pt")
    lowest = min(log.evaluations, key=lambda entry: entry["val_loss"])
    assert (best["iteration"], best["val_loss"]) == (lowest["iteration"], lowest["val_loss"])
    assert not [name for name in best["model"] if "_orig_mod" in name]
    report = storyllm.evaluate(load(whole / "best_model_params.pt"), tiny_data / "validation.bin")
    assert report.loss == pytest.approx(best["val_loss"], abs=0.3)  # the whole file, not only the fixed windows
    assert load(whole / "last.pt").tell("One day", max_new_tokens=5, seed=0)


def test_at_iteration_i_the_weights_have_had_the_whole_updates_only(whole, tiny_data, tmp_path):
    """An evaluation inside an update sees the weights before it; the one at the end sees the leftover batches too."""
    for stop_at, same_as in [(10, 8), (11, 8), (8, 8), (20, 20), (21, 20)]:
        for stop in (stop_at, same_as):
            train(TINY.override({"train.stop_at": stop}), tiny_data, tmp_path / f"{stop_at}-{stop}")
        folders = [tmp_path / f"{stop_at}-{stop}" for stop in (stop_at, same_as)]
        assert weights(folders[0]) == weights(folders[1])
        assert read_log(folders[0] / "log.jsonl").evaluations[-1]["iteration"] == stop_at
        assert load_checkpoint(folders[0] / "last.pt")["iteration"] == same_as
    assert weights(whole) != weights(tmp_path / "21-21")


def test_evaluating_more_often_changes_nothing_else(whole, tiny_data, tmp_path):
    train(TINY.override({"train.eval_interval": 1}), tiny_data, tmp_path)
    often, seldom = losses(tmp_path), losses(whole)
    assert weights(tmp_path) == weights(whole)
    assert often[0] == seldom[0]
    assert len(often[1]) == 23
    assert [entry for entry in often[1] if entry["iteration"] in (0, 5, 10, 15, 20, 22)] == seldom[1]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(whole, tiny_data, tmp_path):
    train(TINY, tiny_data, tmp_path / "same")
    train(TINY.override({"train.seed": 1}), tiny_data, tmp_path / "other")
    assert weights(tmp_path / "same") == weights(whole)
    assert losses(tmp_path / "same") == losses(whole)
    assert losses(tmp_path / "other")[1][0] != losses(whole)[1][0]


def test_training_leaves_the_global_generators_alone(tiny_data, tmp_path):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    train(TINY.override({"train.stop_at": 4}), tiny_data, tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert numpy_before == np.random.get_state()[1].tolist()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_built_and_takes_a_step(name):
    """Whole in its shape and settings; one window of data and a small vocabulary keep it short."""
    changes = {"model.vocab_size": 300, "model.dropout": 0.0, "train.device": "cpu", "train.warmup_iters": 0}
    recipe = RECIPES[name].override({**changes, "train.batch_size": 1, "train.gradient_accumulation_steps": 1})
    torch.manual_seed(0)
    model = GPT(recipe.model)
    optimizer, machine = make_optimizer(model, recipe.train), choose_machine(recipe.train, recipe.model)
    x, y = torch.randint(300, (2, 1, 64), generator=torch.Generator().manual_seed(1))
    rate = lr_at(0, recipe.train)
    before, _ = train_step(model.loss, [(x, y)], optimizer, machine.grad_scaler(), machine, recipe.train, rate)
    assert model.loss(x, y).item() < before.item()


# Cut and continued


@pytest.mark.parametrize("cuts", [[0], [4, 8, 12, 16, 20], [7], [10, 13, 21]])
def test_cut_and_continued_equals_uninterrupted_to_the_bit(whole, tiny_data, tmp_path, cuts):
    for stop_at in [max(1, cut) for cut in cuts]:
        train(TINY.override({"train.stop_at": stop_at}), tiny_data, tmp_path)
    train(TINY, tiny_data, tmp_path)
    updates, evaluations = losses(tmp_path)
    expected = losses(whole)
    assert weights(tmp_path) == weights(whole)
    assert weights(tmp_path, "best_model_params.pt") == weights(whole, "best_model_params.pt")
    assert updates == expected[0]
    assert [entry for entry in evaluations if entry["iteration"] in (0, 5, 10, 15, 20, 22)] == expected[1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_muon_and_shuffled_windows_continue_too(tiny_data, tmp_path, dtype):
    changes = {
        "train.optimizer": "muon",
        "train.windows": "shuffled",
        "train.schedule": "flat",
        "train.decay_share": 0.4,
    }
    recipe = TINY.override({**changes, "train.dtype": dtype})
    train(recipe, tiny_data, tmp_path / "whole")
    for stop_at in (9, 17):
        train(recipe.override({"train.stop_at": stop_at}), tiny_data, tmp_path / "cut")
    train(recipe, tiny_data, tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert losses(tmp_path / "cut")[0] == losses(tmp_path / "whole")[0]


def test_fp16_with_its_scaler_continues_too(tiny_data, tmp_path):
    recipe = TINY.override({"train.dtype": "float16"})
    train(recipe, tiny_data, tmp_path / "whole")
    train(recipe.override({"train.stop_at": 9}), tiny_data, tmp_path / "cut")
    train(recipe, tiny_data, tmp_path / "cut")
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["scaler"]
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_what_the_log_says_after_the_last_saving_is_said_again_once(whole, tiny_data, tmp_path):
    """As after a cut of power: the state is of iteration 8, the log is further on and ends within a line."""
    train(TINY.override({"train.stop_at": 8}), tiny_data, tmp_path)
    state = (tmp_path / "last.pt").read_bytes()
    train(TINY.override({"train.stop_at": 16}), tiny_data, tmp_path)
    (tmp_path / "last.pt").write_bytes(state)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"event": "upd')
    train(TINY, tiny_data, tmp_path)
    assert weights(tmp_path) == weights(whole)
    assert losses(tmp_path)[0] == losses(whole)[0]


PROGRAM = """
import json, sys, storyllm
recipe = storyllm.Recipe.from_dict(json.loads(sys.argv[1]))
log = storyllm.train(recipe, sys.argv[2], sys.argv[3])
sys.exit(130 if log.interrupted else 0)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_or_killed_continues_to_the_same_bits(how, tiny_data, tmp_path):
    recipe = TINY.override({"train.max_iters": 400, "train.eval_interval": 100, "train.checkpoint_minutes": 0.0})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(recipe.to_dict()), str(tiny_data), str(tmp_path / "cut")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    log = tmp_path / "cut" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 12):
        time.sleep(0.02)
    process.send_signal(how)
    assert process.wait(60) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert 0 < load_checkpoint(tmp_path / "cut" / "last.pt")["iteration"] < 400
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    train(recipe, tiny_data, tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_an_interrupt_saves_and_returns_what_there_is(tiny_data, tmp_path, monkeypatch, capsys):
    steps = []

    def stop_in_the_third_step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(training, "train_step", stop_in_the_third_step)
    log = train(TINY, tiny_data, tmp_path)
    assert log.interrupted
    assert [entry["iteration"] for entry in log.updates] == [4, 8]
    assert "interrupted" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "last.pt")["iteration"] == 8


def test_the_number_of_windows_at_once_is_kept(tiny_data, tmp_path):
    train(TINY.override({"train.micro_batch_size": 5, "train.stop_at": 8}), tiny_data, tmp_path)
    assert train(TINY, tiny_data, tmp_path).run["micro_batch_size"] == 5


def test_a_finished_run_says_so_and_ends_well(whole, tiny_data, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    log = train(TINY, tiny_data, tmp_path / "run")
    assert "finished already" in capsys.readouterr().out
    assert log.evaluations == read_log(whole / "log.jsonl").evaluations
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_more_iterations_stretch_the_schedule_and_it_says_so(tiny_data, tmp_path, capsys):
    """A run that ended with a whole update: nothing is lost by going on."""
    train(TINY.override({"train.max_iters": 20}), tiny_data, tmp_path)
    log = train(TINY.override({"train.max_iters": 32}), tiny_data, tmp_path)
    assert "max_iters was 20, now 32" in capsys.readouterr().out
    assert log.evaluations[-1]["iteration"] == 32
    assert log.updates[-1]["learning_rate"] == lr_at(31, dataclasses.replace(TINY.train, max_iters=32))


# What it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.n_layer": 3}, "model.n_layer was 2, now 3"),
        ({"train.learning_rate": 1e-3}, "train.learning_rate was 0.01, now 0.001"),
        ({"train.seed": 9, "train.batch_size": 4}, "train.batch_size was 3, now 4; train.seed was 0, now 9"),
        ({"train.max_iters": 10, "train.warmup_iters": 4}, "has 22 iterations, max_iters is 10"),
    ],
)
def test_another_recipe_is_refused_by_what_differs(whole, tiny_data, changes, message):
    with pytest.raises(StoryLLMError) as caught:
        train(TINY.override(changes), tiny_data, whole)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_data_is_refused(whole, tmp_path):
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(f"The pig ate {n} figs." for n in range(500)))
    storyllm.prepare(storyllm.DataConfig(source=str(tmp_path / "stories.txt"), tokenizer="bpe:257"), tmp_path / "data")
    with pytest.raises(StoryLLMError, match="was trained on other data"):
        train(TINY, tmp_path / "data", whole)


def test_data_that_is_missing_or_mixed_is_refused(tiny_data, tmp_path):
    with pytest.raises(StoryLLMError, match="storyllm prepare"):
        train(TINY, tmp_path / "nothing", tmp_path / "run")
    shutil.copytree(tiny_data, tmp_path / "data")
    vocabulary = read_json(tmp_path / "data" / "vocabulary.json")
    vocabulary["tokens"] = vocabulary["tokens"].rsplit(" ", 1)[0]
    write_json(tmp_path / "data" / "vocabulary.json", vocabulary)
    with pytest.raises(StoryLLMError, match="not made with the vocabulary beside it"):
        train(TINY, tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_or_foreign_state_is_refused_and_left_alone(whole, tiny_data, tmp_path):
    """Where no earlier one is whole."""
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("last.*.pt"))
    state = tmp_path / "run" / "last.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(StoryLLMError, match="damaged"):
        train(TINY, tiny_data, tmp_path / "run")
    assert state.stat().st_size == 1000
    shutil.copy(whole / "best_model_params.pt", state)
    with pytest.raises(StoryLLMError, match="no training state"):
        train(TINY, tiny_data, tmp_path / "run")


@pytest.mark.parametrize("name", ["best_model_params.pt", "log.jsonl"])
def test_files_of_a_run_without_its_state_are_not_written_over(whole, tiny_data, tmp_path, name):
    shutil.copy(whole / name, tmp_path)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(StoryLLMError, match=f"holds the {name} of a run whose last.pt is not there"):
        train(TINY, tiny_data, tmp_path)
    assert (tmp_path / name).read_bytes() == before


def test_a_lost_log_is_begun_again(whole, tiny_data, tmp_path):
    train(TINY.override({"train.stop_at": 8}), tiny_data, tmp_path)
    (tmp_path / "log.jsonl").unlink()
    log = train(TINY, tiny_data, tmp_path)
    assert [entry["iteration"] for entry in log.updates] == [12, 16, 20, 22]
    assert weights(tmp_path) == weights(whole)


def test_a_context_longer_than_the_data_is_refused(tiny_data, tmp_path):
    with pytest.raises(StoryLLMError, match="a window of 100000 needs 100001"):
        train(TINY.override({"model.block_size": 100_000}), tiny_data, tmp_path)


def test_a_loss_that_is_not_finite_stops_and_poisons_nothing(tiny_data, tmp_path):
    train(TINY.override({"train.stop_at": 8}), tiny_data, tmp_path)
    before = weights(tmp_path), weights(tmp_path, "best_model_params.pt")
    poisoned = load_checkpoint(tmp_path / "last.pt")
    poisoned["optimizer"]["state"][0]["exp_avg"].fill_(math.nan)
    storyllm.checkpoint.save_checkpoint(tmp_path / "last.pt", poisoned)
    with pytest.raises(StoryLLMError, match=r"the loss is nan, .* nan at iteration 15, learning rate \d"):
        train(TINY, tiny_data, tmp_path)
    assert (weights(tmp_path), weights(tmp_path, "best_model_params.pt")) == before


def test_where_compilation_fails_the_run_goes_on_without_it(whole, tiny_data, tmp_path, monkeypatch, capsys):
    def no_compiler(function, dynamic):
        def fail(*args):
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    log = train(TINY.override({"train.compile": True}), tiny_data, tmp_path)
    assert log.run["device"].endswith("compiled (as asked for), which failed (RuntimeError): not compiled")
    assert "torch.compile does not work here (RuntimeError): going on without it" in capsys.readouterr().out
    assert weights(tmp_path) == weights(whole)


@pytest.mark.parametrize("compiler", ["real", "pretended"])
def test_a_compiled_run_is_the_same_to_rounding(tiny_data, tmp_path, monkeypatch, compiler):
    recipe = TINY.override({"model.dropout": 0.0, "train.micro_batch_size": 5})  # a compiler draws dropout its own way
    plain = train(recipe, tiny_data, tmp_path / "plain")
    sizes = set()

    def pretended(function, dynamic):
        return lambda x, y: sizes.add(len(x)) or function(x, y)

    if compiler == "pretended":
        monkeypatch.setattr(torch, "compile", pretended)
    elif shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler on this machine")
    compiled = train(recipe.override({"train.compile": True}), tiny_data, tmp_path / "compiled")
    for one, other in zip(compiled.updates, plain.updates, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
    assert sizes == ({5} if compiler == "pretended" else set())  # the rest of an update is not compiled for itself


def test_a_run_says_how_long_it_will_take(tiny_data, tmp_path, monkeypatch, capsys):
    asked = []

    def seconds_left(pace, windows, evaluations):
        asked.append((windows, evaluations))
        return 120.0 * windows

    monkeypatch.setattr(training.Pace, "seconds_left", seconds_left)
    log = train(TINY, tiny_data, tmp_path)
    # In updates of 4 batches of 3 windows, the last of 2; evaluations at 0, 5, 10, 15, 20 and 22.
    assert asked == [(66, 6), (54, 5), (42, 4), (30, 3), (18, 2), (6, 2), (0, 1)]
    assert "about 2.2 hours for 22 iterations" in capsys.readouterr().out
    assert [entry["seconds_left"] for entry in log.updates] == [120 * windows for windows, _ in asked[1:]]


def test_on_a_gpu_whose_rate_is_known_the_log_says_how_much_of_it_was_used(tiny_data, tmp_path, monkeypatch, capsys):
    choose = training.choose_machine
    monkeypatch.setattr(training, "choose_machine", lambda *a: dataclasses.replace(choose(*a), peak_flops=1e12))
    log = train(TINY, tiny_data, tmp_path)
    for entry in log.updates:
        expected = entry["tokens_per_second"] * flops_per_token(storyllm.Recipe.from_dict(log.run["recipe"]).model)
        assert entry["mfu"] == pytest.approx(expected / 1e12, abs=1e-4)
    assert "% of the GPU" in capsys.readouterr().out


def test_other_things_than_a_recipe_are_refused(tiny_data, tmp_path):
    for wrong in ("demo", TINY.train, None):
        with pytest.raises(StoryLLMError, match="expected a Recipe"):
            train(wrong, tiny_data, tmp_path)
    with pytest.raises(StoryLLMError, match="expected a DataConfig"):
        storyllm.prepare(TINY, tmp_path)
    with pytest.raises(StoryLLMError, match="expected a GPTConfig"):
        GPT(TINY)
    with pytest.raises(StoryLLMError, match="expected a Storyteller"):
        storyllm.evaluate("best_model_params.pt", tiny_data / "validation.bin")


def test_a_closed_pipe_loses_nothing(tiny_data, tmp_path, monkeypatch):
    def closed(*args, **kwargs):
        raise BrokenPipeError

    steps = iter(range(100))
    monkeypatch.setattr(training, "train_step", lambda *a, **k: closed() if next(steps) == 3 else train_step(*a, **k))
    with pytest.raises(BrokenPipeError):
        train(TINY, tiny_data, tmp_path)
    assert load_checkpoint(tmp_path / "last.pt")["iteration"] == 12
