"""`log.jsonl`: one JSON object per line, written during training and read back for figures.

{"event": "run", "recipe": {...}, "versions": {...}, "device": "CPU", "git_revision": "...", ...}     at each start
{"event": "update", "iteration": 32, "train_loss": 10.8, "learning_rate": 4e-05, "grad_norm": 2.1, ...}
{"event": "evaluation", "iteration": 500, "train_loss": 9.43, "val_loss": 9.44, "val_bits_per_byte": 3.35, ...}
{"event": "sample", "iteration": 600, "prompt": "Once upon a time", "text": "Once upon a time, there was a little..."}
{"event": "warning", "iteration": 500, "message": "out of memory with micro-batch size 32, retrying with 16"}

Each line ends with a CRC-32 of the file up to that line, which reveals changed, deleted, repeated and moved lines,
except lines deleted at the end. Lines without a checksum, or with one of their own (earlier versions), are accepted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..config import Recipe, StoryLLMError
from ..files import fsync, os_error
from .trackers import Tracker

# The numbers that an entry must contain.
REQUIRED: dict[str, tuple[str, ...]] = {
    "run": (),
    "update": ("iteration", "learning_rate"),
    "evaluation": ("iteration", "train_loss", "val_loss", "val_bits_per_byte"),
    "sample": ("iteration",),
    "warning": ("iteration",),
}


@dataclass
class Log:
    """The log of a run. Losses are in nats per token."""

    run: dict[str, Any] = field(default_factory=dict)  # the last "run" entry: recipe, versions, device
    updates: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    interrupted: int = 0  # from `train`: the signal that interrupted it (2: SIGINT, 15: SIGTERM), 0 if it completed


def read_log(path: str | Path, size: int | None = None) -> Log:
    """Reads a `log.jsonl`, or its first `size` bytes. Raises StoryLLMError if it is missing or a line is corrupted.

    A last line without a newline is ignored: the process was killed while writing it.
    """
    log = Log()
    lists = {"update": log.updates, "evaluation": log.evaluations, "sample": log.samples, "warning": log.warnings}
    for entry in _entries(Path(path), size):
        if entry["event"] == "run":
            log.run = entry
        else:
            lists[entry["event"]].append(entry)
    return log


def _entries(path: Path, size: int | None = None) -> Iterator[dict[str, Any]]:
    """The entries of a `log.jsonl`, or of its first `size` bytes."""
    if not path.is_file():
        raise StoryLLMError(f"log {path} not found; train a model first, or pass the log.jsonl of a run")
    try:
        with open(path, "rb") as file:
            *lines, _incomplete = file.read(-1 if size is None else size).split(b"\n")
    except OSError as error:
        raise os_error("read", path, error) from error
    crc = 0  # of the lines so far
    for number, line in enumerate(lines, 1):
        line = line.removesuffix(b"\r")
        try:
            entry = _parse_line(line, crc)
        except (StoryLLMError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoryLLMError(
                f"{path} line {number} is corrupted, out of order or not from a StoryLLM log; restore the file from a "
                "copy, or move it away"
            ) from error
        crc = zlib.crc32(line + b"\n", crc)
        yield entry


def _parse_line(line: bytes, crc: int) -> dict[str, Any]:
    """The entry in a line that follows lines with that CRC-32. Raises some exception if the line is corrupted."""
    if checked := re.fullmatch(rb'(.*), "(chained_)?crc32": (\d+)\}', line):
        line = checked[1] + b"}"
        if zlib.crc32(line, crc if checked[2] else 0) != int(checked[3]):
            raise ValueError("checksum mismatch")
    entry = json.loads(line)
    for name in REQUIRED[entry["event"]]:
        if type(entry[name]) not in ((int,) if name == "iteration" else (int, float)):
            raise TypeError(f"{name} is {entry[name]}")
    for name, value in entry.items():
        if isinstance(value, (int, float)) and not abs(value) < 2**63:  # also rejects NaN
            raise ValueError(f"{name} is {value}")
    if entry["event"] == "sample" and type(entry["text"]) is not str:
        raise TypeError(f"text is {entry['text']}")
    if entry["event"] == "run":
        Recipe.from_dict(entry.get("recipe", {}))
    return entry


class LogWriter:
    """Appends entries to a `log.jsonl`, once it is open, and passes them on to the tracker, if any.

    Without a path, as on all processes of a run but one, nothing is written. Raises StoryLLMError if the file cannot be
    written.
    """

    def __init__(self, path: Path | None, tracker: Tracker | None = None) -> None:
        self.path = path
        self.tracker = tracker
        self.file: IO[bytes] | None = None
        self._crc = 0  # of the file so far
        self._warnings: list[str] = []

    def open(self, size: int) -> LogWriter:
        """Opens the file for appending, truncated to its first `size` bytes."""
        if self.path is None:
            return self
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)
            self.file = os.fdopen(descriptor, "r+b", buffering=0)
            self.file.truncate(min(size, os.fstat(descriptor).st_size))
            self._crc = zlib.crc32(self.file.read().replace(b"\r\n", b"\n"))  # as `read_log` reads it
        except OSError as error:
            raise os_error("write", self.path, error) from error
        if self.tracker is not None:
            self.tracker.start(list(_entries(self.path)), self.warn)
        return self

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        if self.tracker is not None:
            self.tracker.close()

    def warn(self, message: str) -> None:
        """Issues a Python warning, and logs it after the next entry. Works before the file is open."""
        warnings.warn(message, stacklevel=2)
        self._warnings.append(message)

    def write(self, entry: dict[str, Any]) -> None:
        """Appends an entry, unbuffered, and then any warnings, with the entry's iteration."""
        if self.path is None:
            return
        self._append(entry)
        if self.tracker is not None:
            self.tracker.log(entry)
        while self._warnings:
            self._append({"event": "warning", "iteration": entry["iteration"], "message": self._warnings.pop(0)})

    def _append(self, entry: dict[str, Any]) -> None:
        assert self.path is not None and self.file is not None
        line = json.dumps(entry).encode()
        line = line[:-1] + b', "chained_crc32": %d}\n' % zlib.crc32(line, self._crc)
        self._crc = zlib.crc32(line, self._crc)
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            raise os_error("write", self.path, error) from error

    def sync(self) -> int:
        """Flushes the file to disk; returns its size in bytes, 0 if it is not open yet."""
        if self.path is None or self.file is None:
            return 0
        try:
            fsync(self.file.fileno())
            return os.fstat(self.file.fileno()).st_size
        except OSError as error:
            raise os_error("write", self.path, error) from error


def describe_environment() -> dict[str, Any]:
    """Versions, platform, git revision (None outside a checkout) and the current time."""
    packages = ("torch", "tiktoken", "tokenizers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "git_revision": _git_revision(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def package_checksum() -> str:
    """The SHA-256 of the code of this package."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _git_revision() -> str | None:
    """The revision of the checkout that contains this package at its top level, if any."""
    checkout = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        top, revision = done.stdout.splitlines()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return revision if Path(top) == checkout else None
