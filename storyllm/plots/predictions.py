"""Figures of what a model predicts: the next token, and how the loss falls within the context."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config import StoryLLMError, printable
from ..evaluation.likelihood import open_tokens_of, story_losses
from ..model.decoding import eval_mode
from ..model.sampling import next_token_probs
from ..storyteller import Storyteller
from .style import BLUE, finish, house_style, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_next_tokens(
    prompt: str,
    panels: Mapping[str, tuple[Storyteller, Mapping[str, Any]]],
    top: int = 10,
    out: str | Path | None = None,
) -> Figure:
    """The most likely next tokens after `prompt`, as bars, in a panel for each {title: (storyteller, sampling)}.

    `sampling` may hold the temperature, top_k and top_p of `next_token_probs`. A panel shows its own `top` tokens,
    without those of probability 0. All panels have the same scale. The figure is saved to `out` if given, in the format
    of its suffix. Raises StoryLLMError if `panels` is empty.
    """
    if not panels:
        raise StoryLLMError("no panels were given, expected at least one {title: (storyteller, sampling)}")
    with house_style():
        figure = new_figure(2.6 * len(panels), 0.27 * top + 0.8)
        columns = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
        for axes, (title, (storyteller, sampling)) in zip(columns, panels.items(), strict=True):
            probs = next_token_probs(_next_logits(storyteller, prompt), **sampling)
            values, ids = probs.topk(min(top, int((probs > 0).sum())))
            tokens = [repr(storyteller.tokenizer.decode([token]))[1:-1] for token in ids.tolist()]
            style_axes(axes)
            bars = axes.barh(range(len(tokens)), values.tolist(), color=BLUE, height=0.75)
            axes.bar_label(bars, [f"{value:.1%}" for value in values.tolist()], padding=3, fontsize=8)
            axes.set_yticks(range(len(tokens)), tokens, family="DejaVu Sans Mono", parse_math=False)
            axes.set_ylim(top - 0.4, -0.6)
            axes.margins(x=0.25)  # room for the percentages
            axes.xaxis.set_visible(False)
            axes.grid(visible=False)
            axes.set_title(printable(title), loc="left", fontsize=10, parse_math=False)
        return finish(figure, out)


@torch.no_grad()
def _next_logits(storyteller: Storyteller, prompt: str) -> torch.Tensor:
    """(vocab_size,) logits of the token after the prompt, or of a story's first token."""
    ids = storyteller.tokenizer.encode_ordinary(prompt) or [storyteller.tokenizer.eot_token]
    model = storyteller.model
    with eval_mode(model):
        return model.next_logits(torch.tensor([ids[-model.config.block_size :]], device=model.device))[0].float().cpu()


def plot_loss_by_position(
    storyteller: Storyteller, data: str | Path, windows: int = 256, out: str | Path | None = None
) -> Figure:
    """The mean loss at each position of the context, over the first `windows` windows of a `.bin` file.

    The dashed line is the mean of all positions. The figure is saved to `out` if given, in the format of its suffix.
    Raises StoryLLMError if the file was prepared with another tokenizer or has no complete window.
    """
    ids, T = open_tokens_of(storyteller, data).ids, storyteller.model.config.block_size
    complete = min(windows, (len(ids) - 1) // T)
    if complete < 1:
        raise StoryLLMError(f"{data} has no complete window of {T} tokens, expected at least one; use a larger file")
    mean = story_losses(storyteller, ids[: complete * T + 1], progress=lambda count: None).by_position
    with house_style():
        figure = new_figure(9, 3.2)
        axes = figure.subplots()
        style_axes(axes)
        axes.plot(np.arange(1, T + 1), mean, color=BLUE, linewidth=1.5)
        axes.axhline(float(mean.mean()), color=BLUE, linewidth=1, linestyle="--")
        axes.set_xlim(1, T)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("position in the context (tokens)")
        axes.set_ylabel("loss (nats per token)")
        return finish(figure, out)
