"""The configuration of a run: model, data and training as frozen dataclasses that validate their fields.

The comment after a field is also its help text on the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

MAX_SIZE = 2**31 - 1  # more windows, tokens or features than fit any memory; larger sizes overflow in PyTorch
MAX_WINDOWS = 2**20  # windows of an update; all of them are in memory at once


def printable(text: str) -> str:
    """`text` with control characters escaped, except newlines and tabs, so that a terminal does not execute them.

    Surrogates, as in file names that are not UTF-8, are escaped too: they cannot be printed.
    """
    # The last two ranges are line separators and characters that change the direction of text.
    control = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(control, lambda match: ascii(match[0])[1:-1], text)


class StoryLLMError(Exception):
    """Bad input. The message is one line: what was given, what was expected, and what to do."""

    def __init__(self, message: str) -> None:
        # The message may quote untrusted files.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback."""
        return [f"StoryLLMError: {self}"]


def missing_extra(purpose: str, package: str, extra: str) -> StoryLLMError:
    """The error for a package of an extra that is not installed."""
    return StoryLLMError(f'{purpose} needs the package {package}; run: pip install "storyllm[{extra}]"')


def plain_number(value: Any) -> Any:
    """A NumPy number as a Python number, anything else unchanged."""
    return value.item() if isinstance(value, np.number) else value


def shown(value: Any) -> str:
    """`value` for a message: in one line and shortened, since it may be untrusted, long or a tensor."""
    if type(value) is int and value.bit_length() > 1_000:  # Python refuses to format it
        return f"an integer of {value.bit_length()} bits"
    return " ".join(reprlib.repr(value).split())


def _check_types(config: Any) -> None:
    """Raises StoryLLMError unless each field has its declared type.

    Converts NumPy numbers to Python numbers, and an int to float where needed.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = plain_number(getattr(config, name))
        options = [hint] if get_origin(hint) is Literal or not get_args(hint) else list(get_args(hint))
        if type(value) is int and value.bit_length() > 1_000:
            raise StoryLLMError(f"{name} is {shown(value)}, must be less than 2**63")
        if float in options and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if not any(_matches(value, option) for option in options):
            raise StoryLLMError(f"{name} is {shown(value)}, must be {' or '.join(map(_type_name, options))}")
        object.__setattr__(config, name, value)  # the fields are frozen


def _matches(value: Any, option: Any) -> bool:
    """True if `value` has the type `option` or is one of its literals."""
    if get_origin(option) is Literal:
        return type(value) is str and value in get_args(option)
    return type(value) is option


def _type_name(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(map(repr, get_args(option)))
    return "None" if option is type(None) else option.__name__


def _check_range(config: Any, low: float, *names: str, exclusive: bool = False, high: float = math.inf) -> None:
    """Raises StoryLLMError unless each named field is in [low, high], or in (low, high] if `exclusive`.

    Fields that are None or "auto" are skipped.
    """
    for name in names:
        value = getattr(config, name)
        if value is None or value == "auto":
            continue
        if not (value > low or (value == low and not exclusive)) or value > high or value == math.inf:
            bound = f"{'greater than' if exclusive else 'at least'} {low}"
            bound += f" and at most {high}" if high < math.inf else " and finite" if value == math.inf else ""
            raise StoryLLMError(f"{name} is {value}, must be {bound}")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2 style transformer.

    Raises:
        StoryLLMError: a value is invalid.
    """

    vocab_size: int = 50257  # vocabulary size; training uses that of the data
    block_size: int = 128  # context length in tokens
    n_layer: int = 6  # number of transformer blocks
    n_head: int = 6  # attention heads per block
    n_embd: int = 384  # width (hidden size), a multiple of n_head
    dropout: float = 0.1  # dropout probability for embeddings, attention weights and residuals
    bias: bool = True  # use biases in linear layers and LayerNorm, as GPT-2 does
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # of the MLP: exact GELU, or OpenAI's tanh approximation of it
    flash_attention: bool = True  # use PyTorch's fused attention kernels
    embedding_std: float = 0.02  # standard deviation of the initial token embeddings
    position_std: float = 0.02  # standard deviation of the initial position embeddings
    final_norm_gain: float = 1.0  # initial gain of the last LayerNorm
    copy_strength: float = 0.0  # attention starts by copying what it attends to, times this; 0: random, as in GPT-2
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time

    def __post_init__(self) -> None:
        _check_types(self)
        _check_range(self, 1, "vocab_size", "block_size", "n_head", "n_embd", high=MAX_SIZE)
        _check_range(self, 1, "n_layer", high=10_000)  # more would fill the memory with small layers one by one
        if self.n_embd % self.n_head:
            multiple = (self.n_embd // self.n_head + 1) * self.n_head
            raise StoryLLMError(
                f"n_embd is {self.n_embd}, must be a multiple of n_head ({self.n_head}); use {multiple}"
            )
        _check_range(self, 0, "embedding_std", "position_std", "final_norm_gain", "copy_strength")
        if not 0 <= self.dropout < 1:
            raise StoryLLMError(f"dropout is {self.dropout}, must be at least 0 and less than 1")


@dataclass(frozen=True)
class DataConfig:
    """The source of the stories and how they are tokenized.

    Raises:
        StoryLLMError: a value is invalid.
    """

    source: str = "roneneldan/TinyStories"  # a dataset on the Hugging Face Hub, a local file or folder, or "synthetic"
    tokenizer: str = "gpt2"  # "gpt2", or "bpe:N" to train a byte-level BPE vocabulary of N tokens on the stories
    text_column: str = "text"  # name of the text column (Hub, .parquet, .csv) or key (.jsonl, .json)
    validation_fraction: float = 0.01  # fraction to hold out without a validation split; small sources hold out more
    max_stories: int | None = None  # use only the first stories: of each split, or of a source without splits
    clean: bool = False  # fix mojibake (UTF-8 read as Windows-1252), strip surrounding whitespace, drop empty stories
    synthetic_stories: int = 20_000  # number of synthetic training stories (plus 5% for validation)
    synthetic_seed: int = 0  # seed of the synthetic stories
    synthetic_genre: Literal["space"] | None = None  # genre of the synthetic stories; by default, they are about home

    def __post_init__(self) -> None:
        _check_types(self)
        _check_range(self, 1, "synthetic_stories", "max_stories")
        _check_range(self, 0, "synthetic_seed")
        if not self.source:
            raise StoryLLMError("source is empty, must be a Hub dataset, a file, a folder or 'synthetic'")
        if not 0 < self.validation_fraction < 1:
            raise StoryLLMError(f"validation_fraction is {self.validation_fraction}, must be between 0 and 1")
        if self.tokenizer != "gpt2":
            size = self.tokenizer.removeprefix("bpe:")
            if size == self.tokenizer or not re.fullmatch("[0-9]{3,5}", size) or not 257 <= int(size) <= 65536:
                raise StoryLLMError(
                    f"tokenizer is {reprlib.repr(self.tokenizer)}, must be 'gpt2' or 'bpe:N' with N from 257 to 65536"
                )


@dataclass(frozen=True)
class TrainConfig:
    """The training hyperparameters. An iteration is one batch of batch_size windows; intervals are in iterations.

    Raises:
        StoryLLMError: a value is invalid.
    """

    max_iters: int = 20_000  # total number of iterations
    stop_at: int | None = None  # stop early at this iteration; the schedule still ends at max_iters
    batch_size: int = 32  # windows per iteration
    gradient_accumulation_steps: int = 32  # iterations per optimizer update
    micro_batch_size: int | Literal["auto"] = "auto"  # windows per forward pass; affects memory and speed only
    windows: Literal["random", "shuffled"] = "random"  # sample windows with replacement, or without ("shuffled")
    optimizer: Literal["adamw", "muon"] = "adamw"  # "muon": Muon for the matrices in the blocks, AdamW for the rest
    schedule: Literal["cosine", "wsd"] = "cosine"  # learning rate schedule after warmup; "wsd": warmup-stable-decay
    learning_rate: float = 1e-4  # learning rate at the end of warmup
    min_lr: float = 5e-4  # final learning rate; in `faithful` it is deliberately higher than learning_rate
    warmup_iters: int = 1_000  # iterations of linear warmup
    warmup_start_factor: float = 1 / 3  # warmup starts at this fraction of learning_rate
    decay_fraction: float = 0.0  # fraction of max_iters spent decaying to min_lr ("wsd" only)
    muon_lr_scale: float = 1.0  # Muon's learning rate relative to AdamW's
    weight_decay: float = 0.1  # weight decay, applied to matrices and embeddings
    beta1: float = 0.9  # AdamW beta1: decay rate of the first-moment average
    beta2: float = 0.95  # AdamW beta2: decay rate of the second-moment average
    grad_clip: float = 0.5  # maximum gradient norm; 0 disables clipping
    eval_interval: int | Literal["auto"] = "auto"  # iterations between evaluations; "auto": 500, or less in a short run
    eval_windows: int = 1_024  # windows per split in an evaluation, the same ones every time
    sample_interval: int = 0  # iterations between samples: continuations of the same prompt; 0: no samples
    sample_prompt: str = "Once upon a time"  # the beginning of every sample
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # show the run in a tracker as well
    mirror_dir: str | None = None  # folder for copies of the run, in case this machine is lost: a mounted Drive
    mirror_minutes: float = 10.0  # minutes between copies to mirror_dir
    checkpoint_minutes: float = 2.0  # minutes between saves of last.pt
    keep_checkpoints: int = 2  # previous versions of last.pt to keep, in case it is corrupted
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of matrix multiplications
    device: str = "auto"  # "auto", "cuda", "mps", "cpu", or any torch.device string
    compile: bool | Literal["auto"] = "auto"  # use torch.compile; "auto": for long runs on a CUDA GPU
    seed: int = 0  # seed of the initial weights, the windows and dropout

    @property
    def windows_per_update(self) -> int:
        """Windows in a full optimizer update."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def resolved_eval_interval(self) -> int:
        """Iterations between evaluations: `eval_interval`; for "auto" 500, in a short run a twentieth of it."""
        if self.eval_interval == "auto":
            return max(1, min(500, self.max_iters // 20))
        return self.eval_interval

    @property
    def last_iteration(self) -> int:
        """The iteration at which training ends."""
        return min(self.stop_at or self.max_iters, self.max_iters)

    def __post_init__(self) -> None:
        _check_types(self)
        _check_range(self, 1, "max_iters", "stop_at", "gradient_accumulation_steps", "eval_interval")
        _check_range(self, 1, "batch_size", "micro_batch_size", "eval_windows", high=MAX_SIZE)
        if self.windows_per_update > MAX_WINDOWS:
            raise StoryLLMError(
                f"batch_size * gradient_accumulation_steps is {self.windows_per_update:,}, must be at most "
                f"{MAX_WINDOWS:,} windows per update; lower one of them"
            )
        _check_range(self, 0, "learning_rate", "muon_lr_scale", exclusive=True)
        _check_range(self, 0, "min_lr", "weight_decay", "grad_clip", "warmup_iters", "checkpoint_minutes")
        _check_range(self, 0, "sample_interval", "mirror_minutes")
        if self.mirror_dir == "":
            raise StoryLLMError("mirror_dir is '', must be a folder or None")
        _check_range(self, 0, "keep_checkpoints", high=1_000)
        _check_range(self, 0, "seed", high=2**63 - 1)  # the largest seed of PyTorch's generators
        _check_range(self, 0, "warmup_start_factor", "decay_fraction", high=1)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise StoryLLMError(f"{name} is {getattr(self, name)}, must be at least 0 and less than 1")


@dataclass(frozen=True)
class Recipe:
    """The complete configuration of a run."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _check_types(self)

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with fields replaced by dotted name: `{"train.max_iters": 2_000, "model.n_layer": 4}`.

        Raises StoryLLMError for an unknown name, with close matches, and for an invalid value.
        """
        parts = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        known = [f"{part}.{f.name}" for part, config in parts.items() for f in dataclasses.fields(config)]
        grouped: dict[str, dict[str, Any]] = {part: {} for part in parts}
        for name, value in changes.items():
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
                close = close or [other for other in known if str(name).split(".")[-1] in other] or list(known)
                raise StoryLLMError(f"unknown recipe field {name!r}; did you mean {', '.join(close)}?")
            part, _, field_name = name.partition(".")
            grouped[part][field_name] = value
        return Recipe(**{part: dataclasses.replace(config, **grouped[part]) for part, config in parts.items()})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The recipe as nested dictionaries of plain values. `Recipe.from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """The inverse of `to_dict`. Raises StoryLLMError for unknown names and invalid values."""
        if not isinstance(values, Mapping) or not all(isinstance(fields, Mapping) for fields in values.values()):
            raise StoryLLMError("not a recipe: expected a dictionary as returned by Recipe.to_dict")
        return cls().override({f"{part}.{name}": v for part, fields in values.items() for name, v in fields.items()})
