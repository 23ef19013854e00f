"""Samples: continuations of the same prompt that show how a model learns."""

from __future__ import annotations

import textwrap
import warnings
from itertools import zip_longest

from ..config import StoryLLMError, printable
from ..model.gpt import GPT
from ..storyteller import Storyteller
from .log import Log
from .progress import Progress
from .run_folder import RunFolder, TrainState

MAX_NEW_TOKENS = 100
TEMPERATURE = 0.8
LINE_WIDTH = 100  # characters


def sample_if_due(state: TrainState, next_iteration: int, model: GPT, folder: RunFolder, progress: Progress) -> None:
    """Generates, prints and logs a sample if one is due before the update that ends at `next_iteration`.

    The sample has its own generator, seeded with the run's seed, and changes nothing but `state.last_sample`. As for an
    evaluation, one that falls within an update sees the weights before it.
    """
    config = folder.recipe.train
    if not config.sample_interval or state.last_sample >= state.iteration:  # of these weights
        return
    due = state.due(config.sample_interval, state.last_sample, next_iteration, config)
    for iteration in due[:1]:  # the weights are the same for all of them
        folder.check_finite(model, iteration)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*did not end within max_new_tokens")
            text = Storyteller(model, folder.data.tokenizer).generate(
                config.sample_prompt, MAX_NEW_TOKENS, TEMPERATURE, seed=config.seed
            )
        state.last_sample = iteration
        folder.log.write({"event": "sample", "iteration": iteration, "prompt": config.sample_prompt, "text": text})
        progress.print(textwrap.fill(f"iteration {iteration:>6,}: {printable(text)}", LINE_WIDTH))


def samples_table(log: Log, columns: int = 4, width: int = 30) -> str:
    """The samples of a run side by side, as plain text: `columns` of `width` characters.

    If there are more samples, the first, the last and some in between are shown: more of the early ones, since a model
    changes most at first. Raises StoryLLMError if the log has no samples, or if a number is less than 1.
    """
    for name, value in (("columns", columns), ("width", width)):
        if value < 1:
            raise StoryLLMError(f"{name} is {value}, must be at least 1")
    if not log.samples:
        raise StoryLLMError("the log has no samples; set train.sample_interval")
    # The positions form a geometric sequence.
    count = len(log.samples)
    positions = sorted({round(count ** (column / max(1, columns - 1))) - 1 for column in range(columns)})
    cells = []
    for sample in (log.samples[position] for position in positions):
        paragraphs = printable(sample["text"]).split("\n")
        lines = [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, width) or [""]]
        cells.append([f"iteration {sample['iteration']:,}", "-" * width, *lines])
    rows = zip_longest(*cells, fillvalue="")
    return "\n".join("   ".join(f"{cell:<{width}}" for cell in row).rstrip() for row in rows)
