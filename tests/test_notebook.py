"""The notebook runs from top to bottom, and the committed copy is a complete run."""

import ast
import re
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from run_notebook import remove_outputs, run_notebook

import storyllm

NOTEBOOK = Path(__file__).parents[1] / "StoryLLM.ipynb"
README = NOTEBOOK.with_name("README.md")
FIGURES = ["token-colors", "architecture", "curves", "predictions", "surprisal", "positions", "attention", "similarity"]
FIGURES += ["nearest", "compare"]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_of(cell):
    """The cell's syntax tree, without IPython's magic commands."""
    return ast.parse(re.sub(r"^(\s*)%.*$", r"\1pass", cell.source, flags=re.MULTILINE))


def printed(notebook, cell_id):
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    return "".join(output.get("text", "") for output in cell.outputs)


def cells_with_figures(notebook):
    return [
        cell.id for cell in code_cells(notebook) for output in cell.outputs if "image/png" in output.get("data", {})
    ]


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def assert_complete(notebook):
    """Every cell ran once, in order, without errors or warnings, and the figures are there.

    A model that has hardly been trained may warn that its stories do not end.
    """
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    errors = [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not [error for error in errors if "did not end within max_new_tokens" not in error.get("text", "")]
    assert cells_with_figures(notebook) == FIGURES


@pytest.mark.timeout(600)
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """With little data and few iterations."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    overrides = {
        "data.synthetic_stories": 400,
        "train.max_iters": 30,
        "train.eval_interval": 10,
        "train.eval_windows": 8,
        "train.device": "cpu",
    }
    folders = {"data_dir": str(tmp_path / "data"), "checkpoint_dir": str(tmp_path / "checkpoints")}
    target = run_notebook(NOTEBOOK, tmp_path / "run", {"recipe_name": "demo", "overrides": overrides, **folders})
    notebook = nbformat.read(target, as_version=4)
    assert_complete(notebook)
    for cell_id in ("train", "second-train", "finetune"):
        assert "iteration     30" in printed(notebook, cell_id)
    assert printed(notebook, "story").startswith("Once upon a time there was a pumpkin.")
    assert printed(notebook, "temperatures").count("Once upon a time") >= 4
    assert "bits per byte" in printed(notebook, "evaluate")
    assert "Once upon a time" in printed(notebook, "second-story")
    assert (tmp_path / "checkpoints" / "demo" / "story.html").stat().st_size < 1_200_000
    (output,) = next(cell for cell in notebook.cells if cell.id == "playground").outputs
    assert "<iframe" in output.data["text/html"]
    remove_outputs(target)
    assert "<iframe" not in target.read_text(encoding="utf-8")


def test_the_committed_copy_is_a_complete_run_of_demo_and_demo_fast(committed):
    nbformat.validate(committed)
    assert_complete(committed)
    assert NOTEBOOK.stat().st_size < 1_500_000  # without the page in the output of "playground"
    for name, cell_id in (("demo", "train"), ("demo-fast", "second-train")):
        last_iteration = storyllm.get_recipe(name).train.last_iteration
        assert f"{last_iteration}/{last_iteration}" in printed(committed, cell_id)
        assert "iteration      0" in printed(committed, cell_id)  # neither resumed nor already finished


@pytest.mark.skipif(sys.platform == "win32", reason="no signal handlers in asyncio")
def test_an_interrupt_stops_the_cell_and_prints_one_line(tmp_path):
    code = "import time\nprint('started', flush=True)\ntime.sleep(100)"
    cells = [nbformat.v4.new_code_cell(code), nbformat.v4.new_code_cell("print('later')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "sleep.ipynb")
    command = [sys.executable, run_notebook.__code__.co_filename, "sleep.ipynb", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert error.splitlines()[-1] == "sleep.ipynb stopped: KeyboardInterrupt" and "Traceback" not in error
    assert (tmp_path / "run" / "sleep.ipynb").exists()


def test_it_defines_no_functions_or_classes(committed):
    for cell in code_cells(committed):
        definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.While)
        assert not [node for node in ast.walk(code_of(cell)) if isinstance(node, definitions)]


def test_it_has_one_cell_of_parameters(committed):
    assert len([cell for cell in committed.cells if "parameters" in cell.metadata.get("tags", [])]) == 1


def test_it_installs_the_package_of_the_readme_and_keeps_the_installed_torch(committed):
    (setup,) = [cell for cell in committed.cells if cell.id == "setup"]
    (address,) = re.findall(r'^REPOSITORY = "(\S+)"', setup.source, re.MULTILINE)
    assert f"REPOSITORY={address}\n" in README.read_text(encoding="utf-8")
    assert not [line for line in setup.source.splitlines() if "install" in line and "torch" in line]
