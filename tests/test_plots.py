"""The figures say what the log and the config say: data read back from the axes, numbers read back from the texts."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from storyllm.config import RECIPES, GPTConfig, StoryLLMError
from storyllm.log import Log, read_log
from storyllm.plots import count_parameters, draw_flowchart, plot_losses, plot_runs

PNG = b"\x89PNG\r\n\x1a\n"
CONFIGS = {
    **{name: recipe.model for name, recipe in RECIPES.items()},
    "no bias": GPTConfig(bias=False),
    "wide": GPTConfig(vocab_size=1024, n_layer=12, n_head=12, n_embd=768, bias=False),
    "huge": GPTConfig(vocab_size=250_000, block_size=131_072, n_layer=120, n_head=128, n_embd=16_384, dropout=0.125),
    "tiny": GPTConfig(vocab_size=2, block_size=1, n_layer=1, n_head=1, n_embd=1, dropout=0.0),
}


def make_log(iterations: int, every: int, recipe: str = "demo") -> Log:
    """A run's log with an update at every iteration, and an evaluation at 0 and every so often."""
    settings = RECIPES[recipe].override({"train.max_iters": 1_000}).to_dict()
    losses = [2 + 5 / (1 + i / 20) for i in range(iterations + 1)]
    return Log(
        run={
            "event": "run",
            "recipe": settings,
            "device": "a quick brown fox, bfloat16 (it can), not compiled (why not)",
        },
        updates=[
            {"iteration": i, "train_loss": losses[i] + 0.1 * (i % 3), "learning_rate": 1e-3 / i, "seconds": 0.3 * i}
            for i in range(1, iterations + 1)
        ],
        evaluations=[
            {"iteration": i, "train_loss": losses[i], "val_loss": losses[i] + 0.05, "val_bits_per_byte": losses[i] / 3}
            for i in range(0, iterations + 1, every)
        ],
    )


def line(axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


def column(entries: list[dict], key: str) -> tuple[list[float], list[float]]:
    return [e["iteration"] for e in entries], [e[key] for e in entries]


def words(figure) -> str:
    """All that is written in a figure, axes' texts, titles and legends."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return buffer.getvalue()


@pytest.mark.parametrize(("iterations", "every"), [(1_000, 100), (1_000, 1), (10, 10), (1, 1)])
def test_the_curves_are_the_logs(iterations, every):
    log = make_log(iterations, every)
    figure = plot_losses(log)
    losses, rate = figure.axes[:2]
    assert line(losses, "training, each update") == column(log.updates, "train_loss")
    assert line(losses, "training, evaluated") == column(log.evaluations, "train_loss")
    assert line(losses, "validation, evaluated") == column(log.evaluations, "val_loss")
    assert (list(rate.lines[0].get_xdata()), list(rate.lines[0].get_ydata())) == column(log.updates, "learning_rate")
    low, high = losses.get_ylim()
    everything = [y for curve in losses.lines for y in curve.get_ydata()]
    assert low < min(everything) and max(everything) < high
    assert losses.get_xlim()[1] > iterations
    assert png(figure).startswith(PNG)


def test_the_best_is_the_lowest_validation_loss_not_the_last():
    log = make_log(100, 10)
    log.evaluations[4] |= {"val_loss": 1.5, "val_bits_per_byte": 0.777}
    text = words(plot_losses(log))
    assert "best 1.500 at iteration 40\nperplexity 4.48, 0.777 bits per byte" in text


def test_the_title_tells_the_run():
    text = words(plot_losses(make_log(1_000, 100)))
    assert "1,000 iterations" in text and "5.0 minutes" in text and "a quick brown fox, bfloat16, not compiled" in text
    assert "800 of 1,000 iterations" in words(plot_losses(make_log(800, 100)))


def test_the_upper_axis_counts_tokens():
    figure = plot_losses(make_log(1_000, 100, "faithful"))
    (tokens,) = figure.axes[0].child_axes
    png(figure)  # places the ticks
    assert tokens.get_xlim() == pytest.approx([4096 * x for x in figure.axes[0].get_xlim()])
    assert tokens.get_xlabel() == "millions of tokens"
    assert "4" in [tick.get_text() for tick in tokens.get_xticklabels()]  # 4 million tokens are in, as 4


def test_half_a_log_is_drawn_as_far_as_it_goes():
    whole = make_log(100, 10)
    updates_only = plot_losses(Log(updates=whole.updates))
    assert line(updates_only.axes[0], "training, each update") == column(whole.updates, "train_loss")
    assert not updates_only.axes[0].child_axes  # no recipe, so nobody knows the tokens
    one = plot_losses(Log(run=whole.run, evaluations=whole.evaluations[:1]))
    assert len(one.axes) == 1  # no learning rate, no panel for it
    assert line(one.axes[0], "validation, evaluated") == column(whole.evaluations[:1], "val_loss")
    assert one.axes[0].lines[0].get_marker() == "o"  # a line through one point is not to be seen
    bare = [{"iteration": 3, "train_loss": 2.5}, {"iteration": 6, "train_loss": float("nan"), "learning_rate": None}]
    for figure in (updates_only, one, plot_losses(Log(updates=bare)), plot_losses(Log(evaluations=bare))):
        assert png(figure).startswith(PNG)


def test_iterations_come_in_order_and_once():
    log = Log(updates=[{"iteration": i, "train_loss": loss} for i, loss in [(1, 9.0), (3, 7.0), (2, 8.5), (3, 7.5)]])
    assert line(plot_losses(log).axes[0], "training, each update") == ([1, 2, 3], [9.0, 8.5, 7.5])


def test_a_path_is_read_and_a_picture_written(tmp_path):
    log, path = make_log(20, 10), tmp_path / "log.jsonl"
    lines = [log.run, *({"event": "update", **e} for e in log.updates)]
    lines += [{"event": "evaluation", **e} for e in log.evaluations]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines), encoding="utf-8")
    out = tmp_path / "new" / "folder" / "losses.png"
    figure = plot_losses(path, out)
    assert line(figure.axes[0], "training, each update") == column(read_log(path).updates, "train_loss")
    assert out.read_bytes().startswith(PNG)
    assert [file.name for file in out.parent.iterdir()] == ["losses.png"]
    plot_losses(str(path), tmp_path / "losses.svg")
    assert "<svg" in (tmp_path / "losses.svg").read_text(encoding="utf-8")


def run_log(recipe: str, every: int) -> Log:
    log = make_log(1_000, every, recipe)
    for entry in log.evaluations:
        entry["seconds"] = 0.3 * entry["iteration"]
    return log


def test_several_runs_are_drawn_over_tokens_and_minutes():
    logs = {"faithful": run_log("faithful", 100), "$small$": run_log("small-vocab", 50)}
    tokens, minutes = (figure := plot_runs(logs)).axes
    sizes = {"faithful": 32 * 128, "$small$": 16 * 256}
    for log, size, by_tokens, by_minutes in zip(
        logs.values(), sizes.values(), tokens.lines, minutes.lines, strict=True
    ):
        points = log.evaluations[1:]  # the start has no place on a logarithmic axis
        assert list(by_tokens.get_xdata()) == [e["iteration"] * size / 1e6 for e in points]
        assert list(by_minutes.get_xdata()) == [e["seconds"] / 60 for e in points]
        for curve in (by_tokens, by_minutes):
            assert list(curve.get_ydata()) == [e["val_bits_per_byte"] for e in points]
    text = words(figure)
    best = logs["$small$"].evaluations[-1]
    assert (
        f"$small$: best {best['val_bits_per_byte']:.3f} bits per byte ({best['val_loss']:.3f} nats per token)" in text
    )
    assert "after 4.1 million tokens, 5.0 minutes" in text
    assert png(figure).startswith(PNG)


def test_bad_input_is_told_in_one_line(tmp_path):
    log, file = make_log(10, 10), tmp_path / "file"
    file.write_text("", encoding="utf-8")
    untimed = [{"seconds": "x", **e} for e in log.evaluations]
    cases = [
        (lambda: plot_losses(tmp_path / "none.jsonl"), "there is no log .*none.jsonl"),
        (lambda: plot_losses(file), "file holds no update and no evaluation"),
        (lambda: plot_runs({}), "no runs were given"),
        (lambda: plot_runs({"a": Log(run=log.run, evaluations=untimed)}), "'a' has no evaluation after the start"),
        (lambda: plot_runs({"a": make_log(10, 20)}), "'a' has no evaluation after the start"),
        (lambda: plot_losses(Log()), "the log holds no update and no evaluation"),
        (lambda: plot_losses(Log(evaluations=[{"iteration": 5}])), "the log holds no update and no evaluation"),
        (lambda: plot_losses(log, tmp_path / "losses.doc"), r"losses.doc'?, expected a name that ends in .*\.png"),
        (lambda: draw_flowchart(GPTConfig(), tmp_path / "flowchart"), r"flowchart'?, expected .*\.png"),
        (lambda: plot_losses(log, file / "losses.png"), "losses.png cannot be written"),
    ]
    for call, message in cases:
        with pytest.raises(StoryLLMError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_published_number_of_parameters():
    text = words(draw_flowchart(GPTConfig()))
    for number in ("29,995,392", "19,298,688", "49,152", "6 × 1,774,464 = 10,646,784", "50,257 × 384", "443,520"):
        assert number in text, number


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parameters_are_those_of_the_closed_formula(name):
    config = CONFIGS[name]
    width, bias = config.n_embd, config.bias
    block = 12 * width**2 + (13 if bias else 2) * width
    total = (config.vocab_size + config.block_size) * width + config.n_layer * block + (2 if bias else 1) * width
    figure = draw_flowchart(config)
    text = words(figure)
    assert f"a GPT of {total:,} parameters" in text
    assert f"{config.n_layer} × {block:,} = {config.n_layer * block:,}" in text
    key = [t.get_text() for t in figure.axes[0].texts if t.get_position()[1] == 744]  # below the bar
    assert len(key) == 4 and sum(int(number.replace(",", "")) for number in key) == total


@pytest.mark.parametrize("bias", [True, False])
def test_the_parameters_are_those_of_the_model(bias):
    model_module = pytest.importorskip("storyllm.model")
    config = GPTConfig(vocab_size=97, block_size=16, n_layer=3, n_head=2, n_embd=20, bias=bias)
    sizes: dict[str, int] = {}
    for name, parameter in model_module.GPT(config).named_parameters():  # a tied weight comes once
        part = re.sub(r"transformer\.(h\.\d+\.)?|\.(weight|bias)$", "", name)
        sizes[part] = sizes.get(part, 0) + parameter.numel()
    drawn = count_parameters(config)
    for part, size in sizes.items():
        times = 1 if part in ("wte", "wpe", "ln_f") else config.n_layer
        assert size == times * drawn["ln" if part.startswith("ln_") else part], part
    assert f"a GPT of {sum(sizes.values()):,} parameters" in words(draw_flowchart(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_text_overlaps_another_or_leaves_its_box(name):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patches import FancyBboxPatch

    figure = draw_flowchart(CONFIGS[name])
    renderer = FigureCanvasAgg(figure).get_renderer()
    (axes,) = figure.axes
    texts = [(text.get_text(), text.get_window_extent(renderer)) for text in axes.texts]
    boxes = [patch.get_window_extent(renderer) for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    assert len(texts) > 40 and len(boxes) > 15
    for (one, extent), (other, other_extent) in itertools.combinations(texts, 2):
        assert not extent.overlaps(other_extent), f"{one!r} overlaps {other!r}"
    for text, extent in texts:
        around = [box for box in [figure.bbox, *boxes] if box.contains((extent.x0 + extent.x1) / 2, extent.y0 + 1)]
        inner = min(around, key=lambda box: box.width * box.height)
        assert inner.x0 <= extent.x0 and extent.x1 <= inner.x1, f"{text!r} is wider than its box"
        assert inner.y0 <= extent.y0 and extent.y1 <= inner.y1, f"{text!r} is taller than its box"


def test_the_picture_of_the_readme(tmp_path):
    draw_flowchart(GPTConfig(), tmp_path / "flowchart.png")
    drawn = (tmp_path / "flowchart.png").read_bytes()
    assert drawn.startswith(PNG) and int.from_bytes(drawn[16:20], "big") == 1800 and len(drawn) < 400_000
    picture = Path(__file__).parents[1] / "flowchart.png"
    assert picture.read_bytes()[:24] == drawn[:24]  # a PNG of the same size


def test_a_figure_shows_itself_in_a_notebook_without_pyplot():
    formatters = pytest.importorskip("IPython.core.formatters")
    for figure in (plot_losses(make_log(10, 10)), draw_flowchart(GPTConfig())):
        shown, _ = formatters.DisplayFormatter().format(figure)
        assert shown["image/png"].startswith(PNG if isinstance(shown["image/png"], bytes) else "iVBOR")


def test_importing_the_module_does_not_import_matplotlib():
    code = "import sys, storyllm.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], timeout=60).returncode == 0


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        before = dict(matplotlib.rcParams)
        plot_losses(make_log(10, 10))
        draw_flowchart(GPTConfig())
        assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []
