"""Loss curves: one run in detail, or several runs compared by tokens and by time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Recipe, StoryLLMError
from ..training.log import Log, read_log
from .style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PINK,
    SKY,
    YELLOW,
    finish,
    house_style,
    new_figure,
    style_axes,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The lengths have no common divisor, so that 35 runs look different.
RUN_COLORS = (ORANGE, BLUE, GREEN, PINK, YELLOW, SKY, BLACK)
RUN_MARKERS = ("o", "s", "^", "D", "v")


def plot_losses(log: str | Path | Log, out: str | Path | None = None) -> Figure:
    """The training and validation loss of a run, and its learning rate, from a `log.jsonl` or a Log.

    Losses are in nats per token, over iterations and, if the log holds the recipe, over tokens. The figure is saved to
    `out` if given, in the format of its suffix. Raises StoryLLMError if the log holds no losses or `out` cannot be
    written.
    """
    name, log = ("the log", log) if isinstance(log, Log) else (str(log), read_log(log))
    updates = _series(log.updates, "train_loss")
    train, validation = _series(log.evaluations, "train_loss"), _series(log.evaluations, "val_loss")
    rates = _series(log.evaluations + log.updates, "learning_rate")
    last = max([*updates, *train, *validation], default=None)
    if last is None:
        raise StoryLLMError(f"{name} holds no losses, expected at least one update or evaluation; train for longer")

    from matplotlib.ticker import MaxNLocator

    with house_style():
        figure = new_figure(9, 5.8)
        heights = [4, 1] if rates else [1]
        panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        losses, bottom = panels[0], panels[-1]
        for axes in panels:
            style_axes(axes)
        _plot_series(losses, updates, color="#A9CBE3", linewidth=0.8, label="train (per update)")
        _plot_series(losses, train, color=BLUE, linewidth=2.6, label="train (eval)")
        _plot_series(losses, validation, color=ORANGE, linewidth=1.2, marker="o", label="validation (eval)")
        _mark_best(losses, validation, _series(log.evaluations, "val_bits_per_byte"), last)
        losses.margins(y=0.1)  # room for the value of a best loss at the top
        losses.yaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 2.5, 5, 10]))
        losses.set_ylabel("loss (nats per token)")
        losses.legend(frameon=False, labelspacing=0.6)
        if rates:
            _plot_learning_rate(bottom, rates)
        _format_iterations(bottom, last)
        _add_token_axis(losses, log)
        _add_title(losses, "Training and validation loss", _subtitle(log, last))
        return finish(figure, out)


def plot_runs(logs: Mapping[str, str | Path | Log], out: str | Path | None = None) -> Figure:
    """The validation loss of several runs, given as {name: log}, over training tokens and over minutes.

    Losses are in bits per byte, which compares runs with different vocabularies. The figure is saved to `out` if given,
    in the format of its suffix. Raises StoryLLMError if `logs` is empty, a log has no recipe or no timed evaluation
    after iteration 0, or `out` cannot be written.
    """
    curves = [_curve(name, log if isinstance(log, Log) else read_log(log)) for name, log in logs.items()]
    if not curves:
        raise StoryLLMError("no logs were given, expected at least one")
    legend_lines = sum(1 + curve.label.count("\n") for curve in curves)
    with house_style():
        figure = new_figure(10, 4 + 0.21 * legend_lines)
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, x, label in ((left, "tokens", "tokens (millions)"), (right, "minutes", "minutes")):
            for curve, color, marker in zip(curves, cycle(RUN_COLORS), cycle(RUN_MARKERS), strict=False):
                style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 3.5, "label": curve.label}
                axes.plot(getattr(curve, x), curve.bits_per_byte, **style)
            _scale_x(axes, [value for curve in curves for value in getattr(curve, x)])
            axes.set_xlabel(label)
            style_axes(axes)
        left.set_ylabel("bits per byte")
        left.set_title("Validation loss", loc="left", fontsize=14, fontweight="bold")
        legend = figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        return finish(figure, out)


@dataclass(frozen=True)
class _Curve:
    """The evaluations of a run after iteration 0, which has no place on a logarithmic axis."""

    tokens: list[float]  # millions
    minutes: list[float]
    bits_per_byte: list[float]
    label: str


def _curve(name: str, log: Log) -> _Curve:
    tokens_per_iteration = _tokens_per_iteration(log)
    if tokens_per_iteration is None:
        raise StoryLLMError(f"the log of {name!r} holds no recipe, expected the log.jsonl of a training run")
    timed = (e for e in log.evaluations if isinstance(e.get("seconds"), (int, float)))
    points = [e for e in timed if e["iteration"] > 0 and e["seconds"] > 0]
    if not points:
        raise StoryLLMError(f"the log of {name!r} holds no timed evaluation after iteration 0; train for longer")
    best = min(points, key=lambda e: e["val_loss"])
    summary = (
        f"best {best['val_bits_per_byte']:.3f} bits per byte ({best['val_loss']:.2f} nats/token) "
        f"after {_compact(best['iteration'] * tokens_per_iteration)} tokens, {_minutes(best['seconds'])}"
    )
    return _Curve(
        tokens=[e["iteration"] * tokens_per_iteration / 1e6 for e in points],
        minutes=[e["seconds"] / 60 for e in points],
        bits_per_byte=[e["val_bits_per_byte"] for e in points],
        label=wrapped(f"{name}: {summary}", 120, max_lines=5),
    )


def _series(entries: list[dict[str, Any]], key: str) -> dict[int, float]:
    """{iteration: value} in order, from the entries with a number for `key`. The last of several entries counts."""
    found = {e["iteration"]: e[key] for e in entries if "iteration" in e and isinstance(e.get(key), (int, float))}
    return dict(sorted(found.items()))


def _plot_series(axes: Axes, series: dict[int, float], marker: str = "", **style: Any) -> None:
    """Plots a series with at most about 50 markers. A single point always has one, or it would be invisible."""
    if series:
        marker = marker if len(series) > 1 else "o"
        every = max(1, len(series) // 50)
        axes.plot(list(series), list(series.values()), marker=marker, markersize=3.5, markevery=every, **style)


def _mark_best(axes: Axes, validation: dict[int, float], bits_per_byte: dict[int, float], last: int) -> None:
    """Circles the lowest validation loss, labels it, and describes it in the legend."""
    finite = [iteration for iteration, loss in validation.items() if math.isfinite(loss)]
    if not finite:
        return
    best = min(finite, key=validation.__getitem__)
    loss = validation[best]
    perplexity = math.exp(min(loss, 700))
    details = f"perplexity {perplexity:,.2f}" if perplexity < 100 else f"perplexity {perplexity:,.0f}"
    if best in bits_per_byte:
        details += f", {bits_per_byte[best]:.3f} bits per byte"
    label = f"best {loss:.3f} at iteration {best:,}\n{details}"
    axes.plot([best], [loss], "o", markersize=9, markerfacecolor="none", color=INK, label=label)
    side, shift = ("left", -4) if best <= last / 2 else ("right", 8)
    axes.annotate(f"{loss:.3f}", (best, loss), (shift, 9), textcoords="offset points", ha=side, fontweight="bold")


def _plot_learning_rate(axes: Axes, rates: dict[int, float]) -> None:
    from matplotlib.ticker import MaxNLocator

    _plot_series(axes, rates, color=GREY, linewidth=1.5)
    axes.set_ylabel("learning rate")
    axes.set_ylim(0, 1.15 * max(rates.values()) or 1)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.ticklabel_format(axis="y", scilimits=(0, 0), useMathText=True)


def _format_iterations(axes: Axes, last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.015 * max(last, 1), 1.025 * max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda iteration, _: f"{iteration:,.0f}")
    axes.set_xlabel("iteration")


def _add_token_axis(axes: Axes, log: Log) -> None:
    """Adds an upper x-axis that counts tokens, if the log holds the recipe."""
    tokens = _tokens_per_iteration(log)
    if tokens is not None:
        functions: Any = (lambda iteration: iteration * tokens, lambda count: count / tokens)
        top = axes.secondary_xaxis("top", functions=functions)
        top.xaxis.set_major_formatter(lambda count, _: f"{count / 1e6:,g}")
        top.spines["top"].set_visible(False)
        top.tick_params(length=3)
        top.set_xlabel("tokens (millions)")


def _add_title(axes: Axes, title: str, subtitle: str) -> None:
    lower = axes.set_title(subtitle, loc="left", fontsize=9.5, color=MUTED, parse_math=False)
    style: dict[str, Any] = {"fontsize": 14, "fontweight": "bold"}
    axes.annotate(title, (0, 1), (0, 8), xycoords=lower, textcoords="offset points", **style)


def _subtitle(log: Log, last: int) -> str:
    """The length of the run and what it ran on, as far as the log holds them."""
    recipe = log.run.get("recipe") or {}
    total = recipe.get("train", {}).get("max_iters", last)
    parts = [f"{last:,} iterations" if last >= total else f"{last:,} of {total:,} iterations"]
    if seconds := list(_series(log.updates + log.evaluations, "seconds").values()):
        parts.append(_minutes(seconds[-1]))
    parts += [value for key in ("device", "dtype") if isinstance(value := log.run.get(key), str) and value]
    if type(size := log.run.get("micro_batch_size")) is int and 0 < size < 2**63:
        parts.append(f"micro-batch size {size:,}")
    if isinstance(compiled := log.run.get("compiled"), bool):
        parts.append("compiled" if compiled else "not compiled")
    return wrapped("  ·  ".join(part.strip() for part in parts), 105)


def _tokens_per_iteration(log: Log) -> int | None:
    """`batch_size * block_size`, or None if the log holds no recipe."""
    if not log.run.get("recipe"):
        return None
    recipe = Recipe.from_dict(log.run["recipe"])
    return recipe.train.batch_size * recipe.model.block_size


def _scale_x(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x-axis if the values span more than a decade, otherwise a linear one from 0."""
    from matplotlib.ticker import LogLocator, NullFormatter

    decades = math.log10(max(values) / min(values))
    if decades > 1:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 4 else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, 1.05 * max(values))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.1f} min"


def _compact(count: float) -> str:
    """A count with a unit, such as 2.5M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{round(count / size, 1):,g}{unit}"
    return f"{count:g}"
