"""Figures: the loss curves of a run, drawn from its log, and the architecture, drawn from its config.

matplotlib is imported only when a figure is drawn. The figures are plain `Figure` objects made without pyplot, so
nothing global changes, and they show themselves where they end a notebook's cell.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import GPTConfig, Recipe, StoryLLMError, printable
from .files import atomic_write
from .log import Log, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; each kind of part has one, and a pale one inside.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#B4538A"
INK, SOFT, GREY = "#26323D", "#55626D", "#7A8791"
COLOURS = {
    "embeddings": (BLUE, "#DCECF8"),
    "attention": (ORANGE, "#FCE6D6"),
    "MLP": (GREEN, "#D8F1E7"),
    "LayerNorm": (PINK, "#F7E1EE"),
    "": (GREY, "#F3F5F7"),
}
COLOURS_AND_MARKERS = [(ORANGE, "-o"), (BLUE, "-s"), (GREEN, "-^"), (PINK, "-D"), (SOFT, "-v")]
STYLE = {
    **{"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK},
    **{"axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY},
    **{"xtick.labelcolor": INK, "ytick.labelcolor": INK},
}


def plot_losses(log: str | Path | Log, out: str | Path | None = None) -> Figure:
    """Loss curves from a `log.jsonl` (or a Log that was read already), with the learning rate below them.

    Losses are nats per token over iterations, and over tokens too where the log holds the recipe. The figure is saved
    to `out`, if given, in the format of its suffix. Raises StoryLLMError for a log without a loss, or an `out` that
    cannot be written.
    """
    name, log = ("the log", log) if isinstance(log, Log) else (log, read_log(log))
    updates = _series(log.updates, "train_loss")
    train, validation = _series(log.evaluations, "train_loss"), _series(log.evaluations, "val_loss")
    rates = _series(log.evaluations + log.updates, "learning_rate")
    last = max([*updates, *train, *validation], default=None)
    if last is None:
        raise StoryLLMError(f"{name} holds no update and no evaluation, expected one at least: train for longer")

    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.8), facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        heights = [4, 1] if rates else [1]
        panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        losses, bottom = panels[0], panels[-1]
        _line(losses, updates, color="#A9CBE3", linewidth=0.8, label="training, each update")
        _line(losses, train, color=BLUE, linewidth=2.6, label="training, evaluated")
        _line(losses, validation, color=ORANGE, linewidth=1.2, marker="o", label="validation, evaluated")
        _mark_best(losses, validation, _series(log.evaluations, "val_bits_per_byte"), last)
        losses.set_ylabel("loss (nats per token)")
        losses.legend(frameon=False, labelspacing=0.6)
        if rates:
            _line(bottom, rates, color=GREY, linewidth=1.5)
            bottom.set_ylabel("learning rate")
            bottom.set_ylim(0, 1.15 * max(rates.values()) or 1)
            bottom.yaxis.set_major_locator(MaxNLocator(3))
            bottom.ticklabel_format(axis="y", scilimits=(0, 0), useMathText=True)
        for panel in panels:
            _style(panel)
        bottom.set_xlim(-0.015 * max(last, 1), 1.025 * max(last, 1))
        bottom.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        bottom.xaxis.set_major_formatter(lambda iteration, _: f"{iteration:,.0f}")
        bottom.set_xlabel("iterations")
        _head(losses, log, last)
        return _finish(figure, out)


def plot_runs(logs: Mapping[str, str | Path | Log], out: str | Path | None = None) -> Figure:
    """Validation losses of several runs by name, over the tokens trained on and over minutes, from their logs.

    They are bits per byte, so that runs with different vocabularies compare. Saved to `out`, if given, in the format
    of its suffix. Raises StoryLLMError for a log without recipe, time, or an evaluation after the start, and for an
    `out` that cannot be written.
    """
    runs = {name: log if isinstance(log, Log) else read_log(log) for name, log in logs.items()}
    curves = {name: _against_tokens_and_minutes(name, log) for name, log in runs.items()}
    if not curves:
        raise StoryLLMError("no runs were given, expected one log at least")

    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogLocator, NullFormatter

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.6), facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        panels = figure.subplots(1, 2, sharey=True)
        for panel, key in zip(panels, ("millions of tokens", "minutes"), strict=True):
            for (name, curve), (colour, marker) in zip(curves.items(), cycle(COLOURS_AND_MARKERS)):
                label = printable(f"{name}: {curve['meaning']}")
                panel.plot(curve[key], curve["bits per byte"], marker, color=colour, markersize=3.5, label=label)
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_xlabel(key)
            _style(panel)
        panels[0].set_ylabel("validation loss (bits per byte)")
        legend = figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        panels[0].set_title("Validation loss of each run", loc="left", fontsize=14, fontweight="bold")
        return _finish(figure, out)


def _against_tokens_and_minutes(name: str, log: Log) -> dict[str, Any]:
    """The points of a run's curve, but for its start, which a logarithmic axis has no place for; and its best."""
    timed = (e for e in log.evaluations if isinstance(e.get("seconds"), (int, float)))
    points = [e for e in timed if e["iteration"] > 0 and e["seconds"] > 0]
    if not points or "recipe" not in log.run:
        raise StoryLLMError(f"the log of {name!r} has no evaluation after the start, or no recipe: train for longer")
    recipe = Recipe.from_dict(log.run["recipe"])
    tokens = [e["iteration"] * recipe.train.batch_size * recipe.model.block_size for e in points]
    best = min(points, key=lambda e: e["val_loss"])
    return {
        "millions of tokens": [count / 1e6 for count in tokens],
        "minutes": [e["seconds"] / 60 for e in points],
        "bits per byte": [e["val_bits_per_byte"] for e in points],
        "meaning": f"best {best['val_bits_per_byte']:.3f} bits per byte ({best['val_loss']:.3f} nats per token) "
        f"after {tokens[points.index(best)] / 1e6:,.3g} million tokens, {best['seconds'] / 60:,.1f} minutes",
    }


def _style(panel: Axes) -> None:
    """A pale grid, and no frame above and to the right."""
    panel.grid(color="#E8ECEF", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(length=3)


def _series(entries: list[dict[str, Any]], key: str) -> dict[int, float]:
    """{iteration: value}, in order, of the entries that hold a number for `key`; of two, what was written later."""
    found = {e["iteration"]: e[key] for e in entries if "iteration" in e and isinstance(e.get(key), (int, float))}
    return dict(sorted(found.items()))


def _line(axes: Axes, series: dict[int, float], marker: str = "", **style: Any) -> None:
    """Draws a series; a lone point always has a marker, for its line has no length, and a long line has some 50."""
    if series:
        marker = marker if len(series) > 1 else "o"
        every = max(1, len(series) // 50)
        axes.plot(list(series), list(series.values()), marker=marker, markersize=3.5, markevery=every, **style)


def _mark_best(axes: Axes, validation: dict[int, float], bits_per_byte: dict[int, float], last: int) -> None:
    """A ring around the lowest validation loss, with its value beside it and what it means in the legend."""
    finite = [iteration for iteration, loss in validation.items() if math.isfinite(loss)]
    if not finite:
        return
    best = min(finite, key=validation.__getitem__)
    loss = validation[best]
    perplexity = math.exp(min(loss, 700))
    meaning = f"perplexity {perplexity:,.2f}" if perplexity < 100 else f"perplexity {perplexity:,.0f}"
    if best in bits_per_byte:
        meaning += f", {bits_per_byte[best]:.3f} bits per byte"
    axes.plot([best], [loss], "o", markersize=9, markerfacecolor="none", color=INK)
    axes.lines[-1].set_label(f"best {loss:.3f} at iteration {best:,}\n{meaning}")
    side, shift = ("left", -4) if best <= last / 2 else ("right", 8)
    axes.annotate(f"{loss:.3f}", (best, loss), (shift, 9), textcoords="offset points", ha=side, fontweight="bold")


def _head(axes: Axes, log: Log, last: int) -> None:
    """The title, a line about the run, and the axis of tokens, as far as the log tells."""
    recipe = log.run.get("recipe") or {}
    settings = recipe.get("train", {})
    whole = settings.get("max_iters", last)
    about = [f"{last:,} iterations" if last >= whole else f"{last:,} of {whole:,} iterations"]
    if seconds := list(_series(log.updates + log.evaluations, "seconds").values()):
        about += [f"{seconds[-1] / 60:,.{0 if seconds[-1] > 600 else 1}f} minutes"]
    if device := log.run.get("device"):
        about += [re.sub(r" \(.*?\)", "", printable(str(device)))]  # what was chosen; the log also says why
    if tokens := settings.get("batch_size", 0) * recipe.get("model", {}).get("block_size", 0):
        top = axes.secondary_xaxis("top", functions=(lambda x: x * tokens, lambda x: x / tokens))
        top.xaxis.set_major_formatter(lambda count, _: f"{count / 1e6:,g}")
        top.spines["top"].set_visible(False)
        top.tick_params(length=3)
        top.set_xlabel("millions of tokens")
    line = axes.set_title(
        textwrap.fill("  ·  ".join(about), 125), loc="left", fontsize=9.5, color=SOFT, parse_math=False
    )
    style: dict[str, Any] = {"fontsize": 14, "fontweight": "bold"}
    axes.annotate("Training and validation loss", (0, 1), (0, 8), xycoords=line, textcoords="offset points", **style)


def _finish(figure: Figure, out: str | Path | None) -> Figure:
    """Saves the figure, if `out` is given, and lets it show itself in a notebook (else only pyplot's figures do)."""
    if out is not None:
        out = Path(out)
        suffix, formats = out.suffix[1:].lower(), figure.canvas.get_supported_filetypes()
        if suffix not in formats:
            raise StoryLLMError(f"out is {str(out)!r}, expected a name that ends in .{', .'.join(sorted(formats))}")
        with atomic_write(out) as file:
            figure.savefig(file, format=suffix, dpi=200)

    def as_notebooks_show_it() -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()

    figure._repr_png_ = as_notebooks_show_it  # type: ignore[attr-defined]
    return figure


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """Parameters of one part of each sort, named as in the state dict (`ln` is any LayerNorm; lm_head is wte)."""
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


def draw_flowchart(config: GPTConfig, out: str | Path | None = None) -> Figure:
    """The architecture with its sizes and parameters, drawn from the config: a story's path, and a block's inside.

    Saved to `out`, if given, in the format of its suffix. Raises StoryLLMError for an `out` that cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    count = count_parameters(config)
    attention, mlp = (sum(n for name, n in count.items() if name.startswith(part)) for part in ("attn", "mlp"))
    totals = {
        "embeddings": count["wte"] + count["wpe"],
        "attention": config.n_layer * attention,
        "MLP": config.n_layer * mlp,
        "LayerNorm": (2 * config.n_layer + 1) * count["ln"],
    }
    sizes = (
        "B windows at once",
        f"T ≤ {config.block_size:,} tokens of context",
        f"C = {config.n_embd:,} channels",
        f"V = {config.vocab_size:,} tokens in the vocabulary",
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 7.8), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 900), ylim=(780, 0))  # pixels of a README, y downwards
        axes.axis("off")
        _text(axes, 450, 28, f"StoryLLM: a GPT of {sum(totals.values()):,} parameters", size=15, weight="bold")
        _text(axes, 450, 57, "      ".join(sizes), color=SOFT)
        _draw_path(axes, config, count, 2 * count["ln"] + attention + mlp)
        _draw_block(axes, config, count, 2 * count["ln"] + attention + mlp)
        _draw_totals(axes, totals)
        return _finish(figure, out)


def _draw_path(axes: Axes, config: GPTConfig, count: dict[str, int], block: int) -> None:
    """The left half: from text to the next token."""
    for shift in (10, 5):  # the blocks behind the first
        _box(axes, 205 + shift, 435 + shift, 298, 56, fill="white")
    blocks = f"{config.n_layer} × {block:,} = {config.n_layer * block:,}"
    rows: tuple[tuple[float, float, str, str, str, str | None], ...] = (  # the last: what goes on to the next row
        (102, 32, "", "“Once upon a time”", "", ""),
        (164, 32, "", "tokenizer", "", None),
        (308, 20, "", "+", "", "(B, T, C)"),
        (358, 28, "", f"dropout {config.dropout:g}", "", ""),
        (435, 56, "", f"{config.n_layer} × transformer block", blocks, "(B, T, C)"),
        (522, 42, "LayerNorm", "final LayerNorm", f"{count['ln']:,}", ""),
        (592, 42, "embeddings", "linear C → V  (lm_head)", "no parameters of its own", "(B, T, V)  logits"),
        (664, 32, "", "softmax of the last position", "", "(B, V)  probabilities"),
        (732, 32, "", "draw the next token: “ there”", "", None),
    )
    for y, height, kind, title, detail, _ in rows:
        if title == "+":
            _plus(axes, 205, y)
        else:
            _box(axes, 205, y, 298, height, kind, fill="white" if detail == blocks else "")
            _text(axes, 205, y - 9 * bool(detail), title, weight="bold")
            _text(axes, 205, y + 9, detail, size=8.5, color=SOFT)
    for (y, height, *_, label), (below, height_below, *_) in pairwise(rows):
        if label is not None:
            _arrow(axes, (205, y + height / 2), (205, below - height_below / 2))
            _text(axes, 215, below - height_below / 2 - 16, label, size=8.5, color=SOFT, ha="left")
    _arrow(axes, (205, 180), (205, 198), (128, 198), (128, 223))
    _text(axes, 138, 210, "(B, T)  token ids", size=8.5, color=SOFT, ha="left")
    for x, title, rows_of, name in (
        (128, "token embedding", config.vocab_size, "wte"),
        (282, "position embedding", config.block_size, "wpe"),
    ):
        _box(axes, x, 254, 144, 62, "embeddings")
        _text(axes, x, 237, title, size=8.6, weight="bold")
        _text(axes, x, 254, f"{rows_of:,} × {config.n_embd:,}", size=8.5, color=SOFT)
        _text(axes, x, 271, f"{count[name]:,}", size=8.5, color=SOFT)
        _arrow(axes, (x, 285), (x, 308), (195 if x < 205 else 215, 308))
    _arrow(axes, (56, 732), (14, 732), (14, 102), (56, 102))
    _text(axes, 24, 668, "and again", size=8.5, color=SOFT, rotation=90)
    _arrow(axes, (56, 592), (40, 592), (40, 254), (56, 254), arrowstyle="-", color=BLUE, linestyle="--")
    _text(axes, 30, 423, "the same weights", size=8.5, color=BLUE, rotation=90)


def _draw_block(axes: Axes, config: GPTConfig, count: dict[str, int], block: int) -> None:
    """The right half: what is inside one transformer block."""
    width, wide, head = f"{config.n_embd:,}", f"{4 * config.n_embd:,}", config.n_embd // config.n_head
    axes.fill([364, 404, 404, 364], [418, 94, 654, 470], color="#EEF1F4", zorder=0)  # a lens on one of the blocks
    _box(axes, 643, 374, 478, 576, fill="#FCFCFD", zorder=0)
    _text(axes, 422, 108, "one transformer block", size=10.5, weight="bold", ha="left")
    _text(axes, 860, 108, f"{block:,} parameters", size=10.5, weight="bold", ha="right")
    _box(axes, 670, 284, 396, 188, "attention", zorder=1)
    _text(axes, 457, 284, "causal self-attention", size=9, color=ORANGE, rotation=90)
    _box(axes, 670, 543, 396, 138, "MLP", zorder=1)
    _text(axes, 457, 543, "MLP", size=9, color=GREEN, rotation=90)
    rows = (
        (163, 30, "LayerNorm", "LayerNorm", "ln"),
        (217, 34, "attention", f"linear {width} → 3 × {width}: q, k, v", "attn.c_attn"),
        (284, 68, "attention", "", ""),
        (351, 34, "attention", f"linear {width} → {width}", "attn.c_proj"),
        (400, 20, "", "+", ""),
        (449, 30, "LayerNorm", "LayerNorm", "ln"),
        (500, 32, "MLP", f"linear {width} → {wide}", "mlp.c_fc"),
        (543, 26, "MLP", "GELU", ""),
        (586, 32, "MLP", f"linear {wide} → {width}", "mlp.c_proj"),
        (632, 20, "", "+", ""),
    )
    for y, height, kind, title, name in rows:
        if title == "+":  # the residual stream has passed attention or MLP by
            start = 132 if y == 400 else 418
            _arrow(axes, (670, start), (438, start), (438, y), (660, y))
            _plus(axes, 670, y)
            _text(axes, 690, y, f"after dropout {config.dropout:g}", size=8.5, color=SOFT, ha="left")
        else:
            _box(axes, 670, y, 370, height, kind, fill="white" if kind != "LayerNorm" else "")
            _text(axes, 500, y, title, weight="bold", ha="left")
            _text(axes, 842, y, f"{count[name]:,}" if name else "", size=8.5, color=SOFT, ha="right")
    _arrow(axes, (670, 118), (670, 148))
    _text(axes, 680, 133, "(B, T, C)", size=8.5, color=SOFT, ha="left")
    for (y, height, *_), (below, height_below, *_) in pairwise(rows):
        _arrow(axes, (670, y + height / 2), (670, below - height_below / 2))
    _arrow(axes, (670, 642), (670, 676))
    heads = f"{config.n_head} heads" if config.n_head > 1 else "1 head"
    _text(axes, 570, 264, f"{heads}: softmax(q·k / √{head}) v", weight="bold", ha="left")
    _text(axes, 570, 284, f"{head} channels each; dropout {config.dropout:g}", size=8.5, color=SOFT, ha="left")
    _text(axes, 570, 303, "a token sees itself and those before it", size=8.5, color=SOFT, ha="left")
    for row in range(5):  # the causal mask
        for column in range(5):
            colour = ORANGE if column <= row else COLOURS["attention"][1]
            axes.plot(509 + 10.5 * column, 263 + 10.5 * row, "s", color=colour, markersize=6, zorder=5)


def _draw_totals(axes: Axes, totals: dict[str, int]) -> None:
    """Where the parameters are: a bar of each kind's share, which is the key to the colours too."""
    whole, left = sum(totals.values()), 404.0
    for column, (kind, number) in enumerate(totals.items()):
        x, colour, share = 404 + 124 * column, COLOURS[kind][0], number / whole
        axes.barh(699, 478 * share, 14, left=left, color=colour)
        left += 478 * share
        axes.plot(x + 5, 727, "s", color=colour, markersize=7)
        _text(axes, x + 17, 727, kind, size=9, weight="bold", ha="left")
        _text(axes, x + 17, 744, f"{number:,}", size=8.5, color=SOFT, ha="left")
        _text(axes, x + 17, 760, f"{share:.1%}" if share >= 0.001 else "under 0.1%", size=8.5, color=SOFT, ha="left")


def _text(axes: Axes, x: float, y: float, text: str, size: float = 9.5, ha: str = "center", **style: Any) -> None:
    if text:
        axes.text(x, y, text, fontsize=size, horizontalalignment=ha, verticalalignment="center", **style)


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, kind: str = "", fill: str = "", zorder: float = 3
) -> None:
    """A rounded box around (x, y), in its kind's colours."""
    from matplotlib.patches import FancyBboxPatch

    edge, pale = COLOURS[kind]
    shape = FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=7")
    shape.set(facecolor=fill or pale, edgecolor=edge, linewidth=1.1, zorder=zorder)
    axes.add_patch(shape)


def _plus(axes: Axes, x: float, y: float) -> None:
    """The circle where two streams are added."""
    axes.plot(x, y, "o", markersize=15, markerfacecolor="white", markeredgecolor=INK, zorder=4)
    axes.plot(x, y, "+", markersize=9, markeredgecolor=INK, markeredgewidth=1.4, zorder=5)


def _arrow(axes: Axes, *points: tuple[float, float], arrowstyle: str = "-|>", color: str = INK, **style: Any) -> None:
    """An arrow through the points."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Line

    line = FancyArrowPatch(path=Line(points), arrowstyle=arrowstyle, mutation_scale=9, color=color, linewidth=1.1)
    line.set(zorder=2, **style)
    axes.add_patch(line)
