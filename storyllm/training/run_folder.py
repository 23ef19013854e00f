"""The files of a run: save them, resume from them, and never overwrite those of another run."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import (
    BEST,
    CorruptedCheckpointError,
    check_tied,
    load_checkpoint,
    mismatch_errors,
    model_contents,
    model_from_weights,
    save_checkpoint,
)
from ..config import Recipe, StoryLLMError, TrainConfig
from ..data.token_file import Dataset
from ..files import earlier_version, lock_folder
from ..model.gpt import GPT
from .execution import Execution
from .initial_model import RECIPE_FIELDS, check_same_initial_model, describe_initial_model, initial_model
from .log import Log, LogWriter, read_log
from .mirror import Mirror, Position
from .optimizer import load_optimizer_state, lr_at
from .trackers import Tracker

LAST = "last.pt"
LOG = "log.jsonl"

# Settings that may change when a run resumes: how long it runs and on what, and what is reported, not what it learns.
RESUMABLE_CHANGES = frozenset(
    "max_iters stop_at eval_interval micro_batch_size checkpoint_minutes keep_checkpoints dtype device compile "
    "sample_interval sample_prompt report_to mirror_dir mirror_minutes".split()
)


@dataclass
class TrainState:
    """How far a run has come. Weights, optimizer and gradient scaler have their own state."""

    iteration: int = 0  # batches processed, always a whole number of updates
    last_evaluation: int = -1  # iteration of the last evaluation
    last_sample: int = -1  # iteration of the last sample
    best_val_loss: float = math.inf
    seconds: float = 0.0  # training time over all sessions
    log_bytes: int = 0  # size of log.jsonl when this state was saved
    skipped_updates: int = 0  # updates skipped because fp16 overflowed

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of `dataclasses.asdict`. Raises TypeError or ValueError for anything else."""
        if set(values) != {field.name for field in dataclasses.fields(cls)}:
            raise ValueError("unknown or missing field")
        for name, default in dataclasses.asdict(cls()).items():
            value = values[name]
            if type(value) is not type(default) or not value >= min(0, default):  # also rejects NaN
                raise ValueError(f"{name} is invalid")
            if value >= 2**63 and name != "best_val_loss":  # infinite before the first evaluation
                raise ValueError(f"{name} is out of range")
        return cls(**values)

    def due(self, interval: int, last: int, next_iteration: int, config: TrainConfig) -> list[int]:
        """The iterations after `last`, multiples of `interval` or the end, that see the current weights.

        Those are the ones before `next_iteration`, at which the next update ends.
        """
        first = max(self.iteration, last + 1)
        stop = config.last_iteration + 1
        if self.iteration < config.max_iters:
            stop = min(next_iteration, stop)
        return [i for i in range(first, stop) if i % interval == 0 or i == config.last_iteration]


class RunFolder:
    """The checkpoint folder of a run of `recipe` on `data`, which may start from the model in `init_from`.

    Only one of several processes of a run `writes`; the others neither read nor write the folder. Raises StoryLLMError
    if the package that `report_to` needs is not installed, or if `mirror_dir` cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        recipe: Recipe,
        data: Dataset,
        init_from: str | Path | None = None,
        writes: bool = True,
    ) -> None:
        self.path = Path(path)
        self.writes = writes
        self.recipe = recipe
        self.data = data
        self.init_from = None if init_from is None else str(init_from)
        self.started_from: dict[str, str] | None = None  # as `describe_initial_model` returned it
        self.last = self.path / LAST
        report_to = recipe.train.report_to
        tracker = None if report_to == "none" or not writes else Tracker(report_to, self.path, recipe)
        self.log = LogWriter(self.path / LOG if writes else None, tracker)
        mirror_dir, minutes = recipe.train.mirror_dir if writes else None, recipe.train.mirror_minutes
        files = (LOG, BEST, LAST)
        self.mirror = None if mirror_dir is None else Mirror(mirror_dir, minutes, self.path, files, self.log.warn)
        self.origin = self.path  # where `load` found the state

    def lock(self) -> AbstractContextManager[None]:
        """Creates the folder and keeps other processes out. Raises StoryLLMError if it is in use."""
        return lock_folder(self.path) if self.writes else nullcontext()

    def read_log(self) -> Log:
        """The log so far."""
        return read_log(self.path / LOG) if self.writes else Log()

    def load(self) -> dict[str, Any] | None:
        """The newest intact state, in this folder or in its mirror, validated; None for a new run.

        A corrupted last.pt is renamed to last.pt.corrupted and the previous version is used, with a warning. Raises
        StoryLLMError if no version is intact, if the state belongs to another recipe or other data, or if the folder
        contains files of another run.
        """
        if not self.writes:
            return None
        if self.mirror is not None:
            self.origin = self.mirror.restore(self._position()) or self.path
        saved = self._newest_intact()
        if saved is None:
            for name in (BEST, LOG):
                if (self.path / name).exists():
                    raise StoryLLMError(
                        f"{self.path} contains the {name} of a run but no {LAST}; "
                        "use another checkpoint folder, or move that file away"
                    )
            return None
        self._validate(saved)
        self._check_other_files(saved)
        return saved

    def _position(self) -> Position | None:
        """How far the newest intact state in this folder is; None if there is none."""
        for version in saved_versions(self.last):
            with suppress(CorruptedCheckpointError, LookupError, TypeError, ValueError):
                state = TrainState.from_dict(load_checkpoint(version)["state"])
                return state.iteration, state.log_bytes
        return None

    def create_model(self, saved: dict[str, Any] | None) -> GPT:
        """The model of the run, on the CPU, with the weights it starts with if there is no `saved` state.

        Sets the recipe's model and `started_from`. Raises StoryLLMError if `init_from` does not fit recipe and data, or
        if the process that writes has no state and this one has.
        """
        if saved is None:
            if not self.writes and self.last.exists():
                raise StoryLLMError(
                    f"{self.last} is on this machine, but not on that of rank 0, which would start a new run; put the "
                    "checkpoint folder on a disk that all machines share"
                )
            model = initial_model(self.recipe.model, self.data, self.init_from)
            self.started_from = describe_initial_model(self.init_from) if self.init_from else None
        elif saved["init_from"] is None:
            model = GPT(self.recipe.model)
        else:  # the shape is that of the saved weights
            self.started_from = saved["init_from"]
            with mismatch_errors(self.last):
                model = model_from_weights(saved["recipe"].model, saved["model"])
        self.recipe = dataclasses.replace(self.recipe, model=model.config)
        return model

    def _newest_intact(self) -> dict[str, Any] | None:
        corrupted: dict[Path, CorruptedCheckpointError] = {}
        for version in saved_versions(self.last):
            try:
                saved = load_checkpoint(version)
            except CorruptedCheckpointError as error:
                corrupted[version] = error
                continue
            for bad in corrupted:
                os.replace(bad, bad.with_name(f"{bad.name}.corrupted"))
            if version != self.last:
                names = ", ".join(bad.name for bad in corrupted)
                reason = f"{names} is corrupted" if corrupted else f"{LAST} is missing"
                self.log.warn(f"{reason}; resuming from the earlier {version}")
            return saved
        if corrupted:
            raise next(iter(corrupted.values()))  # the error of the newest version
        return None

    def _validate(self, saved: dict[str, Any]) -> None:
        """Raises StoryLLMError unless `saved` is a valid state of this run. Parses its recipe, state and init_from."""
        path = self.last
        if "optimizer" not in saved:
            raise StoryLLMError(f"{path} contains weights but no training state; use another checkpoint folder")
        try:
            saved["recipe"] = Recipe.from_dict(saved["recipe"])
            saved["state"] = TrainState.from_dict(saved["state"])
            initial = saved["init_from"] = saved.get("init_from")  # missing in older states
            if initial is not None and not type(initial["name"]) is type(initial["sha256"]) is str:
                raise TypeError("init_from is invalid")
            same_data = saved["data_sha256"] == self.data.sha256
            if type(saved["device"]) is not str or type(saved["micro_batch_size"]) is not int:
                raise TypeError("device or micro_batch_size is invalid")
            if not 1 <= saved["micro_batch_size"] < 2**63:
                raise ValueError("micro_batch_size is out of range")
        except (StoryLLMError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise StoryLLMError(
                f"{path} is corrupted or from another version of StoryLLM; use another checkpoint folder"
            ) from error
        if not same_data:
            raise StoryLLMError(f"{path} belongs to a run on other data; use that data, or another checkpoint folder")
        check_same_initial_model(initial, self.init_from, path)
        before, now = saved["recipe"].to_dict(), self.recipe.to_dict()
        changes = [
            f"{part}.{name} was {before[part][name]!r}, now {value!r}"
            for part in ("model", "train")
            for name, value in now[part].items()
            if name not in RESUMABLE_CHANGES
            and before[part][name] != value
            and not (initial and part == "model" and name not in RECIPE_FIELDS)  # those come from the initial model
        ]
        if changes:
            more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
            raise StoryLLMError(
                f"{path} belongs to a run with another recipe ({'; '.join(changes[:4])}{more}); "
                "use that recipe to resume it, or another checkpoint folder"
            )
        iteration, max_iters = saved["state"].iteration, self.recipe.train.max_iters
        if iteration > max_iters:
            raise StoryLLMError(
                f"{path} is at iteration {iteration}, max_iters is {max_iters}; raise it, "
                "or use another checkpoint folder for a new run"
            )
        if before["train"]["max_iters"] != max_iters:
            self.log.warn(
                f"max_iters was {before['train']['max_iters']:,}, now {max_iters:,}; the learning rate schedule changes"
            )

    def _check_other_files(self, saved: dict[str, Any]) -> None:
        """Warns about files missing next to the state. Raises StoryLLMError if the log is corrupted."""
        state = saved["state"]
        if state.best_val_loss < math.inf and not (self.path / BEST).exists():
            self.log.warn(f"{self.path / BEST} is missing; the next evaluation writes a new one")
            state.best_val_loss = math.inf
        log = self.path / LOG
        content = log.read_bytes()[: state.log_bytes] if log.exists() else b""
        complete = content.rfind(b"\n") + 1  # bytes in complete lines
        if complete < state.log_bytes:
            self.log.warn(f"{log} lost {state.log_bytes - complete:,} bytes of entries; resuming without them")
            state.log_bytes = complete
        if log.exists():
            read_log(log, state.log_bytes)

    def restore(self, saved: dict[str, Any], model: GPT, execution: Execution) -> TrainState:
        """Loads what `load` returned into model, optimizer and gradient scaler; returns the rest of the state.

        Raises StoryLLMError if it does not match the model.
        """
        try:
            model.load_state_dict(saved["model"])
            check_tied(saved["model"])
            load_optimizer_state(execution.optimizer, saved["optimizer"])
            scaler = execution.scaler
            if scaler.is_enabled() and saved["scaler"]:
                if not all(type(value) in (int, float) for value in saved["scaler"].values()):
                    raise TypeError("invalid scaler state")
                scaler.load_state_dict(saved["scaler"])
        except (StoryLLMError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise StoryLLMError(
                f"{self.last} does not match the model ({reason}); use another checkpoint folder"
            ) from error
        return saved["state"]

    def save(self, state: TrainState, model: GPT, execution: Execution) -> None:
        """Saves everything needed to resume as last.pt. Raises StoryLLMError if the weights are not finite."""
        if not self.writes:
            return
        state.log_bytes = self.log.sync()  # first, so that a saved state never refers to lost log entries
        self.check_finite(model, state.iteration)
        save_checkpoint(
            self.last,
            {
                **model_contents(model, self.data.tokenizer, self.recipe),
                "optimizer": execution.optimizer.state_dict(),
                "scaler": execution.scaler.state_dict(),
                "state": dataclasses.asdict(state),
                "data_sha256": self.data.sha256,
                "init_from": self.started_from,
                "device": execution.device.device.type,
                "micro_batch_size": execution.device.micro_batch_size,
            },
            keep=self.recipe.train.keep_checkpoints,
        )
        if self.mirror is not None:
            self.mirror.copy_if_due((state.iteration, state.log_bytes))

    def copy_to_mirror(self, state: TrainState) -> None:
        """Copies the state, which was saved last, to the mirror, if any, even if this is not due yet."""
        if self.mirror is not None:
            self.mirror.copy((state.iteration, state.log_bytes))

    def save_best(self, model: GPT, iteration: int, val_loss: float) -> None:
        """Saves the model as best_model_params.pt. Raises StoryLLMError if the weights are not finite."""
        if not self.writes:
            return
        self.check_finite(model, iteration)
        contents = model_contents(model, self.data.tokenizer, self.recipe)
        contents |= {"iteration": iteration, "val_loss": val_loss, "init_from": self.started_from}
        save_checkpoint(self.path / BEST, contents)

    def check_finite(self, model: GPT, iteration: int) -> None:
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise self.diverged("the weights contain NaN or infinity", iteration)

    def diverged(self, problem: str, iteration: int) -> StoryLLMError:
        """The error for a loss or weights that are not finite."""
        return StoryLLMError(
            f"{problem} at iteration {iteration}, learning rate {lr_at(iteration, self.recipe.train):.2e}; lower "
            f"train.learning_rate and use another checkpoint folder (the last good state is kept in {self.path})"
        )


def saved_versions(path: Path) -> list[Path]:
    """The existing versions of a state, newest first: last.pt, last.1.pt, last.2.pt, ..."""
    pattern = f"{path.stem}.*{path.suffix}"
    numbers = {p.name.removeprefix(f"{path.stem}.").removesuffix(path.suffix) for p in path.parent.glob(pattern)}
    valid = sorted(int(n) for n in numbers if re.fullmatch("[1-9][0-9]{0,3}", n))
    return [p for p in (path, *(earlier_version(path, number) for number in valid)) if p.is_file()]
