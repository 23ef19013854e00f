"""Figures of a model's weights and attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import StoryLLMError, printable
from ..model.decoding import eval_mode
from ..model.gpt import GPT
from ..storyteller import Storyteller
from .style import MUTED, finish, house_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def attention_weights(model: GPT, idx: Tensor) -> list[Tensor]:
    """The (B, n_head, T, T) attention weights of each layer for (B, T) ids: row t is the distribution over 0 to t.

    The fused kernels do not return them, so they are computed again from the queries and keys.
    """
    weights: list[Tensor] = []

    def record(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        B, T, _ = output.shape  # (B, T, 3 C)
        q, k, _ = (part.view(B, T, model.config.n_head, -1).transpose(1, 2) for part in output.chunk(3, dim=-1))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        weights.append(scores.masked_fill(future, -math.inf).softmax(-1))

    blocks = model.transformer["h"].children()
    hooks = [block.attn.c_attn.register_forward_hook(record) for block in blocks]  # type: ignore[union-attr]
    try:
        with eval_mode(model):
            model.hidden(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return weights


def plot_attention(storyteller: Storyteller, text: str, out: str | Path | None = None) -> Figure:
    """The attention of every layer and head for `text`: a row is a token, and shows which tokens it attends to.

    Layers and heads are numbered from 0, as in the state dict. Best for a sentence. The text may not exceed the
    context. The figure is saved to `out` if given, in the format of its suffix. Raises StoryLLMError if the text is
    empty or too long.
    """
    tokenizer, model = storyteller.tokenizer, storyteller.model
    ids = tokenizer.encode_ordinary(text)
    if not 0 < len(ids) <= model.config.block_size:
        raise StoryLLMError(
            f"the text has {len(ids)} tokens, must have 1 to {model.config.block_size} (block_size); shorten it"
        )
    weights = attention_weights(model, torch.tensor([ids], device=model.device))
    names = [repr(tokenizer.decode([token]))[1:-1] for token in ids]
    layers, heads = model.config.n_layer, model.config.n_head
    with house_style():
        size = max(1.6, 0.11 * len(ids))
        figure = new_figure(size * heads + 1.2, size * layers + 1.2)
        panels = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
        for layer in range(layers):
            for head in range(heads):
                axes = panels[layer, head]
                axes.imshow(weights[layer][0, head].cpu().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="equal")
                axes.set_title(f"layer {layer}, head {head}", fontsize=8, color=MUTED)
                axes.spines[:].set_visible(False)
                axes.tick_params(length=0, labelsize=7, labelfontfamily="DejaVu Sans Mono")
                axes.tick_params(axis="x", labelrotation=90)
        for axis in (panels[0, 0].xaxis, panels[0, 0].yaxis):  # shared by all panels
            axis.set_ticks(range(len(ids)), names, parse_math=False)
        return finish(figure, out)


def plot_position_similarity(model: GPT, out: str | Path | None = None) -> Figure:
    """The cosine similarity of each pair of position embeddings.

    The figure is saved to `out` if given, in the format of its suffix.
    """
    positions = F.normalize(model.state_dict()["transformer.wpe.weight"].float().cpu(), dim=-1)
    with house_style():
        figure = new_figure(5, 4.2)
        axes = figure.subplots()
        image = axes.imshow((positions @ positions.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        figure.colorbar(image, ax=axes, label="cosine similarity")
        axes.set_xlabel("position")
        axes.set_ylabel("position")
        return finish(figure, out)


def nearest_tokens(storytellers: Mapping[str, Storyteller], tokens: Sequence[str], count: int = 6) -> str:
    """A table of the tokens whose embeddings have the highest cosine similarity to those of `tokens`, as plain text.

    It has a column for each {title: storyteller}. Each of `tokens` is the text of a token with its space: " dog" and
    "dog" are different tokens. Raises StoryLLMError, naming it, for a text that is not a single token.
    """
    lines = [f"{'token':<12}" + "".join(f"{printable(title):<50}" for title in storytellers)]
    for token in tokens:
        cells = [_nearest(storyteller, token, count) for storyteller in storytellers.values()]
        lines.append(f"{token!r:<12}" + "".join(f"{cell:<50}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def _nearest(storyteller: Storyteller, token: str, count: int) -> str:
    tokenizer = storyteller.tokenizer
    ids = tokenizer.encode_ordinary(token)
    if len(ids) != 1:
        raise StoryLLMError(f"{token!r} is {len(ids)} tokens, must be one; choose another word, with its space")
    embeddings = F.normalize(storyteller.model.state_dict()["transformer.wte.weight"].float(), dim=-1)
    nearest = (embeddings @ embeddings[ids[0]]).topk(min(count + 1, len(embeddings))).indices.tolist()
    return " ".join(repr(tokenizer.decode([other]))[1:-1].strip() for other in nearest if other != ids[0])
