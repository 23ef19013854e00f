"""Linear layers with bfloat16 and int8 weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from storyllm import StoryLLMError, Storyteller, evaluate, load
from storyllm.model.quantization import FORMATS, convert_linear_layers


@pytest.mark.parametrize(("weights", "tolerance"), [("bfloat16", 0.01), ("int8", 0.03)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 5, 48)])
def test_outputs_are_close_to_those_of_float32(weights, tolerance, bias, shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 70, bias=bias), torch.randn(shape)
    layer.weight.data *= torch.logspace(-3, 3, 70)[:, None]  # each output needs its own scale
    expected = layer(x).detach()
    error = (FORMATS[weights](layer)(x) - expected).abs() / (expected.abs().mean(dim=tuple(range(x.ndim - 1))) + 1e-6)
    assert 0 < error.mean().item() < tolerance


@pytest.mark.parametrize("weights", FORMATS)
def test_every_linear_layer_is_converted_and_the_head_is_untied(weights, make_model, random_ids):
    model, original = make_model(), make_model()
    convert_linear_layers(model, weights)
    assert not [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    assert torch.equal(model.transformer["wte"].weight, original.transformer["wte"].weight)
    logits, expected = model(random_ids())[0], original(random_ids())[0]
    assert 0 < (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("weights", ["auto", *FORMATS])
def test_a_loaded_model_generates_and_its_loss_hardly_changes(weights, tiny_run, tiny_data):
    exact = load(tiny_run / "best_model_params.pt", "cpu")
    converted = load(tiny_run / "best_model_params.pt", "cpu", weights)
    assert isinstance(converted, Storyteller)
    assert converted.generate("One day", max_new_tokens=20, seed=0).startswith("One day")
    losses = [evaluate(storyteller, tiny_data / "validation.bin").loss for storyteller in (exact, converted)]
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
    assert (losses[1] == losses[0]) == (weights == "auto")  # the model is too small to profit


def test_another_format_or_device_is_rejected(tiny_run, make_model):
    with pytest.raises(StoryLLMError, match="weights is 'int4', must be 'auto', 'float32'"):
        load(tiny_run / "best_model_params.pt", weights="int4")
    with pytest.raises(StoryLLMError, match="weights 'int8' are for a CPU, the model is on meta"):
        convert_linear_layers(make_model().to("meta"), "int8")
