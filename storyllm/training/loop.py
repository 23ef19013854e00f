"""The training loop.

Windows and dropout are drawn from generators seeded by the iteration, so the state of a run is its weights, its
optimizer and a few numbers, and an interrupted run gives the same result as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Recipe, StoryLLMError, TrainConfig, printable
from ..data.stories import SPLITS
from ..data.token_file import Dataset, open_dataset
from ..data.windows import DROPOUT, evaluation_windows, training_batch
from ..device import DeviceConfig, resolve_device_config
from ..evaluation.likelihood import bits_per_byte, total_loss
from ..model.gpt import GPT
from .distributed import Processes, torchrun_processes
from .execution import Execution, LossFunction, one_line_errors, process_state
from .initial_model import describe_initial_model
from .interrupt import Interrupt, StopRequested
from .log import Log, describe_environment, package_checksum
from .optimizer import lr_at, make_optimizer
from .progress import Progress
from .run_folder import RunFolder, TrainState
from .samples import sample_if_due


def train_step(
    loss_fn: LossFunction,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    config: TrainConfig,
    device: DeviceConfig,
    scaler: torch.amp.GradScaler,
    processes: Processes | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer update: accumulates the gradients of the micro-batches, clips them, and steps.

    `micro_batches` are (windows, T) inputs and targets of any number of windows. Each window has the weight of one
    window of a full update, even if the last update has fewer. With several processes, the micro-batches are those of
    this one. Returns the mean loss in nats per token and the gradient norm before clipping, both as scalar tensors.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total_loss, windows = torch.zeros((), dtype=torch.float32, device=device.device), 0
    for x, y in micro_batches:
        with device.autocast():
            loss = loss_fn(x, y)
        scaler.scale(loss * (len(x) / config.windows_per_update)).backward()
        total_loss += loss.detach() * len(x)
        windows += len(x)
    if processes is not None:  # loss, windows and gradients
        total_loss, windows = processes.sum(total_loss, windows)
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
    scaler.step(optimizer)  # does nothing if fp16 overflowed; `update` then halves the scale
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total_loss / windows, grad_norm


def train(
    recipe: Recipe,
    data_dir: str | Path = "data",
    checkpoint_dir: str | Path = "checkpoints",
    init_from: str | Path | None = None,
    original_data_dir: str | Path | None = None,
) -> Log:
    """Trains a model on the data that `prepare` wrote to `data_dir`, and returns the log of the complete run.

    Writes `best_model_params.pt` (lowest validation loss), `last.pt` (the state to resume from) and `log.jsonl` to
    `checkpoint_dir`. If they exist, the run resumes, and gives the same losses as an uninterrupted one (on a CPU to the
    bit). Ctrl-C, a notebook's stop button or SIGTERM saves, evaluates and returns, with the signal in the log's
    `interrupted`. A second one raises KeyboardInterrupt immediately; the last save remains.

    A new run may start from another model: `init_from` is anything that `storyllm.load` accepts. Model fields then come
    from that model, except dropout, flash_attention, gradient_checkpointing and block_size, which may be shorter. The
    run remembers the model, so resuming it does not need `init_from`. With `original_data_dir`, the data of that model,
    each evaluation also gives the bits per byte of its validation split, which rise as the model forgets it.

    Processes that torchrun starts train together (docs/distributed.md). The log is empty on all but the first.

    Raises StoryLLMError if the data is missing or does not match, if the checkpoints belong to another run or are in
    use by another process, if another thread trains, if the loss is not finite, if disk space or memory run out, and if
    another process of the run is lost.
    """
    if not isinstance(recipe, Recipe):
        raise StoryLLMError(f"train got {type(recipe).__name__}, expected a Recipe; use storyllm.get_recipe(name)")
    data = open_dataset(data_dir, original_data_dir)
    model_config = dataclasses.replace(recipe.model, vocab_size=data.train.info.vocab_size)
    recipe = Recipe(model=model_config, data=data.config, train=recipe.train)
    config = recipe.train
    processes = torchrun_processes(config.device)
    folder = RunFolder(checkpoint_dir, recipe, data, init_from, writes=processes.rank == 0)
    with process_state(), Interrupt() as interrupt, processes, folder.lock(), one_line_errors():
        # Resume the run in the folder, or start a new one.
        processes.check_same(lambda: common_settings(folder))
        saved = processes.broadcast(folder.load())
        torch.manual_seed(config.seed)
        model = folder.create_model(saved)
        recipe, model_config = folder.recipe, model.config
        device = resolve_device_config(config, model_config, processes.size)
        if saved and config.micro_batch_size == "auto" and saved["device"] == device.device.type:
            device = dataclasses.replace(device, micro_batch_size=saved["micro_batch_size"])
        model = model.to(device.device)
        optimizer = make_optimizer(model, config, device.dtype, processes)
        execution = Execution(config, device, optimizer, interrupt, folder.log.warn, processes)
        state = folder.restore(saved, model, execution) if saved else TrainState()
        processes.connect(model)
        progress = Progress(recipe, state.iteration, device.peak_flops, processes.size)
        if state.last_evaluation >= config.last_iteration:
            progress.print(
                f"already finished: {printable(str(folder.path))} has completed {state.last_evaluation:,} iterations; "
                "raise train.max_iters (or stop_at), or use another checkpoint folder for a new run"
            )
            return folder.read_log()
        if saved:
            progress.print(f"resuming at iteration {state.iteration:,} from {printable(str(folder.origin))}")
        progress.print(f"{model.num_parameters():,} parameters\n{execution.device.description}")

        eval_windows = evaluation_windows(data, model_config.block_size, config)
        loss_fn, seconds_per_window = execution.prepare_loss(model, *update_windows(data, recipe, 0))
        progress.estimate(seconds_per_window, state.iteration, state.last_evaluation)
        if not saved:  # from here on, the folder belongs to this run
            folder.save(state, model, execution)

        with progress, folder.log.open(state.log_bytes) as log:  # truncated to what the saved state knows
            log.write({"event": "run", "iteration": state.iteration, **describe_run(folder, model, execution)})
            last_save = time.monotonic()
            run_start = time.monotonic() - state.seconds

            def evaluate_at(iteration: int) -> None:
                """Evaluates the current weights, and keeps them if they are the best so far."""
                started = time.monotonic()
                losses = estimate_loss(model, eval_windows, data, execution)
                progress.add_evaluation(time.monotonic() - started)
                if not math.isfinite(losses["train_loss"] + losses["val_loss"]):
                    problem = f"the loss is {losses['train_loss']}, validation loss {losses['val_loss']}"
                    raise folder.diverged(problem, iteration)
                if losses["val_loss"] < state.best_val_loss:
                    folder.save_best(model, iteration, losses["val_loss"])
                    state.best_val_loss = losses["val_loss"]
                state.last_evaluation = iteration
                entry = {**losses, "learning_rate": lr_at(iteration, config), "seconds": state.seconds}
                log.write({"event": "evaluation", "iteration": iteration, **entry})
                progress.show_evaluation(iteration, losses)

            try:
                while True:
                    next_iteration = min(state.iteration + config.gradient_accumulation_steps, config.max_iters)

                    for iteration in evaluations_due(state, next_iteration, config):
                        evaluate_at(iteration)
                    sample_if_due(state, next_iteration, model, folder, progress)
                    if next_iteration > config.last_iteration or state.iteration == config.max_iters:
                        break

                    # One optimizer update.
                    started = time.monotonic()
                    x, y = update_windows(data, recipe, state.iteration)
                    learning_rate = lr_at(next_iteration - 1, config)
                    model.train()
                    loss, grad_norm = step_within_memory(execution, loss_fn, x, y, learning_rate, state, progress)
                    if not math.isfinite(loss + grad_norm):
                        if not execution.fp16_overflowed():
                            raise folder.diverged(f"the loss is {loss}, its gradient norm {grad_norm}", next_iteration)
                        state.skipped_updates += 1
                    seconds = time.monotonic() - started
                    state.iteration = next_iteration
                    state.seconds = time.monotonic() - run_start

                    # Log.
                    entry: dict[str, Any] = {
                        "iteration": state.iteration,
                        "train_loss": loss if math.isfinite(loss) else None,
                        "learning_rate": learning_rate,
                        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                        **progress.update_metrics(len(x), seconds, state.iteration, state.last_evaluation),
                        **({"skipped_updates": state.skipped_updates} if execution.scaler.is_enabled() else {}),
                        "seconds": state.seconds,
                    }
                    log.write({"event": "update", **entry})
                    progress.show_update(entry)

                    # Save when due.
                    if time.monotonic() - last_save > 60 * config.checkpoint_minutes:
                        folder.save(state, model, execution)
                        last_save = time.monotonic()
            except OSError:  # standard output is closed or full; the files raise StoryLLMError
                folder.save(state, model, execution)
                raise
            except StopRequested:
                folder.save(state, model, execution)
                progress.print(f"interrupted: saved iteration {state.iteration:,} to {printable(str(folder.last))}")
                interrupt.handled = True
                if state.iteration > max(state.last_evaluation, 0):  # best_model_params.pt may still be of iteration 0
                    progress.print("evaluating; interrupt again to skip this")
                    evaluate_at(state.iteration)
                    folder.save(state, model, execution)
            else:
                folder.save(state, model, execution)
            folder.copy_to_mirror(state)
    interrupted = interrupt.requested if state.last_evaluation < config.last_iteration else 0
    return dataclasses.replace(folder.read_log(), interrupted=interrupted)


def evaluations_due(state: TrainState, next_iteration: int, config: TrainConfig) -> list[int]:
    """The iterations at which the current weights are evaluated, before the update that ends at `next_iteration`.

    An evaluation that falls within an update sees the weights before it.
    """
    return state.due(config.resolved_eval_interval, state.last_evaluation, next_iteration, config)


def estimate_loss(
    model: GPT, eval_windows: dict[str, tuple[np.ndarray, np.ndarray]], data: Dataset, execution: Execution
) -> dict[str, float]:
    """The losses on both splits' evaluation windows, in nats per token, and the validation loss in bits per byte.

    If there is original data, also the bits per byte of its windows. Never compiled: that would take longer than it
    saves.
    """
    model.eval()

    def loss_on(split: str) -> float:
        x, y = map(torch.from_numpy, eval_windows[split])  # (eval_windows, T) each

        def attempt() -> float:
            losses = total_loss(model.loss, execution.micro_batches(x, y), execution.device)
            total, windows = execution.processes.sum(*losses)
            return float(total / windows)

        return execution.retry(attempt)

    train_loss, val_loss = (loss_on(split) for split in SPLITS)
    info = data.validation.info
    bpb = bits_per_byte(val_loss, info.tokens, info.bytes)
    losses = {"train_loss": train_loss, "val_loss": val_loss, "val_bits_per_byte": bpb}
    if data.original is not None:
        info = data.original.info
        losses["original_bits_per_byte"] = bits_per_byte(loss_on("original"), info.tokens, info.bytes)
    return losses


def update_windows(data: Dataset, recipe: Recipe, iteration: int) -> tuple[Tensor, Tensor]:
    """(windows, T) inputs and targets of the update that starts at `iteration`."""
    config = recipe.train
    stop = min(iteration + config.gradient_accumulation_steps, config.max_iters)
    batches = [training_batch(data.train, recipe.model.block_size, config, i) for i in range(iteration, stop)]
    x, y = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*batches, strict=True))
    return x, y


def step_within_memory(
    execution: Execution,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    learning_rate: float,
    state: TrainState,
    progress: Progress,
) -> tuple[float, float]:
    """`train_step` on an update's windows, retried if it runs out of memory. Returns loss and gradient norm."""

    def attempt() -> tuple[Tensor, Tensor]:
        processes = execution.processes
        torch.manual_seed(dropout_seed(execution.config.seed, state.iteration, processes.rank))
        micro_batches = progress.track(execution.micro_batches(x, y), state.iteration)
        return train_step(
            loss_fn,
            processes.last_pass_reduces(micro_batches),
            execution.optimizer,
            learning_rate,
            execution.config,
            execution.device,
            execution.scaler,
            processes,
        )

    loss, grad_norm = execution.retry(attempt)
    return loss.item(), grad_norm.item()


def dropout_seed(seed: int, iteration: int, rank: int = 0) -> int:
    """The seed of an update's dropout on the process `rank`, independent of the seeds of the windows."""
    states = np.random.SeedSequence((DROPOUT, seed, iteration)).generate_state(rank + 1, np.uint64)
    return int(states[rank]) >> 1  # int64


def common_settings(folder: RunFolder) -> dict[str, Any]:
    """What all processes of a run must have in common, by name: recipe, data, initial model, code and PyTorch."""
    recipe, init_from = folder.recipe.to_dict(), folder.init_from
    return {
        **{f"{part}.{name}": value for part in ("model", "train") for name, value in recipe[part].items()},
        **{f"{split}.bin": checksum for split, checksum in folder.data.sha256.items()},
        "original data": None if folder.data.original is None else folder.data.original.info.sha256,
        "init_from": None if init_from is None else describe_initial_model(init_from),
        "storyllm (checksum)": package_checksum(),
        "torch": torch.__version__,
    }


def describe_run(folder: RunFolder, model: GPT, execution: Execution) -> dict[str, Any]:
    """The log's description of the run: recipe, data, device and versions."""
    device = execution.device
    return {
        "recipe": folder.recipe.to_dict(),
        "init_from": folder.started_from,
        "parameters": model.num_parameters(),
        "device": device.name,
        "dtype": str(device.dtype).removeprefix("torch."),
        "compiled": device.compile,
        "micro_batch_size": device.micro_batch_size,
        "device_description": device.description,
        **execution.processes.describe(execution.config.windows_per_update),
        "data": {split: dataclasses.asdict(folder.data[split].info) for split in SPLITS},
        **describe_environment(),
    }
