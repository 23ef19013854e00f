"""The benchmarks run, and their baseline does the same work as StoryLLM."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from storyllm import GPT, GPTConfig, Recipe, TrainConfig, evaluate, load, read_log, read_stories, train
from storyllm.data.token_file import open_dataset
from storyllm.data.windows import training_batch
from storyllm.device import PEAK_FLOPS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {path.name for path in BENCHMARKS.glob("*.py")}
MODULES = {"common.py", "plain_loop.py"}  # not scripts

TINY_SETTINGS = (
    "model.n_layer=1 model.n_embd=12 model.block_size=8 train.batch_size=2 train.gradient_accumulation_steps=1 "
    "train.device=cpu"
)
# Each script with its smallest options. {data} is a prepared folder, {stories} the file it was prepared from.
SMALLEST = {
    "tokenization.py": "--source {stories} --tokenizer bpe:300 --repeats 1 --copies 2",
    "windows.py": "--tokens 100000 --repeats 1 --batches 10",
    "matmul.py": "--rows 2 --repeats 1",
    "loss.py": "--tokens 32 --repeats 1",
    "training_step.py": "--recipe demo --repeats 1 --rounds 1",
    "generation.py": "--recipe demo --stories 1 --repeats 1 --tokens-beyond 1",
    "shared_cpu.py": "--busy 1 --seconds 0.1 --rounds 1 --tasks 'generate demo (tokens/s)'",
    "import_time.py": "--repeats 1",
    "memory.py": "--device cpu --repeats 1",
    "scaling.py": "",
    "names.py": "{run}/last.pt --stories 2",
    "gpu.py": "--data-dir {data} --device cpu --small",
    "distributed.py": "--data-dir {data} --recipe demo-fast --processes 1 2 --updates 2",
    "sweep.py": f"--data-dir {{data}} --tokens 160 --base '{TINY_SETTINGS}' --rows train.learning_rate=1e-3",
    "learning_curves.py": "--source {stories} --runs demo --tokens 1024 --eval-windows 2 --published --out curves.svg",
    "faithful_curve.py": "--source {stories} --stop-at 1 --eval-windows 2",
}
# The scripts that also run in the normal suite, since they start no processes. gpu.py runs loss.py and
# generation.py.
IN_PROCESS = ("windows.py", "matmul.py", "gpu.py")
TABLE_ROW = re.compile(
    r"^  StoryLLM +[\d.,e+-]+ \S+$\n^  .* +[\d.,e+-]+ \S+  \(StoryLLM: [\d.]+(x|% of the memory)\)$", re.M
)


@pytest.fixture
def run_benchmark(tiny_data, tiny_run, tmp_path, monkeypatch, capsys):
    """Runs a script in this process, in an empty folder, and returns its exit code, output and errors."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)

    def run(script, options):
        module = importlib.import_module(script.removesuffix(".py"))
        stories = tiny_data.parent / "stories.txt"
        arguments = shlex.split(options.format(data=tiny_data, stories=stories, run=tiny_run))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as exited:
            importlib.import_module("common").run_cli(module.main)
        captured = capsys.readouterr()
        return exited.value.code or 0, captured.out, captured.err

    return run


def test_every_script_has_its_smallest_options_here():
    assert set(SMALLEST) == SCRIPTS - MODULES


def test_the_readme_lists_every_script_and_make_bench_runs_those_for_a_cpu():
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+\.py)` \|", readme, re.M)) == SCRIPTS - MODULES
    makefile = (BENCHMARKS.parent / "Makefile").read_text(encoding="utf-8")
    not_in_make_bench = {"shared_cpu.py", "names.py", "gpu.py", "sweep.py", "learning_curves.py", "faithful_curve.py"}
    not_in_make_bench |= {"scaling.py", "distributed.py"}  # the first measures nothing
    assert set(re.findall(r"benchmarks/(\w+\.py)", makefile)) == set(SMALLEST) - not_in_make_bench


@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", IN_PROCESS)
def test_a_benchmark_prints_a_table(run_benchmark, script):
    code, out, _ = run_benchmark(script, SMALLEST[script])
    assert code == 0
    assert TABLE_ROW.search(out), out


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", SMALLEST)
def test_a_benchmark_runs_from_the_command_line(script, tiny_data, tiny_run, tmp_path, request):
    if script == "faithful_curve.py":
        request.getfixturevalue("gpt2_cache")
    options = SMALLEST[script].format(data=tiny_data, stories=tiny_data.parent / "stories.txt", run=tiny_run)
    command = [sys.executable, str(BENCHMARKS / script), *shlex.split(options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2_000:]
    other_tables = {"shared_cpu.py", "memory.py", "names.py", "sweep.py", "learning_curves.py", "faithful_curve.py"}
    if script == "distributed.py":
        assert re.search(r"^ +2 +[\d,]+ +\d+% +[\d.]+ ms", done.stdout, re.M), done.stdout
    elif script not in {*other_tables, "scaling.py"}:
        assert TABLE_ROW.search(done.stdout), done.stdout
    if script == "tokenization.py":
        assert "identical output: True" in done.stdout


@pytest.mark.parametrize("implementation", ["StoryLLM", "plain loop"])
def test_a_process_measures_one_implementation_of_a_training_step(run_benchmark, implementation):
    code, out, _ = run_benchmark("training_step.py", f"--recipe demo --repeats 1 --only '{implementation}'")
    seconds, megabytes = map(float, out.split())
    assert code == 0
    assert 0 < seconds < 60 and megabytes > 100


def test_the_page_on_scaling_has_the_tables_of_the_script(run_benchmark):
    code, out, _ = run_benchmark("scaling.py", "")
    page = (BENCHMARKS.parent / "docs/scaling.md").read_text(encoding="utf-8")
    tables = out.strip().split("\n\n")
    assert code == 0 and len(tables) == 4
    for table in tables:
        assert f"\n{table}\n\n" in page
    for cluster in importlib.import_module("scaling").CLUSTERS:
        flops, memory = PEAK_FLOPS[cluster.gpu] / 1e12, f"{cluster.memory / 1e9:.0f} GB"
        rates = [f"{rate / 1e9:,g} GB/s" for rate in (cluster.memory_rate, cluster.link, cluster.network)]
        cells = [cluster.name, f"{flops:.0f}e12", memory, rates[0], str(cluster.gpus_per_machine), rates[1]]
        assert re.search(re.escape(f"| {' | '.join(cells)} (") + r"[^|]*" + re.escape(f" | {rates[2]} |"), page)


def test_invalid_input_is_one_line_and_exit_code_2(run_benchmark):
    code, _, error = run_benchmark("training_step.py", "--recipe nix")
    assert code == 2
    assert "nix" in error and error.count("\n") == 1


def test_a_sweep_prints_a_row_per_setting_and_seed_and_repeats_no_run(run_benchmark, tmp_path):
    rows = (
        "'train.optimizer=muon train.schedule=wsd' 'train.windows=shuffled try=from_story_starts' "
        "try=zero_projections try=large_embeddings"  # differ in nothing else
    )
    options = f"--data-dir {{data}} --tokens 160 --base '{TINY_SETTINGS}' --seeds 2 --rows {rows}"
    tables = []
    for _ in range(2):
        code, out, _ = run_benchmark("sweep.py", options)
        assert code == 0
        tables.append(re.findall(r"^ +(\d\.\d{4}) +(\d\.\d{4}) .*seed (\d)$", out, re.M))
    assert len(set(tables[0])) == 8
    assert tables[1] == tables[0]
    runs = list((tmp_path / "checkpoints" / "sweep").iterdir())
    assert len(runs) == 8
    for run in runs:
        assert [update["iteration"] for update in read_log(run / "log.jsonl").updates] == list(range(1, 11))


def test_learning_curves_are_compared_on_all_validation_stories(run_benchmark, tmp_path):
    options = "--source {stories} --runs demo --tokens 2048 --seeds 2 --eval-windows 2 --out runs.png --folder runs"
    options += " --settings train.batch_size=2"
    with pytest.warns(UserWarning, match="vocabulary"):  # the stories are too few for 1,024 tokens
        code, out, _ = run_benchmark("learning_curves.py", options)
    assert code == 0
    rows = re.findall(r"^demo +(\d) +2,048 +[\d,]+ +(\d\.\d{4}) +(\d\.\d{4}) +\d", out, re.M)
    assert [seed for seed, _, _ in rows] == ["0", "1"] and rows[0][1] != rows[1][1]
    run_dir = tmp_path / "runs/demo-2048-1 train.batch_size=2"
    assert [update["iteration"] for update in read_log(run_dir / "log.jsonl").updates] == [1, 2, 3, 4]
    report = evaluate(load(run_dir / "last.pt"), tmp_path / "runs/data-bpe1024/validation.bin")
    assert rows[1][1:] == (f"{report.loss:.4f}", f"{report.bits_per_byte:.4f}")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_counted_in_each_story(run_benchmark, monkeypatch):
    code, out, _ = run_benchmark("names.py", SMALLEST["names.py"])
    assert code == 0
    corpus, model = re.findall(r"^ +(\d\.\d\d) +(\d\.\d{3})   (?:the corpus|.*last\.pt)$", out, re.M)
    assert 1 <= float(corpus[0]) <= 2 and float(corpus[1]) == 1
    assert model == ("0.00", "1.000")  # its stories have other names
    names = importlib.import_module("names")
    assert names.different_names("Mia and Tom ran. Mia's dog, Anna, said: TOM!") == 3


def test_the_baseline_tokenizes_to_identical_bytes(tiny_data, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    datasets = pytest.importorskip("datasets")
    plain_loop = importlib.import_module("plain_loop")
    data = open_dataset(tiny_data)
    stories = datasets.Dataset.from_dict({"text": list(read_stories(data.config, "train"))})
    plain_loop.prepare(stories, data.tokenizer, tmp_path / "train.bin", num_proc=1)
    assert (tmp_path / "train.bin").read_bytes() == (tiny_data / "train.bin").read_bytes()


def test_train_and_the_baseline_reach_the_same_losses(tiny_data, tmp_path, monkeypatch):
    """A hundred iterations without dropout from the same seed and windows."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plain_loop = importlib.import_module("plain_loop")
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
    model_config = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0)
    losses = [update["train_loss"] for update in train(Recipe(model_config, train=config), tiny_data, tmp_path).updates]

    torch.manual_seed(7)
    plain_model = plain_loop.PlainGPT(model_config)
    torch.manual_seed(7)
    plain_model.load_state_dict(GPT(model_config).state_dict())
    tokens = open_dataset(tiny_data).train

    def get_batch(iteration):
        return tuple(map(torch.from_numpy, training_batch(tokens, 16, config, iteration)))

    plain_losses = list(plain_loop.train(plain_model, get_batch, config, "cpu"))
    plain_losses = np.array(plain_losses).reshape(-1, 4).mean(1)  # per update
    np.testing.assert_allclose(losses, plain_losses, atol=1e-4)
    assert plain_losses[-1] < plain_losses[0] - 1
