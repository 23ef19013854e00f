"""The training step, seen whole, and the loop around it: schedule, evaluation, log, checkpoint, continuation.

Nothing here depends on how often the run was cut. The windows of a batch and the dropout of an update are drawn from
generators seeded by recipe and iteration, so that the state of a run is its weights, its optimizer and a few numbers.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import check_same_run, load_state, model_contents, save_checkpoint
from .config import DataConfig, Recipe, StoryLLMError, TrainConfig, printable
from .device import Machine, choose_device, choose_machine, is_out_of_memory
from .evaluation import bits_per_byte, mean_loss
from .files import cannot, locked
from .interrupt import Interrupt, StopRequested
from .log import Log, LogWriter, describe_environment, read_log
from .model import GPT
from .optim import lr_at, make_optimizer, restore_optimizer
from .pace import Pace, duration, model_flops_utilization
from .stories import SPLITS
from .tokens import TokenInfo, Tokens, check_together, open_tokens, random_windows, read_tokenizer, shuffled_windows

BEST = "best_model_params.pt"
LAST = "last.pt"
LOG = "log.jsonl"

# The first number of every generator's seed sequence, so that no two draw the same.
TRAINING, EVALUATION, DROPOUT = 0, 1, 2

# How far a run has come: attributes of a run, saved with its state.
PROGRESS = ("iteration", "evaluated", "best_val_loss", "seconds", "log_bytes", "skipped_updates")

BAR = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}{postfix}]"  # tqdm's {remaining} forgets evaluations

LossFunction = Callable[[Tensor, Tensor], Tensor]  # (windows, T) inputs and targets -> mean nats per token
Result = TypeVar("Result")


def train_step(
    loss_of: LossFunction,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    machine: Machine,
    config: TrainConfig,
    learning_rate: float,
) -> tuple[Tensor, Tensor]:
    """One update: gradients of all the micro-batches, clipped, and a step of the optimizer.

    `micro_batches` are (windows, T) inputs and targets that make up an update together, in pieces of any size. Each
    window weighs the same, its share of a whole update, even where fewer windows are left at the end. Returns the mean
    loss in nats per token and the norm of the gradient before clipping, both scalars on the device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    summed_loss, windows = torch.zeros((), device=machine.device), 0
    for x, y in micro_batches:
        with machine.autocast():
            loss = loss_of(x, y)
        scaler.scale(loss * (len(x) / config.windows_in_update)).backward()
        summed_loss += loss.detach() * len(x)
        windows += len(x)
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
    scaler.step(optimizer)  # skipped where fp16 overflowed; the scale is halved then
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return summed_loss / windows, grad_norm


def train(recipe: Recipe, data_dir: str | Path = "data", checkpoint_dir: str | Path = "checkpoints") -> Log:
    """Trains a model by `recipe` on the data that `prepare` made, and returns the log of the whole run.

    Writes `best_model_params.pt` (the lowest validation loss), `last.pt` (everything) and `log.jsonl` into
    `checkpoint_dir`. If they are there, the run continues, to the same losses as if it had never been cut (on a CPU to
    the bit). Ctrl-C, a notebook's stop button, or SIGTERM saves and returns; the log's `interrupted` says so. A second
    one raises KeyboardInterrupt at once, and what was saved before stays.

    Raises StoryLLMError for data that is missing or does not fit, for checkpoints of another run, for a folder that
    another process trains in, for a loss that is not finite, and where disk or memory are too small.
    """
    if not isinstance(recipe, Recipe):
        raise StoryLLMError(f"train was given a {type(recipe).__name__}, expected a Recipe: storyllm.RECIPES[name]")
    data_dir, checkpoint_dir = Path(data_dir), Path(checkpoint_dir)
    data = {split: open_tokens(data_dir / f"{split}.bin") for split in SPLITS}
    tokenizer = read_tokenizer(data_dir)
    check_together({split: tokens.info for split, tokens in data.items()}, tokenizer, data_dir)
    with locked(checkpoint_dir), torch.random.fork_rng(), Interrupt() as interrupt:
        try:
            run = _Run(recipe, data, tokenizer, checkpoint_dir, interrupt)
            if run.evaluated >= run.end:
                limit = "max_iters" if run.end == recipe.train.max_iters else "stop_at"
                print(
                    f"finished already: {printable(str(checkpoint_dir))} holds {run.evaluated:,} iterations of "
                    f"{run.end:,}; raise {limit} to go on, or take another checkpoint folder to begin anew"
                )
            else:
                run.go()
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                raise cannot("opened or written", error.filename or "the output", error) from error
            if not is_out_of_memory(error):
                raise
            raise StoryLLMError(
                f"out of memory ({' '.join(str(error).split())[:100]}): lower model.n_embd, model.n_layer, "
                "model.block_size, train.batch_size or train.eval_windows, or set model.gradient_checkpointing"
            ) from error
    interrupted = interrupt.requested if run.evaluated < run.end else 0
    return dataclasses.replace(read_log(checkpoint_dir / LOG), interrupted=interrupted)


class _Run:
    """A run: model, optimizer, scaler, and how far it has come."""

    def __init__(
        self,
        recipe: Recipe,
        data: dict[str, Tokens],
        tokenizer: tiktoken.Encoding,
        directory: Path,
        interrupt: Interrupt,
    ) -> None:
        info = data["train"].info
        self.recipe = Recipe(
            model=dataclasses.replace(recipe.model, vocab_size=info.vocab_size),
            data=_data_config(info),
            train=recipe.train,
        )
        self.config = recipe.train
        self.end = min(self.config.stop_at or self.config.max_iters, self.config.max_iters)
        self.data = data
        self.tokenizer = tokenizer
        self.directory = directory
        self.interrupt = interrupt
        self.iteration = 0  # batches seen; always at the end of an update
        self.evaluated = -1  # iteration of the last evaluation
        self.best_val_loss = math.inf
        self.seconds = 0.0  # of training so far, in all its parts
        self.log_bytes = 0  # length of the log when the state was saved
        self.skipped_updates = 0  # in which fp16 overflowed
        self.warnings: list[str] = []  # what the log is still to be told
        self.pace = Pace(2 * self.config.eval_windows)

        saved, warning = load_state(directory / LAST)
        self.is_new = saved is None
        if saved is None:
            self._check_nothing_is_lost()
        else:
            check_same_run(saved, self.recipe, self._data_sha256(), directory / LAST)
            same_device = saved["device"] == choose_device(self.config.device).type
            if self.config.micro_batch_size == "auto" and same_device:
                self.config = dataclasses.replace(self.config, micro_batch_size=saved["micro_batch_size"])
        if warning:
            self._warn(warning)
        self.machine = choose_machine(self.config, self.recipe.model)
        torch.manual_seed(self.config.seed)
        self.model = GPT(self.recipe.model).to(self.machine.device)
        self.optimizer = make_optimizer(self.model, self.config)
        self.scaler = self.machine.grad_scaler()
        if saved is not None:
            self._restore(saved)

    def go(self) -> None:
        """Trains from where the run stands to its end, or until it is interrupted."""
        print(f"{self.model.num_parameters():,} parameters on {self.machine.why}")
        rng = np.random.default_rng((EVALUATION, self.config.seed))
        windows = {split: self._windows(split, self.config.eval_windows, rng) for split in SPLITS}
        loss_of = self._loss_function()
        print(f"about {duration(self._seconds_left())} for {self.end - self.iteration:,} iterations")
        if self.is_new:  # from here on the other files here are this run's
            self._save()
        saved_at = started = time.monotonic()
        earlier_seconds = self.seconds
        with (
            tqdm(total=self.end, initial=self.iteration, bar_format=BAR, mininterval=0.5, file=sys.stdout) as bar,
            LogWriter(self.directory / LOG, self.log_bytes) as log,  # what came after the last saving happens again
        ):
            log.write({"event": "run", **self._description()})
            try:
                while True:
                    next_iteration = min(
                        self.iteration + self.config.gradient_accumulation_steps, self.config.max_iters
                    )
                    for point in self._evaluation_points(next_iteration):
                        self._evaluate(point, windows, log, bar)
                    if next_iteration > self.end or self.iteration == self.config.max_iters:
                        break
                    entry = self._update(next_iteration, loss_of, bar)
                    self.iteration = next_iteration
                    self.seconds = earlier_seconds + time.monotonic() - started
                    self._write(log, {"event": "update", "iteration": self.iteration, **entry, "seconds": self.seconds})
                    if time.monotonic() - saved_at > 60 * self.config.checkpoint_minutes:
                        self._save(log)
                        saved_at = time.monotonic()
            except OSError:  # of printing (the log's and the states' are StoryLLMErrors): nobody reads it any more
                self._save(log)
                raise
            except StopRequested:
                self._save(log)
                bar.write(f"interrupted: {printable(str(self.directory / LAST))} keeps {self.iteration:,} iterations")
            else:
                self._save(log)

    def _warn(self, message: str) -> None:
        """Says on the error stream, and in the log's next lines, what the run met with."""
        warnings.warn(message, stacklevel=2)
        self.warnings.append(message)

    def _write(self, log: LogWriter, entry: dict[str, Any]) -> None:
        for message in self.warnings:
            log.write({"event": "warning", "iteration": self.iteration, "message": message})
        self.warnings.clear()
        log.write(entry)

    def _evaluation_points(self, next_iteration: int) -> list[int]:
        """The iterations at which the present weights are due for evaluation, up to the update that comes next.

        A point inside an update is evaluated before it: the weights have had only the updates that were whole by then.
        """
        first, after = max(self.iteration, self.evaluated + 1), min(next_iteration, self.end + 1)
        if self.iteration == self.config.max_iters:
            after = self.end + 1  # no update comes next: the last point is due
        return [i for i in range(first, after) if i % self.config.eval_interval == 0 or i == self.end]

    def _windows(self, split: str, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        try:
            x, y = random_windows(self.data[split].ids, self.recipe.model.block_size, count, rng)
        except StoryLLMError as error:
            raise StoryLLMError(f"{self.data[split].path}: {error}") from error
        return torch.from_numpy(x), torch.from_numpy(y)

    def _batch(self, iteration: int) -> tuple[Tensor, Tensor]:
        """The batch of an iteration: it depends on recipe, data and iteration alone."""
        size, seed = self.config.batch_size, (TRAINING, self.config.seed)
        if self.config.windows == "random":
            return self._windows("train", size, np.random.default_rng((*seed, iteration)))
        x, y = shuffled_windows(self.data["train"].ids, self.recipe.model.block_size, size, seed, iteration)
        return torch.from_numpy(x), torch.from_numpy(y)

    def _update(self, next_iteration: int, loss_of: LossFunction, bar: tqdm) -> dict[str, float | None]:
        """Takes the batches from `iteration` to `next_iteration` as one update; returns what the log says of it."""
        started = time.monotonic()
        batches = [self._batch(i) for i in range(self.iteration, next_iteration)]
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))  # (windows, T) each
        self.model.train()
        learning_rate = lr_at(next_iteration - 1, self.config)

        def step() -> tuple[Tensor, Tensor]:
            torch.manual_seed(_seed_of(DROPOUT, self.config.seed, self.iteration))
            micro_batches = self._with_progress(self._micro_batches(x, y), bar)
            return train_step(
                loss_of, micro_batches, self.optimizer, self.scaler, self.machine, self.config, learning_rate
            )

        train_loss, grad_norm = (value.item() for value in self._within_memory(step))
        if not math.isfinite(train_loss + grad_norm):
            # Where fp16 overflowed, the step was skipped and a lower scale comes next; a scale under 1 has not helped.
            if not self.scaler.is_enabled() or self.scaler.get_scale() < 1:
                self._refuse(f"the loss is {train_loss}, the norm of its gradient {grad_norm}", next_iteration)
            self.skipped_updates += 1
        update_seconds = time.monotonic() - started
        self.pace.add_update(len(x), update_seconds)
        tokens_per_second = x.numel() / update_seconds
        speed: dict[str, float | None] = {"tokens_per_second": round(tokens_per_second, 1)}
        shown = f"{tokens_per_second:,.0f} tokens/s"
        if self.machine.peak_flops is not None:
            mfu = model_flops_utilization(tokens_per_second, self.recipe.model, self.machine.peak_flops)
            speed["mfu"] = round(mfu, 4)
            shown += f", {mfu:.0%} of the GPU"
        seconds_left = self._seconds_left(len(x) // self.config.batch_size)
        left = bar.format_interval(seconds_left)
        bar.set_postfix_str(f"{left} left, loss {train_loss:.3f}, lr {learning_rate:.1e}, {shown}", False)
        return {
            "train_loss": train_loss if math.isfinite(train_loss) else None,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            **speed,
            "seconds_left": round(seconds_left, 1),
            **({"skipped_updates": self.skipped_updates} if self.scaler.is_enabled() else {}),
        }

    def _within_memory(self, work: Callable[[], Result]) -> Result:
        """What `work` gives; where memory runs out, it is done all over again with half the windows at once."""
        most = max(self.config.windows_in_update, self.config.eval_windows)
        while True:
            try:
                return work()
            except Exception as error:
                size = min(self.machine.micro_batch_size, most)
                if not is_out_of_memory(error) or size == 1:
                    raise
            # Here, no longer there: an exception keeps every tensor of the frames that it came through.
            self._warn(f"out of memory with {size} windows at once: going on with {size // 2}")
            self.machine = dataclasses.replace(self.machine, micro_batch_size=size // 2)
            self.optimizer.zero_grad(set_to_none=True)
            scale, self.scaler = self.scaler.state_dict(), self.machine.grad_scaler()
            self.scaler.load_state_dict(scale)
            if self.machine.device.type == "cuda":
                torch.cuda.empty_cache()

    def _seconds_left(self, begun: int = 0) -> float:
        """How long the rest of the run will take, at its pace so far, when `begun` more iterations are done."""
        iteration = self.iteration + begun
        interval = self.config.eval_interval
        evaluations = self.end // interval - self.evaluated // interval + (self.end % interval > 0)  # one at the end
        return self.pace.seconds_left((self.end - iteration) * self.config.batch_size, evaluations)

    def _micro_batches(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The windows on the device, in pieces that fit it. An interrupt takes effect here, between two of them."""
        size = self.machine.micro_batch_size
        x, y = x.to(self.machine.device), y.to(self.machine.device)  # in one go: each copy would wait for a GPU
        for xb, yb in zip(x.split(size), y.split(size), strict=True):
            self.interrupt.check()
            yield xb, yb

    def _with_progress(
        self, micro_batches: Iterator[tuple[Tensor, Tensor]], bar: tqdm
    ) -> Iterator[tuple[Tensor, Tensor]]:
        windows = 0
        for x, y in micro_batches:
            yield x, y
            windows += len(x)
            bar.n = self.iteration + windows / self.config.batch_size  # not a sum of fractions, which would drift
            bar.update(0)

    def _evaluate(self, point: int, windows: dict[str, tuple[Tensor, Tensor]], log: LogWriter, bar: tqdm) -> None:
        """Losses of both splits on their fixed windows, logged as of iteration `point`; the best weights are kept.

        Never compiled: that would take longer than it saves.
        """
        started = time.monotonic()
        self.model.eval()
        train_loss, val_loss = (self._within_memory(partial(self._mean_loss, *windows[split])) for split in SPLITS)
        self.pace.add_evaluation(time.monotonic() - started)
        if not math.isfinite(train_loss + val_loss):
            self._refuse(f"the loss is {train_loss}, on the validation stories {val_loss}", point)
        info = self.data["validation"].info
        if val_loss < self.best_val_loss:
            self._check_weights()
            self.best_val_loss = val_loss
            contents = model_contents(self.model, self.tokenizer, self.recipe)
            save_checkpoint(self.directory / BEST, {**contents, "iteration": point, "val_loss": val_loss})
        self.evaluated = point
        bpb = bits_per_byte(val_loss, info.tokens, info.bytes)
        entry = {
            "event": "evaluation",
            "iteration": point,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_bits_per_byte": bpb,
            "learning_rate": lr_at(point, self.config),
            "seconds": self.seconds,
        }
        self._write(log, entry)
        losses = f"train loss {train_loss:.4f}, validation loss {val_loss:.4f} ({bpb:.3f} bits per byte)"
        bar.write(f"iteration {point:>6,}: {losses}", sys.stdout)

    def _mean_loss(self, x: Tensor, y: Tensor) -> float:
        return mean_loss(self.model.loss, self._micro_batches(x, y), self.machine)

    def _refuse(self, what: str, iteration: int) -> NoReturn:
        raise StoryLLMError(
            f"{what} at iteration {iteration}, learning rate {lr_at(iteration, self.config):.2e}: "
            f"lower train.learning_rate and take another checkpoint folder; {self.directory} keeps an earlier state"
        )

    def _check_weights(self) -> None:
        """Before every saving: what is not finite never takes the place of something that is."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            self._refuse("the weights hold NaN or infinity", self.iteration)

    def _save(self, log: LogWriter | None = None) -> None:
        if log is not None:
            log.sync()  # so that a state never knows of lines that a cut of power took
            self.log_bytes = log.size()
        self._check_weights()
        save_checkpoint(
            self.directory / LAST,
            {
                **model_contents(self.model, self.tokenizer, self.recipe),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "data_sha256": self._data_sha256(),
                "device": self.machine.device.type,
                "micro_batch_size": self.machine.micro_batch_size,
                **{name: getattr(self, name) for name in PROGRESS},
            },
            keep=self.config.keep_checkpoints,
        )

    def _data_sha256(self) -> dict[str, str]:
        return {split: tokens.info.sha256 for split, tokens in self.data.items()}

    def _check_nothing_is_lost(self) -> None:
        """Raises StoryLLMError if a new run would write over the files of another."""
        for name in (BEST, LOG):
            if (self.directory / name).exists():
                raise StoryLLMError(
                    f"{self.directory} holds the {name} of a run whose {LAST} is not there: "
                    "take another checkpoint folder, or move that file away"
                )

    def _restore(self, saved: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(saved["model"])
            restore_optimizer(self.optimizer, saved["optimizer"])
            if self.scaler.is_enabled() and saved["scaler"]:
                if not all(type(value) in (int, float) for value in saved["scaler"].values()):
                    raise TypeError("scaler")
                self.scaler.load_state_dict(saved["scaler"])
            for name in PROGRESS:
                setattr(self, name, saved[name])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise StoryLLMError(
                f"{self.directory / LAST} does not fit this model ({' '.join(str(error).split())[:120]}): "
                "take another checkpoint folder"
            ) from error
        self._check_files()
        if self.evaluated < self.end:
            print(f"continuing at iteration {self.iteration:,}")

    def _check_files(self) -> None:
        """Warns of what is missing beside the state; raises StoryLLMError if the log is damaged."""
        if self.best_val_loss < math.inf and not (self.directory / BEST).exists():
            self._warn(f"{self.directory / BEST} is not there: the best weights of later evaluations take its place")
            self.best_val_loss = math.inf
        log = self.directory / LOG
        lines = log.read_bytes()[: self.log_bytes] if log.exists() else b""
        whole = lines.rfind(b"\n") + 1
        if whole < self.log_bytes:
            self._warn(f"{log} has lost {self.log_bytes - whole:,} bytes of what was logged: going on without them")
            self.log_bytes = whole
        if log.exists():
            read_log(log, self.log_bytes)

    def _loss_function(self) -> LossFunction:
        """`model.loss`, compiled where that was chosen and works. It is tried: its time begins the run's pace."""
        size = min(self.machine.micro_batch_size, self.config.windows_in_update)
        x, y = (part.contiguous() for part in self._windows("train", size, np.random.default_rng(0)))

        def tried() -> LossFunction:
            xb, yb = x[: self.machine.micro_batch_size], y[: self.machine.micro_batch_size]
            loss_of = self._compiled_loss(xb, yb) if self.machine.compile else self.model.loss
            self._try(loss_of, xb, yb)  # what takes time only once
            started = time.monotonic()
            self._try(loss_of, xb, yb)
            self.pace.add_update(len(xb), time.monotonic() - started)
            return loss_of

        try:
            return self._within_memory(tried)
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _compiled_loss(self, x: Tensor, y: Tensor) -> LossFunction:
        """`model.loss` compiled for windows like these; plain, and a line that says so, where that fails."""
        compiled = torch.compile(self.model.loss, dynamic=False)
        try:
            self._try(compiled, x, y)
        except Exception as error:  # a compiler has many ways to fail
            if is_out_of_memory(error):
                raise
            print(f"torch.compile does not work here ({type(error).__name__}): going on without it")
            why = f"{self.machine.why}, which failed ({type(error).__name__}): not compiled"
            self.machine = dataclasses.replace(self.machine, compile=False, why=why)
            return self.model.loss

        # What is left over at the end of an update has another size: it is not worth a compilation of its own.
        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            size = min(self.machine.micro_batch_size, self.config.windows_in_update)
            return (compiled if len(x) == size else self.model.loss)(x, y)

        return loss_of

    def _try(self, loss_of: LossFunction, x: Tensor, y: Tensor) -> None:
        """Takes a gradient, and waits until it is there."""
        self.model.train()
        with self.machine.autocast():
            loss = loss_of(x.to(self.machine.device), y.to(self.machine.device))
        loss.backward()
        loss.item()

    def _description(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_dict(),
            "parameters": self.model.num_parameters(),
            "iteration": self.iteration,
            "device": self.machine.why,
            "micro_batch_size": self.machine.micro_batch_size,
            "data": {split: dataclasses.asdict(tokens.info) for split, tokens in self.data.items()},
            **describe_environment(),
        }


def _data_config(info: TokenInfo) -> DataConfig:
    """The settings that the data was prepared with. Raises StoryLLMError if the `.json` holds something else."""
    try:
        settings = {name: value for name, value in dict(info.request).items() if name != "fingerprint"}
        return DataConfig(source=info.source, **settings)
    except (TypeError, ValueError) as error:
        raise StoryLLMError("the data's .json is damaged or not StoryLLM's: prepare the data again") from error


def _seed_of(*numbers: int) -> int:
    """One seed for PyTorch out of several numbers: different for different ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1  # 63 bits: it must not overflow
