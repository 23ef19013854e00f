"""Files from strangers: nothing in them is executed, takes memory that they do not have, or commands a terminal."""

import ast
import dataclasses
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
from test_training import TINY

import storyllm
from storyllm import StoryLLMError, Storyteller, load, read_log, train
from storyllm.checkpoint import load_checkpoint, save_checkpoint
from storyllm.cli import main
from storyllm.config import printable
from storyllm.files import read_json, write_json
from storyllm.tokens import read_tokenizer

REPOSITORY = Path(storyllm.__file__).parents[1]


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    train(TINY.override({"train.stop_at": 8}), tiny_data, folder)
    return folder


# Execution


class Bite:
    """Executed by whoever unpickles it."""

    def __reduce__(self):
        return os.mkdir, ("bitten",)


def save_bite(path, contents):
    torch.save({**contents, "extra": Bite()}, path)


def save_old_bite(path, contents):
    torch.save({**contents, "extra": Bite()}, path, _use_new_zipfile_serialization=False)


def save_plain_bite(path, contents):
    path.write_bytes(pickle.dumps(Bite()))


def save_hidden_bite(path, contents):
    """A whole checkpoint whose pickle alone was changed; its checksums are right."""
    torch.save(contents, path)
    source, path = zipfile.ZipFile(io.BytesIO(path.read_bytes())), path
    with zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            data = pickle.dumps(Bite(), protocol=2) if entry.filename.endswith("data.pkl") else source.read(entry)
            target.writestr(entry.filename, data)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [save_bite, save_old_bite, save_plain_bite, save_hidden_bite])
@pytest.mark.parametrize("name", ["best_model_params.pt", "last.pt"])
def test_a_pickle_is_never_executed(run, tiny_data, tmp_path, monkeypatch, save, name):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / name, load_checkpoint(run / name))
    with pytest.raises(StoryLLMError, match=rf"{name} is damaged or not a checkpoint"):
        load(tmp_path / name)
    if name == "last.pt":
        with pytest.raises(StoryLLMError, match="not a checkpoint"):
            train(TINY, tiny_data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_bite_bites_those_who_execute_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bite()))
    assert (tmp_path / "bitten").is_dir()


def test_there_is_one_torch_load_and_it_executes_nothing():
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
def test_the_lint_rule_finds_what_could_execute_a_file(line):
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
    """One number that says it is a terabyte."""
    contents["recipe"]["model"].update(block_size=10**10)
    contents["model"]["transformer.wpe.weight"] = torch.zeros(1).expand(10**10, 32)


def many_views(contents):
    """A small storage, seen again and again."""
    weight = torch.zeros(1_000_000)
    contents["more"] = [weight[i : i + 900_000] for i in range(50_000)]


def laughs(contents):
    """Lists of lists that are the same lists: short in the file, without end when written out."""
    inner = ["ha"] * 10
    for _ in range(40):
        inner = [inner] * 10
    contents["recipe"]["model"]["n_layer"] = inner


def words(contents):
    contents["tokenizer"]["tokens"] = " ".join(["AAAA"] * 3_000_000)


class Large:
    def __reduce__(self):
        return bytearray, (10**12,)


def allocation(contents):
    contents["more"] = Large()


HOSTILE = [wide, deep, long, expanded, many_views, laughs, words, allocation]

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
def test_sizes_that_a_file_claims_take_no_memory(run, tmp_path, change):
    """A file is refused with no more than 64 MB and thirty times its size, in a line of a usual length."""
    contents = load_checkpoint(run / "best_model_params.pt")
    change(contents)
    torch.save(contents, tmp_path / "large.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADER, run / "best_model_params.pt", tmp_path / "large.pt"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    length, more = map(int, done.stdout.split())
    assert length < 600
    assert more < 64 * 2**20


def test_an_archive_that_unpacks_to_more_than_it_has_is_refused(run, tmp_path):
    source = zipfile.ZipFile(run / "best_model_params.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(entry.filename, bytes(200_000_000) if entry.filename.endswith("data/1") else data)
    assert (tmp_path / "bomb.pt").stat().st_size < 1_000_000
    with pytest.raises(StoryLLMError, match="damaged or not a checkpoint"):
        load(tmp_path / "bomb.pt")


# Names


def test_names_in_files_lead_nowhere(run, tiny_data, tmp_path):
    """In an archive, in a configuration, in a .json: no file of that name is read or written."""
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
    with pytest.raises(StoryLLMError, match="not a checkpoint"):
        load(path)
    save_checkpoint(path, contents)
    load(path).tell("One day", max_new_tokens=2, seed=0)
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


def test_a_log_that_is_a_link_is_not_followed(run, tiny_data, tmp_path):
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


def test_printable_leaves_text_and_takes_commands():
    text = 'Zoë said: "¡olé!"\n\tשלום 😀 <b>'
    assert printable(text) == text
    assert printable(ESCAPES) == r"\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\x7f\x00"
    assert printable("a\u2028b\u202ec") == r"a\u2028b\u202ec"
    assert str(StoryLLMError("a\nb\tc\u2028d\u202ee")) == r"a\nb\tc\u2028d\u202ee"


def commands(text):
    return re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_neither_a_prompt_nor_a_story_commands_the_terminal(run, tmp_path, capsys):
    arguments = ["tell", "--checkpoint", str(run / "last.pt"), "--max-new-tokens", "300", "--temperature", "3"]
    assert main([*arguments, "--seed", "1", f"One{ESCAPES}day {HTML}"]) == 0
    told = capsys.readouterr().out
    assert r"One\x1b[2J" in told
    assert not commands(told)
    assert main([*arguments, "--seed", "2", "--num-stories", "2", f"One{ESCAPES}day"]) == 0
    assert not commands(capsys.readouterr().out)
    teller = load(run / "last.pt")  # so many tokens hold some that would
    assert commands(teller.tell("One day", max_new_tokens=300, temperature=3, seed=1))


def test_no_message_commands_the_terminal(run, tiny_data, tmp_path, monkeypatch, capsys):
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
        ["tell", "--checkpoint", f"c{name}.pt"],
        ["tell", "--checkpoint", str(run / "last.pt"), "--device", ESCAPES],
        ["plot"],
    ):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert not commands(printed.err), arguments
        assert not commands(printed.out.replace("\r", "")), arguments  # a bar goes back to where its line starts
        assert printed.err.count("\n") == 1
    with pytest.raises(StoryLLMError) as caught:
        raise StoryLLMError(f"line one\nline two{ESCAPES}")
    assert not commands(str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_of_a_strangers_name_is_shown_as_text(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = "prepare --source builtin --builtin-stories 30 --tokenizer bpe:300".split()
    assert main(arguments) == 0
    for split in ("train", "validation"):
        info = read_json(tmp_path / "data" / f"{split}.json")
        write_json(tmp_path / "data" / f"{split}.json", {**info, "tokenizer": ESCAPES})
    capsys.readouterr()
    assert main(arguments) == 0
    assert not commands(re.sub(r"\r", "", capsys.readouterr().out))


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_plot_shows_what_a_log_says_as_text(run, tmp_path, suffix):
    log = read_log(run / "log.jsonl")
    log.run["device"] = f"{HTML} $x^{{$ \\frac {ESCAPES}"
    storyllm.plot_losses(log, tmp_path / f"losses.{suffix}")
    picture = (tmp_path / f"losses.{suffix}").read_bytes()
    assert len(picture) > 1000
    assert b"<script" not in picture
    assert b"\x1b" not in picture or suffix == "png"


def test_a_notebook_shows_a_story_as_text(run):
    nbformat, nbconvert = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert")
    story = load(run / "last.pt").tell(f"{HTML}{ESCAPES}", max_new_tokens=1, seed=0)
    assert story.startswith(HTML)
    output = nbformat.v4.new_output("stream", name="stdout", text=story)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(story)", outputs=[output])])
    page, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page


# Network

OFFLINE = """
import socket, sys

def cut(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        raise SystemExit(f"somebody asked the network: {event} {arguments}")

sys.addaudithook(cut)
from storyllm.cli import main
for arguments in (
    "prepare --recipe demo --builtin-stories 300 --tokenizer bpe:300",
    "train --recipe demo --train.max-iters 4 --train.eval-windows 4 --train.device cpu",
    "tell --max-new-tokens 5 --seed 1 --device cpu",
    "evaluate --device cpu",
    "plot",
):
    assert main(arguments.split()) == 0
if sys.argv[1:] == ["ask"]:
    socket.create_connection(("127.0.0.1", 9))
"""


@pytest.mark.parametrize("asked", [False, True])
def test_demo_asks_no_network(tmp_path, asked):
    """With the network cut; and the cut is one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TIKTOKEN_CACHE_DIR": str(tmp_path / "none")}
    command = [sys.executable, "-c", OFFLINE, *(["ask"] if asked else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == asked, done.stderr
    assert ("somebody asked the network: socket." in done.stderr) == asked


def test_a_storyteller_needs_no_network_either(run, tiny_data, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("somebody asked the network"))
    model = load(run / "last.pt").model
    assert Storyteller(model, read_tokenizer(tiny_data)).tell("One day", max_new_tokens=3, seed=0)
    assert dataclasses.asdict(model.config)["block_size"] == 16
