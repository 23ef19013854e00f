"""Figures of weights and attention, compared with what the model computes."""

from __future__ import annotations

import pytest
import torch
from matplotlib.text import Text

import storyllm
from storyllm import StoryLLMError, nearest_tokens, plot_attention, plot_position_similarity
from storyllm.plots.internals import attention_weights


@pytest.fixture
def storyteller(tiny_run):
    return storyllm.load(tiny_run / "last.pt", device="cpu")


def test_attention_weights_give_the_output_of_attention(storyteller):
    model = storyteller.model
    idx = torch.randint(model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    expected, values = [], []
    for block in model.transformer["h"]:
        block.attn.c_attn.register_forward_hook(
            lambda module, inputs, output: values.append(output.chunk(3, dim=-1)[2])
        )
        block.attn.c_proj.register_forward_pre_hook(lambda module, inputs: expected.append(inputs[0]))
    weights = attention_weights(model, idx)
    assert len(weights) == model.config.n_layer
    for layer, v, y in zip(weights, values, expected, strict=True):
        assert layer.shape == (2, model.config.n_head, 7, 7)
        heads = v.view(2, 7, model.config.n_head, -1).transpose(1, 2)
        torch.testing.assert_close((layer @ heads).transpose(1, 2).reshape(y.shape), y)


def test_attention_leaves_no_hooks_and_keeps_the_mode(storyteller):
    model = storyteller.model.train()
    attention_weights(model, torch.zeros(1, 3, dtype=torch.long))
    assert model.training
    assert not any(block.attn.c_attn._forward_hooks for block in model.transformer["h"])


def test_the_figure_of_attention_has_a_panel_for_each_head(storyteller):
    text = "One day"
    figure = plot_attention(storyteller, text)
    config = storyteller.model.config
    assert len(figure.axes) == config.n_layer * config.n_head
    ids = torch.tensor([storyteller.tokenizer.encode_ordinary(text)])
    last = attention_weights(storyteller.model, ids)[-1][0, -1]
    torch.testing.assert_close(torch.tensor(figure.axes[-1].images[0].get_array()), last)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[-1] == f"layer {config.n_layer - 1}, head {config.n_head - 1}"


@pytest.mark.parametrize("text", ["", "word " * 300])
def test_a_text_that_does_not_fit_is_an_error(storyteller, text):
    with pytest.raises(StoryLLMError, match=r"tokens, must have 1 to \d+ \(block_size\)"):
        plot_attention(storyteller, text)


def test_position_similarity_is_the_cosine(storyteller, tmp_path):
    figure = plot_position_similarity(storyteller.model, tmp_path / "positions.png")
    image = torch.tensor(figure.axes[0].images[0].get_array())
    wpe = storyteller.model.transformer["wpe"].weight.detach()
    torch.testing.assert_close(image[3, 5], torch.cosine_similarity(wpe[3], wpe[5], dim=0))
    assert "cosine similarity" in [text.get_text() for text in figure.findobj(Text)]


def test_nearest_tokens_are_those_with_the_most_similar_embeddings(storyteller):
    tokenizer, wte = storyteller.tokenizer, storyteller.model.transformer["wte"].weight
    a, b, c = (tokenizer.encode_ordinary(letter)[0] for letter in "abc")
    with torch.no_grad():
        wte[b] = 3 * wte[a]  # the same direction: cosine similarity 1
        wte[c] = -wte[a]
    first, *rows = nearest_tokens({"this": storyteller, "that": storyteller}, ["a"], count=2).split("\n")
    assert first.split() == ["token", "this", "that"]
    assert rows[0].split()[:2] == ["'a'", "b"]
    assert "c" not in rows[0].split()


def test_a_text_of_several_tokens_has_no_neighbors(storyteller):
    with pytest.raises(StoryLLMError, match="tokens, must be one"):
        nearest_tokens({"this": storyteller}, ["unfathomable"])
