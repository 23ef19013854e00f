"""Training on a file that is larger than the memory starts immediately and takes the same memory as on a small one."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
from helpers import TINY, run_in_subprocess

from storyllm import open_token_file, train
from storyllm.files import read_json, write_json

SIZE = 100 * 10**9  # bytes


@pytest.fixture
def large_data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data whose train.bin is a sparse file of 100 GB. Skips if there are no sparse files."""
    folder = shutil.copytree(tiny_data, tmp_path / "large")
    try:
        with open(folder / "train.bin", "r+b") as file:
            file.truncate(SIZE)
    except OSError:
        pytest.skip("the filesystem has no files of this size")
    if getattr((folder / "train.bin").stat(), "st_blocks", SIZE) * 512 > SIZE / 100:
        pytest.skip("the filesystem does not support sparse files")
    values = read_json(folder / "train.json")
    write_json(folder / "train.json", {**values, "tokens": SIZE // 2})
    return folder


def peak_memory() -> float:
    """The peak memory use of this process in MB."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def train_on_both(small: str, large: str) -> None:
    """In a subprocess: prints how much more memory (MB) and CPU time (s) training on the large data takes."""
    recipe = TINY.override({"train.max_iters": 8})
    used = []
    for number, (data, windows) in enumerate([(small, "random"), (large, "random"), (large, "shuffled")]):
        started = time.process_time()
        train(recipe.override({"train.windows": windows}), data, f"run-{number}")
        used.append((peak_memory(), time.process_time() - started))
    for memory, seconds in used[1:]:
        print(f"\nused {memory - used[0][0]:.1f} {seconds - used[0][1]:.2f}")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
def test_training_on_100_gigabytes_takes_the_memory_and_time_of_a_small_file(
    tiny_data: Path, large_data: Path, tmp_path: Path
) -> None:
    assert len(open_token_file(large_data / "train.bin").ids) == SIZE // 2
    printed = run_in_subprocess(train_on_both, str(tiny_data), str(large_data), cwd=tmp_path, timeout=110)
    random, shuffled = [tuple(map(float, line)) for line in re.findall(r"^used (\S+) (\S+)$", printed, re.M)]
    # Reading 100 GB, even of zeros, takes more than ten seconds. The order of all windows would take 25 GB.
    assert random[0] < 100 and random[1] < 5
    assert shuffled[0] < 700 and shuffled[1] < 10
