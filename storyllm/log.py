"""What a run says of itself: `log.jsonl`, one JSON object a line, written as it happens and read back for figures.

{"event": "run", "recipe": {...}, "versions": {...}, "device": "...", "git_revision": "...", ...}     at each start
{"event": "update", "iteration": 32, "train_loss": 10.8, "learning_rate": 4e-05, "grad_norm": 2.1, ...}
{"event": "evaluation", "iteration": 500, "train_loss": 9.43, "val_loss": 9.44, "val_bits_per_byte": 3.35, ...}
{"event": "warning", "iteration": 500, "message": "out of memory with 32 windows at once: going on with 16"}

Each line ends with a checksum of the rest of it, so that a damaged one is not read as another number.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from .config import Recipe, StoryLLMError
from .files import cannot, sync

# The numbers that an entry must hold.
REQUIRED: dict[str, tuple[str, ...]] = {
    "run": (),
    "update": ("iteration", "learning_rate"),
    "evaluation": ("iteration", "train_loss", "val_loss", "val_bits_per_byte"),
    "warning": ("iteration",),
}


@dataclass
class Log:
    """A run's log. Losses are nats per token; `iteration` counts batches."""

    run: dict[str, Any] = field(default_factory=dict)  # recipe, versions, device: how the run was (last) started
    updates: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)  # what the run met with and went on
    interrupted: int = 0  # the signal that stopped the run that returned this (2: Ctrl-C, 15: SIGTERM); 0: none did


def read_log(path: str | Path, size: int | None = None) -> Log:
    """Reads a `log.jsonl`, or its first `size` bytes. Raises StoryLLMError if it is not there or a line is damaged.

    A last line without its line end is what a cut left of a line being written: it is passed over.
    """
    path = Path(path)
    if not path.is_file():
        raise StoryLLMError(f"there is no log {path}: train first, or name the log.jsonl of a run")
    try:
        with open(path, "rb") as file:
            *lines, _cut = file.read(-1 if size is None else size).split(b"\n")
    except OSError as error:
        raise cannot("read", path, error) from error
    log = Log()
    for number, line in enumerate(lines, 1):
        try:
            entry = _checked_entry(line)
            if entry["event"] == "run":
                log.run = entry
            else:
                lists = {"update": log.updates, "evaluation": log.evaluations, "warning": log.warnings}
                lists[entry["event"]].append(entry)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoryLLMError(
                f"{path} line {number} is damaged or not a line of a StoryLLM log: mend it, or move the file away"
            ) from error
    return log


def _checked_entry(line: bytes) -> dict[str, Any]:
    """What a line says. Raises an exception of some kind if it is damaged."""
    if checked := re.fullmatch(rb'(.*), "crc32": (\d+)\}\r?', line):
        line = checked[1] + b"}"
        if zlib.crc32(line) != int(checked[2]):
            raise ValueError("another checksum")
    entry = json.loads(line)
    for name in REQUIRED[entry["event"]]:
        if type(entry[name]) not in ((int,) if name == "iteration" else (int, float)):
            raise TypeError(f"{name} is {entry[name]}")
    for name, value in entry.items():
        if isinstance(value, (int, float)) and not abs(value) < 2**63:  # as NaN is not, either
            raise ValueError(f"{name} is {value}")
    if entry["event"] == "run":
        Recipe.from_dict(entry.get("recipe", {}))
    return entry


class LogWriter:
    """An open `log.jsonl`, cut to the first `size` bytes, that takes entries at its end."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)
            self.file = os.fdopen(descriptor, "r+b", buffering=0)
            self.file.truncate(min(size, self.size()))
        except OSError as error:
            raise cannot("written", path, error) from error

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.close()

    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self.file.fileno()).st_size

    def write(self, entry: dict[str, Any]) -> None:
        """Appends a line, at once. Raises StoryLLMError where it cannot be written, as on a full disk."""
        line = json.dumps(entry).encode()
        line = line[:-1] + b', "crc32": %d}\n' % zlib.crc32(line)
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            raise cannot("written", self.path, error) from error

    def sync(self) -> None:
        """Waits until all of it is on the disk. Raises StoryLLMError where that fails."""
        try:
            sync(self.file.fileno())
        except OSError as error:
            raise cannot("written", self.path, error) from error


def describe_environment() -> dict[str, Any]:
    """What a run ran in: versions, platform, git revision (None outside a checkout), time of the start."""
    packages = ("torch", "tiktoken", "tokenizers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "git_revision": _git_revision(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git_revision() -> str | None:
    """The revision of the checkout that this package lies at the top of, if it does."""
    checkout = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        top, revision = done.stdout.splitlines()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return revision if Path(top) == checkout else None
