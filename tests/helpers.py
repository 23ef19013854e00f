"""Code shared by the tests."""

from __future__ import annotations

import base64
import csv
import gzip
import importlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tiktoken
import torch

from storyllm import GPT, GPTConfig, Recipe, Storyteller, TrainConfig, read_log
from storyllm.checkpoint import load_checkpoint

# Sample data (real TinyStories, GPT-2's vocabulary) is used if it is in this folder next to the repository.
SAMPLE_DATA = Path(__file__).resolve().parents[2] / "shared"

# 22 iterations in updates of 4: five full updates, and a last one of the two remaining batches.
TINY = Recipe(
    model=GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.1),
    train=TrainConfig(
        max_iters=22,
        batch_size=3,
        gradient_accumulation_steps=4,
        learning_rate=1e-2,
        min_lr=1e-3,
        warmup_iters=4,
        eval_interval=5,
        eval_windows=6,
        device="cpu",
    ),
)
TINY_UPDATES = [4, 8, 12, 16, 20, 22]
TINY_EVALUATIONS = [0, 5, 10, 15, 20, 22]
SAVE_EVERY_UPDATE = {"train.checkpoint_minutes": 0.0}

# The same size of model on the command line.
TINY_MODEL_OPTIONS = "--model.block-size 16 --model.n-layer 2 --model.n-head 2 --model.n-embd 32".split()

NAMES = ("Ada", "Ben", "Mia", "Tom", "Zoë", "Little Bear", "the red fox", "Grandma")
THINGS = ("kite", "drum", "apple", "snail", "boat", "lantern", "blanket", "puddle", "cake", "ladder")
PLACES = ("garden", "forest", "kitchen", "river", "meadow", "old barn", "beach")
VERBS = ("found", "lost", "painted", "carried", "shared", "hid", "washed", "mended")
FEELINGS = ("happy", "sad", "proud", "sleepy", "brave", "a bit shy", "very cold")


def random_story(rng: random.Random) -> str:
    """A few random sentences."""
    name, friend = rng.sample(NAMES, 2)
    sentences = [f"One day {name} went to the {rng.choice(PLACES)}."]
    for _ in range(rng.randint(3, 6)):
        who = rng.choice((name, friend))
        sentences.append(f"{who} {rng.choice(VERBS)} a {rng.choice(THINGS)} and was {rng.choice(FEELINGS)}.")
    sentences.append(f'"Let us go home," said {friend}.')
    return rng.choice((" ", "\n", "\n\n")).join(sentences)


def random_stories(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [random_story(rng) for _ in range(count)]


def txt_bytes(stories: list[str], newline: str = "\n") -> bytes:
    """A .txt of these stories."""
    return "".join(f"{story}{newline}<|endoftext|>{newline}" for story in stories).encode()


def jsonl_bytes(stories: list[str], column: str = "text") -> bytes:
    """A .jsonl of these stories, with non-ASCII characters escaped in every other line."""
    lines = (json.dumps({"id": i, column: story}, ensure_ascii=i % 2 == 0) for i, story in enumerate(stories))
    return "".join(f"{line}\n" for line in lines).encode()


def parquet_bytes(stories: Any, column: str = "text", **options: Any) -> bytes:
    """A .parquet of these stories. The options are those of `pyarrow.parquet.write_table`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(stories)), column: stories}), file, **options)
    return file.getvalue()


def json_bytes(stories: list[str], column: str = "text") -> bytes:
    """A .json of these stories: an array of objects."""
    return json.dumps([{"id": i, column: story} for i, story in enumerate(stories)]).encode()


def csv_bytes(stories: list[str], column: str = "text") -> bytes:
    """A .csv of these stories, quoted where necessary."""
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("id", column), *enumerate(stories)])
    return file.getvalue().encode()


def compressed(to_bytes: Callable[..., bytes]) -> Callable[..., bytes]:
    """The same format, compressed with gzip."""
    return lambda *arguments, **options: gzip.compress(to_bytes(*arguments, **options), mtime=0)


TEXT_FORMATS: dict[str, Callable[..., bytes]] = {
    ".txt": txt_bytes,
    ".jsonl": jsonl_bytes,
    ".json": json_bytes,
    ".csv": csv_bytes,
}
STORY_FORMATS = {
    **TEXT_FORMATS,
    **{f"{suffix}.gz": compressed(to_bytes) for suffix, to_bytes in TEXT_FORMATS.items()},
    ".parquet": parquet_bytes,
}


def write_stories(path: Path, stories: Any, **options: Any) -> Path:
    """Writes a story file in the format of its suffix."""
    suffix = next(suffix for suffix in STORY_FORMATS if path.name.endswith(suffix))
    path.write_bytes(STORY_FORMATS[suffix](stories, **options))
    return path


def source_of(folder: Path, suffix: str, content: bytes) -> Path:
    """A folder with `content` in a training file, next to a validation file, so that no story is held out."""
    folder.mkdir(exist_ok=True)
    (folder / f"train{suffix}").write_bytes(content)
    write_stories(folder / f"validation{suffix}", ["validation"])
    return folder


def stories_in(path: Path, tokenizer: tiktoken.Encoding) -> list[str]:
    """The text of each story in a .bin, decoded without the package's reader."""
    ids = np.frombuffer(path.read_bytes(), "<u2")
    assert ids[-1] == tokenizer.eot_token, "the last story does not end with the end-of-text token"
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.eot_token) + 1)[:-1]
    return [tokenizer.decode_bytes(part[:-1].tolist()).decode() for part in parts]


def weights(folder: Path, name: str = "last.pt") -> dict[str, Any]:
    """The weights in a run's checkpoint, as lists that compare with ==."""
    return {key: tensor.tolist() for key, tensor in load_checkpoint(folder / name)["model"].items()}


def losses(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The updates and evaluations in a run's log, without anything that depends on the clock."""
    log = read_log(folder / "log.jsonl")
    names = ("iteration", "train_loss", "val_loss", "val_bits_per_byte", "learning_rate", "grad_norm")

    def without_times(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: entry[name] for name in names if name in entry} for entry in entries]

    return without_times(log.updates), without_times(log.evaluations)


@contextmanager
def interrupted_in_the_third_update() -> Iterator[None]:
    """Sends SIGINT to this process during the third update within the block."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def interrupt_in_the_third_update(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return clip(*arguments)

    with patch.object(torch.nn.utils, "clip_grad_norm_", interrupt_in_the_third_update):
        yield


def iteration_of(path: Path) -> int:
    """The iteration of a saved training state."""
    return load_checkpoint(path)["state"]["iteration"]


def model_in(page: Path) -> bytes:
    """The model file in a page written by `export_page`."""
    found = re.search(r'id="model-file">([^<]*)<', page.read_text(encoding="utf-8"))
    assert found
    return base64.b64decode(found[1])


def rounded_to_float16(storyteller: Storyteller) -> Storyteller:
    """The same model with its matrices rounded to float16."""
    model = GPT(storyteller.model.config).eval()
    state = storyteller.model.state_dict()
    model.load_state_dict({name: w.half().float() if w.ndim == 2 else w for name, w in state.items()})
    return Storyteller(model, storyteller.tokenizer)


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)


def folder_contents(folder: Path) -> dict[str, bytes]:
    """The name and content of each file in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def environment() -> dict[str, str]:
    """Environment variables for a subprocess that runs StoryLLM on one thread."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Starts `storyllm` with these arguments in a subprocess."""
    command = [sys.executable, "-m", "storyllm", *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **{**pipes, **options})


def run(*arguments: object, timeout: float = 100, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `storyllm` with these arguments to its end."""
    process = start(*arguments, **options)
    try:
        out, error = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def run_in_subprocess(function: Callable[..., None], *arguments: object, cwd: Path, timeout: float) -> str:
    """What a function of a test module prints in a subprocess. Fails if it raises, crashes or exceeds the timeout."""
    module = Path(function.__code__.co_filename)
    code = (
        f"import importlib, sys; sys.path.insert(0, {str(module.parent)!r}); "
        f"importlib.import_module({module.stem!r}).{function.__name__}(*{arguments!r})"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment(), timeout=timeout, capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-1_000:]} {done.stderr[-3_000:]}"
    return done.stdout


class Ranks:
    """A process that forks the processes of a run, as if torchrun had started them. Importing PyTorch takes it long.

    Each of them calls a function of a test module with its rank and other arguments, in the folder `cwd`, and writes to
    `rank-0.out`, `rank-0.err` and so on.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-c", "import helpers; helpers.serve_ranks()"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen(command, env=environment(), **pipes)

    def start(self, size: int, function: Callable[..., object], *arguments: Any, cwd: Path) -> list[int]:
        """Starts that many processes; returns their ids. Paths among the arguments arrive as strings."""
        module = Path(function.__code__.co_filename)
        request = [str(module.parent), module.stem, function.__name__, size, str(cwd), arguments]
        assert self.server.stdin is not None
        print(json.dumps(request, default=str), file=self.server.stdin, flush=True)
        return self._answer()

    def wait(self) -> list[int]:
        """The exit codes of the processes, once all have ended."""
        return self._answer()

    def run(self, size: int, function: Callable[..., object], *arguments: Any, cwd: Path) -> list[int]:
        """Starts that many processes and waits for their exit codes."""
        self.start(size, function, *arguments, cwd=cwd)
        return self.wait()

    def _answer(self) -> list[int]:
        assert self.server.stdout is not None
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()


def serve_ranks() -> None:
    """Answers the requests of `Ranks`."""
    import torch

    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # imports much of PyTorch, which each process would otherwise do again
    for request in sys.stdin:
        folder, module, function, size, cwd, arguments = json.loads(request)
        sys.path.insert(0, folder)
        call = getattr(importlib.import_module(module), function)
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        pids = []
        for rank in range(size):
            pids.append(os.fork())
            if not pids[-1]:
                _run_rank(call, rank, size, port, Path(cwd), arguments)
        print(json.dumps(pids), flush=True)
        # As torchrun does, this process has the store, which outlives the others.
        store = torch.distributed.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
        del store


def _run_rank(call: Callable[..., Any], rank: int, size: int, port: int, cwd: Path, arguments: list[Any]) -> None:
    code = 1
    try:
        signal.alarm(280)  # ends a process that waits forever
        os.chdir(cwd)
        for descriptor, suffix in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"rank-{rank}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        variables: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        variables["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        os.environ.update({name: str(value) for name, value in variables.items()})
        code = int(call(rank, *arguments) or 0)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def assert_one_line_error(done: subprocess.CompletedProcess[str], *key_words: str) -> None:
    """Checks for exit code 2 and a single line on standard error that contains the key words."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    for word in key_words:
        assert word in done.stderr
