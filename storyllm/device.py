"""Which device, number format and compilation suit this machine, and why."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from .config import GPTConfig, StoryLLMError, TrainConfig
from .pace import PEAK_FLOPS, duration, flops_per_token, peak_flops

# What "auto" takes for micro_batch_size. A CPU gets CPU_TOKENS tokens at once, a GPU one token for each
# GPU_BYTES_PER_TOKEN of its memory, as far as GPU_TOKENS, which keep any of today's busy; a model of more than 6 x 384
# channels gets fewer in proportion.
CPU_TOKENS = 1_024
GPU_BYTES_PER_TOKEN = 1 << 20
GPU_TOKENS = 65_536
CHANNELS = 6 * 384

# Compiling takes about a minute and may save a third of a run: it is for runs that take so many seconds otherwise, at a
# quarter of the GPU's highest rate (one that is not in the table counts as a T4).
COMPILE_SECONDS = 300
USUAL_SHARE = 0.25


@dataclass(frozen=True)
class Machine:
    """What a run computes with. `why` says in one line how it was chosen."""

    device: torch.device
    dtype: torch.dtype  # of the matrix products; weights and sums are float32 always
    compile: bool
    micro_batch_size: int  # windows that go through the device at once
    why: str
    peak_flops: float | None = None  # highest rate of this GPU for `dtype`, in operations a second, where it is known

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which the forward pass runs in this machine's number format."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """A scaler that keeps small fp16 gradients from vanishing; for the other formats it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is CUDA, else MPS, else the CPU. Raises StoryLLMError if it is not here."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if _works("mps") else "cpu")
    if not _works(name):
        raise StoryLLMError(f"device {name!r} is not on this machine, expected 'auto', 'cuda', 'mps' or 'cpu'")
    return torch.device(name)


def _works(name: str) -> bool:
    if name == "mps" and not torch.backends.mps.is_available():
        return False
    try:
        return bool((torch.ones(2, device=name) + 1).sum() == 4)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError):
        return False  # unknown, not built in, or not there


def choose_machine(train: TrainConfig, model: GPTConfig) -> Machine:
    """Fills in every "auto" of `train` for the machine at hand, and takes what it names."""
    device = choose_device(train.device)
    name, best, reason = "CPU", torch.float32, ""
    capability = (0, 0)
    if device.type == "mps":
        name = "Apple GPU (MPS)"
    elif device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        best, reason = auto_dtype(capability)
    dtype = best if train.dtype == "auto" else getattr(torch, train.dtype)
    if train.dtype != "auto":
        reason = " (as asked for)"
    peak = peak_flops(name, dtype)
    compiled, compile_reason = auto_compile(capability, peak, train, model)
    if train.compile != "auto":
        compiled, compile_reason = train.compile, "as asked for"
    if train.micro_batch_size == "auto":
        micro_batch_size = auto_micro_batch_size(device, train, model)
    else:
        micro_batch_size = train.micro_batch_size
    why = (
        f"{name}, {str(dtype).removeprefix('torch.')}{reason}, {micro_batch_size} windows at once, "
        f"{'compiled' if compiled else 'not compiled'} ({compile_reason})"
    )
    return Machine(device, dtype, compiled, micro_batch_size, why, peak)


def is_out_of_memory(error: BaseException) -> bool:
    """Did the device, or the CPU, have no memory left for a tensor? PyTorch has no one exception for it."""
    words = ("out of memory", "can't allocate memory", "bad_alloc", "could not create a primitive")  # the last: oneDNN
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def auto_micro_batch_size(device: torch.device, train: TrainConfig, model: GPTConfig) -> int:
    """The windows that go through the device at once: what fits, in equal parts of an update where that is near."""
    tokens = CPU_TOKENS
    if device.type == "cuda":
        tokens = min(torch.cuda.get_device_properties(device).total_memory // GPU_BYTES_PER_TOKEN, GPU_TOKENS)
    windows = tokens * CHANNELS // (model.n_layer * model.n_embd) // model.block_size
    largest = max(1, min(windows, train.windows_in_update))
    divisor = max(size for size in range(1, largest + 1) if train.windows_in_update % size == 0)
    return divisor if divisor > largest // 2 else largest


def auto_compile(
    capability: tuple[int, int], peak: float | None, train: TrainConfig, model: GPTConfig
) -> tuple[bool, str]:
    """Is this run to be compiled, on a CUDA GPU of that compute capability ((0, 0): on none)? And why."""
    if capability < (7, 0):
        return False, "that is for CUDA GPUs from 7.0 on"
    if find_spec("triton") is None:
        return False, "triton is not installed"
    iterations = min(train.stop_at or train.max_iters, train.max_iters)
    flops = iterations * train.batch_size * model.block_size * flops_per_token(model)
    seconds = flops / (USUAL_SHARE * (peak or PEAK_FLOPS["T4"]))
    return seconds >= COMPILE_SECONDS, f"a run of some {duration(seconds)}, it pays from {duration(COMPILE_SECONDS)} on"


def auto_dtype(capability: tuple[int, int]) -> tuple[torch.dtype, str]:
    """The number format for a CUDA GPU of that compute capability, and the reason.

    `torch.cuda.is_bf16_supported()` says yes on a T4 (7.5), which emulates bf16 at a fraction of its fp16 speed: the
    capability is what tells.
    """
    written = ".".join(map(str, capability))
    if capability >= (8, 0):
        return torch.bfloat16, f" (compute capability {written})"
    return torch.float16, f" (compute capability {written}, bf16 needs 8.0)"
