"""The device, number format and compilation that suit this machine, and why they were chosen."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from .config import GPTConfig, StoryLLMError, TrainConfig

# The micro-batch size that "auto" selects, in tokens. A CPU gets CPU_TOKENS; a GPU gets a token per
# GPU_BYTES_PER_TOKEN of its memory, up to GPU_TOKENS, which keep any current GPU busy. This is for a model with
# n_layer * n_embd of REFERENCE_SIZE; larger ones get proportionally fewer tokens.
CPU_TOKENS = 1_024
GPU_BYTES_PER_TOKEN = 1 << 20
GPU_TOKENS = 65_536
REFERENCE_SIZE = 6 * 384

# On a CPU, "auto" keeps float32 for narrower models: `demo` was faster in bf16, but not as good (docs/experiments.md).
MIN_BF16_WIDTH = 192

# Compilation takes about a minute and saves up to a third of the run. "auto" compiles runs that would otherwise take
# COMPILE_SECONDS, estimated at TYPICAL_MFU of the GPU's peak FLOP/s (an unknown GPU counts as a T4).
COMPILE_SECONDS = 300
TYPICAL_MFU = 0.25

# Peak FLOP/s of dense 16-bit matrix products with float32 accumulation, from NVIDIA's data sheets and white papers.
# Keys are matched as words of the device's name; the first match counts.
PEAK_FLOPS = {
    "T4": 65e12,
    "V100-PCIE": 112e12,
    "V100": 125e12,
    "A100": 312e12,
    "L4": 121e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "RTX 3070": 40.6e12,
    "RTX 3080": 59.5e12,
    "RTX 3090": 71e12,
    "RTX 4080": 97.5e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
}


@dataclass(frozen=True)
class DeviceConfig:
    """The device of a run and how it is used."""

    device: torch.device
    name: str  # such as "CPU" or "Tesla T4"
    dtype: torch.dtype  # of matrix products; weights and sums are always float32
    compile: bool
    micro_batch_size: int  # windows per forward pass
    dtype_reason: str = ""
    compile_reason: str = ""
    peak_flops: float | None = None  # FLOP/s of this GPU with `dtype`, if known

    @property
    def description(self) -> str:
        """The configuration and the reasons for it, in one line."""
        dtype = str(self.dtype).removeprefix("torch.") + (f" ({self.dtype_reason})" if self.dtype_reason else "")
        compiled = f"{'compiled' if self.compile else 'not compiled'} ({self.compile_reason})"
        return f"{self.name}, {dtype}, micro-batch size {self.micro_batch_size}, {compiled}"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context for forward passes in this number format."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler, enabled only for float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def resolve_device(name: str = "auto") -> torch.device:
    """The device with that name; "auto" prefers CUDA, then MPS, then the CPU.

    Raises StoryLLMError if the device is not available, or if it is a CUDA GPU that this PyTorch cannot use.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if _problem("mps") is None else "cpu"
    if problem := _problem(name):
        if name.startswith("cuda") and torch.cuda.is_available():  # an old GPU is available, too
            raise StoryLLMError(
                f"the GPU {torch.cuda.get_device_name()} failed a test ({problem}); choose another GPU (on Kaggle: "
                "GPU T4 x2), or the CPU (--train.device cpu)"
            )
        raise StoryLLMError(f"device {name!r} is not available on this machine; use 'auto' or 'cpu'")
    return torch.device(name)


def _problem(name: str) -> str | None:
    """Why the device does not compute, in one line; None if it does."""
    if name == "mps" and not torch.backends.mps.is_available():
        return "no MPS"
    try:
        result = (torch.ones(2, dtype=torch.float32, device=name) + 1).sum()
        return None if result == 4 else f"1 + 1 is {result / 2}"
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        # An unknown name, a device that is not compiled in, or none of that kind.
        return " ".join(str(error).split())[:100] or type(error).__name__


def resolve_device_config(train: TrainConfig, model: GPTConfig, processes: int = 1) -> DeviceConfig:
    """Replaces each "auto" in `train` by the choice for this machine, which runs one of several equal processes.

    Raises StoryLLMError for a missing device.
    """
    device = resolve_device(train.device)
    name, dtype, dtype_reason, capability = "CPU", torch.float32, "", (0, 0)
    if device.type == "mps":
        name = "Apple GPU (MPS)"
    elif device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        dtype, dtype_reason = auto_dtype(capability)
    elif device.type == "cpu" and cpu_has("avx512_bf16", "amx_bf16") and model.n_embd >= MIN_BF16_WIDTH:
        dtype, dtype_reason = torch.bfloat16, "native on this CPU"
    if train.dtype != "auto":
        dtype, dtype_reason = getattr(torch, train.dtype), "as requested"
    peak = peak_flops(name, dtype)
    if train.compile == "auto":
        compiled, compile_reason = auto_compile(capability, peak, train, model, processes)
    else:
        compiled, compile_reason = train.compile, "as requested"
    micro_batch_size = train.micro_batch_size
    if micro_batch_size == "auto":
        micro_batch_size = auto_micro_batch_size(device, train, model, processes)
    return DeviceConfig(device, name, dtype, compiled, micro_batch_size, dtype_reason, compile_reason, peak)


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error` means that the device or the CPU ran out of memory. PyTorch has several exceptions for it."""
    # The last phrase is oneDNN's. A "primitive descriptor" cannot be created for a product that it does not support.
    phrases = "out of memory|can't allocate memory|bad_alloc|could not create a primitive(?! descriptor)"
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and re.search(phrases, str(error)) is not None
    )


def auto_micro_batch_size(device: torch.device, train: TrainConfig, model: GPTConfig, processes: int = 1) -> int:
    """The number of windows per forward pass: what fits, preferably a divisor of a process's windows in an update."""
    tokens = CPU_TOKENS
    if device.type == "cuda":
        tokens = min(torch.cuda.get_device_properties(device).total_memory // GPU_BYTES_PER_TOKEN, GPU_TOKENS)
    windows = tokens * REFERENCE_SIZE // (model.n_layer * model.n_embd) // model.block_size
    share = -(-train.windows_per_update // processes)
    largest = max(1, min(windows, share))
    divisor = max(size for size in range(1, largest + 1) if share % size == 0)
    return divisor if divisor > largest // 2 else largest


def auto_compile(
    capability: tuple[int, int], peak: float | None, train: TrainConfig, model: GPTConfig, processes: int = 1
) -> tuple[bool, str]:
    """Whether to compile, and why. `capability` is the GPU's CUDA compute capability, (0, 0) without one."""
    if capability < (7, 0):
        return False, "compute capability below 7.0" if any(capability) else "no CUDA GPU"
    if find_spec("triton") is None:
        return False, "triton is not installed"
    flops = train.last_iteration * train.batch_size * model.block_size * flops_per_token(model)
    seconds = flops / (TYPICAL_MFU * (peak or PEAK_FLOPS["T4"]) * processes)
    reason = f"pays off for runs over {COMPILE_SECONDS / 60:.0f} minutes, this one is estimated at {seconds / 60:.1f}"
    return seconds >= COMPILE_SECONDS, reason


def cpu_has(*instructions: str) -> bool:
    """True if this CPU has one of these sets of instructions, as PyTorch names them. False if PyTorch cannot tell."""
    if not hasattr(torch.cpu, "get_capabilities"):  # added in PyTorch 2.13
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in instructions)


def auto_dtype(capability: tuple[int, int]) -> tuple[torch.dtype, str]:
    """The number format for a CUDA GPU with that compute capability, and the reason.

    `torch.cuda.is_bf16_supported()` is True on a T4 (7.5), which only emulates bf16, at a fraction of its fp16 speed.
    """
    version = ".".join(map(str, capability))
    if capability >= (8, 0):
        return torch.bfloat16, f"compute capability {version}"
    return torch.float16, f"compute capability {version}, bf16 needs 8.0"


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of the GPU with that name; None if it is unknown, and for float32."""
    if dtype == torch.float32:
        return None
    names = (name for name in PEAK_FLOPS if re.search(rf"\b{name}\b(?! Ti| SUPER| D| Laptop| NVL|.*MIG)", device_name))
    return next((PEAK_FLOPS[name] for name in names), None)


def flops_per_token(config: GPTConfig) -> int:
    """FLOPs of a token's forward and backward pass (Chowdhery et al. 2022, appendix B).

    6 per weight of the blocks and the head, plus 12 * n_layer * n_embd * block_size for attention. Embedding lookups
    do not count.
    """
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size
