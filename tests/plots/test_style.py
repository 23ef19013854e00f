"""What all figures promise: they are saved atomically, show in notebooks, and leave matplotlib's state alone."""

from __future__ import annotations

import sys

import matplotlib
import pytest

from storyllm import RECIPES, GPTConfig, Log, StoryLLMError, plot_architecture, plot_losses, plot_runs

PNG = b"\x89PNG\r\n\x1a\n"
EVALUATION = {"iteration": 10, "train_loss": 2.0, "val_loss": 2.5, "val_bits_per_byte": 0.8, "seconds": 60.0}
LOG = Log(run={"recipe": RECIPES["demo"].to_dict()}, evaluations=[EVALUATION])

every_figure = pytest.mark.parametrize(
    "plot",
    [
        lambda out=None: plot_losses(LOG, out),
        lambda out=None: plot_runs({"demo": LOG}, out),
        lambda out=None: plot_architecture(GPTConfig(), out),
    ],
    ids=["losses", "runs", "architecture"],
)


@every_figure
def test_a_figure_is_saved_in_the_format_of_the_suffix(plot, tmp_path):
    folder = tmp_path / "new" / "folder"
    plot(folder / "figure.png")
    plot(str(folder / "figure.svg"))
    assert (folder / "figure.png").read_bytes().startswith(PNG)
    assert "<svg" in (folder / "figure.svg").read_text(encoding="utf-8")
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "figure.svg"]


@every_figure
@pytest.mark.parametrize("name", ["figure", "figure.doc"])
def test_an_unknown_suffix_is_rejected(plot, name, tmp_path):
    with pytest.raises(StoryLLMError, match=rf"{name}'.*\.png"):
        plot(tmp_path / name)
    assert not list(tmp_path.iterdir())


@every_figure
def test_a_path_that_cannot_be_written_is_reported(plot, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoryLLMError, match=r"figure\.png"):
        plot(tmp_path / "file" / "figure.png")


@every_figure
def test_a_figure_shows_itself_in_a_notebook(plot):
    formatters = pytest.importorskip("IPython.core.formatters")
    shown, _ = formatters.DisplayFormatter().format(plot())
    assert shown["image/png"].startswith(PNG if isinstance(shown["image/png"], bytes) else "iVBOR")


@every_figure
def test_plotting_does_not_change_global_state(plot):
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        before = dict(matplotlib.rcParams)
        plot()
        assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []
