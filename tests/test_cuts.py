"""Cut off anywhere, started again each time: the end is the same. `cuts.py` does the cutting."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import synthetic_stories

import storyllm


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuts")
    (folder / "stories.txt").write_bytes("\n<|endoftext|>\n".join(synthetic_stories(300)).encode())
    source = storyllm.DataConfig(source=str(folder / "stories.txt"), tokenizer="bpe:300", validation_fraction=0.1)
    storyllm.prepare(source, folder / "prepared")
    return folder


def cut(data, folder, job, cuts, seed=0, fault=""):
    """What cutting the job off so many times found."""
    command = [sys.executable, str(Path(__file__).with_name("cuts.py")), job, str(data), str(folder)]
    command += ["--cuts", str(cuts), "--seed", str(seed), "--fault", fault]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    return report["cuts"], report["found"], done.stderr


@pytest.mark.parametrize(("job", "cuts"), [("train", 10), ("prepare", 40)])
def test_cut_off_anywhere_it_ends_as_if_it_never_was(data, tmp_path, job, cuts):
    done, found, errors = cut(data, tmp_path, job, cuts)
    assert found == [], errors
    assert sum(done.values()) == cuts


@pytest.mark.parametrize(("job", "fault"), [("train", "torn"), ("prepare", "order")])
def test_a_fault_is_found(data, tmp_path, job, fault):
    """Files written in their place, and a description that comes after its data."""
    assert cut(data, tmp_path, job, 300, fault=fault)[1]


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize(("job", "cuts"), [("train", 60), ("prepare", 400)])
def test_cut_off_very_often(data, tmp_path, job, cuts, seed):
    done, found, errors = cut(data, tmp_path, job, cuts, seed)
    assert found == [], errors
    assert sum(done.values()) == cuts
    assert all(done.values())


@pytest.mark.campaign
@pytest.mark.parametrize("fault", ["torn", "log", "windows"])
def test_each_fault_of_training_is_found(data, tmp_path, fault):
    assert cut(data, tmp_path, "train", 60, fault=fault)[1]
