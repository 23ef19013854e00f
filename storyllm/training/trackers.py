"""Trackers: the entries of `log.jsonl` in TensorBoard, Weights & Biases or Trackio.

Whenever a run starts or resumes, a tracker gets the log from its beginning. So it shows what the log says: no gaps, and
no repeated steps after an interruption.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..config import Recipe, missing_extra

PROJECT = "storyllm"
UPDATES = 1_000  # about as many updates of a run are reported


class Service(Protocol):
    """A run in one of the services."""

    def log(self, iteration: int, numbers: dict[str, float], text: str | None) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder, which are written again from the beginning of the log."""

    def __init__(self, folder: Path, run_id: str, recipe: Recipe) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        for file in path.glob("events.out.tfevents.*"):
            file.unlink()
        # purge_step also removes the steps from the memory of a TensorBoard that is open.
        self.writer = SummaryWriter(str(path), purge_step=0, flush_secs=10)
        self.writer.add_text("recipe", f"```\n{json.dumps(recipe.to_dict(), indent=2)}\n```", 0)

    def log(self, iteration: int, numbers: dict[str, float], text: str | None) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, iteration)
        if text is not None:
            self.writer.add_text("sample", text, iteration)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, in the run's folder. Offline unless the environment variable WANDB_MODE differs."""

    def __init__(self, folder: Path, run_id: str, recipe: Recipe) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.html = wandb.Html
        self.run = wandb.init(
            project=project,
            name=folder.name,
            id=run_id,
            dir=str(folder),
            config=recipe.to_dict(),
            mode=mode,
            resume="allow" if mode == "online" else None,
        )
        self.first_step = self.run.step  # greater than 0 if the server has the run already

    def log(self, iteration: int, numbers: dict[str, float], text: str | None) -> None:
        if iteration >= self.first_step:
            sample = {} if text is None else {"sample": self.html(f"<p>{html.escape(text)}</p>")}
            self.run.log({**numbers, **sample}, step=max(iteration, self.run.step))  # it must not decrease

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of Trackio, which replaces the one that was reported before this run resumed."""

    def __init__(self, folder: Path, run_id: str, recipe: Recipe) -> None:
        import trackio

        name = f"{folder.name}-{run_id}"
        with suppress(ValueError):  # there is no project yet
            for run in trackio.Api().runs(PROJECT):
                if run.name == name:
                    run.delete()
        self.markdown = trackio.Markdown
        self.run = trackio.init(PROJECT, name, config=recipe.to_dict())

    def log(self, iteration: int, numbers: dict[str, float], text: str | None) -> None:
        sample = {} if text is None else {"sample": self.markdown(text)}
        self.run.log({**numbers, **sample}, step=iteration)

    def close(self) -> None:
        self.run.finish()


SERVICES: dict[str, type[Any]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


class Tracker:
    """Reports the entries of a log to a service. After a failure it warns and reports nothing more.

    Raises StoryLLMError if the service's package is not installed.
    """

    def __init__(self, name: str, folder: Path, recipe: Recipe) -> None:
        if find_spec(name) is None:
            raise missing_extra(f"report_to {name!r}", name, name)
        self.name = name
        self.folder = folder.resolve()
        self.recipe = recipe
        self.warn: Callable[[str], None] = lambda message: None
        self._failed = False
        self._entries: list[dict[str, Any]] = []  # of the log, not reported yet
        self._service: Service | None = None
        self._iteration = -1  # of the last update that was reported

    def start(self, entries: list[dict[str, Any]], warn: Callable[[str], None]) -> None:
        """Begins with the entries that the log has already. `warn` gets the message of a failure."""
        self._entries, self.warn = entries, warn

    def log(self, entry: dict[str, Any]) -> None:
        """Reports an entry: the numbers of an update or an evaluation, or a sample."""
        self._entries.append(entry)
        self._attempt(self._report)

    def close(self) -> None:
        """Sends what is left to the service."""
        if self._service is not None:
            self._attempt(self._service.close)

    def _report(self) -> None:
        if self._service is None:
            # The first entry has the time at which the run began: no other run has the same id.
            run_id = hashlib.sha256(json.dumps(self._entries[0]).encode()).hexdigest()[:12]
            self._service = SERVICES[self.name](self.folder, run_id, self.recipe)
        entries, self._entries = self._entries, []
        for entry in entries:
            self._report_entry(self._service, entry)

    def _report_entry(self, service: Service, entry: dict[str, Any]) -> None:
        event, iteration = entry["event"], entry.get("iteration", 0)
        if event == "update":
            interval = max(1, self.recipe.train.last_iteration // UPDATES)
            if iteration // interval == self._iteration // interval:
                return
            self._iteration = iteration
        if event in ("update", "evaluation"):
            names = (name for name in entry if name != "iteration")
            numbers = {f"{event}/{name}": entry[name] for name in names if isinstance(entry[name], (int, float))}
            service.log(iteration, numbers, None)
        elif event == "sample":
            service.log(iteration, {}, entry["text"])

    def _attempt(self, call: Callable[[], None]) -> None:
        """Calls `call`, unless something failed before."""
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # services fail in many ways
            self._failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self.warn(f"reporting to {self.name} failed ({reason}); training continues without it")
