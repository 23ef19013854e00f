"""Trackers show what the log says, once, and never stop a run."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest
from helpers import SAVE_EVERY_UPDATE, TINY, TINY_EVALUATIONS, TINY_UPDATES, weights

from storyllm import Recipe, StoryLLMError, read_log, train
from storyllm.cli import main
from storyllm.training.trackers import UPDATES, Tracker

REPORTED = TINY.override({"train.sample_interval": 10})
TENSORBOARD = REPORTED.override({"train.report_to": "tensorboard"})
WANDB = REPORTED.override({"train.report_to": "wandb"})
TRACKIO = REPORTED.override({"train.report_to": "trackio"})


# TensorBoard


def events(folder):
    """The scalars, {tag: [(step, value)]}, and samples, [(step, text)], in the event files of a run."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = event_accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    reader.Reload()
    tags = reader.Tags()
    scalars = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags["scalars"]}
    samples = reader.Tensors("sample/text_summary")
    return scalars, [(event.step, event.tensor_proto.string_val[0].decode()) for event in samples]


def assert_events_are_the_log(folder):
    log = read_log(folder / "log.jsonl")
    scalars, samples = events(folder)
    for tag, entries in (
        ("update/train_loss", log.updates),
        ("update/learning_rate", log.updates),
        ("evaluation/val_loss", log.evaluations),
        ("evaluation/val_bits_per_byte", log.evaluations),
    ):
        name = tag.split("/")[1]
        expected = [(entry["iteration"], pytest.approx(entry[name], rel=1e-6)) for entry in entries]  # float32
        assert scalars[tag] == expected
    assert samples == [(sample["iteration"], sample["text"]) for sample in log.samples]
    assert [entry["iteration"] for entry in log.updates] == TINY_UPDATES
    assert [entry["iteration"] for entry in log.evaluations] == TINY_EVALUATIONS


def test_the_event_files_of_a_run_have_its_log(tiny_data, tmp_path):
    pytest.importorskip("tensorboard")
    log = train(TENSORBOARD, tiny_data, tmp_path)
    assert_events_are_the_log(tmp_path)
    assert log.warnings == []


def test_a_resumed_run_repeats_no_step(tiny_data, tmp_path):
    """Neither after an interruption nor after a crash, which loses entries of the log."""
    pytest.importorskip("tensorboard")
    for stop_at in (10, 15):
        train(TENSORBOARD.override({"train.stop_at": stop_at, **SAVE_EVERY_UPDATE}), tiny_data, tmp_path)
    (tmp_path / "last.pt").unlink()
    with pytest.warns(UserWarning, match="resuming from the earlier"):
        train(TENSORBOARD, tiny_data, tmp_path)
    assert_events_are_the_log(tmp_path)


def test_a_run_may_begin_to_report_when_it_resumes(tiny_data, tmp_path):
    pytest.importorskip("tensorboard")
    train(REPORTED.override({"train.stop_at": 10}), tiny_data, tmp_path)
    train(TENSORBOARD, tiny_data, tmp_path)
    assert_events_are_the_log(tmp_path)


# Weights & Biases and Trackio, replaced by modules that record what they get


class Run:
    """A run of either service: what was logged, {step: values}, and how often it was finished."""

    def __init__(self, name: str = "", step: int = 0) -> None:
        self.name = name
        self.step = step
        self.logged: dict[int, dict[str, Any]] = {}
        self.finished = 0
        self.deleted = False

    def log(self, values: dict[str, Any], step: int) -> None:
        assert step >= self.step, "W&B ignores a step before the current one"
        self.step = step
        repeated = set(values) & set(self.logged.setdefault(step, {}))
        assert not repeated, f"{repeated} of step {step} reported again"
        self.logged[step].update(values)

    def finish(self) -> None:
        self.finished += 1

    def delete(self) -> None:
        self.deleted = True


def fake_module(monkeypatch, name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def wandb_runs(monkeypatch):
    """The runs of a W&B that records them, as (options of wandb.init, run)."""
    runs: list[tuple[dict[str, Any], Run]] = []

    def init(**options: Any) -> Run:
        runs.append((options, Run()))
        return runs[-1][1]

    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    fake_module(monkeypatch, "wandb", init=init, Html=str)
    return runs


@pytest.fixture
def trackio_runs(monkeypatch):
    """The runs of a Trackio that records them."""
    runs: list[Run] = []

    def init(project: str, name: str, config: dict[str, Any]) -> Run:
        runs.append(Run(name))
        return runs[-1]

    class Api:
        def runs(self, project: str) -> list[Run]:
            if not runs:
                raise ValueError("no such project")
            return runs

    fake_module(monkeypatch, "trackio", init=init, Api=Api, Markdown=str)
    return runs


def assert_logged(run: Run, folder) -> None:
    log = read_log(folder / "log.jsonl")
    expected: dict[int, dict[str, Any]] = {}
    for event, entries in (("update", log.updates), ("evaluation", log.evaluations)):
        for entry in entries:
            values = {f"{event}/{name}": value for name, value in entry.items() if name not in ("event", "iteration")}
            expected.setdefault(entry["iteration"], {}).update(values)
    assert {step: {n: v for n, v in values.items() if n != "sample"} for step, values in run.logged.items()} == expected
    sampled = [step for step, values in run.logged.items() if "sample" in values]
    assert sampled == [sample["iteration"] for sample in log.samples]
    assert run.finished == 1


def test_each_start_reports_the_complete_run_to_wandb_with_the_same_id(wandb_runs, tiny_data, tmp_path):
    for stop_at in (8, None):
        train(WANDB.override({"train.stop_at": stop_at}), tiny_data, tmp_path / "run")
        assert_logged(wandb_runs[-1][1], tmp_path / "run")
    first, second = (options for options, _ in wandb_runs)
    assert first["id"] == second["id"]
    for options in (first, second):
        assert (options["mode"], options["resume"], options["project"]) == ("offline", None, "storyllm")
        assert (options["name"], options["dir"]) == ("run", str(tmp_path / "run"))
        assert Recipe.from_dict(options["config"]).train.report_to == "wandb"
    train(WANDB.override({"train.stop_at": 4}), tiny_data, tmp_path / "other")
    assert wandb_runs[-1][0]["id"] != first["id"]


def test_wandb_is_online_if_the_environment_says_so(wandb_runs, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    train(WANDB.override({"train.stop_at": 8}), tiny_data, tmp_path)
    server = Run(step=9)  # the server has the steps up to 8
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **options: wandb_runs.append((options, server)) or server)
    train(WANDB, tiny_data, tmp_path)
    assert {(options["mode"], options["resume"], options["project"]) for options, _ in wandb_runs} == {
        ("online", "allow", "mine")
    }
    assert sorted(server.logged) == [10, 12, 15, 16, 20, 22]


def test_steps_that_decrease_within_an_update_are_reported(wandb_runs, tiny_data, tmp_path):
    """An evaluation within an update has a greater iteration than the sample of the same weights."""
    train(WANDB.override({"train.sample_interval": 4}), tiny_data, tmp_path)
    samples = [sample["iteration"] for sample in read_log(tmp_path / "log.jsonl").samples]
    reported = [step for step, values in wandb_runs[0][1].logged.items() if "sample" in values]
    assert len(reported) == len(samples) and reported != samples


def test_trackio_gets_one_run_which_is_complete(trackio_runs, tiny_data, tmp_path):
    for stop_at in (8, None):
        train(TRACKIO.override({"train.stop_at": stop_at}), tiny_data, tmp_path / "run")
        assert_logged(trackio_runs[-1], tmp_path / "run")
    train(TRACKIO.override({"train.stop_at": 4}), tiny_data, tmp_path / "other")
    assert [run.deleted for run in trackio_runs] == [True, False, False]
    assert trackio_runs[1].name.startswith("run-") and trackio_runs[2].name.startswith("other-")


@pytest.mark.parametrize("iterations", [999, 5_000])
def test_of_a_long_run_about_a_thousand_updates_are_reported(wandb_runs, tmp_path, iterations):
    updates = [{"event": "update", "iteration": i, "train_loss": 1.0} for i in range(1, iterations + 1)]
    reported = []
    for start in (0, iterations // 2):  # the same ones if the run resumes
        tracker = Tracker("wandb", tmp_path, TINY.override({"train.max_iters": iterations}))
        tracker.start(updates[:start], pytest.fail)
        for update in updates[start:]:
            tracker.log(update)
        reported.append(list(wandb_runs[-1][1].logged))
    assert reported[0] == reported[1]
    assert min(iterations, UPDATES) <= len(reported[0]) <= UPDATES + 1


# Failures


@pytest.mark.parametrize("method", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning(wandb_runs, tiny_run, tiny_data, tmp_path, monkeypatch, method):
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    if method == "init":
        monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    else:
        monkeypatch.setattr(Run, method, fail)
    message = r"reporting to wandb failed \(ConnectionError: no route to host\); training continues"
    with pytest.warns(UserWarning, match=message) as caught:
        log = train(WANDB, tiny_data, tmp_path)
    assert len(caught) == 1
    assert [entry["iteration"] for entry in log.warnings] == ([] if method == "finish" else [0])
    assert weights(tmp_path) == weights(tiny_run)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_one_line_before_training_starts(tiny_data, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(StoryLLMError, match=rf'needs the package {name}; run: pip install "storyllm\[{name}\]"'):
        train(TINY.override({"train.report_to": name}), tiny_data, tmp_path / "run")
    options = ["--train.report-to", name, "--data-dir", str(tiny_data), "--checkpoint-dir", str(tmp_path / "run")]
    assert main(["train", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()
