"""What "auto" selects, on this machine and on GPUs that PyTorch is made to report."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable

import pytest
import torch

from storyllm import GPT, RECIPES, GPTConfig, StoryLLMError, TrainConfig
from storyllm.device import (
    PEAK_FLOPS,
    auto_dtype,
    flops_per_token,
    is_out_of_memory,
    peak_flops,
    resolve_device,
    resolve_device_config,
)

T4 = types.SimpleNamespace(name="Tesla T4", capability=(7, 5), total_memory=15_828_320_256)
A100 = types.SimpleNamespace(name="NVIDIA A100-SXM4-40GB", capability=(8, 0), total_memory=42_405_855_232)
H200 = types.SimpleNamespace(name="NVIDIA H200", capability=(9, 0), total_memory=150_109_880_320)
UNKNOWN = types.SimpleNamespace(name="Some GPU", capability=(8, 6), total_memory=8 << 30)
OLD = types.SimpleNamespace(name="Tesla P100-PCIE-16GB", capability=(6, 0), total_memory=16 << 30)

FAITHFUL = RECIPES["faithful"]


# What PyTorch raises on a GPU that is too old for its kernels.
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be ..."


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes PyTorch report the given GPU, on which kernels run on the CPU, or raise an error."""
    ones = torch.ones

    def report(card: types.SimpleNamespace, error: str = "") -> None:
        def ones_on_the_cpu(*size: int, device: object = None, **options: object) -> torch.Tensor:
            if error and str(device).startswith("cuda"):
                raise RuntimeError(error)
            return ones(*size, **options)

        monkeypatch.setattr(torch, "ones", ones_on_the_cpu)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)  # on a T4, too: emulated
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: card.name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: card.capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: card)

    return report


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Python find triton, which torch.compile needs."""
    module = types.ModuleType("triton")
    module.__spec__ = importlib.machinery.ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", module)


# Device and number format


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (True, False, "cuda"), (False, False, "cpu")]
)
def test_auto_prefers_cuda(gpu, monkeypatch, cuda, mps, expected):
    if cuda:
        gpu(T4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == resolve_device() == torch.device(expected)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_is_too_old_is_rejected_with_what_to_choose(gpu, name):
    gpu(OLD, error=NO_KERNEL)
    with pytest.raises(StoryLLMError, match=r"the GPU Tesla P100.*\(CUDA error: no kernel image.*T4 x2.*device cpu"):
        resolve_device_config(TrainConfig(device=name), GPTConfig())
    assert resolve_device_config(TrainConfig(device="cpu"), GPTConfig()).name == "CPU"


def test_a_gpu_that_computes_is_used_whatever_its_age(gpu):
    gpu(OLD)
    assert resolve_device_config(TrainConfig(), GPTConfig()).name == OLD.name


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "meta!", "xpu", "cpu:x"])
def test_an_unavailable_device_is_rejected(name):
    with pytest.raises(StoryLLMError, match=f"{name!r}.*'auto'"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_a_named_device_is_used(name):
    assert resolve_device(name) == torch.device(name)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 0), "float16"), ((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")],
)
def test_bf16_is_used_from_compute_capability_8(capability, dtype):
    selected, reason = auto_dtype(capability)
    assert selected == getattr(torch, dtype)
    assert ".".join(map(str, capability)) in reason


def test_a_t4_trains_in_fp16_with_a_gradient_scaler_enabled(gpu):
    gpu(T4)
    config = resolve_device_config(TrainConfig(), GPTConfig())
    assert (config.device.type, config.dtype) == ("cuda", torch.float16)
    assert "T4" in config.description and "float16" in config.description and "7.5" in config.description


def test_an_a100_trains_in_bf16(gpu):
    gpu(A100)
    assert resolve_device_config(TrainConfig(), GPTConfig()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("capabilities", "width", "dtype"),
    [
        ({"avx512_bf16": True}, 384, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, 192, torch.bfloat16),
        ({"avx512_bf16": True}, 128, torch.float32),  # too narrow
        ({"avx512_f": True, "avx512_bf16": False}, 384, torch.float32),
        ({}, 384, torch.float32),
        (None, 384, torch.float32),  # PyTorch before 2.13 cannot tell
    ],
)
def test_a_cpu_with_native_bf16_uses_it(monkeypatch, capabilities, width, dtype):
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    model = GPTConfig(n_embd=width, n_head=4)
    assert resolve_device_config(TrainConfig(device="cpu"), model).dtype == dtype
    assert resolve_device_config(TrainConfig(device="cpu", dtype="float32"), model).dtype == torch.float32


def test_a_cpu_trains_in_float32_without_compilation(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    config = resolve_device_config(TrainConfig(device="cpu"), GPTConfig())
    assert (config.device.type, config.dtype, config.compile) == ("cpu", torch.float32, False)
    assert (config.name, config.peak_flops) == ("CPU", None)
    assert not config.grad_scaler().is_enabled()
    with config.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(("name", "scaled"), [("bfloat16", False), ("float16", True), ("float32", False)])
def test_a_requested_number_format_is_used(name, scaled):
    config = resolve_device_config(TrainConfig(device="cpu", dtype=name), GPTConfig())
    assert config.dtype == getattr(torch, name)
    assert config.grad_scaler().is_enabled() == scaled
    assert f"{name} (as requested)" in config.description
    with config.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == config.dtype


def test_requested_compilation_and_micro_batch_size_are_used():
    config = resolve_device_config(TrainConfig(device="cpu", compile=True, micro_batch_size=5), GPTConfig())
    assert (config.compile, config.micro_batch_size) == (True, 5)
    assert "micro-batch size 5" in config.description and "compiled (as requested)" in config.description


# Micro-batch size


@pytest.mark.parametrize(("card", "windows"), [(T4, 64), (A100, 256), (H200, 512)])
def test_a_gpus_micro_batches_divide_an_update(gpu, card, windows):
    """Otherwise the remainder would be compiled separately."""
    gpu(card)
    assert resolve_device_config(TrainConfig(), GPTConfig()).micro_batch_size == windows


def test_an_update_without_large_divisors_still_gets_large_micro_batches(gpu):
    gpu(T4)
    config = TrainConfig(batch_size=151, gradient_accumulation_steps=1)  # a prime number
    assert resolve_device_config(config, GPTConfig()).micro_batch_size == 117


def test_a_larger_model_gets_smaller_micro_batches(gpu):
    gpu(T4)
    sizes = [
        resolve_device_config(TrainConfig(), model).micro_batch_size
        for model in (FAITHFUL.model, RECIPES["context-1024"].model, RECIPES["gpt2-small"].model)
    ]
    assert sizes[0] > sizes[1] > sizes[2] >= 1
    assert resolve_device_config(TrainConfig(), GPTConfig(n_layer=200, n_embd=6144)).micro_batch_size == 1


def test_a_micro_batch_is_never_larger_than_an_update():
    config = TrainConfig(batch_size=2, gradient_accumulation_steps=3, device="cpu")
    assert resolve_device_config(config, GPTConfig(n_layer=1, n_embd=6, block_size=8)).micro_batch_size == 6


# Compilation


@pytest.mark.parametrize(
    ("card", "recipe", "changes", "compiled"),
    [
        (T4, "faithful", {}, True),
        (T4, "demo", {}, False),
        (T4, "faithful", {"train.stop_at": 1_000}, False),
        (T4, "demo", {"train.compile": True}, True),
        (T4, "faithful", {"train.compile": False}, False),
        (H200, "faithful", {}, False),  # takes about a minute anyway
        (UNKNOWN, "faithful", {}, True),  # counts as a T4
        (OLD, "faithful", {}, False),
    ],
)
def test_auto_compiles_long_runs_on_recent_gpus(gpu, triton, card, recipe, changes, compiled):
    gpu(card)
    recipe = RECIPES[recipe].override(changes)
    config = resolve_device_config(recipe.train, recipe.model)
    assert config.compile == compiled
    assert ("not compiled (" in config.description) != compiled


def test_the_reason_for_compilation_names_the_estimated_minutes(gpu, triton):
    gpu(T4)
    assert "15.4" in resolve_device_config(FAITHFUL.train, FAITHFUL.model).compile_reason


def test_without_triton_nothing_is_compiled(gpu, monkeypatch):
    gpu(T4)
    monkeypatch.setitem(sys.modules, "triton", None)
    config = resolve_device_config(FAITHFUL.train, FAITHFUL.model)
    assert not config.compile and "triton" in config.description


# FLOP/s


def test_flops_per_token_by_hand():
    # Two layers of 12 * 8 * 8 weights and a head of 10 * 8: 6 FLOPs each. Attention over 5 tokens.
    config = GPTConfig(vocab_size=10, block_size=5, n_layer=2, n_head=2, n_embd=8)
    assert flops_per_token(config) == 6 * (2 * 12 * 64 + 80) + 12 * 2 * 8 * 5


def test_flops_per_token_count_all_matrices_of_the_model():
    config = FAITHFUL.model
    with torch.device("meta"):
        model = GPT(config)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "wpe" not in name)
    assert flops_per_token(config) - 12 * config.n_layer * config.n_embd * config.block_size == 6 * matrices


@pytest.mark.parametrize(
    ("name", "flops"),
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
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3070 Laptop GPU", None),
        ("NVIDIA L40S", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("CPU", None),
        ("Apple GPU (MPS)", None),
    ],
)
def test_peak_flops_by_the_name_of_the_gpu(name, flops):
    assert peak_flops(name, torch.float16) == flops
    assert peak_flops(name, torch.float32) is None


@pytest.mark.parametrize("name", PEAK_FLOPS)
def test_every_gpu_in_the_table_is_found(name):
    assert peak_flops(f"NVIDIA {name}", torch.bfloat16) == PEAK_FLOPS[name]


def test_peak_flops_of_the_device_depend_on_the_number_format(gpu):
    gpu(T4)
    assert resolve_device_config(TrainConfig(), GPTConfig()).peak_flops == 65e12
    assert resolve_device_config(TrainConfig(dtype="float32"), GPTConfig()).peak_flops is None


# Memory


def test_a_failed_allocation_is_recognized_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for the matmul primitive"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) == expected
