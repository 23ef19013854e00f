"""Loss curves: values, axes and labels are read back from the figures and compared with the logs."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
from matplotlib.text import Text

from storyllm import RECIPES, Log, StoryLLMError, plot_losses, plot_runs, read_log


def make_log(iterations: int, eval_interval: int, recipe: str = "demo", **run: Any) -> Log:
    """The log of a run of `recipe` with `max_iters` 1,000 and one iteration per update, at 0.3 seconds each."""
    losses = [2 + 5 / (1 + i / 20) for i in range(iterations + 1)]
    return Log(
        run={"event": "run", "recipe": RECIPES[recipe].override({"train.max_iters": 1_000}).to_dict(), **run},
        updates=[
            {"iteration": i, "train_loss": losses[i] + 0.1 * (i % 3), "learning_rate": 1e-3 / i, "seconds": 0.3 * i}
            for i in range(1, iterations + 1)
        ],
        evaluations=[
            {
                **{"iteration": i, "train_loss": losses[i], "val_loss": losses[i] + 0.05},
                **{"val_bits_per_byte": losses[i] / 3, "seconds": 0.3 * i},
            }
            for i in range(0, iterations + 1, eval_interval)
        ],
    )


def curve(axes, label: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def column(entries: list[dict], key: str) -> tuple[list[float], list[float]]:
    return [e["iteration"] for e in entries], [e[key] for e in entries]


def figure_text(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def draw(figure) -> None:
    """Lays the figure out, which places ticks and legends."""
    figure.savefig(io.BytesIO(), format="png")


def assert_nothing_is_clipped(figure) -> None:
    draw(figure)
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height, drawn


@pytest.mark.parametrize(("iterations", "eval_interval"), [(1_000, 100), (1_000, 1), (10, 10), (1, 1)])
def test_curves_show_the_values_in_the_log(iterations, eval_interval):
    log = make_log(iterations, eval_interval)
    figure = plot_losses(log)
    losses, rates = figure.axes
    assert curve(losses, "train (per update)") == column(log.updates, "train_loss")
    assert curve(losses, "train (eval)") == column(log.evaluations, "train_loss")
    assert curve(losses, "validation (eval)") == column(log.evaluations, "val_loss")
    assert (list(rates.lines[0].get_xdata()), list(rates.lines[0].get_ydata())) == column(log.updates, "learning_rate")
    low, high = losses.get_ylim()
    values = [y for line in losses.lines for y in line.get_ydata()]
    assert low < min(values) and max(values) < high
    assert losses.get_xlim()[0] < 0 and iterations < losses.get_xlim()[1]
    assert_nothing_is_clipped(figure)


def test_best_is_the_lowest_validation_loss_not_the_last():
    log = make_log(100, 10)
    log.evaluations[4] |= {"val_loss": 1.5, "val_bits_per_byte": 0.777}
    text = figure_text(plot_losses(log))
    for part in ("best 1.500 at iteration 40", "perplexity 4.48", "0.777 bits per byte"):
        assert part in text


def test_subtitle_describes_the_run():
    run = {"device": "Tesla T4", "dtype": "float16", "compiled": True, "micro_batch_size": 16}
    text = figure_text(plot_losses(make_log(1_000, 100, **run)))
    for part in ("1,000 iterations", "5.0 min", "Tesla T4", "float16", "micro-batch size 16", "compiled"):
        assert part in text
    assert "not compiled" in figure_text(plot_losses(make_log(10, 10, compiled=False)))


def test_subtitle_shows_how_far_an_interrupted_run_got():
    assert "800 of 1,000 iterations" in figure_text(plot_losses(make_log(800, 100)))


@pytest.mark.parametrize("value", [None, 2**80, -1, 0.5, "", [], {}, ["Tesla T4"]])
def test_subtitle_omits_fields_of_the_wrong_type(value):
    run = dict.fromkeys(("device", "dtype", "compiled", "micro_batch_size"), value)
    assert figure_text(plot_losses(make_log(10, 10, **run))) == figure_text(plot_losses(make_log(10, 10)))


@pytest.mark.parametrize(
    "device", ["\x1b[2J\r\x00", "$x^{$ \\frac", "\ud800", "NVIDIA RTX 6000 Ada Generation " * 1_000]
)
def test_untrusted_device_names_are_shown_as_text(device):
    figure = plot_losses(make_log(10, 10, device=device))
    assert_nothing_is_clipped(figure)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", figure_text(figure))


def test_upper_axis_counts_tokens():
    figure = plot_losses(make_log(1_000, 100, "faithful"))
    (tokens,) = figure.axes[0].child_axes
    draw(figure)
    assert tokens.get_xlim() == pytest.approx([32 * 128 * x for x in figure.axes[0].get_xlim()])
    assert "4" in [tick.get_text() for tick in tokens.get_xticklabels()]  # in millions


@pytest.mark.parametrize("run", [{}, {"recipe": {}}])
def test_without_a_recipe_there_is_no_token_axis(run):
    log = make_log(100, 10)
    figure = plot_losses(Log(run=run, updates=log.updates))
    assert curve(figure.axes[0], "train (per update)") == column(log.updates, "train_loss")
    assert not figure.axes[0].child_axes
    draw(figure)


def test_a_recipe_with_the_largest_sizes_can_be_plotted():
    log = make_log(10, 10)
    log.run["recipe"]["train"] |= {"batch_size": 2**20, "max_iters": 10**300}
    log.run["recipe"]["model"] |= {"block_size": 2**31 - 1}
    assert_nothing_is_clipped(plot_losses(log))


def test_a_single_evaluation_is_visible():
    log = make_log(100, 10)
    figure = plot_losses(Log(run=log.run, evaluations=log.evaluations[:1]))
    (losses,) = figure.axes  # there is no learning rate to plot
    assert curve(losses, "validation (eval)") == column(log.evaluations[:1], "val_loss")
    assert all(line.get_marker() == "o" for line in losses.lines)
    assert_nothing_is_clipped(figure)


@pytest.mark.parametrize("kind", ["updates", "evaluations"])
def test_missing_and_nonfinite_values_can_be_plotted(kind):
    entries = [{"iteration": 3, "train_loss": 2.5}, {"iteration": 6, "train_loss": float("nan"), "learning_rate": None}]
    draw(plot_losses(Log(**{kind: entries})))


def test_iterations_are_sorted_and_the_last_entry_for_one_counts():
    log = Log(updates=[{"iteration": i, "train_loss": loss} for i, loss in [(1, 9.0), (3, 7.0), (2, 8.5), (3, 7.5)]])
    assert curve(plot_losses(log).axes[0], "train (per update)") == ([1, 2, 3], [9.0, 8.5, 7.5])


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_log_is_read_from_a_path(tmp_path, kind):
    log, path = make_log(20, 10), tmp_path / "log.jsonl"
    lines = [log.run, *({"event": "update", **e} for e in log.updates)]
    lines += [{"event": "evaluation", **e} for e in log.evaluations]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines), encoding="utf-8")
    losses = plot_losses(kind(path)).axes[0]
    assert curve(losses, "train (per update)") == column(read_log(path).updates, "train_loss")
    assert len(plot_runs({"run": kind(path)}).axes) == 2


def test_runs_are_plotted_over_tokens_and_minutes():
    logs = {"faithful": make_log(1_000, 100, "faithful"), "$small$": make_log(1_000, 50, "small-vocab")}
    figure = plot_runs(logs)
    by_tokens, by_minutes = figure.axes
    for position, (log, tokens_per_iteration) in enumerate(zip(logs.values(), (32 * 128, 8 * 256), strict=True)):
        points = log.evaluations[1:]  # iteration 0 has no place on a logarithmic axis
        tokens, minutes = by_tokens.lines[position], by_minutes.lines[position]
        assert list(tokens.get_xdata()) == [e["iteration"] * tokens_per_iteration / 1e6 for e in points]
        assert list(minutes.get_xdata()) == [e["seconds"] / 60 for e in points]
        for line in (tokens, minutes):
            assert list(line.get_ydata()) == [e["val_bits_per_byte"] for e in points]
    best = logs["$small$"].evaluations[-1]
    (label,) = [text.get_text() for text in figure.legends[0].get_texts() if text.get_text().startswith("$small$")]
    values = (f"{best['val_bits_per_byte']:.3f} bits per byte", f"{best['val_loss']:.2f} nats/token", "2M", "5.0 min")
    for value in values:
        assert value in label


@pytest.mark.parametrize("count", [1, 3, 6, 12])
def test_runs_look_different_and_their_labels_fit(count):
    figure = plot_runs({f"checkpoints/{'long-' * 5 * run}name": make_log(100, 10) for run in range(count)})
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}) == count
    assert_nothing_is_clipped(figure)
    assert all(axes.get_position().height * figure.get_figheight() > 2 for axes in figure.axes)  # inches


@pytest.mark.parametrize(("eval_interval", "scale"), [(10, "log"), (500, "linear"), (1_000, "linear")])
def test_runs_have_labelled_ticks_whatever_their_range(eval_interval, scale):
    figure = plot_runs({"run": make_log(1_000, eval_interval)})
    draw(figure)
    for axes in figure.axes:
        low, high = axes.get_xlim()
        inside = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert axes.get_xscale() == scale and len(inside) >= 3


def test_untrusted_run_names_are_shown_as_text():
    figure = plot_runs({"\x1b[2J\ud800$x^{$" * 500: make_log(10, 10)})
    assert_nothing_is_clipped(figure)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\ud800-\udfff]", figure_text(figure))


def without(log: Log, key: str) -> Log:
    return Log(run=log.run, evaluations=[{**e, key: None} for e in log.evaluations])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_losses("missing.jsonl"), "missing.jsonl"),
        (lambda: plot_losses(Log()), "no losses"),
        (lambda: plot_losses(Log(evaluations=[{"iteration": 5}])), "no losses"),
        (lambda: plot_runs({}), "no logs"),
        (lambda: plot_runs({"first": without(make_log(10, 10), "seconds")}), "first.*no timed evaluation"),
        (lambda: plot_runs({"first": make_log(10, 20)}), "first.*no timed evaluation"),
        (lambda: plot_runs({"first": Log(evaluations=make_log(10, 10).evaluations)}), "first.*no recipe"),
    ],
)
def test_logs_that_cannot_be_plotted_are_rejected(call, message):
    with pytest.raises(StoryLLMError, match=message):
        call()
