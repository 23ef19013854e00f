"""Fixtures for exported pages: the page of a small model, and its engine in Node."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import model_in

import storyllm
from storyllm.export.web_page import export_page

# Answers one line of JSON, {model, code, input}, with another. `code` is the body of a function in JavaScript.
SERVER = """
import { createInterface } from "node:readline";
import * as engine from "./engine.mjs";
import { readFileSync } from "node:fs";
const loaded = {};
for await (const line of createInterface({ input: process.stdin })) {
  const { model, code, input } = JSON.parse(line);
  let answer;
  try {
    loaded[model] ??= await engine.loadModel(readFileSync(model));
    const run = new Function("engine", "model", "tokenizer", "info", "input", code);
    answer = { result: run(engine, loaded[model].model, loaded[model].tokenizer, loaded[model].info, input) };
  } catch (error) {
    answer = { error: error.message };
  }
  process.stdout.write(JSON.stringify(answer) + "\\n");
}
"""


@pytest.fixture(scope="session")
def pages(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of the model in `tiny_run` for each format of the weights."""
    folder = tmp_path_factory.mktemp("pages")
    checkpoint = tiny_run / "best_model_params.pt"
    return {name: export_page(checkpoint, folder / f"{name}.html", weights=name) for name in ("int8", "float16")}


@pytest.fixture(scope="session")
def storyteller(tiny_run: Path) -> storyllm.Storyteller:
    """The model of `pages` in Python."""
    return storyllm.load(tiny_run / "best_model_params.pt", "cpu")


@pytest.fixture(scope="module")
def in_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """A function that runs JavaScript with the engine and the model of a page, and returns the result."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed")
    if int(subprocess.run([node, "--version"], capture_output=True, text=True).stdout[1:].split(".")[0]) < 18:
        pytest.skip("Node is older than version 18")
    folder = tmp_path_factory.mktemp("node")
    parts = [Path(storyllm.__file__).parent / "export" / "page" / name for name in ("engine.js", "load.js")]
    (folder / "engine.mjs").write_bytes(b"".join(part.read_bytes() for part in parts))
    (folder / "server.mjs").write_text(SERVER, encoding="utf-8")
    command = [node, "server.mjs"]
    server = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    files: dict[Path, str] = {}

    def run(page: Path, code: str, value: Any = None) -> Any:
        if page not in files:
            path = folder / f"{len(files)}.bin"
            path.write_bytes(model_in(page))
            files[page] = str(path)
        print(json.dumps({"model": files[page], "code": code, "input": value}), file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer.get("result")

    yield run
    server.kill()
    server.communicate()
