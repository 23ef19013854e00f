"""The command line: arguments and printing, nothing else."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import threading
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tiktoken
import tyro
from tyro.conf import OmitArgPrefixes, Positional, Suppress, UseAppendAction, arg

from . import __version__
from .config import DataConfig, GPTConfig, Recipe, StoryLLMError, TrainConfig, printable
from .data.prepare import prepare
from .data.shards import merge_shards, prepare_shard
from .data.token_file import VOCABULARY, load_tokenizer, verify
from .device import is_out_of_memory
from .evaluation.likelihood import evaluate
from .evaluation.ratings import rating_report, write_rating_sheets
from .evaluation.report import PAGE, judge
from .export.gguf_file import export_gguf
from .export.hugging_face import check_hub_name, export_hugging_face, push_to_hub
from .export.web_page import export_page
from .files import os_error
from .importing import load_model
from .plots.loss_curves import plot_losses, plot_runs
from .recipes import RECIPES, get_recipe
from .storyteller import DEFAULT_MAX_NEW_TOKENS, load, wrap
from .training.distributed import is_first_process, process_prefix, tell_torchrun
from .training.interrupt import Terminated, raise_interrupt
from .training.loop import train
from .training.run_folder import BEST, LOG

RecipeName = Annotated[
    str, arg(metavar="NAME", help=f"one of {', '.join(RECIPES)}; it sets the defaults of the other options")
]


@dataclass(frozen=True)
class ModelOptions(GPTConfig):
    """The shape of the model. Its vocabulary size is that of the data."""

    vocab_size: Suppress[int] = GPTConfig.vocab_size


@dataclass
class Prepare:
    """Tokenize stories into train.bin and validation.bin."""

    data: OmitArgPrefixes[DataConfig]
    recipe: RecipeName = "faithful"
    out: Path = Path("data")  # output folder
    tokenizer_from: Path | None = None  # use the tokenizer of this data folder or model (file, folder or OWNER/NAME)
    shards: int = 1  # divide the work among this many processes or machines; afterwards, --merge
    shard: int | None = None  # the part of the work to do here, from 1 to --shards
    merge: bool = False  # merge the shards in the output folder instead of preparing it
    overwrite: bool = False  # replace existing data that was prepared with other settings
    verify: bool = False  # check the data in the output folder instead of preparing it

    def run(self) -> int:
        if self.shard is None and self.shards != 1:
            raise StoryLLMError(
                f"shards is {self.shards}, but shard is missing; pass --shard 1 to --shard {self.shards}, one for each "
                "process"
            )
        if self.verify:
            info = verify(self.out)
            print("all checksums and counts match")
        elif self.merge:
            info = merge_shards(self.out, self.overwrite)
        elif self.shard is not None:
            return self.run_shard(self.shard)
        else:
            info = prepare(self.data, self.out, overwrite=self.overwrite, tokenizer=self.tokenizer())
        for split in (info.train, info.validation):
            print(
                printable(
                    f"{self.out / split.split}.bin: {split.stories:,} stories, {split.tokens:,} tokens "
                    f"({split.tokenizer}), {split.bytes:,} bytes of text"
                )
            )
        return 0

    def run_shard(self, shard: int) -> int:
        infos = prepare_shard(self.data, self.out, shard, self.shards, self.overwrite, self.tokenizer())
        for split, info in infos.items():
            print(
                f"{split}: {info.tokens:,} tokens of {info.source_stories:,} stories in shard {shard} of {self.shards}"
            )
        return 0

    def tokenizer(self) -> tiktoken.Encoding | None:
        """The tokenizer of `tokenizer_from`."""
        if self.tokenizer_from is None:
            return None
        if (self.tokenizer_from / VOCABULARY).is_file():
            return load_tokenizer(self.tokenizer_from)
        return load_model(self.tokenizer_from).tokenizer


DATA_NAMES = {"val": "validation data", "original": "original data"}


@dataclass
class Train:
    """Train a model on prepared data. An interrupted run resumes from its checkpoint folder."""

    model: ModelOptions
    train: TrainConfig
    recipe: RecipeName = "faithful"
    data_dir: Path = Path("data")  # folder written by `storyllm prepare`
    checkpoint_dir: Path = Path("checkpoints")  # folder for best_model_params.pt, last.pt and log.jsonl
    init_from: Path | None = None  # fine-tune this model: a model file, a run's or Hugging Face folder, or OWNER/NAME
    original_data_dir: Path | None = None  # folder with that model's data; shows what fine-tuning makes it forget

    def run(self) -> int:
        recipe = Recipe(GPTConfig(**asdict(self.model)), get_recipe(self.recipe).data, self.train)
        log = train(recipe, self.data_dir, self.checkpoint_dir, self.init_from, self.original_data_dir)
        if log.interrupted:
            if is_first_process():
                print("run the same command again to resume")
            return 128 + log.interrupted
        path = self.checkpoint_dir / BEST
        if log.evaluations and path.exists():
            best = min(log.evaluations, key=lambda entry: entry["val_loss"])
            print(
                f"best validation loss {best['val_loss']:.4f} ({best['val_bits_per_byte']:.4f} bits per byte) "
                f"at iteration {best['iteration']:,}, saved to {printable(str(path))}"
            )
            for data in ("val", "original") if log.run.get("init_from") else ():
                before, after = (entry.get(f"{data}_bits_per_byte") for entry in (log.evaluations[0], best))
                if before and after:
                    print(f"{DATA_NAMES[data]}: {before:.4f} bits per byte before fine-tuning, {after:.4f} after")
        return 0


@dataclass
class Generate:
    """Generate a story that begins with the prompt, and print it token by token."""

    prompt: Annotated[
        Positional[str], arg(metavar="[PROMPT]", help="beginning of the story; without it, the model chooses one")
    ] = ""
    checkpoint: Path = Path("checkpoints") / BEST  # a model file, a run's or Hugging Face folder, or OWNER/NAME (Hub)
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS  # maximum length in tokens, not counting the prompt
    temperature: float = 1.0  # 0 is greedy decoding; higher is more random
    top_k: int | None = None  # sample only from the k most likely tokens
    top_p: float | None = None  # sample only from the smallest set of most likely tokens with at least this probability
    seed: int | None = None  # random seed; the same seed gives the same story
    num_stories: int = 1  # number of stories, generated as one batch
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"  # "auto": int8 for large models on a CPU
    device: str = "auto"  # "auto", "cuda", "mps", "cpu", or any torch.device string

    def run(self) -> int:
        if self.num_stories < 1:
            raise StoryLLMError(f"num_stories is {self.num_stories}, must be at least 1")
        storyteller = load(self.checkpoint, self.device, self.weights)
        sampling: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed,
        }
        with warnings.catch_warnings(record=True) as caught:  # shown after the story, not within it
            if self.num_stories == 1:
                pieces = storyteller.stream(self.prompt, **sampling)
            else:
                stories = storyteller.generate([self.prompt] * self.num_stories, **sampling)
                pieces = iter(["\n\n---\n\n".join(stories)])
            for piece in wrap(pieces, shutil.get_terminal_size().columns) if sys.stdout.isatty() else pieces:
                print(printable(piece), end="", flush=True)
            print()
        for warning in caught:
            warnings.warn(warning.message, stacklevel=1)
        return 0


@dataclass
class Evaluate:
    """Print a model's loss, perplexity and bits per byte over a complete .bin file."""

    checkpoint: Path = Path("checkpoints") / BEST  # a model file, a run's or Hugging Face folder, or OWNER/NAME (Hub)
    data: Path = Path("data/validation.bin")  # .bin prepared with the model's tokenizer, or its folder
    device: str = "auto"  # "auto", "cuda", "mps", "cpu", or any torch.device string

    def run(self) -> int:
        storyteller = load(self.checkpoint, self.device)
        report = evaluate(storyteller, _file_in(self.data, "validation.bin"))
        print(f"loss           {report.loss:.4f} nats per token ({report.tokens:,} tokens)")
        print(f"perplexity     {report.perplexity:.2f}")
        print(f"bits per byte  {report.bits_per_byte:.4f} ({report.bytes:,} bytes of text)")
        return 0


@dataclass
class Judge:
    """Compare the stories of models in a report. With --sheet and --ratings, people rate the stories of a report."""

    checkpoint: UseAppendAction[tuple[Path, ...]] = ()  # model file or its folder; repeat the option to compare models
    data: Path = Path("data")  # folder with the models' training data
    out: Path = Path("report")  # folder for report.html, report.json and stories.jsonl, and for rating sheets
    beginnings: int = 50  # number of held-out stories whose beginnings each model completes
    temperature: float = 1.0  # 0 is greedy decoding; higher is more random
    top_k: int | None = None  # sample only from the k most likely tokens
    top_p: float | None = None  # sample only from the smallest set of most likely tokens with at least this probability
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS  # maximum length of a completion in tokens
    seed: int = 0  # random seed of the beginnings, the completions and the order on rating sheets
    device: str = "auto"  # "auto", "cuda", "mps", "cpu", or any torch.device string
    overwrite: bool = False  # replace an existing report
    sheet: bool = False  # write a page for each rater, with stories of the report in random order
    raters: int = 3  # number of pages
    rated: int = 10  # number of beginnings on a page, each with a story from every model and the real one
    ratings: tuple[Path, ...] = ()  # files that raters saved: print means, intervals and agreement

    def run(self) -> int:
        if self.sheet:
            print(*write_rating_sheets(self.out, self.rated, self.raters, self.seed), sep="\n")
        elif self.ratings:
            print(printable(str(rating_report(self.ratings, self.out))))
        else:
            options = "data out beginnings temperature top_k top_p max_new_tokens seed device overwrite".split()
            folders = self.checkpoint or (Path("checkpoints"),)
            paths = [path / BEST if (path / BEST).is_file() else path for path in folders]
            print(printable(str(judge(_named(paths), **{name: getattr(self, name) for name in options}))))
            print(printable(str(self.out / PAGE)))
        return 0


@dataclass
class Plot:
    """Plot the loss curves of a run, or compare the validation losses of several runs."""

    logs: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="[LOG ...]", help="logs written by `storyllm train`, or their folders"),
    ] = (Path("checkpoints") / LOG,)
    out: Path = Path("losses.png")  # image file: .png, .svg or .pdf

    def run(self) -> int:
        logs = [_file_in(log, LOG) for log in self.logs]
        if len(logs) == 1:
            plot_losses(logs[0], self.out)
        else:
            plot_runs({str(log.parent if log.name == LOG else log): log for log in logs}, self.out)
        print(printable(str(self.out)))
        return 0


@dataclass
class Export:
    """Export a model: a folder for transformers and the Hub, a file for llama.cpp, or a web page."""

    checkpoint: Path = Path("checkpoints") / BEST  # a model file, a run's or Hugging Face folder, or OWNER/NAME (Hub)
    to: Path = Path("export")  # output folder; for "gguf" a file that ends in .gguf, for "html" one in .html
    format: Literal["hf", "gguf", "html"] = "hf"  # for transformers and the Hub, for llama.cpp, or a page for a browser
    weights: Literal["int8", "float16"] = "int8"  # of a page: "float16" is more precise and twice as large
    push: str | None = None  # upload the folder to this repository on the Hub, OWNER/NAME
    overwrite: bool = False  # replace an earlier export

    def run(self) -> int:
        if self.push is not None:
            if self.format != "hf":
                raise StoryLLMError(f"push uploads a folder in Hugging Face's format; omit --format {self.format}")
            check_hub_name(self.push)
        if self.format == "gguf":
            export_gguf(self.checkpoint, self.to, self.overwrite)
        elif self.format == "html":
            export_page(self.checkpoint, self.to, self.weights, self.overwrite)
        else:
            export_hugging_face(self.checkpoint, self.to, self.overwrite, name=self.push or "")
        print(printable(str(self.to)))
        if self.push is not None:
            push_to_hub(self.to, self.push)
            print(f"https://huggingface.co/{self.push}")
        return 0


DESCRIPTION = """Train a small GPT from scratch to write children's stories.

Example:
  storyllm prepare --recipe demo
  storyllm train --recipe demo
  storyllm generate "Once upon a time"

Each command has its own --help. Exit codes: 0 success, 2 invalid input, 130 interrupted, 143 terminated."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. Invalid input prints one line to standard error and returns 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for characters that the terminal cannot encode
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous_handler = signal.signal(signal.SIGTERM, raise_interrupt) if in_main_thread else None
    previous_showwarning = warnings.showwarning
    warnings.showwarning = lambda message, *_: _print_error(str(message))
    try:
        code = _run(arguments)
        sys.stdout.flush()  # raises here, not at exit, if the output cannot be written
        return code
    except StoryLLMError as error:
        _print_error(str(error))
        tell_torchrun(str(error))
        return 2
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        _print_error("terminated" if terminated else "interrupted")
        return 143 if terminated else 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has exited
        return 0 if arguments[:1] == ["generate"] else 130
    except OSError as error:
        _print_error(str(os_error("open or write", error.filename or "the output", error)))
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _print_error("out of memory; generate fewer stories or shorter ones, or close other programs")
        return 2
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # discard the rest, or Python reports the error again at exit
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        warnings.showwarning = previous_showwarning
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous_handler or signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code."""
    if arguments == ["--version"]:
        print(f"storyllm {__version__}")
        return 0
    recipe = _selected_recipe(arguments)
    commands: dict[str, Any] = {
        "prepare": Prepare(data=recipe.data),
        "train": Train(model=ModelOptions(**asdict(recipe.model)), train=recipe.train),
        "generate": Generate(),
        "evaluate": Evaluate(),
        "judge": Judge(),
        "plot": Plot(),
        "export": Export(),
    }
    descriptions = {name: str(command.__doc__) for name, command in commands.items()}
    command = tyro.extras.subcommand_type_from_defaults(commands, descriptions)
    return tyro.cli(command, prog="storyllm", description=DESCRIPTION, args=arguments).run()


@dataclass
class RecipeOption:
    """The one option that is needed before the others are defined."""

    recipe: str = "faithful"


def _selected_recipe(arguments: list[str]) -> Recipe:
    """The recipe selected by --recipe, whose values are the defaults of the other options."""
    arguments = [argument for argument in arguments if not argument.startswith("--tyro-")]  # for shell completion
    known, _ = tyro.cli(RecipeOption, args=arguments, return_unknown_args=True, add_help=False)
    return get_recipe(known.recipe)


def _file_in(path: Path, name: str) -> Path:
    """The file of that name if `path` is a folder, otherwise `path` itself."""
    return path / name if path.is_dir() else path


def _named(checkpoints: list[Path]) -> dict[str, Path]:
    """The checkpoints under the names of their folders, or of their complete paths if some folders have the same."""
    paths = [path.resolve() for path in checkpoints]
    names = [path.parent.name if path.name == BEST else f"{path.parent.name}/{path.name}" for path in paths]
    named = dict(zip(names if len(set(names)) == len(names) else map(str, paths), checkpoints, strict=True))
    if len(named) < len(checkpoints):
        raise StoryLLMError("a checkpoint is given twice; name each one once")
    return named


def _print_error(message: str) -> None:
    error = StoryLLMError(message)  # which escapes control characters
    print(f"storyllm: {process_prefix()}{error}", file=sys.stderr)


def _open_closed_streams() -> None:
    """Opens /dev/null for standard streams that are closed, so that no file gets their descriptor."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
