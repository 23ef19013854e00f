"""The command line: arguments and printing, nothing else."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg

from . import __version__
from .config import RECIPES, DataConfig, GPTConfig, Recipe, StoryLLMError, TrainConfig, get_recipe, printable
from .device import is_out_of_memory
from .evaluation import evaluate
from .files import cannot
from .generation import load
from .interrupt import Terminated, raise_interrupt
from .plots import plot_losses, plot_runs
from .tokens import prepare, verify
from .training import LOG, train

RECIPE_HELP = f"one of: {', '.join(RECIPES)}; its fields are the defaults of the other options"
RecipeName = Annotated[str, arg(help=RECIPE_HELP, metavar="NAME")]


# tyro draws a box around what a constructor raises. So it fills these, which check nothing; the configuration made of
# them afterwards does, and what it raises is one line like every other.


@dataclass(frozen=True)
class ModelOptions(GPTConfig):
    """The model's shape. The size of its vocabulary is the data's."""

    vocab_size: Suppress[int] = 50257

    def __post_init__(self) -> None: ...


@dataclass(frozen=True)
class DataOptions(DataConfig):
    """Where the stories come from and how they become tokens."""

    def __post_init__(self) -> None: ...


@dataclass(frozen=True)
class TrainOptions(TrainConfig):
    """How the model learns, counted in iterations: one batch of batch_size windows each."""

    def __post_init__(self) -> None: ...


@dataclass
class Prepare:
    """Make token files out of stories: train.bin and validation.bin, with a .json beside each."""

    data: OmitArgPrefixes[DataOptions]
    recipe: RecipeName = "faithful"
    out: Path = Path("data")  # folder to write into
    overwrite: bool = False  # replace other data in that folder
    verify: bool = False  # make nothing, but read all the data in that folder and check it

    def run(self) -> int:
        if self.verify:
            info = verify(self.out)
            print("every checksum and count is right")
        else:
            info = prepare(DataConfig(**asdict(self.data)), self.out, overwrite=self.overwrite)
        for split in (info.train, info.validation):
            print(
                printable(
                    f"{self.out / split.split}.bin: {split.stories:,} stories, {split.tokens:,} tokens "
                    f"of {split.tokenizer}, {split.bytes:,} bytes of text"
                )
            )
        return 0


@dataclass
class Train:
    """Train a model on prepared data. A run that was cut off continues by itself."""

    model: ModelOptions
    train: TrainOptions
    recipe: RecipeName = "faithful"
    data_dir: Path = Path("data")  # folder that `prepare` wrote
    checkpoint_dir: Path = Path("checkpoints")  # folder for best_model_params.pt, last.pt and log.jsonl

    def run(self) -> int:
        recipe = Recipe(
            model=GPTConfig(**asdict(self.model)),
            data=get_recipe(self.recipe).data,
            train=TrainConfig(**asdict(self.train)),
        )
        log = train(recipe, self.data_dir, self.checkpoint_dir)
        if log.interrupted:
            print(f"run the same command again to continue from {printable(str(self.checkpoint_dir))}")
            return 128 + log.interrupted
        path = self.checkpoint_dir / "best_model_params.pt"
        if log.evaluations and path.exists():
            best = min(log.evaluations, key=lambda entry: entry["val_loss"])
            print(
                f"best validation loss {best['val_loss']:.4f} ({best['val_bits_per_byte']:.4f} bits per byte) "
                f"at iteration {best['iteration']:,}: {printable(str(path))}"
            )
        return 0


@dataclass
class Tell:
    """Tell a story that begins with the prompt, as it is made. Without a prompt, the model begins by itself."""

    prompt: Positional[str] = ""  # how the story begins
    checkpoint: Path = Path("checkpoints/best_model_params.pt")  # a model that `train` saved
    max_new_tokens: int = 200  # longest story, in tokens
    temperature: float = 1.0  # 0: always the likeliest token; 1: as the model has it; more: wilder
    top_k: int | None = None  # choose among the k likeliest tokens only
    top_p: float | None = None  # choose among the likeliest tokens that hold this probability together
    seed: int | None = None  # a number that makes the story repeatable; None: another each time
    num_stories: int = 1  # how many stories, told at once
    device: str = "auto"  # auto, cuda, mps or cpu

    def run(self) -> int:
        if self.num_stories < 1:
            raise StoryLLMError(f"num_stories is {self.num_stories}, expected at least 1")
        teller = load(self.checkpoint, self.device)
        sampling: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed,
        }
        if self.num_stories == 1:
            for piece in teller.stream(self.prompt, **sampling):
                print(printable(piece), end="", flush=True)
            print()
        else:
            print(printable("\n\n---\n\n".join(teller.tell([self.prompt] * self.num_stories, **sampling))))
        return 0


@dataclass
class Evaluate:
    """Measure a model on a whole token file: loss, perplexity, bits per byte."""

    checkpoint: Path = Path("checkpoints/best_model_params.pt")  # a model that `train` saved
    data: Path = Path("data/validation.bin")  # a file that `prepare` wrote, with the model's tokenizer
    device: str = "auto"  # auto, cuda, mps or cpu

    def run(self) -> int:
        report = evaluate(load(self.checkpoint, self.device), self.data)
        print(f"loss           {report.loss:.4f} nats per token, over {report.tokens:,} tokens")
        print(f"perplexity     {report.perplexity:.2f}")
        print(f"bits per byte  {report.bits_per_byte:.4f}, over {report.bytes:,} bytes of text")
        return 0


@dataclass
class Plot:
    """Draw a run's loss curves and learning rate; several runs: their validation losses, against tokens and time."""

    log: tuple[Path, ...] = (Path("checkpoints/log.jsonl"),)  # the log that `train` wrote; or several
    out: Path = Path("losses.png")  # picture to write: .png, .svg or .pdf

    def run(self) -> int:
        if len(self.log) == 1:
            plot_losses(self.log[0], self.out)
        else:
            plot_runs({str(log.parent if log.name == LOG else log): log for log in self.log}, self.out)
        print(printable(str(self.out)))
        return 0


DESCRIPTION = """Train a small GPT from scratch to tell children's stories, and let it tell them.

storyllm prepare --recipe demo  |  storyllm train --recipe demo  |  storyllm tell "Once upon a time"

Each command has its own --help. Exit codes: 0 all went well, 2 bad input, 130 interrupted, 143 terminated."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code. Bad input is one line on the error stream and code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _open_what_is_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character; a story goes on without it
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler_before = signal.signal(signal.SIGTERM, raise_interrupt) if in_main_thread else None
    showwarning_before = warnings.showwarning
    warnings.showwarning = lambda message, *_: print(f"storyllm: {StoryLLMError(str(message))}", file=sys.stderr)
    try:
        code = _run(arguments)
        sys.stdout.flush()  # whether it can be written is known here, or said too late
        return code
    except StoryLLMError as error:
        print(f"storyllm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        print(f"storyllm: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
        return 143 if terminated else 130
    except BrokenPipeError:  # whoever read the output has gone: a story is told enough, other work is not done
        return 0 if arguments[:1] == ["tell"] else 130
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"storyllm: {cannot('opened or written', error.filename or 'the output', error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("storyllm: out of memory: ask for less at once, or close other programs", file=sys.stderr)
        return 2
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # what is left of it goes nowhere, or Python would complain of it at its end
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        warnings.showwarning = showwarning_before
        if in_main_thread:
            signal.signal(signal.SIGTERM, handler_before or signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    """Runs one command; returns its exit code, or raises what went wrong."""
    if arguments == ["--version"]:
        print(f"storyllm {__version__}")
        return 0
    recipe = get_recipe(_recipe_name(arguments))
    commands: dict[str, Any] = {
        "prepare": Prepare(data=DataOptions(**asdict(recipe.data))),
        "train": Train(model=ModelOptions(**asdict(recipe.model)), train=TrainOptions(**asdict(recipe.train))),
        "tell": Tell(),
        "evaluate": Evaluate(),
        "plot": Plot(),
    }
    help_texts = {name: str(command.__doc__) for name, command in commands.items()}
    command = tyro.extras.subcommand_type_from_defaults(commands, help_texts)
    return tyro.cli(command, prog="storyllm", description=DESCRIPTION, args=arguments).run()


def _open_what_is_closed() -> None:
    """A program started without input or output gets empty ones: no file of ours may take their place."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _recipe_name(arguments: list[str]) -> str:
    """The last value of --recipe, needed before the other options because it gives them their defaults."""
    name = "faithful"
    for argument, following in pairwise([*arguments, ""]):
        if argument == "--recipe":
            name = following
        elif argument.startswith("--recipe="):
            name = argument.removeprefix("--recipe=")
    return name
