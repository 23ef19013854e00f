"""Runs a notebook from top to bottom and prints the text output of its cells as it appears.

    python tests/run_notebook.py StoryLLM.ipynb run
    python tests/run_notebook.py StoryLLM.ipynb run recipe_name=demo

Writes run/StoryLLM.ipynb and run/StoryLLM.html. The outputs of cells tagged "remove-output" are only in the HTML, so
that the notebook can be committed. Parameters are set in a new cell after the one tagged "parameters", as
papermill does. On the command line, they are strings. Ctrl-C interrupts the current cell: training saves its progress.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


class PrintingClient(NotebookClient):
    """A notebook client that also prints the text output of the cells, and passes Ctrl-C on to the kernel."""

    async def async_start_new_kernel_client(self, **options: Any) -> Any:
        client = await super().async_start_new_kernel_client(**options)
        with contextlib.suppress(NotImplementedError, RuntimeError):  # Windows, or not the main thread
            asyncio.get_running_loop().add_signal_handler(
                signal.SIGINT, lambda: asyncio.ensure_future(self.km.interrupt_kernel())
            )
        return client

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        return super().process_message(msg, cell, cell_index)


def run_notebook(source: Path, out_dir: Path, parameters: Mapping[str, Any], cwd: Path | None = None) -> Path:
    """Executes `source` in its own folder, or in `cwd`, and returns the path of the executed notebook in `out_dir`.

    Raises CellExecutionError if a cell fails. The notebook up to that cell is written anyway.
    """
    notebook = nbformat.read(source, as_version=4)
    if parameters:
        tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
        lines = [f"{name} = {value!r}" for name, value in parameters.items()]
        notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    out_dir.mkdir(parents=True, exist_ok=True)
    target = out_dir / source.name
    client = PrintingClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        coalesce_streams=True,  # keeps only the last state of a progress bar
        resources={"metadata": {"path": str(cwd or source.resolve().parent)}},
    )
    try:
        client.execute()
    finally:
        nbformat.write(notebook, target)
    return target


def remove_outputs(path: Path) -> None:
    """Removes the outputs of the cells tagged "remove-output" from a notebook file."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "remove-output" in cell.metadata.get("tags", []):
            cell.outputs = []
    nbformat.write(notebook, path)


def main() -> int:
    source, out_dir, *settings = sys.argv[1:]
    started = time.monotonic()
    try:
        target = run_notebook(Path(source), Path(out_dir), dict(setting.split("=", 1) for setting in settings))
    except CellExecutionError as error:
        print(f"{source} stopped: {error.ename}: {error.evalue}".rstrip(": "), file=sys.stderr)
        return 130 if "interrupt" in f"{error.ename} {error.evalue}".lower() else 1
    except KeyboardInterrupt:  # before the kernel has started
        return 130
    from nbconvert import HTMLExporter

    page = target.with_suffix(".html")
    page.write_text(HTMLExporter().from_filename(str(target))[0], encoding="utf-8")
    remove_outputs(target)
    print(f"\ndone in {time.monotonic() - started:.0f} seconds: open {page} in a browser, or {target} in Jupyter")
    return 0


if __name__ == "__main__":
    sys.exit(main())
