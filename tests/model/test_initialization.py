"""The initial weights, GPT-2's and those that a config asks for."""

from __future__ import annotations

import math

import pytest
import torch

from storyllm import GPT, GPTConfig

CONFIG = {"vocab_size": 1_000, "block_size": 128, "n_layer": 8, "n_head": 4, "n_embd": 256}


def make(seed: int = 0, **changes: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(GPT(GPTConfig(**{**CONFIG, **changes})).named_parameters())


def test_the_initialization_is_that_of_gpt2():
    for name, parameter in make().items():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


@pytest.mark.parametrize(
    ("field", "name", "factor"),
    [
        ("embedding_std", "transformer.wte.weight", 25.0),
        ("position_std", "transformer.wpe.weight", 25.0),
        ("final_norm_gain", "transformer.ln_f.weight", 0.5),
    ],
)
def test_a_field_scales_one_parameter(field, name, factor):
    default, changed = make(), make(**{field: 0.5})
    torch.testing.assert_close(changed.pop(name), default.pop(name) * factor)
    assert all(torch.equal(changed[other], parameter) for other, parameter in default.items())


def test_attention_starts_by_copying_what_it_attends_to():
    weights = make(copy_strength=0.3)
    for layer in range(8):
        values = weights[f"transformer.h.{layer}.attn.c_attn.weight"][512:]
        projection = weights[f"transformer.h.{layer}.attn.c_proj.weight"]
        torch.testing.assert_close(projection @ values, 0.3 * torch.eye(256), atol=1e-5, rtol=0)
    first, second = (weights[f"transformer.h.{layer}.attn.c_proj.weight"] for layer in (0, 1))
    assert not torch.allclose(first, second)
    queries = weights["transformer.h.0.attn.c_attn.weight"][:512]
    assert torch.equal(queries, make()["transformer.h.0.attn.c_attn.weight"][:512])
