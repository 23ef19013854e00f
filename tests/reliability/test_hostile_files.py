"""Untrusted files: nothing in them is executed, exhausts memory, leaves its folder, or controls a terminal."""

import ast
import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import TINY, environment

import storyllm
from storyllm import StoryLLMError, Storyteller, load, load_tokenizer, read_log, train
from storyllm.checkpoint import load_checkpoint, save_checkpoint
from storyllm.cli import main
from storyllm.config import printable
from storyllm.files import read_json, write_json

REPOSITORY = Path(storyllm.__file__).parents[1]


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    train(TINY.override({"train.stop_at": 8}), tiny_data, folder)
    return folder


# Execution


class Payload:
    """Code that runs when it is unpickled: it creates a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def save_with_payload(path, contents):
    torch.save({**contents, "extra": Payload()}, path)


def save_in_old_format(path, contents):
    torch.save({**contents, "extra": Payload()}, path, _use_new_zipfile_serialization=False)


def save_plain_pickle(path, contents):
    path.write_bytes(pickle.dumps(Payload()))


def save_with_replaced_pickle(path, contents):
    """A complete checkpoint with matching checksums, in which only the pickle was replaced."""
    torch.save(contents, path)
    source, path = zipfile.ZipFile(io.BytesIO(path.read_bytes())), path
    with zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            data = pickle.dumps(Payload(), protocol=2) if entry.filename.endswith("data.pkl") else source.read(entry)
            target.writestr(entry.filename, data)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [save_with_payload, save_in_old_format, save_plain_pickle, save_with_replaced_pickle])
@pytest.mark.parametrize("name", ["best_model_params.pt", "last.pt"])
def test_a_pickle_is_never_executed(run, tiny_data, tmp_path, monkeypatch, save, name):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / name, load_checkpoint(run / name))
    with pytest.raises(StoryLLMError, match=name):
        load(tmp_path / name)
    if name == "last.pt":
        with pytest.raises(StoryLLMError, match=r"last\.pt"):
            train(TINY, tiny_data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_unpickling_executes_the_payload(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "executed").is_dir()


def test_torch_load_is_called_once_and_executes_nothing():
    calls = []
    for path in REPOSITORY.rglob("*.py"):
        if ".venv" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                calls.append((path.name, {k.arg: ast.unparse(k.value) for k in node.keywords}))
    assert calls == [("checkpoint.py", {"map_location": "'cpu'", "weights_only": "True"})]


@pytest.mark.parametrize(
    "line",
    [
        *("import torch; torch.load('a')", "from torch import load", "import pickle", "from dill import loads"),
        *("eval('1')", "exec('1')", "import numpy as np; np.load('a')", "import marshal; marshal.loads(b'')"),
    ],
)
def test_lint_bans_functions_that_can_execute_a_file(line):
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "storyllm/new.py", "-"]
    done = subprocess.run(command, input=line + "\n", capture_output=True, text=True, cwd=REPOSITORY)
    assert re.search(r"^(TID251|S102|S30[127]) ", done.stdout, re.MULTILINE), done.stdout


# Memory


def wide(contents):
    contents["recipe"]["model"].update(n_embd=1_200_000)


def deep(contents):
    contents["recipe"]["model"].update(n_layer=1_000_000_000)


def long(contents):
    contents["recipe"]["model"].update(block_size=1_000_000_000)


def expanded(contents):
    """A view of one number with the shape of a terabyte."""
    contents["recipe"]["model"].update(block_size=10**10)
    contents["model"]["transformer.wpe.weight"] = torch.zeros(1).expand(10**10, 32)


def many_views(contents):
    """Many views of a small storage."""
    weight = torch.zeros(1_000_000)
    contents["more"] = [weight[i : i + 900_000] for i in range(50_000)]


def nested(contents):
    """Lists of references to the same list (a "billion laughs"): short in the file, endless when printed."""
    inner = ["x"] * 10
    for _ in range(40):
        inner = [inner] * 10
    contents["recipe"]["model"]["n_layer"] = inner


def repeated_tokens(contents):
    contents["tokenizer"]["tokens"] = " ".join(["AAAA"] * 3_000_000)


class Large:
    def __reduce__(self):
        return bytearray, (10**12,)


def allocation(contents):
    contents["more"] = Large()


HOSTILE = [wide, deep, long, expanded, many_views, nested, repeated_tokens, allocation]

LOADER = """
import pathlib, resource, sys, storyllm
storyllm.load(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path = pathlib.Path(sys.argv[2])
try:
    storyllm.load(path)
except storyllm.StoryLLMError as error:
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(len(str(error)), more - 30 * path.stat().st_size)
"""


@pytest.mark.parametrize("change", HOSTILE)
def test_declared_sizes_allocate_no_memory(run, tmp_path, change):
    """The file is rejected with a short message, using at most 64 MB and thirty times its size."""
    contents = load_checkpoint(run / "best_model_params.pt")
    change(contents)
    torch.save(contents, tmp_path / "large.pt")
    command = [sys.executable, "-c", LOADER, run / "best_model_params.pt", tmp_path / "large.pt"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    length, more = map(int, done.stdout.split())
    assert length < 600
    assert more < 64 * 2**20


def test_a_zip_bomb_is_rejected(run, tmp_path):
    source = zipfile.ZipFile(run / "best_model_params.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(entry.filename, bytes(200_000_000) if entry.filename.endswith("data/1") else data)
    assert (tmp_path / "bomb.pt").stat().st_size < 1_000_000
    with pytest.raises(StoryLLMError, match=r"bomb\.pt"):
        load(tmp_path / "bomb.pt")


# Names


def test_names_in_files_are_never_used_as_paths(run, tiny_data, tmp_path):
    """Names in an archive, a configuration or a .json."""
    (tmp_path / "inside").mkdir()
    contents = load_checkpoint(run / "last.pt")
    contents["recipe"]["data"]["source"] = "../outside.txt"
    contents["tokenizer"]["name"] = "../../outside"
    path = tmp_path / "inside" / "last.pt"
    save_checkpoint(path, contents)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../outside", "out")
        archive.writestr("/tmp/outside", "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoryLLMError, match=r"last\.pt"):
        load(path)
    save_checkpoint(path, contents)
    load(path).generate("One day", max_new_tokens=2, seed=0)
    assert sorted(tmp_path.rglob("*")) == before
    data = tmp_path / "data"
    data.mkdir()
    for file in tiny_data.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    for split in ("train", "validation"):
        info = read_json(data / f"{split}.json")
        write_json(data / f"{split}.json", {**info, "source": "../../outside", "tokenizer": "../x"})
    train(TINY.override({"train.stop_at": 4}), data, tmp_path / "inside" / "run")
    assert not list(tmp_path.rglob("*outside*"))


def test_a_symlinked_log_is_not_followed(run, tiny_data, tmp_path):
    (tmp_path / "precious").write_text("precious")
    for file in run.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(StoryLLMError, match=r"log\.jsonl"):
        train(TINY, tiny_data, tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"


# Terminals, notebooks, plots

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\x7f\x00"
HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def test_printable_escapes_control_characters_only():
    text = 'Zoë said: "¡olé!"\n\tשלום 😀 <b>'
    assert printable(text) == text
    assert printable(ESCAPES) == r"\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\x7f\x00"
    assert printable("a\u2028b\u202ec") == r"a\u2028b\u202ec"
    assert str(StoryLLMError("a\nb\tc\u2028d\u202ee")) == r"a\nb\tc\u2028d\u202ee"


def control_characters(text):
    return re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_prompts_and_stories_cannot_control_the_terminal(run, tmp_path, capsys):
    arguments = ["generate", "--checkpoint", str(run / "last.pt"), "--max-new-tokens", "300", "--temperature", "3"]
    assert main([*arguments, "--seed", "1", f"One{ESCAPES}day {HTML}"]) == 0
    printed = capsys.readouterr().out
    assert r"One\x1b[2J" in printed
    assert not control_characters(printed)
    assert main([*arguments, "--seed", "2", "--num-stories", "2", f"One{ESCAPES}day"]) == 0
    assert not control_characters(capsys.readouterr().out)
    storyteller = load(run / "last.pt")  # shows that the story itself has control characters
    assert control_characters(storyteller.generate("One day", max_new_tokens=300, temperature=3, seed=1))


def test_messages_cannot_control_the_terminal(run, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = ESCAPES.replace("\x00", "")
    pq.write_table(pa.table({f"text{ESCAPES}\n": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / f"b{name}.jsonl").write_text("{}\n")
    contents = load_checkpoint(run / "last.pt")
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
        ["generate", "--checkpoint", str(run / "last.pt"), "--device", ESCAPES],
        ["plot"],
    ):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert not control_characters(printed.err), arguments
        assert not control_characters(printed.out.replace("\r", "")), (
            arguments
        )  # the progress bar uses carriage returns
        assert printed.err.count("\n") == 1
    with pytest.raises(StoryLLMError) as caught:
        raise StoryLLMError(f"line one\nline two{ESCAPES}")
    assert not control_characters(str(caught.value))
    assert "\n" not in str(caught.value)


def test_the_name_of_a_tokenizer_cannot_control_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = "prepare --source synthetic --synthetic-stories 30 --tokenizer bpe:300".split()
    assert main(arguments) == 0
    for split in ("train", "validation"):
        info = read_json(tmp_path / "data" / f"{split}.json")
        write_json(tmp_path / "data" / f"{split}.json", {**info, "tokenizer": ESCAPES})
    capsys.readouterr()
    assert main(arguments) == 0
    assert not control_characters(re.sub(r"\r", "", capsys.readouterr().out))


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_plot_shows_untrusted_text_as_text(run, tmp_path, suffix):
    log = read_log(run / "log.jsonl")
    log.run["device"] = f"{HTML} $x^{{$ \\frac {ESCAPES}"
    storyllm.plot_losses(log, tmp_path / f"losses.{suffix}")
    picture = (tmp_path / f"losses.{suffix}").read_bytes()
    assert len(picture) > 1000
    assert b"<script" not in picture
    assert b"\x1b" not in picture or suffix == "png"


def test_a_notebook_shows_html_in_a_story_as_text(run):
    nbformat, nbconvert = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert")
    story = load(run / "last.pt").generate(f"{HTML}{ESCAPES}", max_new_tokens=1, seed=0)
    assert story.startswith(HTML)
    output = nbformat.v4.new_output("stream", name="stdout", text=story)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(story)", outputs=[output])])
    page, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page


# Network

OFFLINE = """
import socket, sys

def forbid(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        raise SystemExit(f"network access: {event} {arguments}")

sys.addaudithook(forbid)
from storyllm.cli import main
for arguments in (
    "prepare --recipe demo --synthetic-stories 300 --tokenizer bpe:300",
    "train --recipe demo --train.max-iters 4 --train.eval-windows 4 --train.device cpu",
    "generate --max-new-tokens 5 --seed 1 --device cpu",
    "evaluate --device cpu",
    "plot",
):
    assert main(arguments.split()) == 0
if sys.argv[1:] == ["connect"]:
    socket.create_connection(("127.0.0.1", 9))
"""


@pytest.mark.parametrize("connect", [False, True])
def test_demo_does_not_use_the_network(tmp_path, connect):
    """`connect` shows that network access would be noticed."""
    variables = {**environment(), "TIKTOKEN_CACHE_DIR": str(tmp_path / "none")}
    command = [sys.executable, "-c", OFFLINE, *(["connect"] if connect else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert done.returncode == connect, done.stderr
    assert ("network access: socket." in done.stderr) == connect


def test_a_storyteller_does_not_use_the_network(run, tiny_data, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("network access"))
    model = load(run / "last.pt").model
    assert Storyteller(model, load_tokenizer(tiny_data)).generate("One day", max_new_tokens=3, seed=0)
