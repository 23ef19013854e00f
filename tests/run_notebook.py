"""Runs a notebook top to bottom and shows what it prints as it prints it, like a terminal would.

    python tests/run_notebook.py StoryLLM.ipynb run              # run/StoryLLM.ipynb and run/StoryLLM.html

Parameters, as in `recipe=demo`, are set in a cell put in after the one tagged "parameters", as papermill does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


class Watched(NotebookClient):
    """A client that also prints the text output of the cells."""

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        if msg["msg_type"] == "stream":
            sys.stdout.write(msg["content"]["text"])
            sys.stdout.flush()
        return super().process_message(msg, cell, cell_index)


def run_notebook(source: Path, folder: Path, parameters: Mapping[str, Any], cwd: Path | None = None) -> Path:
    """Executes `source`, in its own folder or in `cwd`, into `folder`; returns the executed notebook's path.

    Raises CellExecutionError where a cell fails; the notebook is written up to there all the same.
    """
    notebook = nbformat.read(source, as_version=4)
    if parameters:
        tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
        lines = [f"{name} = {value!r}" for name, value in parameters.items()]
        notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    client = Watched(
        notebook,
        timeout=None,
        kernel_name="python3",
        coalesce_streams=True,  # a progress bar leaves its last state, not all of them
        resources={"metadata": {"path": str(cwd or source.resolve().parent)}},
    )
    try:
        client.execute()
    finally:
        nbformat.write(notebook, target)
    return target


def main() -> int:
    source, folder, *settings = sys.argv[1:]
    started = time.monotonic()
    try:
        target = run_notebook(Path(source), Path(folder), dict(setting.split("=", 1) for setting in settings))
    except CellExecutionError as error:
        print(f"{source} failed: {error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    from nbconvert import HTMLExporter

    page = target.with_suffix(".html")
    page.write_text(HTMLExporter().from_filename(str(target))[0], encoding="utf-8")
    print(f"\ndone in {time.monotonic() - started:.0f} seconds: open {page} in a browser, or {target} in Jupyter")
    return 0


if __name__ == "__main__":
    sys.exit(main())
