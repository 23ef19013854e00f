"""What a run is made of: the model, the data and the training, as frozen dataclasses, and the table of recipes.

Every field is checked when the object is made, so an impossible recipe never gets as far as a tensor. The comment
behind a field is also its help text on the command line.
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


def printable(text: str) -> str:
    """`text` with its control characters, but for line ends and tabs, written out: a terminal shows and obeys none."""
    commands = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"  # the last turn the order of text around
    return re.sub(commands, lambda command: ascii(command[0])[1:-1], text)


class StoryLLMError(ValueError):
    """Any bad input: the message says in one line what was got, what was expected and what to do."""

    def __init__(self, message: str) -> None:
        # It may quote what a stranger's file holds.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def _check_types(config: Any) -> None:
    """Raises StoryLLMError unless every field holds a value of its declared type (an int may stand for a float)."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        options = [hint] if get_origin(hint) is Literal or not get_args(hint) else list(get_args(hint))
        if type(value) is int and value.bit_length() > 1_000:  # Python would not write it out
            raise StoryLLMError(f"{name} is a whole number of {value.bit_length()} bits, expected one under 2**63")
        if float in options and type(value) is int and abs(value) < 2**53:
            object.__setattr__(config, name, float(value))  # the one way to change a frozen field
        elif not any(_fits(value, option) for option in options):
            expected = " or ".join(map(_written, options))
            got = " ".join(reprlib.repr(value).split())  # what a file holds may be long, or a tensor of several lines
            raise StoryLLMError(f"{name} is {got}, expected {expected}")


def _fits(value: Any, option: Any) -> bool:
    """Is `value` of the type `option`, or one of the words of a Literal?"""
    if get_origin(option) is Literal:
        return type(value) is str and value in get_args(option)
    return type(value) is option


def _written(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(map(repr, get_args(option)))
    return "None" if option is type(None) else option.__name__


def _check_range(config: Any, low: float, *names: str, above: bool = False, high: float = math.inf) -> None:
    """Raises StoryLLMError unless each named field (None and "auto" aside) is at least `low` (over it, if `above`)."""
    for name in names:
        value = getattr(config, name)
        if value is None or value == "auto":
            continue
        if not (value > low or (value == low and not above)) or value > high or value == math.inf:
            bound = f"{'more than' if above else 'at least'} {low}"
            bound += f" and at most {high}" if high < math.inf else " and finite" if value == math.inf else ""
            raise StoryLLMError(f"{name} is {value}, expected {bound}")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2 style transformer. Raises StoryLLMError for a shape that cannot be built."""

    vocab_size: int = 50257  # tokens in the vocabulary; when training, the data's own
    block_size: int = 128  # context length in tokens
    n_layer: int = 6  # transformer blocks
    n_head: int = 6  # attention heads in a block
    n_embd: int = 384  # width of the residual stream, a multiple of n_head
    dropout: float = 0.1  # probability, on embeddings, attention weights and residuals
    bias: bool = True  # biases in the linear layers and the layer norms, as in GPT-2
    flash_attention: bool = True  # PyTorch's fused attention; False: the plain masked softmax
    gradient_checkpointing: bool = False  # recompute each block in the backward pass: less memory, more time

    def __post_init__(self) -> None:
        _check_types(self)
        _check_range(self, 1, "vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        if self.n_embd % self.n_head:
            raise StoryLLMError(
                f"n_embd is {self.n_embd}, expected a multiple of n_head ({self.n_head}): "
                f"take {self.n_embd // self.n_head * self.n_head + self.n_head}"
            )
        if not 0 <= self.dropout < 1:
            raise StoryLLMError(f"dropout is {self.dropout}, expected a probability from 0 to under 1")


@dataclass(frozen=True)
class DataConfig:
    """Where the stories come from and how they become tokens."""

    source: str = "roneneldan/TinyStories"  # a dataset on the hub, a local folder or file, or "builtin"
    tokenizer: str = "gpt2"  # "gpt2", or "bpe:N": a byte-level vocabulary of N tokens trained on the stories
    text_column: str = "text"  # column (hub, .parquet) or key (.jsonl) that holds the story
    validation_fraction: float = 0.01  # share of stories held out where the source has no validation split
    clean: bool = False  # mend mojibake, strip spaces at the ends, drop empty stories; False: text as it is
    builtin_stories: int = 20_000  # training stories that "builtin" writes (a twentieth more for validation)
    builtin_seed: int = 0  # seed of the built-in stories

    def __post_init__(self) -> None:
        _check_types(self)
        _check_range(self, 1, "builtin_stories")
        _check_range(self, 0, "builtin_seed")
        if not self.source:
            raise StoryLLMError("source is empty, expected a hub dataset, a folder, a file or 'builtin'")
        if not 0 < self.validation_fraction < 1:
            raise StoryLLMError(f"validation_fraction is {self.validation_fraction}, expected a share between 0 and 1")
        if self.tokenizer != "gpt2":
            size = self.tokenizer.removeprefix("bpe:")
            if size == self.tokenizer or not re.fullmatch("[0-9]{3,5}", size) or not 257 <= int(size) <= 65536:
                raise StoryLLMError(
                    f"tokenizer is {self.tokenizer!r}, expected 'gpt2' or 'bpe:N' with N from 257 to 65536"
                )


@dataclass(frozen=True)
class TrainConfig:
    """How the model learns. Everything is counted in iterations: one batch of `batch_size` windows each."""

    max_iters: int = 20_000  # iterations of the whole schedule
    stop_at: int | None = None  # stop at this iteration; the schedule stays that of max_iters
    batch_size: int = 32  # windows in an iteration
    gradient_accumulation_steps: int = 32  # iterations in an optimizer update
    micro_batch_size: int | Literal["auto"] = "auto"  # windows that go through the device at once
    windows: Literal["random", "shuffled"] = "random"  # anywhere in the data, or all of it once before any of it again
    optimizer: Literal["adamw", "muon"] = "adamw"  # "muon": Muon for the matrices in the blocks, AdamW for the rest
    schedule: Literal["cosine", "flat"] = "cosine"  # after the warm-up: half a cosine, or flat and then a line down
    learning_rate: float = 1e-4  # rate at the end of the warm-up
    min_lr: float = 5e-4  # rate at the end; in faithful it lies above learning_rate, and the rate rises
    warmup_iters: int = 1_000  # iterations of linear warm-up
    warmup_start: float = 1 / 3  # where the warm-up starts, as a share of learning_rate
    decay_share: float = 0.0  # share of max_iters, at the end, in which "flat" comes down to min_lr
    muon_lr_scale: float = 1.0  # Muon's rate, as a multiple of AdamW's
    weight_decay: float = 0.1  # on matrices and embeddings
    beta1: float = 0.9  # AdamW's decay of the gradient's mean
    beta2: float = 0.95  # AdamW's decay of the gradient's mean square
    grad_clip: float = 0.5  # largest norm of the gradient; 0: no limit
    eval_interval: int = 500  # iterations between evaluations
    eval_windows: int = 1_024  # windows of each split that an evaluation reads, the same every time
    checkpoint_minutes: float = 2.0  # minutes between two savings of last.pt
    keep_checkpoints: int = 2  # earlier states that stay beside last.pt, for when it is found damaged
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # number format of the matrix products
    device: str = "auto"  # "auto", "cuda", "mps", "cpu", or what torch.device takes
    compile: bool | Literal["auto"] = "auto"  # torch.compile; "auto": for a long run on a CUDA GPU
    seed: int = 0  # seed of weights, windows, dropout

    @property
    def windows_in_update(self) -> int:
        """Windows that a whole update learns from."""
        return self.batch_size * self.gradient_accumulation_steps

    def __post_init__(self) -> None:
        _check_types(self)
        _check_range(
            self,
            1,
            *("max_iters", "stop_at", "batch_size", "gradient_accumulation_steps", "micro_batch_size"),
            *("eval_interval", "eval_windows"),
        )
        _check_range(self, 0, "learning_rate", "muon_lr_scale", above=True)
        _check_range(self, 0, "min_lr", "weight_decay", "grad_clip", "warmup_iters", "checkpoint_minutes")
        _check_range(self, 0, "keep_checkpoints", high=1_000)
        _check_range(self, 0, "seed", high=2**63 - 1)  # as far as PyTorch's generators take one
        _check_range(self, 0, "warmup_start", "decay_share", high=1)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise StoryLLMError(f"{name} is {getattr(self, name)}, expected a number from 0 to under 1")


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on, besides the stories themselves."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _check_types(self)

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """This recipe with fields changed by dotted name, as in `{"train.max_iters": 2_000, "model.n_layer": 4}`.

        Raises StoryLLMError for a name that does not exist (the message lists the near ones) or a bad value.
        """
        parts = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        known = [f"{part}.{f.name}" for part, config in parts.items() for f in dataclasses.fields(config)]
        grouped: dict[str, dict[str, Any]] = {part: {} for part in parts}
        for name, value in changes.items():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
                near = near or [other for other in known if str(name).split(".")[-1] in other] or list(known)
                raise StoryLLMError(f"the recipe has no field {name!r}: did you mean {', '.join(near)}?")
            part, _, field_name = name.partition(".")
            grouped[part][field_name] = value
        return Recipe(**{part: dataclasses.replace(config, **grouped[part]) for part, config in parts.items()})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The recipe as plain dictionaries, for a log or a checkpoint; `Recipe.from_dict` takes it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """The recipe that `to_dict` wrote. Raises StoryLLMError for a name or value that does not belong."""
        if not isinstance(values, Mapping) or not all(isinstance(fields, Mapping) for fields in values.values()):
            raise StoryLLMError("this is not a recipe: expected what Recipe.to_dict wrote")
        return cls().override({f"{part}.{name}": v for part, fields in values.items() for name, v in fields.items()})


_FAITHFUL = Recipe()

# How to learn most from few tokens: Muon, a high rate that falls to nothing, small batches with an update each, no
# dropout, every window once before any again. docs/experiments.md says how each was chosen.
_FAST = TrainConfig(
    max_iters=1_220,
    batch_size=16,
    gradient_accumulation_steps=1,
    windows="shuffled",
    optimizer="muon",
    schedule="flat",
    learning_rate=5e-3,
    min_lr=0.0,
    warmup_iters=60,
    decay_share=0.6,
    beta2=0.99,
    grad_clip=1.0,
    eval_interval=122,
    eval_windows=256,
)

RECIPES: dict[str, Recipe] = {
    # The specification to the letter: 6 layers, 384 wide, 20,000 iterations, a rate that rises from 1e-4 to 5e-4.
    "faithful": _FAITHFUL,
    # The same model, tokenizer and context, with 2.5 million tokens: the published final loss.
    "fast": Recipe(model=dataclasses.replace(_FAITHFUL.model, dropout=0.0), train=_FAST),
    # A vocabulary that these stories need, and a model of the size that suits five minutes of a T4, by counting.
    "small-vocab": Recipe(
        model=GPTConfig(vocab_size=4096, block_size=256, n_layer=6, n_head=4, n_embd=256, dropout=0.0),
        data=DataConfig(tokenizer="bpe:4096"),
        train=dataclasses.replace(_FAST, max_iters=15_000, eval_interval=500),
    ),
    # From nothing to a readable story in under three minutes on two CPU cores, with no network.
    "demo": Recipe(
        model=GPTConfig(vocab_size=1024, block_size=256, n_layer=2, n_head=4, n_embd=128, dropout=0.0),
        data=DataConfig(source="builtin", tokenizer="bpe:1024"),
        train=TrainConfig(
            max_iters=3_600,
            batch_size=4,
            gradient_accumulation_steps=1,
            learning_rate=3e-3,
            min_lr=1e-4,
            warmup_iters=50,
            beta2=0.99,
            grad_clip=1.0,
            eval_interval=100,
            eval_windows=32,
        ),
    ),
    # The specification's future: longer contexts with the same tokens an iteration, and GPT-2's own size.
    "context-512": _FAITHFUL.override({"model.block_size": 512, "train.batch_size": 8}),
    "context-1024": _FAITHFUL.override({"model.block_size": 1024, "train.batch_size": 4}),
    "gpt2-small": _FAITHFUL.override(
        {"model.block_size": 1024, "model.n_layer": 12, "model.n_head": 12, "model.n_embd": 768, "train.batch_size": 4}
    ),
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises StoryLLMError, with the names that exist, for any other."""
    if name not in RECIPES:
        raise StoryLLMError(f"there is no recipe {name!r}, expected one of: {', '.join(RECIPES)}")
    return RECIPES[name]
