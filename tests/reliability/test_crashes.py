"""A job that is killed at random points and run again each time ends as if it had never been killed (crashes.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import random_stories

import storyllm


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crashes")
    (folder / "stories.txt").write_bytes("\n<|endoftext|>\n".join(random_stories(300)).encode())
    config = storyllm.DataConfig(source=str(folder / "stories.txt"), tokenizer="bpe:300", validation_fraction=0.1)
    storyllm.prepare(config, folder / "prepared")
    return folder


def crash(data, folder, job, kills, seed=0, bug=""):
    """The number of kills of each kind, and the problems found."""
    command = [sys.executable, str(Path(__file__).with_name("crashes.py")), job, str(data), str(folder)]
    command += ["--kills", str(kills), "--seed", str(seed), "--bug", bug]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    return report["kills"], report["problems"], done.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("job", "kills"), [("train", 8), ("prepare", 30)])
def test_kills_at_random_points_do_not_change_the_result(data, tmp_path, job, kills):
    done, problems, errors = crash(data, tmp_path, job, kills)
    assert problems == [], errors
    assert sum(done.values()) == kills


@pytest.mark.timeout(600)
def test_a_planted_bug_is_found(data, tmp_path):
    assert crash(data, tmp_path, "prepare", 300, bug="order")[1]


@pytest.mark.campaign
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize(("job", "kills"), [("train", 60), ("prepare", 400)])
def test_hundreds_of_kills_do_not_change_the_result(data, tmp_path, job, kills, seed):
    done, problems, errors = crash(data, tmp_path, job, kills, seed)
    assert problems == [], errors
    assert sum(done.values()) == kills
    assert all(done.values())


@pytest.mark.campaign
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("bug", ["in-place", "log", "windows"])
def test_each_planted_bug_of_training_is_found(data, tmp_path, bug):
    assert crash(data, tmp_path, "train", 60, bug=bug)[1]
