"""The notebook: run top to bottom as a reader would, only shorter; and the copy in the repository."""

import json
from pathlib import Path

import nbformat
import pytest
from run_notebook import run_notebook

NOTEBOOK = Path(__file__).parents[1] / "StoryLLM.ipynb"


def outputs(notebook, cell_id):
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    return cell.outputs


def printed(notebook, cell_id):
    return "".join(output.get("text", "") for output in outputs(notebook, cell_id))


def pictures(notebook):
    return [
        cell.id
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    parameters = {
        "recipe_name": "demo",
        "data_dir": str(folder / "data"),
        "checkpoint_dir": str(folder / "checkpoints"),
        "overrides": {
            "data.builtin_stories": 400,
            "train.max_iters": 30,
            "train.eval_interval": 10,
            "train.eval_windows": 8,
            "train.device": "cpu",
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for a model this small, a second thread costs more than it brings
        return nbformat.read(run_notebook(NOTEBOOK, folder / "run", parameters), as_version=4)


def test_it_runs_top_to_bottom(executed):
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]


def test_it_shows_what_it_promises(executed):
    assert pictures(executed) == ["flowchart", "curves", "fast-curves"]
    assert "iteration     30" in printed(executed, "train")
    assert "30/30" in printed(executed, "train")
    assert printed(executed, "pumpkin").startswith("Once upon a time there was a pumpkin.")
    assert printed(executed, "temperatures").count("Once upon a time") >= 4
    assert "bits per byte" in printed(executed, "evaluate")
    assert "10/10" in printed(executed, "fast-train")
    assert printed(executed, "fast-story").startswith("Once upon a time")


def test_the_copy_in_the_repository_is_a_real_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert pictures(notebook) == ["flowchart", "curves", "fast-curves"]
    assert "finished already" not in printed(notebook, "train") + printed(notebook, "fast-train")
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_it_only_calls_the_package():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for source in code:
        assert not [line for line in source.splitlines() if line.lstrip().startswith(("def ", "class ", "while "))]
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert not any("torch" in line for line in code[0].splitlines() if "install" in line)  # Colab's own stays
