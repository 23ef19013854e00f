"""Untrusted files: nothing in them is executed, takes memory that they do not have, or controls a terminal."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import TINY, environment

import storyllm
from storyllm import StoryLLMError, load, read_log, train
from storyllm.checkpoint import load_checkpoint, save_checkpoint
from storyllm.cli import main
from storyllm.files import read_json, write_json

REPOSITORY = Path(storyllm.__file__).parents[1]
Contents = dict[str, Any]

# Execution


class Malicious:
    """Creates the folder `executed` when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("executed",)


def save_with_torch(path: Path, contents: Contents) -> None:
    torch.save({**contents, "extra": Malicious()}, path)


def save_with_older_torch_format(path: Path, contents: Contents) -> None:
    torch.save({**contents, "extra": Malicious()}, path, _use_new_zipfile_serialization=False)


def save_plain_pickle(path: Path, contents: Contents) -> None:
    path.write_bytes(pickle.dumps(Malicious()))


def save_checkpoint_with_another_pickle(path: Path, contents: Contents) -> None:
    """A valid checkpoint in which only the pickle is replaced. Its checksums match."""
    torch.save(contents, path)
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            data = pickle.dumps(Malicious(), protocol=2) if entry.filename.endswith("data.pkl") else source.read(entry)
            target.writestr(entry.filename, data)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["best_model_params.pt", "last.pt"])
@pytest.mark.parametrize(
    "save", [save_with_torch, save_with_older_torch_format, save_plain_pickle, save_checkpoint_with_another_pickle]
)
def test_a_pickle_is_never_executed(tiny_run, tiny_data, tmp_path, monkeypatch, save, name):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / name, load_checkpoint(tiny_run / name))
    with pytest.raises(StoryLLMError, match=rf"{name} .*not a checkpoint"):
        load(tmp_path / name)
    with pytest.raises(StoryLLMError, match=name):
        train(TINY, tiny_data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_malicious_pickle_does_execute_when_it_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Malicious()))
    assert (tmp_path / "executed").is_dir()


def test_torch_load_is_called_once_and_executes_nothing():
    calls = []
    for path in REPOSITORY.rglob("*.py"):
        if any(part.startswith(".") for part in path.relative_to(REPOSITORY).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                calls.append((path.name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}))
    assert calls == [("checkpoint.py", {"map_location": "'cpu'", "weights_only": "True"})]


def test_the_linter_finds_everything_that_could_execute_a_file():
    lines = (
        *("import torch; torch.load('a')", "from torch import load", "import pickle", "from dill import loads"),
        *("eval('1')", "exec('1')", "import numpy as np; np.load('a')", "import marshal; marshal.loads(b'')"),
    )
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--output-format=concise",
        "--stdin-filename=storyllm/new.py",
        "-",
    ]
    text = "\n".join(lines) + "\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=REPOSITORY)
    found = {int(line) for line in re.findall(r":(\d+):\d+: (?:TID251|S102|S30[127]) ", done.stdout)}
    assert found == set(range(1, len(lines) + 1)), done.stdout + done.stderr


# Memory


def huge_width(contents: Contents) -> None:
    contents["recipe"]["model"].update(n_embd=1_200_000)


def many_layers(contents: Contents) -> None:
    contents["recipe"]["model"].update(n_layer=10_000)


def long_context(contents: Contents) -> None:
    contents["recipe"]["model"].update(block_size=1_000_000_000)


def expanded_tensor(contents: Contents) -> None:
    """A single number with the shape of a terabyte."""
    contents["recipe"]["model"].update(block_size=10**10)
    contents["model"]["transformer.wpe.weight"] = torch.zeros(1).expand(10**10, 32)


def overlapping_views(contents: Contents) -> None:
    weight = torch.zeros(1_000_000)
    contents["more"] = [weight[i : i + 900_000] for i in range(5_000)]


def nested_references(contents: Contents) -> None:
    """Lists of the same lists: small in the file, endless when they are printed."""
    inner: list[Any] = ["x"] * 10
    for _ in range(40):
        inner = [inner] * 10
    contents["recipe"]["model"]["n_layer"] = inner


def many_tokens(contents: Contents) -> None:
    contents["tokenizer"]["tokens"] = " ".join(["AAAA"] * 500_000)


class Large:
    def __reduce__(self) -> tuple[type[bytearray], tuple[int]]:
        return bytearray, (10**12,)


def allocation(contents: Contents) -> None:
    contents["more"] = Large()


# Prints for each file its name, the length of the error, and the memory in bytes beyond 30 times its size.
LOADER = """
import pathlib, resource, sys, storyllm

def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

storyllm.load(sys.argv[1])  # imports what is needed
for path in map(pathlib.Path, sys.argv[2:]):
    before = peak_memory()
    try:
        storyllm.load(path)
    except storyllm.StoryLLMError as error:
        print(path.stem, len(str(error)), peak_memory() - before - 30 * path.stat().st_size)
"""


def test_declared_sizes_take_no_memory(tiny_run, tmp_path):
    """A file is refused in a line of normal length, with at most 64 MB and 30 times its size of memory."""
    changes = [huge_width, many_layers, long_context, expanded_tensor, overlapping_views, nested_references]
    changes += [many_tokens, allocation]
    paths = []
    for change in changes:
        contents = load_checkpoint(tiny_run / "best_model_params.pt")
        change(contents)
        paths.append(tmp_path / f"{change.__name__}.pt")
        torch.save(contents, paths[-1])
    paths.sort(key=lambda path: path.stat().st_size)  # peak memory only grows
    command = [sys.executable, "-c", LOADER, tiny_run / "best_model_params.pt", *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=110)
    refused = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _, _ in refused] == [path.stem for path in paths], done.stderr
    for name, length, memory in refused:
        assert int(length) < 600, name
        assert int(memory) < 64 * 2**20, name


def test_a_compressed_archive_is_refused(tiny_run, tmp_path):
    source = zipfile.ZipFile(tiny_run / "best_model_params.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            data = bytes(100_000_000) if entry.filename.endswith("data/1") else source.read(entry)
            target.writestr(entry.filename, data)
    assert (tmp_path / "bomb.pt").stat().st_size < 1_000_000
    with pytest.raises(StoryLLMError, match="not a checkpoint"):
        load(tmp_path / "bomb.pt")


# Paths


def test_names_inside_files_are_never_used_as_paths(tiny_run, tiny_data, tmp_path):
    contents = load_checkpoint(tiny_run / "last.pt")
    contents["recipe"]["data"]["source"] = "../outside.txt"
    contents["tokenizer"]["name"] = "../../outside"
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "last.pt"
    save_checkpoint(path, contents)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../outside", "x")
        archive.writestr("/tmp/outside", "x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoryLLMError, match="not a checkpoint"):
        load(path)
    save_checkpoint(path, contents)
    load(path).generate("One day", max_new_tokens=2, seed=0)
    assert sorted(tmp_path.rglob("*")) == before
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    for split in ("train", "validation"):
        info = read_json(data / f"{split}.json")
        write_json(data / f"{split}.json", {**info, "source": "../../outside", "tokenizer": "../outside"})
    train(TINY.override({"train.stop_at": 4}), data, tmp_path / "inside" / "run")
    assert not list(tmp_path.rglob("*outside*"))


def test_a_log_that_is_a_symlink_is_not_followed(unfinished, tiny_data, tmp_path):
    target = tmp_path / "target"
    shutil.copy(unfinished / "log.jsonl", target)
    content = target.read_bytes()
    (unfinished / "log.jsonl").unlink()
    (unfinished / "log.jsonl").symlink_to(target)
    with pytest.raises(StoryLLMError, match=r"log\.jsonl"):
        train(TINY, tiny_data, unfinished)
    assert target.read_bytes() == content


# Terminals and plots

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\x7f\x00"
HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def control_characters(text: str) -> list[str]:
    return re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_neither_a_prompt_nor_a_story_controls_the_terminal(tiny_run, capsys):
    arguments = ["generate", "--checkpoint", str(tiny_run / "last.pt"), "--max-new-tokens", "300", "--temperature", "3"]
    assert main([*arguments, "--seed", "1", f"One{ESCAPES}day {HTML}"]) == 0
    printed = capsys.readouterr().out
    assert r"One\x1b[2J" in printed
    assert not control_characters(printed)
    assert main([*arguments, "--seed", "2", "--num-stories", "2", f"One{ESCAPES}day"]) == 0
    assert not control_characters(capsys.readouterr().out)
    # The model does generate control characters.
    story = load(tiny_run / "last.pt").generate("One day", max_new_tokens=300, temperature=3, seed=1)
    assert control_characters(story)


def test_no_error_message_controls_the_terminal(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = ESCAPES.replace("\x00", "")
    pq.write_table(pa.table({f"text{ESCAPES}\n": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / f"b{name}.jsonl").write_text("{}\n")
    contents = load_checkpoint(tiny_run / "last.pt")
    contents["tokenizer"]["name"] = ESCAPES
    contents["recipe"]["model"]["n_head"] = ESCAPES
    save_checkpoint(tmp_path / f"c{name}.pt", contents)
    (tmp_path / "log.jsonl").write_text(json.dumps({"event": ESCAPES}) + "\n")
    for arguments in (
        ["prepare", "--source", "a.parquet"],
        ["prepare", "--source", f"b{name}.jsonl"],
        ["prepare", "--source", f"none{ESCAPES}"],
        ["train", "--recipe", ESCAPES],
        ["train", "--data-dir", name],
        ["generate", "--checkpoint", f"c{name}.pt"],
        ["generate", "--checkpoint", str(tiny_run / "last.pt"), "--device", ESCAPES],
        ["plot", "log.jsonl"],
    ):
        assert main(arguments) == 2, arguments
        printed = capsys.readouterr()
        assert not control_characters(printed.err), arguments
        assert not control_characters(printed.out.replace("\r", "")), arguments  # a progress bar returns to the margin
        assert printed.err.count("\n") == 1, arguments


def test_a_tokenizer_name_does_not_control_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = "prepare --source synthetic --synthetic-stories 30 --tokenizer bpe:300".split()
    assert main(arguments) == 0
    for split in ("train", "validation"):
        info = read_json(tmp_path / "data" / f"{split}.json")
        write_json(tmp_path / "data" / f"{split}.json", {**info, "tokenizer": ESCAPES})
    capsys.readouterr()
    assert main(arguments) == 0
    assert not control_characters(capsys.readouterr().out.replace("\r", ""))


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_plot_shows_the_content_of_a_log_as_text(tiny_run, tmp_path, suffix):
    log = read_log(tiny_run / "log.jsonl")
    log.run["device"] = f"{HTML} $x^{{$ \\frac {ESCAPES}"
    storyllm.plot_losses(log, tmp_path / f"losses.{suffix}")
    image = (tmp_path / f"losses.{suffix}").read_bytes()
    assert len(image) > 1_000
    assert b"<script" not in image
    assert b"\x1b" not in image or suffix == "png"


# Network

OFFLINE = """
import socket, sys

def refuse(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        raise SystemExit(f"network access: {event} {arguments}")

sys.addaudithook(refuse)
from storyllm.cli import main

for arguments in (
    "prepare --recipe demo --synthetic-stories 300 --tokenizer bpe:300",
    "train --recipe demo --train.max-iters 4 --train.eval-windows 4 --train.device cpu",
    "generate --max-new-tokens 5 --seed 1 --device cpu",
    "evaluate --device cpu",
    "plot",
):
    assert main(arguments.split()) == 0
print("all commands succeeded")
socket.create_connection(("127.0.0.1", 9))  # is noticed
"""


def test_demo_does_not_use_the_network(tmp_path):
    variables = {**environment(), "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty")}
    command = [sys.executable, "-c", OFFLINE]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path, timeout=110)
    assert "all commands succeeded" in done.stdout, done.stderr
    assert done.returncode == 1
    assert "network access: socket.getaddrinfo" in done.stderr
