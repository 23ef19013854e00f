"""The architecture diagram: its numbers are read back and compared with closed formulas and with the model."""

from __future__ import annotations

import itertools
import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text

from storyllm import GPT, RECIPES, GPTConfig, plot_architecture
from storyllm.plots.architecture import count_parameters

CONFIGS = {
    **{name: recipe.model for name, recipe in RECIPES.items()},
    "no bias": GPTConfig(bias=False),
    "tanh": GPTConfig(activation="gelu_tanh"),
    "huge": GPTConfig(vocab_size=250_000, block_size=131_072, n_layer=120, n_head=128, n_embd=16_384, dropout=0.125),
    "tiny": GPTConfig(vocab_size=2, block_size=1, n_layer=1, n_head=1, n_embd=1, dropout=0.0),
}


def figure_text(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_faithful_recipe_has_the_published_parameter_counts():
    text = figure_text(plot_architecture(RECIPES["faithful"].model))
    for number in ("29,995,392", "19,298,688", "49,152", "6 × 1,774,464 = 10,646,784", "50,257 × 384", "443,520"):
        assert number in text, number


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts_follow_the_closed_formula(name):
    config = CONFIGS[name]
    width, bias, layers = config.n_embd, int(config.bias), config.n_layer
    totals = {
        "embeddings": (config.vocab_size + config.block_size) * width,
        "attention": layers * (4 * width**2 + 4 * width * bias),
        "MLP": layers * (8 * width**2 + 5 * width * bias),
        "LayerNorm": (2 * layers + 1) * width * (1 + bias),
    }
    text = figure_text(plot_architecture(config))
    for kind, total in totals.items():
        assert kind in text and f"{total:,}" in text, kind
    assert f"{sum(totals.values()):,} parameters" in text


@pytest.mark.parametrize(("name", "label"), [("faithful", "GELU"), ("tanh", "GELU (tanh approximation)")])
def test_the_activation_is_named(name, label):
    assert label in figure_text(plot_architecture(CONFIGS[name])).splitlines()


@pytest.mark.parametrize("bias", [True, False])
def test_parameter_counts_are_those_of_the_model(bias):
    config = GPTConfig(vocab_size=97, block_size=16, n_layer=3, n_head=2, n_embd=20, bias=bias)
    sizes: dict[str, int] = {}
    for name, parameter in GPT(config).named_parameters():  # yields a tied weight once
        part = re.sub(r"transformer\.(h\.\d+\.)?|\.(weight|bias)$", "", name)
        sizes[part] = sizes.get(part, 0) + parameter.numel()
    counts = count_parameters(config)
    for part, size in sizes.items():
        times = 1 if part in ("wte", "wpe", "ln_f") else config.n_layer
        assert size == times * counts["ln" if part.startswith("ln_") else part], part
    assert f"{sum(sizes.values()):,} parameters" in figure_text(plot_architecture(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_do_not_overlap_and_fit_in_their_boxes(name):
    figure = plot_architecture(CONFIGS[name])
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
