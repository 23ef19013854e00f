"""The schedule against the rates that the published runs printed, and what is decayed."""

import pytest
import torch

from storyllm import GPT, RECIPES, GPTConfig, TrainConfig, lr_at
from storyllm.optim import make_optimizer, parameter_groups

# Iteration and learning rate, as two published runs of the specification's recipe printed them
# (extremecoder-rgb/StoryLLM and maverick0721/SLM-from-scratch): a warm-up over 1,000 iterations, then up to 5e-4.
PUBLISHED_RATES = """
  500 0.00007    1000 0.00010    1500 0.00010    2000 0.00010    2500 0.00011    3000 0.00011    3500 0.00012
 4000 0.00012    4500 0.00013    5000 0.00014    5500 0.00015    6000 0.00016    6500 0.00018    7000 0.00019
 7500 0.00020    8000 0.00022    8500 0.00024    9000 0.00025    9500 0.00027   10000 0.00028   10500 0.00030
11000 0.00032   11500 0.00033   12000 0.00035   12500 0.00036   13000 0.00038   13500 0.00040   14000 0.00041
14500 0.00042   15000 0.00044   15500 0.00045   16000 0.00046   16500 0.00047   17000 0.00048   17500 0.00048
18000 0.00049   18500 0.00049   19000 0.00050   19500 0.00050
""".split()


@pytest.mark.parametrize(("iteration", "printed"), list(zip(PUBLISHED_RATES[::2], PUBLISHED_RATES[1::2], strict=True)))
def test_the_published_rates(iteration, printed):
    assert f"{lr_at(int(iteration), RECIPES['faithful'].train):.5f}" == printed


def test_the_published_rates_are_all_there():
    assert [int(i) for i in PUBLISHED_RATES[::2]] == list(range(500, 20_000, 500))


def test_the_schedules_corners():
    config = TrainConfig(max_iters=100, warmup_iters=10, warmup_start=0.5, learning_rate=1.0, min_lr=0.1)
    expected = {0: 0.5, 5: 0.75, 10: 1.0, 55: 0.55, 100: 0.1, 1000: 0.1}
    assert {i: pytest.approx(lr_at(i, config)) for i in expected} == expected


def test_no_warm_up_and_nothing_but_warm_up():
    flat = TrainConfig(max_iters=100, warmup_iters=0, learning_rate=1.0, min_lr=1.0)
    assert {lr_at(i, flat) for i in range(101)} == {1.0}
    warming = TrainConfig(max_iters=10, warmup_iters=10, warmup_start=0.0, learning_rate=1.0)
    assert [lr_at(i, warming) for i in range(10)] == pytest.approx([i / 10 for i in range(10)])


def test_matrices_are_decayed_and_vectors_are_not():
    model = GPT(GPTConfig(vocab_size=50, n_layer=2, n_head=2, n_embd=8))
    decayed, plain = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("bias") or "ln_" in names[id(p)] for p in plain["params"])
    assert not any(names[id(p)].endswith("bias") or "ln_" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)  # the tied weight once


def test_the_optimizer_is_the_specifications():
    optimizer = make_optimizer(GPT(GPTConfig(vocab_size=50, n_layer=1, n_head=1, n_embd=8)), RECIPES["faithful"].train)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 2
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
