"""Figures of predictions: their numbers are those of the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import storyllm
from storyllm import StoryLLMError, plot_loss_by_position, plot_next_tokens


@pytest.fixture
def storyteller(tiny_run):
    return storyllm.load(tiny_run / "last.pt", device="cpu")


def bars(axes) -> list[tuple[str, float]]:
    names = [label.get_text() for label in axes.get_yticklabels()]
    return list(zip(names, [bar.get_width() for bar in axes.patches], strict=True))


def test_bars_are_the_most_likely_tokens(storyteller):
    prompt = "One day"
    figure = plot_next_tokens(prompt, {"plain": (storyteller, {}), "cold": (storyteller, {"temperature": 0.5})}, top=5)
    plain, cold = figure.axes
    ids = torch.tensor([storyteller.tokenizer.encode_ordinary(prompt)])
    logits = storyteller.model(ids)[0][0, -1].detach()
    values, tokens = storyllm.next_token_probs(logits).topk(5)
    expected = [repr(storyteller.tokenizer.decode([token]))[1:-1] for token in tokens.tolist()]
    assert [name for name, _ in bars(plain)] == expected
    np.testing.assert_allclose([value for _, value in bars(plain)], values, rtol=1e-4)
    assert bars(cold)[0][1] > bars(plain)[0][1]  # a lower temperature makes the likeliest token likelier
    assert plain.get_xlim() == cold.get_xlim()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["plain", "cold"]


def test_excluded_tokens_have_no_bar(storyteller):
    (axes,) = plot_next_tokens("", {"three": (storyteller, {"top_k": 3})}).axes
    assert len(bars(axes)) == 3


@pytest.mark.parametrize(
    ("panels", "message"), [({}, "no panels"), ({"hot": {"temperature": -1}}, "temperature is -1")]
)
def test_invalid_panels_are_an_error(storyteller, panels, message):
    with pytest.raises(StoryLLMError, match=message):
        plot_next_tokens("One", {title: (storyteller, sampling) for title, sampling in panels.items()})


def test_the_loss_by_position_is_the_loss_of_complete_windows(storyteller, tiny_data):
    tokens = storyllm.open_token_file(tiny_data / "validation.bin")
    T = storyteller.model.config.block_size
    (axes,) = plot_loss_by_position(storyteller, tiny_data / "validation.bin", windows=5).axes
    line, mean = (line.get_ydata() for line in axes.lines)
    assert len(line) == T
    ids = torch.from_numpy(tokens.ids[: 5 * T + 1].astype(np.int64))
    loss = storyteller.model(ids[:-1].view(5, T), ids[1:].view(5, T))[1]
    assert np.mean(line) == pytest.approx(loss.item(), rel=1e-4) == pytest.approx(mean[0], rel=1e-4)


def test_a_file_of_another_tokenizer_is_an_error(storyteller, tmp_path):
    (tmp_path / "stories.txt").write_text("A story of another kind.\n" * 2_000)
    storyllm.prepare(storyllm.DataConfig(source=str(tmp_path / "stories.txt"), tokenizer="bpe:257"), tmp_path / "data")
    with pytest.raises(StoryLLMError, match="prepare the data with that one"):
        plot_loss_by_position(storyteller, tmp_path / "data" / "validation.bin")
