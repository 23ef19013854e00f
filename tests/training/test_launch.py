"""`train_parallel` runs torchrun in a subprocess, shows its output, and falls back to one process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from helpers import TINY, environment, iteration_of

from storyllm import StoryLLMError, read_log, train_parallel
from storyllm.cli import main
from storyllm.training.launch import command_line_options

pytestmark = pytest.mark.timeout(300)


def test_it_trains_on_several_processes_and_shows_their_output(tiny_data, tmp_path, capfd):
    log = train_parallel(TINY, tiny_data, tmp_path / "run", processes=2)
    assert (log.run["world_size"], log.run["windows_per_process"]) == (2, [6, 6])
    assert log.updates[-1]["iteration"] == 22 and not log.interrupted
    out, error = capfd.readouterr()
    assert "iteration     22" in out and "22/22" in out
    assert error == ""


def test_without_gpus_it_trains_in_this_process(tiny_data, tmp_path):
    log = train_parallel(TINY, tiny_data, tmp_path)
    assert log.run["world_size"] == 1 and log.updates[-1]["iteration"] == 22


def test_if_torchrun_fails_it_says_why_and_trains_in_this_process(tiny_data, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("STORYLLM_TIMEOUT", "soon")
    log = train_parallel(TINY, tiny_data, tmp_path / "run", processes=2)
    assert log.run["world_size"] == 1 and log.updates[-1]["iteration"] == 22
    out, error = capfd.readouterr()
    assert "training with 2 processes failed (rank" in out and "STORYLLM_TIMEOUT is 'soon'" in out
    assert "continuing with one" in out
    assert all(line.startswith("storyllm: rank") for line in error.splitlines())


def test_an_error_of_the_user_is_raised(tmp_path):
    with pytest.raises(StoryLLMError, match="not found"):
        train_parallel(TINY, tmp_path / "missing", tmp_path / "run", processes=2)


INTERRUPTED = """
import json, sys, storyllm
recipe, data, folder = storyllm.Recipe.from_dict(json.loads(sys.argv[1])), *sys.argv[2:]
log = storyllm.train_parallel(recipe, data, folder, processes=2)
print("interrupted by", log.interrupted, "after", len(log.updates))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_an_interrupt_saves_the_run(tiny_data, tmp_path):
    recipe = TINY.override({"train.max_iters": 1_000_000, "train.eval_interval": 1_000_000})
    command = [sys.executable, "-c", INTERRUPTED, json.dumps(recipe.to_dict()), tiny_data, tmp_path / "run"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 10):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=200)
    assert "run the same command again" in out and out.splitlines()[-1].startswith("interrupted by 2 after"), error
    assert "Traceback" not in error
    assert iteration_of(tmp_path / "run" / "last.pt") == read_log(log).updates[-1]["iteration"]


def test_the_options_of_a_recipe_give_the_recipe(tiny_data, tmp_path):
    recipe = TINY.override({"model.bias": False, "train.micro_batch_size": 5, "train.compile": False})
    folders = ["--data-dir", str(tiny_data), "--checkpoint-dir", str(tmp_path)]
    assert main(["train", "--recipe", "fast", *command_line_options(recipe), *folders]) == 0
    run = read_log(tmp_path / "log.jsonl").run
    assert run["recipe"]["train"] == recipe.to_dict()["train"]
    assert run["recipe"]["model"] == recipe.to_dict()["model"]
