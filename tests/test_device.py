"""What "auto" becomes, on this machine and on GPUs that this machine does not have."""

import types

import pytest
import torch

from storyllm import RECIPES, GPTConfig, StoryLLMError, TrainConfig
from storyllm.device import auto_dtype, choose_device, choose_machine

T4 = types.SimpleNamespace(name="Tesla T4", capability=(7, 5), total_memory=15_828_320_256)
H200 = types.SimpleNamespace(name="NVIDIA H200", capability=(9, 0), total_memory=150_109_880_320)
A100 = types.SimpleNamespace(name="NVIDIA A100-SXM4-40GB", capability=(8, 0), total_memory=42_405_855_232)


@pytest.fixture
def gpu(monkeypatch):
    """Makes PyTorch's questions about the hardware be answered as the given GPU would."""

    def pretend(card):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)  # as on a T4, emulated
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: card.name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: card.capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: card)

    return pretend


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_bf16_from_compute_capability_8_on(capability, dtype):
    assert auto_dtype(capability)[0] == dtype


def test_a_t4_trains_in_fp16_with_a_scaler(gpu):
    gpu(T4)
    machine = choose_machine(TrainConfig(), GPTConfig())
    assert machine.device.type == "cuda"
    assert machine.dtype == torch.float16
    assert "T4" in machine.why
    assert "7.5" in machine.why
    assert 32 <= machine.micro_batch_size <= 128


def test_an_a100_trains_in_bf16(gpu):
    gpu(A100)
    machine = choose_machine(TrainConfig(), GPTConfig())
    assert machine.dtype == torch.bfloat16
    assert machine.micro_batch_size > 128


@pytest.mark.parametrize(("card", "windows"), [(T4, 64), (A100, 256), (H200, 512)])
def test_a_gpu_takes_windows_in_equal_parts_of_an_update(gpu, card, windows):
    """A part of another size would have to be compiled for itself."""
    gpu(card)
    assert choose_machine(TrainConfig(), GPTConfig()).micro_batch_size == windows


def test_an_update_that_does_not_divide_is_still_taken_in_large_parts(gpu):
    gpu(T4)
    config = TrainConfig(batch_size=151, gradient_accumulation_steps=1)  # a prime number
    assert choose_machine(config, GPTConfig()).micro_batch_size == 117


def test_compilation_is_for_runs_that_are_worth_it(gpu, monkeypatch):
    monkeypatch.setattr("storyllm.device.find_spec", lambda name: name)
    gpu(T4)
    faithful, demo = RECIPES["faithful"], RECIPES["demo"]
    machine = choose_machine(faithful.train, faithful.model)
    assert machine.compile and "compiled (a run of some 15.4 minutes, it pays from 5.0 minutes on)" in machine.why
    machine = choose_machine(demo.train, demo.model)
    assert not machine.compile and "not compiled (a run of some 1 seconds, it pays from" in machine.why
    short = faithful.override({"train.stop_at": 1_000})
    assert not choose_machine(short.train, short.model).compile
    assert choose_machine(TrainConfig(compile=True), demo.model).compile
    assert not choose_machine(TrainConfig(compile=False), faithful.model).compile
    gpu(H200)  # does it in a minute anyway
    assert not choose_machine(faithful.train, faithful.model).compile
    gpu(types.SimpleNamespace(name="Some GPU", capability=(8, 6), total_memory=8 << 30))  # as if it were a T4
    assert choose_machine(faithful.train, faithful.model).compile
    monkeypatch.setattr("storyllm.device.find_spec", lambda name: None)
    machine = choose_machine(faithful.train, faithful.model)
    assert not machine.compile and "not compiled (triton is not installed)" in machine.why


def test_the_rate_of_a_known_gpu_is_known(gpu):
    gpu(T4)
    assert choose_machine(TrainConfig(), GPTConfig()).peak_flops == 65e12
    assert choose_machine(TrainConfig(dtype="float32"), GPTConfig()).peak_flops is None


def test_a_larger_model_gets_fewer_windows_at_once(gpu):
    gpu(T4)
    small, large = (RECIPES[name].model for name in ("context-1024", "gpt2-small"))
    assert choose_machine(TrainConfig(), large).micro_batch_size < choose_machine(TrainConfig(), small).micro_batch_size
    huge = GPTConfig(n_layer=200, n_embd=6144)
    assert choose_machine(TrainConfig(), huge).micro_batch_size == 1


def test_an_update_is_never_exceeded():
    config = TrainConfig(batch_size=2, gradient_accumulation_steps=3, device="cpu")
    assert choose_machine(config, GPTConfig(n_layer=1, n_embd=6, block_size=8)).micro_batch_size == 6


def test_the_cpu_computes_in_float32_and_plainly():
    machine = choose_machine(TrainConfig(device="cpu"), GPTConfig())
    assert (machine.device.type, machine.dtype, machine.compile) == ("cpu", torch.float32, False)
    assert not machine.grad_scaler().is_enabled()


def test_what_is_named_is_taken():
    config = TrainConfig(device="cpu", dtype="bfloat16", compile=True, micro_batch_size=5)
    machine = choose_machine(config, GPTConfig())
    assert (machine.dtype, machine.compile, machine.micro_batch_size) == (torch.bfloat16, True, 5)
    with machine.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    half = choose_machine(TrainConfig(device="cpu", dtype="float16"), GPTConfig())
    assert half.grad_scaler().is_enabled()


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "meta!", "xpu"])
def test_a_device_that_is_not_here_is_refused_in_one_line(name):
    with pytest.raises(StoryLLMError, match="not on this machine, expected"):
        choose_device(name)
