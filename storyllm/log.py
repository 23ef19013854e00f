"""What a run says of itself: `log.jsonl`, one JSON object a line, written as it happens and read back for figures.

{"event": "run", "recipe": {...}, "versions": {...}, "device": "...", "git_revision": "...", ...}     at each start
{"event": "update", "iteration": 32, "train_loss": 10.8, "learning_rate": 4e-05, "grad_norm": 2.1, ...}
{"event": "evaluation", "iteration": 500, "train_loss": 9.43, "val_loss": 9.44, "val_bits_per_byte": 3.35, ...}
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from .config import StoryLLMError


@dataclass
class Log:
    """A run's log. Losses are nats per token; `iteration` counts batches."""

    run: dict[str, Any] = field(default_factory=dict)  # recipe, versions, device: how the run was (last) started
    updates: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False  # the run that returned this was stopped by hand


def read_log(path: str | Path) -> Log:
    """Reads a `log.jsonl`. Raises StoryLLMError if it is not there or a line is not one of ours.

    A last line without its line end is what a cut left of a line being written: it is passed over.
    """
    path = Path(path)
    if not path.is_file():
        raise StoryLLMError(f"there is no log {path}: train first, or name the log.jsonl of a run")
    log = Log()
    *lines, _cut = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if entry["event"] == "run":
                log.run = entry
            else:
                {"update": log.updates, "evaluation": log.evaluations}[entry["event"]].append(entry)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoryLLMError(f"{path} line {number} is not a line of a StoryLLM log: is it another file?") from error
    return log


def write_entry(log: TextIO, entry: dict[str, Any]) -> None:
    """Appends one line to an open log, at once."""
    log.write(json.dumps(entry) + "\n")
    log.flush()


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
