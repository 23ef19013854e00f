"""Training on all GPUs of a machine from a notebook, which is a single process: torchrun in a subprocess."""

from __future__ import annotations

import codecs
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ..config import Recipe
from .log import Log, read_log
from .loop import train
from .run_folder import LOG

INTERRUPTED = 128 + signal.SIGINT  # the exit code of `storyllm train`


def train_parallel(
    recipe: Recipe,
    data_dir: str | Path = "data",
    checkpoint_dir: str | Path = "checkpoints",
    init_from: str | Path | None = None,
    original_data_dir: str | Path | None = None,
    processes: int | None = None,
) -> Log:
    """`train` on all GPUs of this machine, with one process each; `train` itself if there are fewer than two.

    Runs torchrun, whose output is printed as it appears. An interrupt is passed on: the run saves, and the log's
    `interrupted` is 2 as that of `train`. If torchrun fails, prints why, and resumes the run in this process, on one
    GPU. `processes` replaces the number of GPUs; with a recipe whose device is "cpu", the processes share the CPU.
    Raises what `train` raises.
    """
    if processes is None:
        uses_gpus = isinstance(recipe, Recipe) and recipe.train.device in ("auto", "cuda")
        processes = torch.cuda.device_count() if uses_gpus and torch.cuda.is_available() else 1
    if processes > 1:
        folders = ["--data-dir", data_dir, "--checkpoint-dir", checkpoint_dir]
        for option, folder in (("--init-from", init_from), ("--original-data-dir", original_data_dir)):
            folders += [] if folder is None else [option, folder]
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        code, problem = _run(
            [sys.executable, "-m", *torchrun, "-m", "storyllm", "train", *command_line_options(recipe), *folders]
        )
        if code == 0:
            return read_log(Path(checkpoint_dir) / LOG)
        if code == INTERRUPTED:
            log = read_log(Path(checkpoint_dir) / LOG)
            log.interrupted = signal.SIGINT
            return log
        print(f"training with {processes} processes failed ({problem}); continuing with one")
    return train(recipe, data_dir, checkpoint_dir, init_from, original_data_dir)


def command_line_options(recipe: Recipe) -> list[str]:
    """The options of `storyllm train` for the model and training of a recipe."""
    values = recipe.to_dict()
    del values["model"]["vocab_size"]  # that of the data
    options = []
    for part in ("model", "train"):
        for name, value in values[part].items():
            option = f"{part}.{name}".replace("_", "-")
            if isinstance(value, bool) and option != "train.compile":  # which also has the value "auto"
                options.append(f"--{option}" if value else f"--{part}.no-{option.removeprefix(f'{part}.')}")
            else:
                options.append(f"--{option}={value}")
    return options


def _run(command: list[object]) -> tuple[int, str]:
    """Runs a command and prints its output as it appears. Returns its exit code and what went wrong, in one line.

    An interrupt, passed on to the command, gives the code INTERRUPTED. Of the errors, only those of StoryLLM are shown.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [str(argument) for argument in command],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,  # so that an interrupt reaches it once, from here
        )
        assert process.stdout is not None
        decoder, interrupted = codecs.getincrementaldecoder("utf-8")("replace"), False
        while True:
            try:
                data = os.read(process.stdout.fileno(), 1 << 16)
                print(decoder.decode(data), end="", flush=True)
                if not data:
                    code = process.wait()
                    break
            except KeyboardInterrupt:
                if interrupted:
                    process.kill()
                    raise
                interrupted = True
                process.send_signal(signal.SIGINT)
        errors.seek(0)
        lines = errors.read().decode("utf-8", "replace").splitlines()
    messages = [line for line in lines if line.startswith("storyllm: ")]
    print("".join(f"{message}\n" for message in messages), end="", file=sys.stderr)
    if interrupted and code != 0:
        return INTERRUPTED, ""
    return code, messages[-1].removeprefix("storyllm: ") if messages else (lines or [f"exit code {code}"])[-1]
