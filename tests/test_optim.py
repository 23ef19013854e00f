"""The schedule against the rates that the published runs printed, and what is decayed."""

import copy
import dataclasses

import pytest
import torch

from storyllm import GPT, RECIPES, GPTConfig, StoryLLMError, TrainConfig, lr_at
from storyllm.optim import make_optimizer, parameter_groups, restore_optimizer

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


def test_the_flat_schedule():
    config = TrainConfig(
        schedule="flat",
        max_iters=100,
        warmup_iters=10,
        warmup_start=0.0,
        learning_rate=2.0,
        decay_share=0.4,
        min_lr=0.0,
    )
    expected = {0: 0.0, 5: 1.0, 10: 2.0, 35: 2.0, 60: 2.0, 70: 1.5, 80: 1.0, 90: 0.5, 99: 0.05, 100: 0.0, 1000: 0.0}
    assert {i: pytest.approx(lr_at(i, config)) for i in expected} == expected
    never_falling = dataclasses.replace(config, decay_share=0.0)
    assert [lr_at(i, never_falling) for i in (50, 99)] == [2.0, 2.0]


def test_a_decay_begins_after_the_warm_up():
    config = TrainConfig(
        schedule="flat",
        max_iters=100,
        warmup_iters=20,
        warmup_start=0.0,
        learning_rate=1.0,
        decay_share=1.0,
        min_lr=0.2,
    )
    expected = {0: 0.0, 10: 0.5, 20: 1.0, 60: 0.6, 100: 0.2}
    assert {i: pytest.approx(lr_at(i, config)) for i in expected} == expected


def test_no_warm_up_and_nothing_but_warm_up():
    flat = TrainConfig(max_iters=100, warmup_iters=0, learning_rate=1.0, min_lr=1.0)
    assert {lr_at(i, flat) for i in range(101)} == {1.0}
    warming = TrainConfig(max_iters=10, warmup_iters=10, warmup_start=0.0, learning_rate=1.0)
    assert [lr_at(i, warming) for i in range(10)] == pytest.approx([i / 10 for i in range(10)])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, n_layer=2, n_head=2, n_embd=8, dropout=0.0))


def test_matrices_are_decayed_and_vectors_are_not(model):
    muon, (decayed, plain) = parameter_groups(model, TrainConfig(weight_decay=0.1))
    assert muon == []
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("bias") or "ln_" in names[id(p)] for p in plain["params"])
    assert not any(names[id(p)].endswith("bias") or "ln_" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)  # the tied weight once


def test_muon_gets_exactly_the_hidden_matrices(model):
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon", muon_lr_scale=0.5, weight_decay=0.2))
    names = {id(p): name for name, p in model.named_parameters()}
    hidden, decayed, plain = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sorted(hidden) == sorted(f"transformer.h.{i}.{layer}.weight" for i in range(2) for layer in layers)
    assert decayed == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert sorted(hidden + decayed + plain) == sorted(names.values())
    assert [group["lr_scale"] for group in optimizer.param_groups] == [0.5, 1.0, 1.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.0]
    assert [type(part) for part in (optimizer.muon, optimizer.adamw)] == [torch.optim.Muon, torch.optim.AdamW]


def step(model, optimizer, rate=1e-2):
    x = torch.randint(50, (2, 4, 8), generator=torch.Generator().manual_seed(1))
    model.loss(x[0], x[1]).backward()
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad()


def test_the_two_as_one_do_what_each_does_alone(model):
    other = copy.deepcopy(model)
    config = TrainConfig(optimizer="muon", muon_lr_scale=0.5)
    optimizer = make_optimizer(model, config)
    muon_groups, adamw_groups = parameter_groups(other, config)
    parts = [
        torch.optim.Muon(muon_groups, lr=1e-2 * 0.5, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw_groups, lr=1e-2, betas=(0.9, 0.95)),
    ]
    for _ in range(3):
        step(model, optimizer)
        x = torch.randint(50, (2, 4, 8), generator=torch.Generator().manual_seed(1))
        other.loss(x[0], x[1]).backward()
        for part in parts:
            part.step()
            part.zero_grad()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_optimizer_goes_on_to_the_bit(model, name):
    config = TrainConfig(optimizer=name)
    optimizer = make_optimizer(model, config)
    step(model, optimizer)
    other = copy.deepcopy(model)
    restored = make_optimizer(other, config)
    restore_optimizer(restored, copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(model, optimizer)
        step(other, restored)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_the_state_of_another_optimizer_is_refused(model):
    muon, adamw = (make_optimizer(model, TrainConfig(optimizer=name)) for name in ("muon", "adamw"))
    step(model, muon)
    with pytest.raises(ValueError, match="of parameter 0 is another optimizer's"):
        restore_optimizer(adamw, muon.state_dict())


def test_a_pytorch_without_muon_is_told_so(model, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(StoryLLMError, match=r"optimizer is 'muon', which PyTorch has from 2\.9 on, and this is"):
        make_optimizer(model, TrainConfig(optimizer="muon"))


def test_the_optimizer_is_the_specifications():
    optimizer = make_optimizer(GPT(GPTConfig(vocab_size=50, n_layer=1, n_head=1, n_embd=8)), RECIPES["faithful"].train)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 2
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
