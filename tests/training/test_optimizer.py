"""The learning rate schedule and the optimizers."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storyllm import GPT, RECIPES, GPTConfig, TrainConfig, lr_at
from storyllm.training.muon import Muon
from storyllm.training.optimizer import load_optimizer_state, make_optimizer, parameter_groups

# Iteration and learning rate, as printed by two published runs of the specification's recipe
# (extremecoder-rgb/StoryLLM and maverick0721/SLM-from-scratch).
PUBLISHED_RATES = """
  500 0.00007    1000 0.00010    1500 0.00010    2000 0.00010    2500 0.00011    3000 0.00011    3500 0.00012
 4000 0.00012    4500 0.00013    5000 0.00014    5500 0.00015    6000 0.00016    6500 0.00018    7000 0.00019
 7500 0.00020    8000 0.00022    8500 0.00024    9000 0.00025    9500 0.00027   10000 0.00028   10500 0.00030
11000 0.00032   11500 0.00033   12000 0.00035   12500 0.00036   13000 0.00038   13500 0.00040   14000 0.00041
14500 0.00042   15000 0.00044   15500 0.00045   16000 0.00046   16500 0.00047   17000 0.00048   17500 0.00048
18000 0.00049   18500 0.00049   19000 0.00050   19500 0.00050
""".split()

# The same 200 examples in every run, however slow the machine is.
examples = settings(max_examples=200, deadline=None, derandomize=True, database=None)


# lr_at


def test_faithful_has_the_published_learning_rates():
    printed = dict(zip(map(int, PUBLISHED_RATES[::2]), PUBLISHED_RATES[1::2], strict=True))
    assert list(printed) == list(range(500, 20_000, 500))
    assert {i: f"{lr_at(i, RECIPES['faithful'].train):.5f}" for i in printed} == printed


COSINE = TrainConfig(max_iters=100, warmup_iters=10, warmup_start_factor=0.5, learning_rate=1.0, min_lr=0.1)
WSD = TrainConfig(
    **{"schedule": "wsd", "max_iters": 100, "warmup_iters": 10, "warmup_start_factor": 0.0, "decay_fraction": 0.4},
    **{"learning_rate": 2.0, "min_lr": 0.0},
)
WSD_RATES = {0: 0.0, 5: 1.0, 10: 2.0, 35: 2.0, 60: 2.0, 70: 1.5, 80: 1.0, 90: 0.5, 99: 0.05, 100: 0.0, 1000: 0.0}


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        pytest.param(COSINE, {0: 0.5, 5: 0.75, 10: 1.0, 55: 0.55, 100: 0.1, 1000: 0.1}, id="cosine"),
        pytest.param(WSD, WSD_RATES, id="wsd"),
        pytest.param(dataclasses.replace(WSD, decay_fraction=0.0), {10: 2.0, 50: 2.0, 99: 2.0}, id="no decay"),
        pytest.param(
            dataclasses.replace(WSD, warmup_iters=20, decay_fraction=1.0, min_lr=0.2),
            {0: 0.0, 10: 1.0, 20: 2.0, 60: 1.1, 100: 0.2},
            id="decay starts after warmup",
        ),
        pytest.param(
            dataclasses.replace(COSINE, warmup_iters=0, min_lr=1.0), dict.fromkeys(range(101), 1.0), id="constant"
        ),
        pytest.param(
            dataclasses.replace(COSINE, warmup_iters=100, warmup_start_factor=0.0),
            {i: i / 100 for i in range(100)},
            id="only warmup",
        ),
    ],
)
def test_learning_rates_match_the_table(config, rates):
    assert {i: pytest.approx(lr_at(i, config)) for i in rates} == rates


RATES = st.floats(1e-12, 1e3) | st.sampled_from([1e-4, 3e-3])
ITERATIONS = st.integers(0, 12) | st.integers(0, 100_000)
SCHEDULES = st.builds(
    TrainConfig,
    max_iters=ITERATIONS.map(lambda i: i + 1),
    warmup_iters=ITERATIONS,
    schedule=st.sampled_from(get_args(get_type_hints(TrainConfig)["schedule"])),
    decay_fraction=st.floats(0, 1),
    learning_rate=RATES,
    min_lr=RATES | st.just(0.0),
    warmup_start_factor=st.floats(0, 1),
)


def decay_iters(config: TrainConfig) -> float:
    after_warmup = config.max_iters - config.warmup_iters
    return after_warmup if config.schedule == "cosine" else min(config.decay_fraction * config.max_iters, after_warmup)


def corners(config: TrainConfig) -> set[int]:
    """The iterations around which the schedule changes."""
    decay_start = math.floor(config.max_iters - decay_iters(config))
    places = (0, config.warmup_iters, (config.warmup_iters + config.max_iters) // 2, decay_start, config.max_iters)
    return {max(0, place + offset) for place in places for offset in (-1, 0, 1)}


@examples
@given(SCHEDULES, st.lists(st.integers(0, 100_010)))
def test_the_learning_rate_stays_between_its_ends(config, iterations):
    ends = [config.learning_rate, config.min_lr]
    if config.warmup_iters:
        ends.append(config.warmup_start_factor * config.learning_rate)
    rounding = 1e-12 * max(ends)
    for iteration in corners(config) | set(iterations):
        assert min(ends) - rounding <= lr_at(iteration, config) <= max(ends) + rounding


@examples
@given(SCHEDULES, st.lists(st.integers(0, 100_000)))
def test_the_learning_rate_does_not_jump(config, iterations):
    """It never changes faster than its warmup or decay does."""
    rounding = 1e-12 * max(config.learning_rate, config.min_lr)
    warmup_slope = (1 - config.warmup_start_factor) * config.learning_rate / max(1, config.warmup_iters)
    steepest = abs(config.learning_rate - config.min_lr) / max(1, decay_iters(config))
    steepest *= math.pi / 2 if config.schedule == "cosine" else 1
    for iteration in {i for i in corners(config) | set(iterations) if i < config.max_iters}:
        change = abs(lr_at(iteration + 1, config) - lr_at(iteration, config))
        if iteration >= config.warmup_iters:
            assert change <= steepest * (1 + 1e-6) + rounding
        elif iteration + 1 < config.max_iters:  # no batch is processed at max_iters
            assert change == pytest.approx(warmup_slope, rel=1e-6, abs=rounding)


@examples
@given(SCHEDULES)
def test_the_learning_rate_reaches_its_ends(config):
    if config.warmup_iters:
        assert lr_at(0, config) == pytest.approx(config.warmup_start_factor * config.learning_rate)
    if config.warmup_iters < config.max_iters:
        assert {lr_at(config.max_iters + i, config) for i in (0, 1, 1000)} == {config.min_lr}
        decay_start = math.floor(config.max_iters - decay_iters(config))
        for iteration in {config.warmup_iters, min(decay_start, config.max_iters - 1)}:
            rounding = 1e-12 * max(config.learning_rate, config.min_lr)
            assert lr_at(iteration, config) == pytest.approx(config.learning_rate, rel=1e-9, abs=rounding)


# Optimizers


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, n_layer=2, n_head=2, n_embd=8, dropout=0.0))


def names_by_group(model: GPT, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def update(model: GPT, *optimizers: torch.optim.Optimizer) -> None:
    x, y = torch.randint(50, (2, 4, 8), generator=torch.Generator().manual_seed(1))
    model.loss(x, y).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_faithful_uses_the_specified_optimizer(model):
    optimizer = make_optimizer(model, RECIPES["faithful"].train)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_adamw_decays_matrices_but_not_biases_or_layer_norms(model):
    decayed, not_decayed = names_by_group(model, make_optimizer(model, TrainConfig()))
    assert all(name.endswith("bias") or "ln_" in name for name in not_decayed)
    assert not any(name.endswith("bias") or "ln_" in name for name in decayed)
    assert sorted(decayed + not_decayed) == sorted(name for name, _ in model.named_parameters())  # tied weights once


def test_muon_gets_exactly_the_matrices_in_the_blocks(model):
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon", muon_lr_scale=0.5, weight_decay=0.2))
    qkv, hidden, embeddings, vectors = names_by_group(model, optimizer)
    layers = ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert qkv == [f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)]
    assert sorted(hidden) == sorted(f"transformer.h.{i}.{layer}.weight" for i in range(2) for layer in layers)
    assert embeddings == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert sorted(qkv + hidden + embeddings + vectors) == sorted(name for name, _ in model.named_parameters())
    assert [group["lr_scale"] for group in optimizer.param_groups] == [0.5, 0.5, 1.0, 1.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.2, 0.0]
    assert [group.get("parts") for group in optimizer.param_groups] == [3, 1, None, None]  # queries, keys and values


def test_the_combined_optimizer_updates_like_muon_and_adamw_alone(model):
    config = TrainConfig(optimizer="muon", learning_rate=1e-2)
    other = copy.deepcopy(model)
    combined = make_optimizer(model, config)
    muon_groups, adamw_groups = parameter_groups(other, config)
    muon = Muon(muon_groups, lr=1e-2)
    adamw = torch.optim.AdamW(adamw_groups, lr=1e-2, betas=(0.9, 0.95))
    for _ in range(3):
        update(model, combined)
        update(other, muon, adamw)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_loaded_optimizer_makes_the_same_updates(model, name):
    config = TrainConfig(optimizer=name)
    optimizer = make_optimizer(model, config)
    update(model, optimizer)
    other = copy.deepcopy(model)
    loaded = make_optimizer(other, config)
    load_optimizer_state(loaded, copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        update(model, optimizer)
        update(other, loaded)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_loading_keeps_the_hyperparameters_of_the_recipe(model):
    saved = make_optimizer(model, TrainConfig(weight_decay=0.5)).state_dict()  # as before the first update
    optimizer = make_optimizer(model, TrainConfig())
    load_optimizer_state(optimizer, saved)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("change", ["optimizer", "parameters", "shape"])
def test_the_state_of_another_optimizer_is_rejected(model, change):
    optimizer = make_optimizer(model, TrainConfig())
    if change == "optimizer":
        other = make_optimizer(model, TrainConfig(optimizer="muon"))
    elif change == "parameters":
        other = make_optimizer(model, TrainConfig())
        other.param_groups.pop()
    else:
        other = optimizer
    update(model, other)
    saved = other.state_dict()
    if change == "shape":
        saved["state"][0]["exp_avg"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="parameter"):
        load_optimizer_state(optimizer, saved)
