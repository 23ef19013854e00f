"""How a batch is executed on the device: micro-batches, retries when memory runs out, and compilation."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ..config import StoryLLMError, TrainConfig
from ..device import DeviceConfig, is_out_of_memory
from ..files import os_error
from ..model.gpt import GPT
from .distributed import OutOfMemoryElsewhereError, Processes, StoppedElsewhere
from .interrupt import Interrupt

# Parameters of glibc's mallopt (malloc.h) and their defaults: the free memory at the end of the heap that malloc keeps,
# and the number of blocks that it may request from the system one by one.
M_TRIM_THRESHOLD, M_MMAP_MAX = (-1, 128 * 1024), (-4, 65_536)

# Held by the run that uses the random generators of this process.
_PROCESS_LOCK = threading.Lock()

LossFunction = Callable[[Tensor, Tensor], Tensor]  # (windows, T) inputs and targets -> mean nats per token
T = TypeVar("T")


class Execution:
    """Executes batches in micro-batches that fit the device. `device.micro_batch_size` shrinks when memory runs out.

    With several processes, each executes its share of a batch.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: DeviceConfig,
        optimizer: torch.optim.Optimizer,
        interrupt: Interrupt,
        warn: Callable[[str], None],
        processes: Processes | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.optimizer = optimizer
        self.scaler = device.grad_scaler()
        self.interrupt = interrupt
        self.warn = warn
        self.processes = processes or Processes()

    def micro_batches(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of (windows, T) inputs and targets on the device, a micro-batch at a time.

        Raises StopRequested before the next micro-batch after an interrupt.
        """
        size = self.device.micro_batch_size
        # One copy, since each synchronizes.
        x, y = (self.processes.share(windows).to(self.device.device) for windows in (x, y))
        for micro_batch in zip(x.split(size), y.split(size), strict=True):
            self.interrupt.check()
            if len(micro_batch[0]):  # an empty share is split into one empty part
                yield micro_batch

    def retry(self, attempt: Callable[[], T]) -> T:
        """Calls `attempt`, again with half the micro-batch size each time it runs out of memory.

        An attempt of several processes ends with `processes.sum`. If one is interrupted or runs out of memory, all are.
        """
        windows = max(self.config.windows_per_update, self.config.eval_windows)
        while True:
            size = min(self.device.micro_batch_size, self.processes.largest_share(windows))
            try:
                return self.processes.attempt(attempt)
            except StoppedElsewhere as stop:
                self.interrupt.request_elsewhere(stop.args[0])
                raise
            except OutOfMemoryElsewhereError as error:
                problem, smaller = f"{error} ran out of memory", max(1, size // 2)
            except Exception as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
                problem, smaller = f"out of memory with micro-batch size {size}", size // 2
            # Outside the except clause: the exception keeps all tensors of its traceback alive.
            self.warn(f"{problem}, retrying with {smaller}")
            self.device = dataclasses.replace(self.device, micro_batch_size=smaller)
            self.optimizer.zero_grad(set_to_none=True)
            scaler_state, self.scaler = self.scaler.state_dict(), self.device.grad_scaler()
            self.scaler.load_state_dict(scaler_state)
            if self.device.device.type == "cuda":
                torch.cuda.empty_cache()

    def fp16_overflowed(self) -> bool:
        """True if an update that is not finite was an fp16 overflow that a smaller loss scale can still avoid."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def prepare_loss(self, model: GPT, x: Tensor, y: Tensor) -> tuple[LossFunction, float]:
        """`model.loss`, compiled if the device config says so, and its seconds per window for forward and backward.

        Both are tried on (windows, T) examples, at least a micro-batch of an update. The time is that of all processes.
        """

        def attempt() -> tuple[LossFunction, float]:
            size = self._size_in_update()
            xb, yb = x[:size].to(self.device.device), y[:size].to(self.device.device)
            loss_fn = self._compile(model, xb, yb) if self.device.compile else model.loss
            self._forward_backward(loss_fn, xb, yb)  # warm up
            started = time.monotonic()
            self._forward_backward(loss_fn, xb, yb)
            windows_per_second, _ = self.processes.sum(len(xb) / (time.monotonic() - started))
            return loss_fn, float(1 / windows_per_second)

        model.train()
        try:
            return self.retry(attempt)
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _compile(self, model: GPT, x: Tensor, y: Tensor) -> LossFunction:
        """`model.loss`, compiled for micro-batches of this size; `model.loss` itself, with a warning, if that fails."""
        compiled = torch.compile(model.loss, dynamic=False)
        try:
            self._forward_backward(compiled, x, y)
        except Exception as error:  # compilers fail in many ways
            if is_out_of_memory(error):
                raise
            self.warn(f"torch.compile failed ({type(error).__name__}), training without it")
            reason = f"torch.compile failed: {type(error).__name__}"
            self.device = dataclasses.replace(self.device, compile=False, compile_reason=reason)
            return model.loss

        def loss_fn(x: Tensor, y: Tensor) -> Tensor:
            # Another size, such as the remainder of an update, is not worth its own compilation.
            return (compiled if len(x) == self._size_in_update() else model.loss)(x, y)

        return loss_fn

    def _size_in_update(self) -> int:
        """The size of the micro-batches of an update, except for the remainder."""
        return min(self.device.micro_batch_size, self.processes.largest_share(self.config.windows_per_update))

    def _forward_backward(self, loss_fn: LossFunction, x: Tensor, y: Tensor) -> None:
        with self.device.autocast():
            loss = loss_fn(x, y)
        loss.backward()
        loss.item()  # waits for the device


@contextmanager
def process_state() -> Iterator[None]:
    """Keeps other runs of this process out, sets the default dtype to float32, and restores it and the generators.

    Raises StoryLLMError if another thread is training.
    """
    if not _PROCESS_LOCK.acquire(blocking=False):
        raise StoryLLMError(
            "another thread of this process is training, and both would draw from the same random generators; "
            "wait for it, or train in another process"
        )
    dtype = torch.get_default_dtype()
    try:
        with torch.random.fork_rng(), reused_memory():
            torch.set_default_dtype(torch.float32)
            yield
    finally:
        torch.set_default_dtype(dtype)
        _PROCESS_LOCK.release()


@contextmanager
def reused_memory() -> Iterator[None]:
    """Makes glibc keep the memory of freed tensors for the next ones, and return it in the end.

    By default, it returns blocks over 32 MiB to the system immediately. Each new one then costs time to map and clear
    its pages: about a fifth of an update of `fast` on a CPU. Does nothing with another C library.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        yield
        return
    libc.mallopt(M_TRIM_THRESHOLD[0], 2**31 - 1)
    libc.mallopt(M_MMAP_MAX[0], 0)
    try:
        yield
    finally:
        libc.mallopt(*M_TRIM_THRESHOLD)
        libc.mallopt(*M_MMAP_MAX)
        libc.malloc_trim(0)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns operating system errors and running out of memory into StoryLLMErrors."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise os_error("open or write", error.filename or "the output", error) from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:100]
        raise StoryLLMError(
            f"out of memory ({reason}); lower model.n_embd, model.n_layer, model.block_size, train.batch_size or "
            "train.eval_windows, or set model.gradient_checkpointing"
        ) from error
