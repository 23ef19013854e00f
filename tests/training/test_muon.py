"""Muon: against PyTorch's, and the properties of an orthogonalized update."""

from __future__ import annotations

import pytest
import torch

from storyllm.training.muon import Muon, orthogonalize


def gradients(*shapes: tuple[int, int], count: int = 3) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(count)]


def updated(make_optimizer, start: list[torch.Tensor], steps: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    weights = [torch.nn.Parameter(weight.clone()) for weight in start]
    optimizer = make_optimizer(weights)
    for step in steps:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return [weight.detach() for weight in weights]


def test_updates_are_those_of_pytorch():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("PyTorch has Muon from version 2.9 on")
    shapes = [(8, 8), (8, 32), (32, 8), (8, 8)]
    (start,), steps = gradients(*shapes, count=1), gradients(*shapes)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    expected = updated(
        lambda weights: torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw", **options), start, steps
    )
    ours = updated(lambda w: Muon([{"params": w, "weight_decay": 0.1}], 1e-2, dtype=torch.bfloat16), start, steps)
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two, atol=5e-4, rtol=0)  # bf16 has 3 digits; an update is about 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_values_become_about_one_whatever_their_scale(dtype, scale):
    matrices = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0)) * scale
    singular = torch.linalg.svdvals(orthogonalize(matrices, dtype).float())
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_orthogonalization_keeps_the_singular_vectors():
    matrix = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    norms = s / s.norm()
    for _ in range(5):  # on singular values, a Newton-Schulz step is this polynomial
        norms = 3.4445 * norms - 4.7750 * norms**3 + 2.0315 * norms**5
    torch.testing.assert_close(orthogonalize(matrix), u @ torch.diag_embed(norms) @ vh, atol=1e-4, rtol=0)


def test_parts_are_updated_as_separate_matrices():
    ((stacked,),), ((gradient,),) = gradients((24, 8), count=1), gradients((24, 8), count=1)
    (whole,) = updated(lambda w: Muon([{"params": w, "parts": 3}], 1e-2), [stacked], [[gradient]])
    parts = updated(lambda w: Muon(w, 1e-2), list(stacked.chunk(3)), [list(gradient.chunk(3))])
    torch.testing.assert_close(whole, torch.cat(parts))


def test_an_update_has_the_size_of_adamws():
    for shape in [(64, 64), (64, 256), (256, 64)]:
        ((gradient,),) = gradients(shape, count=1)
        (change,) = updated(lambda w: Muon(w, 1.0), [torch.zeros(shape)], [[gradient]])
        assert change.square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


def test_a_zero_gradient_changes_nothing_and_weights_without_one_are_left_alone():
    weights = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    weights[0].grad = torch.zeros(4, 4)
    Muon(weights, 1.0).step()
    assert all(torch.equal(weight, torch.ones(4, 4)) for weight in weights)
