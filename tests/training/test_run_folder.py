"""A run is saved and resumed, and the files of another run are never overwritten."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TINY, flip_bit, folder_contents, iteration_of
from hypothesis import given, settings
from hypothesis import strategies as st

from storyllm import GPT, Recipe, StoryLLMError, load
from storyllm.checkpoint import load_checkpoint, save_checkpoint
from storyllm.data.token_file import Dataset, open_dataset
from storyllm.device import DeviceConfig
from storyllm.training.execution import Execution
from storyllm.training.interrupt import Interrupt
from storyllm.training.optimizer import make_optimizer
from storyllm.training.run_folder import RunFolder, TrainState, saved_versions

STATE = TrainState(iteration=8, last_evaluation=5, best_val_loss=4.5, seconds=1.5, skipped_updates=1)


@pytest.fixture
def data(tiny_data: Path) -> Dataset:
    return open_dataset(tiny_data)


def new_run(recipe: Recipe = TINY, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[GPT, Execution]:
    """A model after one update, and its execution."""
    torch.manual_seed(seed)
    model = GPT(recipe.model)
    optimizer = make_optimizer(model, recipe.train)
    device = DeviceConfig(torch.device("cpu"), "CPU", dtype, compile=False, micro_batch_size=12)
    model.loss(*torch.randint(300, (2, 3, 16))).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, Execution(recipe.train, device, optimizer, Interrupt(), lambda _: None)


@pytest.fixture
def saved_run(tmp_path: Path, data: Dataset) -> Path:
    """The folder of a run at iteration 8, with a log, a best model, and two previous states."""
    folder = RunFolder(tmp_path / "run", TINY, data)
    model, execution = new_run()
    with folder.lock():
        folder.save_best(model, 5, STATE.best_val_loss)
        with folder.log.open(0) as log:
            for iteration in (0, 4, 8):
                log.write({"event": "update", "iteration": iteration, "learning_rate": 0.1})
                folder.save(dataclasses.replace(STATE, iteration=iteration), model, execution)
    return tmp_path / "run"


# TrainState


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.builds(
        TrainState,
        iteration=st.integers(0, 2**63 - 1),
        last_evaluation=st.integers(-1, 2**63 - 1),
        best_val_loss=st.floats(0) | st.just(math.inf),
        seconds=st.floats(0, 1e18),
        log_bytes=st.integers(0, 2**63 - 1),
        skipped_updates=st.integers(0, 2**63 - 1),
    )
)
def test_a_state_survives_the_round_trip(state):
    assert TrainState.from_dict(dataclasses.asdict(state)) == state


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainState)])
def test_invalid_values_of_a_state_are_rejected(name):
    values = dataclasses.asdict(STATE)
    wrong_type = 3 if type(values[name]) is float else 3.0
    for value in (None, "3", True, wrong_type, -2, -2.0, math.nan, -math.inf, 2**63, [3], torch.tensor(3)):
        with pytest.raises((TypeError, ValueError)):
            TrainState.from_dict({**values, name: value})
    if name != "best_val_loss":  # infinite before the first evaluation
        with pytest.raises((TypeError, ValueError)):
            TrainState.from_dict({**values, name: math.inf})


def test_unknown_and_missing_fields_of_a_state_are_rejected():
    values = dataclasses.asdict(STATE)
    with pytest.raises(ValueError, match="field"):
        TrainState.from_dict({**values, "epoch": 1})
    del values["seconds"]
    with pytest.raises(ValueError, match="field"):
        TrainState.from_dict(values)


# Saving and resuming


def test_an_empty_folder_is_a_new_run(tmp_path, data):
    assert RunFolder(tmp_path, TINY, data).load() is None


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [("adamw", torch.float32), ("muon", torch.float32), ("adamw", torch.float16)]
)
def test_a_saved_run_is_restored_completely(tmp_path, data, optimizer, dtype):
    recipe = TINY.override({"train.optimizer": optimizer})
    folder = RunFolder(tmp_path, recipe, data)
    model, execution = new_run(recipe, dtype)
    if dtype == torch.float16:
        execution.scaler.load_state_dict({**execution.scaler.state_dict(), "scale": 8.0})
    with folder.log.open(0) as log:
        log.write({"event": "update", "iteration": 8, "learning_rate": 0.1})
        folder.save_best(model, 5, STATE.best_val_loss)
        folder.save(dataclasses.replace(STATE), model, execution)

    folder = RunFolder(tmp_path, recipe, data)
    saved = folder.load()
    other, other_execution = new_run(recipe, dtype, seed=1)
    state = folder.restore(saved, other, other_execution)
    assert state == dataclasses.replace(STATE, log_bytes=(tmp_path / "log.jsonl").stat().st_size)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert (saved["device"], saved["micro_batch_size"]) == ("cpu", 12)
    assert other_execution.scaler.get_scale() == execution.scaler.get_scale()
    moments = [e.optimizer.state_dict()["state"] for e in (execution, other_execution)]
    torch.testing.assert_close(moments[0], moments[1], rtol=0, atol=0)


def test_a_state_that_does_not_match_the_model_is_an_error(saved_run, data):
    folder = RunFolder(saved_run, TINY, data)
    for change in ("width", "head", "optimizer"):
        saved = folder.load()
        model, execution = new_run(TINY.override({"model.n_embd": 16} if change == "width" else {}))
        if change == "head":
            saved["model"]["lm_head.weight"] = saved["model"]["lm_head.weight"] + 1
        elif change == "optimizer":
            saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2, 2)
        with pytest.raises(StoryLLMError, match=r"last\.pt does not match"):
            folder.restore(saved, model, execution)


@pytest.mark.parametrize("keep", [0, 1, 4])
def test_the_requested_number_of_previous_states_is_kept(tmp_path, data, keep):
    folder = RunFolder(tmp_path, TINY.override({"train.keep_checkpoints": keep}), data)
    model, execution = new_run()
    for iteration in range(0, 24, 4):
        folder.save(TrainState(iteration), model, execution)
    versions = [tmp_path / "last.pt", *(tmp_path / f"last.{n}.pt" for n in range(1, keep + 1))]
    assert saved_versions(tmp_path / "last.pt") == versions
    assert sorted(tmp_path.glob("last*")) == sorted(versions)
    assert [iteration_of(path) for path in versions] == [20, 16, 12, 8, 4][: keep + 1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_saved(saved_run, data, value):
    before = folder_contents(saved_run)
    folder = RunFolder(saved_run, TINY, data)
    model, execution = new_run()
    with torch.no_grad():
        next(model.parameters())[0, 0] = value
    for save in (lambda: folder.save(STATE, model, execution), lambda: folder.save_best(model, 8, 1.0)):
        with pytest.raises(StoryLLMError, match=r"at iteration 8.*train\.learning_rate"):
            save()
    assert folder_contents(saved_run) == before


def test_a_folder_in_use_is_an_error(tmp_path, data):
    with RunFolder(tmp_path, TINY, data).lock(), pytest.raises(StoryLLMError, match="in use"):
        RunFolder(tmp_path, TINY, data).lock().__enter__()
    with RunFolder(tmp_path, TINY, data).lock():  # free again
        pass


# Corrupted and missing files


@pytest.mark.parametrize("corrupted", [["last.pt"], ["last.pt", "last.1.pt"]])
def test_a_corrupted_state_falls_back_to_the_previous_one(saved_run, data, corrupted):
    for name in corrupted:
        flip_bit(saved_run / name, 5000)
    content = (saved_run / "last.pt").read_bytes()
    with pytest.warns(UserWarning, match=rf"{', '.join(corrupted)} is corrupted.*last\.{len(corrupted)}\.pt"):
        saved = RunFolder(saved_run, TINY, data).load()
    assert saved["state"].iteration == [8, 4, 0][len(corrupted)]
    assert not any((saved_run / name).exists() for name in corrupted)
    assert (saved_run / "last.pt.corrupted").read_bytes() == content  # nothing is thrown away


def test_a_missing_state_falls_back_to_the_previous_one(saved_run, data):
    """As if the process was killed between the two renames of a save."""
    (saved_run / "last.pt").unlink()
    with pytest.warns(UserWarning, match=r"last\.pt is missing.*last\.1\.pt"):
        assert RunFolder(saved_run, TINY, data).load()["state"].iteration == 4


def test_without_an_intact_state_nothing_is_changed(saved_run, data):
    for path in saved_run.glob("last*.pt"):
        path.write_bytes(path.read_bytes()[:-1000])
    before = folder_contents(saved_run)
    with pytest.raises(StoryLLMError, match=r"last\.pt is corrupted"):
        RunFolder(saved_run, TINY, data).load()
    assert folder_contents(saved_run) == before


def test_other_files_are_not_previous_states(saved_run, data):
    for name in ("last.0.pt", "last.old.pt", "last.01.pt", "last.99999.pt"):
        shutil.copy(saved_run / "last.pt", saved_run / name)
    flip_bit(saved_run / "last.pt", 5000)
    with pytest.warns(UserWarning, match=r"last\.1\.pt"):
        RunFolder(saved_run, TINY, data).load()


@pytest.mark.parametrize("name", ["best_model_params.pt", "log.jsonl"])
def test_files_of_a_run_without_its_state_are_not_overwritten(saved_run, data, name):
    for path in saved_run.glob("last*.pt"):
        path.unlink()
    for path in saved_run.iterdir():
        if path.name != name:
            path.unlink()
    with pytest.raises(StoryLLMError, match=rf"{name}.*no last\.pt.*use another"):
        RunFolder(saved_run, TINY, data).load()
    assert (saved_run / name).exists()


def test_a_model_file_is_not_a_state(saved_run, data):
    shutil.copy(saved_run / "best_model_params.pt", saved_run / "last.pt")
    with pytest.raises(StoryLLMError, match="no training state"):
        RunFolder(saved_run, TINY, data).load()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("state", value) for value in (None, {}, {"iteration": 8}, {**dataclasses.asdict(STATE), "iteration": -1})],
        *[("recipe", value) for value in (None, {"train": {"max_iters": 0}}, {"train": {"unknown": 1}})],
        *[("micro_batch_size", value) for value in (0, -1, 2.0, None, "auto", 2**70)],
        *[("device", value) for value in (None, 3)],
    ],
)
def test_an_invalid_state_is_an_error(saved_run, data, name, value):
    contents = load_checkpoint(saved_run / "last.pt")
    save_checkpoint(saved_run / "last.pt", {**contents, name: value})
    with pytest.raises(StoryLLMError, match=r"last\.pt is corrupted or from another version"):
        RunFolder(saved_run, TINY, data).load()


def test_a_missing_best_model_is_replaced_by_the_next_evaluation(saved_run, data):
    (saved_run / "best_model_params.pt").unlink()
    with pytest.warns(UserWarning, match=r"best_model_params\.pt is missing"):
        assert RunFolder(saved_run, TINY, data).load()["state"].best_val_loss == math.inf


@pytest.mark.parametrize("kept", [0, 1, 100, None])
def test_a_log_that_lost_entries_is_resumed_with_a_warning(saved_run, data, kept):
    log = saved_run / "log.jsonl"
    if kept is None:
        log.unlink()
    else:
        log.write_bytes(log.read_bytes()[:kept])
    with pytest.warns(UserWarning, match=r"log\.jsonl lost"):
        state = RunFolder(saved_run, TINY, data).load()["state"]
    assert state.log_bytes == (log.read_bytes().rfind(b"\n") + 1 if log.exists() else 0)


def test_a_deleted_log_line_is_an_error(saved_run, data):
    """Entries after the last save make the log long enough, but its lines end elsewhere."""
    log = saved_run / "log.jsonl"
    _, *rest = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*rest, b'{"event": "update", "iteration": 12, "learning_rate": 0.1}\n']))
    with (
        pytest.warns(UserWarning, match="lost"),
        pytest.raises(StoryLLMError, match="line 1 is corrupted"),
    ):
        RunFolder(saved_run, TINY, data).load()


def test_a_corrupted_log_is_an_error(saved_run, data):
    flip_bit(saved_run / "log.jsonl", 20)
    before = folder_contents(saved_run)
    with pytest.raises(StoryLLMError, match=r"log\.jsonl line 1"):
        RunFolder(saved_run, TINY, data).load()
    assert folder_contents(saved_run) == before


def test_anything_after_the_saved_entries_of_the_log_is_ignored(saved_run, data):
    log = saved_run / "log.jsonl"
    size = log.stat().st_size
    log.write_bytes(log.read_bytes() + bytes(5000))  # zeros, as some filesystems leave after a power loss
    assert RunFolder(saved_run, TINY, data).load()["state"].log_bytes == size


# Another recipe or other data


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.n_layer": 3}, ["model.n_layer was 2, now 3"]),
        ({"train.learning_rate": 1e-3}, ["train.learning_rate was 0.01, now 0.001"]),
        (
            {"train.seed": 9, "train.batch_size": 4},
            ["train.batch_size was 3, now 4", "train.seed was 0, now 9"],
        ),
        (
            {f"train.{name}": 0.125 for name in "min_lr weight_decay beta1 beta2 grad_clip decay_fraction".split()},
            ["and 2 more"],
        ),
        ({"train.max_iters": 7}, ["iteration 8", "max_iters is 7"]),
    ],
)
def test_another_recipe_is_refused_naming_the_changes(saved_run, data, changes, words):
    before = folder_contents(saved_run)
    with pytest.raises(StoryLLMError) as caught:
        RunFolder(saved_run, TINY.override(changes), data).load()
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert folder_contents(saved_run) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"train.stop_at": 16, "train.checkpoint_minutes": 0.0, "train.keep_checkpoints": 0},
        {"train.micro_batch_size": 3, "train.dtype": "bfloat16", "train.device": "cpu", "train.compile": True},
        {"data.source": "elsewhere", "data.clean": True},  # the data itself is compared by its checksum
    ],
)
def test_changes_that_do_not_affect_the_result_are_accepted(saved_run, data, changes):
    assert RunFolder(saved_run, TINY.override(changes), data).load()["state"].iteration == 8


@pytest.mark.parametrize("max_iters", [8, 40])
def test_another_max_iters_is_accepted_with_a_warning(saved_run, data, max_iters):
    with pytest.warns(UserWarning, match=f"max_iters was 22, now {max_iters}"):
        assert RunFolder(saved_run, TINY.override({"train.max_iters": max_iters}), data).load()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_data_is_refused(saved_run, data, split):
    info = dataclasses.replace(data[split].info, sha256="0" * 64)
    other = dataclasses.replace(data, **{split: dataclasses.replace(data[split], info=info)})
    with pytest.raises(StoryLLMError, match="other data"):
        RunFolder(saved_run, TINY, other).load()


def test_saved_files_can_generate(saved_run):
    for name in ("best_model_params.pt", "last.pt"):
        assert load(saved_run / name).generate("One day", max_new_tokens=5, seed=0).startswith("One day")
    assert load_checkpoint(saved_run / "best_model_params.pt")["iteration"] == 5
