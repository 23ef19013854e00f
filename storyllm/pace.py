"""How fast a run goes: the arithmetic of a token, the share of a GPU's rate that is used, the time that is left."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from .config import GPTConfig

# Highest rates of the matrix units for 16-bit numbers with sums in 32 bits, dense, in operations a second: NVIDIA's
# data sheets and white papers. A name is looked for as words in that of the device, the first that is found counts.
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


def flops_per_token(config: GPTConfig) -> int:
    """Floating-point operations of a token's forward and backward pass: 6 for each weight that multiplies, and those
    of attention, 12 * n_layer * n_embd * block_size (Chowdhery et al. 2022, appendix B).

    The matrices of the blocks and the head multiply; looking an embedding up does not.
    """
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """The highest rate of the GPU of that name, in operations a second; None if it is not known, or for float32."""
    if dtype == torch.float32:
        return None
    names = (name for name in PEAK_FLOPS if re.search(rf"\b{name}\b(?! Ti| SUPER| D| Laptop| NVL|.*MIG)", device_name))
    return next((PEAK_FLOPS[name] for name in names), None)


def model_flops_utilization(tokens_per_second: float, config: GPTConfig, peak: float) -> float:
    """MFU: tokens_per_second * flops_per_token / peak, the share of the GPU's highest rate that the model makes use of.

    Work done twice (gradient checkpointing) does not count.
    """
    return tokens_per_second * flops_per_token(config) / peak


@dataclass
class Pace:
    """What windows and evaluations have taken in this part of a run, in seconds, and so what is left."""

    evaluation_windows: int  # read by an evaluation
    windows: int = 0  # that were trained on
    window_seconds: float = 0.0
    evaluation_seconds: list[float] = field(default_factory=list)

    def add_update(self, windows: int, seconds: float) -> None:
        self.windows += windows
        self.window_seconds += seconds

    def add_evaluation(self, seconds: float) -> None:
        self.evaluation_seconds.append(seconds)

    def seconds_left(self, windows: int, evaluations: int) -> float:
        """How long so many windows and evaluations will take, at the pace so far.

        Before the first evaluation a forward pass counts for a third of forward and backward.
        """
        a_window = self.window_seconds / max(1, self.windows)
        an_evaluation = self.evaluation_windows * a_window / 3
        if self.evaluation_seconds:
            an_evaluation = sum(self.evaluation_seconds) / len(self.evaluation_seconds)
        return windows * a_window + evaluations * an_evaluation


def duration(seconds: float) -> str:
    """A time as a person says it: "48 seconds", "3.5 minutes", "2.1 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5_400 else f"{seconds / 3_600:.1f} hours"
