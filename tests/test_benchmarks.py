"""The benchmarks run, and what they compare is the same thing: fast and plain training come to the same losses."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from storyllm import GPT, GPTConfig, Recipe, TrainConfig, evaluate, load, open_tokens, read_log, train
from storyllm.tokens import random_windows
from storyllm.training import TRAINING

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {path.name for path in BENCHMARKS.glob("*.py")}

# Each script with its smallest options. {data} is a prepared folder.
SMALL = {
    "tokenizing.py": "--source {data}/../stories.txt --tokenizer bpe:300 --repeats 1 --copies 2",
    "windows.py": "--tokens 100000 --repeats 1 --batches 10",
    "products.py": "--rows 2 --repeats 1",
    "loss.py": "--tokens 32 --repeats 1",
    "training_step.py": "--recipe demo --repeats 1",
    "telling.py": "--recipe demo --stories 1 --repeats 1 --beyond 1",
    "import_time.py": "--repeats 1",
    "gpu.py": "--data-dir {data} --device cpu --small",
}
SLOW_OR_SHARED = {"memory.py", "faithful_curve.py", "plain_loop.py", "side_by_side.py"}
HELD_BELOW = {"learning_curves.py", "sweep.py"}


def test_every_benchmark_is_run_here_or_known_not_to_be():
    assert set(SMALL) | SLOW_OR_SHARED | HELD_BELOW == SCRIPTS


def test_every_benchmark_is_explained_and_make_bench_runs_those_for_a_cpu():
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+\.py)` \|", readme, re.M)) == SCRIPTS - {"plain_loop.py", "side_by_side.py"}
    makefile = (BENCHMARKS.parent / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"benchmarks/(\w+\.py)", makefile)) == (set(SMALL) | {"memory.py"}) - {"gpu.py"}


@pytest.mark.parametrize("script", SMALL)
def test_a_benchmark_runs_at_its_smallest(script, tiny_data, tmp_path):
    options = SMALL[script].format(data=tiny_data).split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert re.search(r"  ours +[\d.,e+]+ \S+\n  .* ours: [\d.]+x", done.stdout), done.stdout
    if script == "tokenizing.py":
        assert "the same bytes: True" in done.stdout


def test_a_sweep_has_a_row_for_each_of_its_settings_and_makes_none_twice(tiny_data, tmp_path):
    base = "model.n_layer=1 model.n_embd=12 model.block_size=8 train.batch_size=2 train.gradient_accumulation_steps=1"
    options = ["--data-dir", tiny_data, "--tokens", "160", "--base", f"{base} train.device=cpu", "--seeds", "2"]
    options += ["--rows", "train.optimizer=muon train.schedule=flat", "train.learning_rate=1e-3"]
    options += ["train.windows=shuffled try=from_story_starts", "try=zero_projections"]
    command = [sys.executable, str(BENCHMARKS / "sweep.py"), *map(str, options)]
    tables = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr[-2_000:]
        tables.append(re.findall(r"^ +(\d\.\d{4}) +(\d\.\d{4}) .*seed (\d)$", done.stdout, re.M))
    assert len(tables[0]) == len(set(tables[0])) == 8
    assert tables[1] == tables[0]
    runs = list((tmp_path / "checkpoints" / "sweep").iterdir())
    assert len(runs) == 8
    assert all(read_log(run / "log.jsonl").updates[-1]["iteration"] == 10 for run in runs)


def test_runs_are_compared_on_all_validation_stories(tiny_data, tmp_path):
    options = [
        "--source",
        tiny_data.parent / "stories.txt",
        "--runs",
        "small-vocab",
        "--tokens",
        "8192",
        "--seeds",
        "2",
    ]
    options += ["--eval-windows", "4", "--out", "runs.png", "--folder", "runs"]
    command = [sys.executable, str(BENCHMARKS / "learning_curves.py"), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2_000:]
    rows = re.findall(r"^small-vocab +(\d) +8,192 +[\d,]+ +(\d\.\d{4}) +(\d\.\d{4}) +\d", done.stdout, re.M)
    assert [row[0] for row in rows] == ["0", "1"] and rows[0][1] != rows[1][1]
    report = evaluate(load(tmp_path / "runs/small-vocab-8192-1/last.pt"), tmp_path / "runs/data-bpe4096/validation.bin")
    assert rows[1][1:] == (f"{report.loss:.4f}", f"{report.bits_per_byte:.4f}")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line_and_exit_code_2():
    command = [sys.executable, str(BENCHMARKS / "training_step.py"), "--recipe", "nix"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("there is no recipe 'nix'") and done.stderr.count("\n") == 1


def test_a_fast_run_and_a_plain_run_come_to_the_same_losses(tiny_data, tmp_path, monkeypatch):
    """A hundred iterations from the same seed and windows, without dropout: equal to rounding, and learning."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import plain_loop

    config = TrainConfig(
        max_iters=100,
        batch_size=3,
        gradient_accumulation_steps=4,
        micro_batch_size=5,
        learning_rate=1e-2,
        min_lr=1e-3,
        warmup_iters=4,
        eval_windows=2,
        seed=7,
        device="cpu",
    )
    recipe = Recipe(
        model=GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0), train=config
    )
    fast = [update["train_loss"] for update in train(recipe, tiny_data, tmp_path).updates]

    torch.manual_seed(7)
    start = GPT(recipe.model).state_dict()
    model = plain_loop.PlainGPT(recipe.model)
    model.load_state_dict(start)
    ids = open_tokens(tiny_data / "train.bin").ids

    def batch(iteration):
        windows = random_windows(ids, 16, 3, np.random.default_rng((TRAINING, 7, iteration)))
        return tuple(torch.from_numpy(part) for part in windows)

    plain = np.array(list(plain_loop.train(model, batch, config, "cpu"))).reshape(-1, 4).mean(1)
    np.testing.assert_allclose(fast, plain, atol=1e-4)
    assert plain[-1] < plain[0] - 1
