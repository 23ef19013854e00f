"""The arithmetic of a token, GPUs' rates by name, and the time that is left."""

import pytest
import torch

from storyllm import GPT, RECIPES, GPTConfig
from storyllm.pace import PEAK_FLOPS, Pace, duration, flops_per_token, model_flops_utilization, peak_flops


def test_operations_of_a_token_by_hand():
    # Two layers of 12 * 8 * 8 weights, a head of 10 * 8: 6 operations each; attention over 5 tokens.
    config = GPTConfig(vocab_size=10, block_size=5, n_layer=2, n_head=2, n_embd=8)
    assert flops_per_token(config) == 6 * (2 * 12 * 64 + 80) + 12 * 2 * 8 * 5


def test_the_weights_that_multiply_are_the_models_matrices():
    config = RECIPES["faithful"].model
    matrices = sum(p.numel() for name, p in GPT(config).named_parameters() if p.ndim == 2 and "wpe" not in name)
    assert flops_per_token(config) - 12 * config.n_layer * config.n_embd * config.block_size == 6 * matrices


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 3070 Laptop GPU", None),
        ("NVIDIA L40S", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("CPU", None),
        ("Apple GPU (MPS)", None),
    ],
)
def test_the_rate_of_a_gpu_by_its_name(name, rate):
    assert peak_flops(name, torch.float16) == rate
    assert peak_flops(name, torch.float32) is None


def test_every_rate_in_the_table_can_be_found():
    for name, rate in PEAK_FLOPS.items():
        assert peak_flops(f"NVIDIA {name}", torch.bfloat16) == rate


def test_mfu_is_the_share_of_the_rate():
    config = RECIPES["faithful"].model
    assert model_flops_utilization(65e12 / flops_per_token(config), config, 65e12) == pytest.approx(1.0)
    assert model_flops_utilization(40_000, config, 65e12) == pytest.approx(0.1125, abs=0.001)


def test_the_time_that_is_left():
    pace = Pace(evaluation_windows=30)
    pace.add_update(10, 20.0)
    assert pace.seconds_left(100, 0) == 200
    assert pace.seconds_left(100, 2) == 200 + 2 * 20  # a forward pass: a third of 2 seconds a window
    pace.add_evaluation(5.0)
    pace.add_evaluation(7.0)
    pace.add_update(30, 20.0)
    assert pace.seconds_left(100, 2) == 100 + 2 * 6
    assert pace.seconds_left(0, 0) == 0
    assert Pace(30).seconds_left(100, 2) == 0  # nothing known yet


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 seconds"), (89, "89 seconds"), (90, "1.5 minutes"), (7_200, "2.0 hours")]
)
def test_durations_as_a_person_says_them(seconds, text):
    assert duration(seconds) == text
