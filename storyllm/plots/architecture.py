"""The model architecture with its sizes and parameter counts, drawn from a GPTConfig."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import GPTConfig
from .style import BLUE, GREEN, GREY, INK, MUTED, ORANGE, PINK, finish, house_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Edge and fill color of each kind of component.
COLORS = {
    "embeddings": (BLUE, "#DCECF8"),
    "attention": (ORANGE, "#FCE6D6"),
    "MLP": (GREEN, "#D8F1E7"),
    "LayerNorm": (PINK, "#F7E1EE"),
    "": (GREY, "#F3F5F7"),
}
WIDTH, HEIGHT = 900, 780  # of the figure, in the units of all positions below; y points down


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """The number of parameters of each component, named as in the state dict.

    "ln" is any one LayerNorm, and the components of a block are counted once. lm_head is absent: it is tied to wte.
    """
    width, bias = config.n_embd, int(config.bias)
    return {
        "wte": config.vocab_size * width,
        "wpe": config.block_size * width,
        "ln": (1 + bias) * width,
        "attn.c_attn": (width + bias) * 3 * width,
        "attn.c_proj": (width + bias) * width,
        "mlp.c_fc": (width + bias) * 4 * width,
        "mlp.c_proj": (4 * width + bias) * width,
    }


def plot_architecture(config: GPTConfig, out: str | Path | None = None) -> Figure:
    """A diagram of the model: from text to the next token on the left, one transformer block on the right.

    The figure is saved to `out` if given, in the format of its suffix. Raises StoryLLMError if `out` cannot be written.
    """
    from matplotlib.figure import Figure

    counts = count_parameters(config)
    attention, mlp = (sum(n for name, n in counts.items() if name.startswith(part)) for part in ("attn", "mlp"))
    block = 2 * counts["ln"] + attention + mlp
    totals = {
        "embeddings": counts["wte"] + counts["wpe"],
        "attention": config.n_layer * attention,
        "MLP": config.n_layer * mlp,
        "LayerNorm": (2 * config.n_layer + 1) * counts["ln"],
    }
    sizes = (
        "B sequences per batch",
        f"T ≤ {config.block_size:,} (context length)",
        f"C = {config.n_embd:,} (hidden size)",
        f"V = {config.vocab_size:,} (vocabulary size)",
    )
    with house_style():
        figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        axes.axis("off")
        _text(axes, 450, 28, f"StoryLLM: a GPT with {sum(totals.values()):,} parameters", size=15, weight="bold")
        _text(axes, 450, 57, "      ".join(sizes), color=MUTED)
        _draw_model(axes, config, counts, block)
        _draw_block(axes, config, counts, block)
        _draw_totals(axes, totals)
        return finish(figure, out)


class _Row(NamedTuple):
    """A box, or a circle with a plus sign, in a column of components."""

    y: float
    height: float
    title: str
    detail: str = ""
    kind: str = ""
    fill: str = ""
    arrow: str | None = ""  # label of the arrow to the next row; None: no arrow


def _draw_model(axes: Axes, config: GPTConfig, counts: dict[str, int], block: int) -> None:
    """The left half: from text to the next token."""
    x = 205
    for offset in (10, 5):  # suggests a stack of blocks
        _box(axes, x + offset, 435 + offset, 298, 56, fill="white")
    blocks = f"{config.n_layer} × {block:,} = {config.n_layer * block:,}"
    rows = (
        _Row(102, 32, "“Once upon a time”"),
        _Row(164, 32, "tokenizer", arrow=None),
        _Row(308, 20, "+", arrow="(B, T, C)"),
        _Row(358, 28, f"dropout {config.dropout:g}"),
        _Row(435, 56, f"{config.n_layer} × transformer block", blocks, fill="white", arrow="(B, T, C)"),
        _Row(522, 42, "final LayerNorm", f"{counts['ln']:,}", "LayerNorm"),
        _Row(592, 42, "linear C → V  (lm_head)", "no additional parameters", "embeddings", arrow="(B, T, V)  logits"),
        _Row(664, 32, "softmax at the last position", arrow="(B, V)  probabilities"),
        _Row(732, 32, "sample the next token: “ there”", arrow=None),
    )
    for row in rows:
        if row.title == "+":
            _plus(axes, x, row.y)
        else:
            _box(axes, x, row.y, 298, row.height, row.kind, row.fill)
            _text(axes, x, row.y - 9 * bool(row.detail), row.title, weight="bold")
            _text(axes, x, row.y + 9, row.detail, size=8.5, color=MUTED)
    for row, below in pairwise(rows):
        if row.arrow is not None:
            top = below.y - below.height / 2
            _arrow(axes, (x, row.y + row.height / 2), (x, top))
            _text(axes, x + 10, top - 16, row.arrow, size=8.5, color=MUTED, ha="left")
    _draw_embeddings(axes, config, counts)
    _arrow(axes, (56, 732), (14, 732), (14, 102), (56, 102))
    _text(axes, 24, 668, "repeat", size=8.5, color=MUTED, rotation=90)
    _arrow(axes, (56, 592), (40, 592), (40, 254), (56, 254), arrowstyle="-", color=BLUE, linestyle="--")
    _text(axes, 30, 423, "tied weights", size=8.5, color=BLUE, rotation=90)


def _draw_embeddings(axes: Axes, config: GPTConfig, counts: dict[str, int]) -> None:
    """The token and position embeddings, between the tokenizer and the sum of the two."""
    _arrow(axes, (205, 180), (205, 198), (128, 198), (128, 223))
    _text(axes, 138, 210, "(B, T)  token ids", size=8.5, color=MUTED, ha="left")
    for x, title, length, name, end in (
        (128, "token embedding", config.vocab_size, "wte", 195),
        (282, "position embedding", config.block_size, "wpe", 215),
    ):
        _box(axes, x, 254, 144, 62, "embeddings")
        _text(axes, x, 237, title, size=8.6, weight="bold")
        _text(axes, x, 254, f"{length:,} × {config.n_embd:,}", size=8.5, color=MUTED)
        _text(axes, x, 271, f"{counts[name]:,}", size=8.5, color=MUTED)
        _arrow(axes, (x, 285), (x, 308), (end, 308))


def _draw_block(axes: Axes, config: GPTConfig, counts: dict[str, int], block: int) -> None:
    """The right half: one transformer block."""
    x, width, hidden = 670, f"{config.n_embd:,}", f"{4 * config.n_embd:,}"
    axes.fill([364, 404, 404, 364], [418, 94, 654, 470], color="#EEF1F4", zorder=0)  # connects the two halves
    _box(axes, 643, 374, 478, 576, fill="#FCFCFD", zorder=0)
    _text(axes, 422, 108, "transformer block", size=10.5, weight="bold", ha="left")
    _text(axes, 860, 108, f"{block:,} parameters", size=10.5, weight="bold", ha="right")
    _box(axes, x, 284, 396, 188, "attention", zorder=1)
    _text(axes, 457, 284, "causal self-attention", size=9, color=ORANGE, rotation=90)
    _box(axes, x, 543, 396, 138, "MLP", zorder=1)
    _text(axes, 457, 543, "MLP", size=9, color=GREEN, rotation=90)
    layer_norm = {"kind": "LayerNorm", "detail": f"{counts['ln']:,}"}
    attention, mlp = {"kind": "attention", "fill": "white"}, {"kind": "MLP", "fill": "white"}
    rows = (
        _Row(163, 30, "LayerNorm", **layer_norm),
        _Row(217, 34, f"linear {width} → 3 × {width}: q, k, v", f"{counts['attn.c_attn']:,}", **attention),
        _Row(284, 68, "", **attention),
        _Row(351, 34, f"linear {width} → {width}", f"{counts['attn.c_proj']:,}", **attention),
        _Row(400, 20, "+"),
        _Row(449, 30, "LayerNorm", **layer_norm),
        _Row(500, 32, f"linear {width} → {hidden}", f"{counts['mlp.c_fc']:,}", **mlp),
        _Row(543, 26, "GELU" if config.activation == "gelu" else "GELU (tanh approximation)", **mlp),
        _Row(586, 32, f"linear {hidden} → {width}", f"{counts['mlp.c_proj']:,}", **mlp),
        _Row(632, 20, "+"),
    )
    residuals = iter((132, 418))  # where the two residual connections branch off
    for row in rows:
        if row.title == "+":
            start = next(residuals)
            _arrow(axes, (x, start), (438, start), (438, row.y), (x - 10, row.y))
            _plus(axes, x, row.y)
            _text(axes, x + 20, row.y, f"residual, dropout {config.dropout:g}", size=8.5, color=MUTED, ha="left")
        else:
            _box(axes, x, row.y, 370, row.height, row.kind, row.fill)
            _text(axes, 500, row.y, row.title, weight="bold", ha="left")
            _text(axes, 842, row.y, row.detail, size=8.5, color=MUTED, ha="right")
    _arrow(axes, (x, 118), (x, 148))
    _text(axes, x + 10, 133, "(B, T, C)", size=8.5, color=MUTED, ha="left")
    for row, below in pairwise(rows):
        _arrow(axes, (x, row.y + row.height / 2), (x, below.y - below.height / 2))
    _arrow(axes, (x, 642), (x, 676))
    _draw_heads(axes, config)


def _draw_heads(axes: Axes, config: GPTConfig) -> None:
    """Inside the attention box: the causal mask, and what a head computes."""
    size = config.n_embd // config.n_head
    heads = f"{config.n_head} heads" if config.n_head > 1 else "1 head"
    _text(axes, 570, 264, f"{heads}: softmax(q·k / √{size}) v", weight="bold", ha="left")
    _text(axes, 570, 284, f"head size {size}, dropout {config.dropout:g}", size=8.5, color=MUTED, ha="left")
    _text(axes, 570, 303, "causal mask hides later tokens", size=8.5, color=MUTED, ha="left")
    for row in range(5):
        for column in range(5):
            color = ORANGE if column <= row else COLORS["attention"][1]
            axes.plot(509 + 10.5 * column, 263 + 10.5 * row, "s", color=color, markersize=6, zorder=5)


def _draw_totals(axes: Axes, totals: dict[str, int]) -> None:
    """A bar with the fraction of the parameters in each kind of component, which is also the legend of the colors."""
    total, left = sum(totals.values()), 404.0
    for column, (kind, count) in enumerate(totals.items()):
        x, color, fraction = 404 + 124 * column, COLORS[kind][0], count / total
        axes.barh(699, 478 * fraction, 14, left=left, color=color)
        left += 478 * fraction
        axes.plot(x + 5, 727, "s", color=color, markersize=7)
        _text(axes, x + 17, 727, kind, size=9, weight="bold", ha="left")
        _text(axes, x + 17, 744, f"{count:,}", size=8.5, color=MUTED, ha="left")
        percent = f"{fraction:.1%}" if fraction >= 0.001 else "< 0.1%"
        _text(axes, x + 17, 760, percent, size=8.5, color=MUTED, ha="left")


def _text(axes: Axes, x: float, y: float, text: str, size: float = 9.5, ha: str = "center", **style: Any) -> None:
    if text:
        axes.text(x, y, text, fontsize=size, horizontalalignment=ha, verticalalignment="center", **style)


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, kind: str = "", fill: str = "", zorder: float = 3
) -> None:
    """A rounded box centered on (x, y), in the colors of its kind."""
    from matplotlib.patches import FancyBboxPatch

    edge, default_fill = COLORS[kind]
    box = FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=7")
    box.set(facecolor=fill or default_fill, edgecolor=edge, linewidth=1.1, zorder=zorder)
    axes.add_patch(box)


def _plus(axes: Axes, x: float, y: float) -> None:
    """A circle with a plus sign."""
    axes.plot(x, y, "o", markersize=15, markerfacecolor="white", markeredgecolor=INK, zorder=4)
    axes.plot(x, y, "+", markersize=9, markeredgecolor=INK, markeredgewidth=1.4, zorder=5)


def _arrow(axes: Axes, *points: tuple[float, float], arrowstyle: str = "-|>", color: str = INK, **style: Any) -> None:
    """An arrow along the points."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Polyline

    arrow = FancyArrowPatch(path=Polyline(points), arrowstyle=arrowstyle, mutation_scale=9, color=color, linewidth=1.1)
    arrow.set(zorder=2, **style)
    axes.add_patch(arrow)
