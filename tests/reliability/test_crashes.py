"""A job that is killed again and again ends with the same result as an uninterrupted one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import environment, random_stories

import storyllm


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crashes")
    stories = folder / "stories.txt"
    stories.write_bytes("\n<|endoftext|>\n".join(random_stories(300)).encode())
    config = storyllm.DataConfig(source=str(stories), tokenizer="bpe:300", validation_fraction=0.1)
    storyllm.prepare(config, folder / "prepared")
    return folder


def campaign(job: str, data: Path, folder: Path, *options: object) -> tuple[dict[str, Any], str]:
    """The report of a campaign, and the errors of its processes."""
    program = Path(__file__).with_name("crashes.py")
    command = [sys.executable, program, job, data, folder / "job", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize(("job", "kills"), [("train", 10), ("prepare", 25)])
def test_a_killed_job_ends_like_an_uninterrupted_one(data, tmp_path, job, kills):
    report, errors = campaign(job, data, tmp_path, "--kills", kills)
    assert not report["found"], (report, errors)
    assert sum(report["killed"].values()) == kills


@pytest.mark.parametrize(("job", "fault"), [("train", "torn"), ("prepare", "order")])
def test_a_planted_fault_is_found(data, tmp_path, job, fault):
    report, _ = campaign(job, data, tmp_path, "--kills", 300, "--fault", fault)
    assert report["found"]


@pytest.mark.campaign
@pytest.mark.timeout(1_000)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("job", "kills"), [("train", 60), ("prepare", 400)])
def test_many_kills_do_not_change_the_result(data, tmp_path, job, kills, seed):
    report, errors = campaign(job, data, tmp_path, "--kills", kills, "--seed", seed)
    assert not report["found"], (report, errors)
    assert sum(report["killed"].values()) == kills
    assert all(report["killed"].values())  # every kind of kill


@pytest.mark.campaign
@pytest.mark.timeout(1_000)
@pytest.mark.parametrize("fault", ["log", "windows", "optimizer"])
def test_the_other_planted_faults_are_found(data, tmp_path, fault):
    report, _ = campaign("train", data, tmp_path, "--kills", 60, "--fault", fault)
    assert report["found"]
