"""Micro-batches, retries when memory runs out, and compilation with a fallback."""

from __future__ import annotations

import dataclasses
import errno
import platform
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from helpers import TINY
from torch import Tensor

from storyllm import GPT, StoryLLMError
from storyllm.device import DeviceConfig
from storyllm.training.execution import Execution, one_line_errors
from storyllm.training.interrupt import Interrupt, StopRequested
from storyllm.training.optimizer import make_optimizer

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1.2 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


class SmallMemoryGPT(GPT):
    """A GPT whose loss runs out of memory for more than `limit` windows."""

    limit = 100

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().loss(x, y)


@pytest.fixture
def model() -> SmallMemoryGPT:
    torch.manual_seed(0)
    return SmallMemoryGPT(dataclasses.replace(TINY.model, dropout=0.0))


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def execution(model: GPT, warnings: list[str]) -> Execution:
    """On the CPU, with micro-batches of 8 windows in updates of 12."""
    device = DeviceConfig(torch.device("cpu"), "CPU", torch.float32, compile=False, micro_batch_size=8)
    return Execution(TINY.train, device, make_optimizer(model, TINY.train), Interrupt(), warnings.append)


def use_device(execution: Execution, **changes: object) -> None:
    execution.device = dataclasses.replace(execution.device, **changes)
    execution.scaler = execution.device.grad_scaler()


def windows(count: int = 12) -> tuple[Tensor, Tensor]:
    x, y = torch.randint(300, (2, count, 16), generator=torch.Generator().manual_seed(1))
    return x, y


# micro_batches


@pytest.mark.parametrize(("size", "sizes"), [(12, [12]), (8, [8, 4]), (5, [5, 5, 2]), (1, [1] * 12), (10**9, [12])])
def test_micro_batches_are_consecutive_and_complete(execution, size, sizes):
    use_device(execution, micro_batch_size=size)
    x, y = windows()
    parts = list(execution.micro_batches(x, y))
    assert [len(part) for part, _ in parts] == sizes
    for whole, which in ((x, 0), (y, 1)):
        assert torch.equal(torch.cat([part[which] for part in parts]), whole)


def test_an_interrupt_takes_effect_before_the_next_micro_batch(execution):
    with execution.interrupt:
        parts = execution.micro_batches(*windows())
        next(parts)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(StopRequested):
            next(parts)


# retry


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_running_out_of_memory_halves_the_micro_batch_size(execution, warnings, error):
    def attempt() -> int:
        if execution.device.micro_batch_size > 2:
            raise error
        return execution.device.micro_batch_size

    assert execution.retry(attempt) == 2
    assert len(warnings) == 2
    assert "8" in warnings[0] and "4" in warnings[0]
    assert warnings[1] == "out of memory with micro-batch size 4, retrying with 2"  # as docs and log quote it


def test_sizes_that_no_batch_has_are_skipped(execution):
    """Halving starts from the windows that there are: 12 per update, 40 per evaluation."""
    use_device(execution, micro_batch_size=1_000_000)
    execution.config = dataclasses.replace(execution.config, eval_windows=40)
    tried = []

    def attempt() -> None:
        tried.append(execution.device.micro_batch_size)
        if len(tried) < 3:
            raise MemoryError

    execution.retry(attempt)
    assert tried == [1_000_000, 20, 10]


def test_with_one_window_the_error_is_raised(execution, warnings):
    def attempt() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        execution.retry(attempt)
    assert execution.device.micro_batch_size == 1
    assert len(warnings) == 3  # 8 -> 4 -> 2 -> 1


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), StoryLLMError("x"), StopRequested()])
def test_other_errors_are_not_retried(execution, error):
    def attempt() -> None:
        raise error

    with pytest.raises(type(error)):
        execution.retry(attempt)
    assert execution.device.micro_batch_size == 8


def test_a_retry_drops_gradients_and_keeps_the_loss_scale(execution, model):
    use_device(execution, dtype=torch.float16)
    execution.scaler.load_state_dict({**execution.scaler.state_dict(), "scale": 2.0**9})
    scales = []

    def attempt() -> None:
        assert all(p.grad is None for p in model.parameters())
        with execution.device.autocast():
            execution.scaler.scale(model.loss(*windows(2))).backward()
        execution.scaler.unscale_(execution.optimizer)  # PyTorch raises if one scaler does this twice
        scales.append(execution.scaler.get_scale())
        if len(scales) == 1:
            raise MemoryError

    execution.retry(attempt)
    assert scales == [2.0**9, 2.0**9]


# prepare_loss


def test_without_compilation_the_loss_is_the_models(execution, model, warnings):
    loss_fn, seconds = execution.prepare_loss(model, *windows())
    x, y = windows()
    assert loss_fn(x, y).item() == model.loss(x, y).item()
    assert seconds > 0
    assert warnings == []


def test_preparation_leaves_no_gradients(execution, model):
    before = [p.detach().clone() for p in model.parameters()]
    execution.prepare_loss(model, *windows())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("compile_", [False, True])
def test_preparation_finds_a_micro_batch_size_that_fits(execution, model, warnings, monkeypatch, compile_):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model.limit = 2
    use_device(execution, compile=compile_)
    loss_fn, _ = execution.prepare_loss(model, *windows())
    assert execution.device.micro_batch_size == 2
    assert execution.device.compile == compile_  # out of memory is not a reason to give up compilation
    assert loss_fn(*windows(2)).isfinite()
    assert len(warnings) == 2


def fake_compile(sizes: list[int]) -> Callable:
    """A torch.compile that records the number of windows of each call."""

    def compiled(function: Callable, **_: object) -> Callable:
        return lambda x, y: sizes.append(len(x)) or function(x, y)

    return compiled


def test_only_full_micro_batches_use_the_compiled_loss(execution, model, monkeypatch):
    sizes: list[int] = []
    monkeypatch.setattr(torch, "compile", fake_compile(sizes))
    use_device(execution, compile=True)
    loss_fn, _ = execution.prepare_loss(model, *windows())
    for size in (8, 4, 8):
        loss_fn(*windows(size))
    assert set(sizes) == {8}
    use_device(execution, micro_batch_size=4)  # as after a retry
    loss_fn(*windows(4))
    assert sizes[-1] == 4


def test_a_failed_compilation_falls_back_with_a_warning(execution, model, warnings, monkeypatch):
    class CompilerError(Exception):
        pass

    def fail(*_: object) -> None:
        raise CompilerError("gcc not found")

    monkeypatch.setattr(torch, "compile", lambda function, **_: fail)
    use_device(execution, compile=True, compile_reason="as requested")
    loss_fn, _ = execution.prepare_loss(model, *windows())
    assert loss_fn(*windows()).item() == model.loss(*windows()).item()
    assert len(warnings) == 1
    assert "torch.compile failed (CompilerError)" in warnings[0]
    assert not execution.device.compile
    assert "not compiled (torch.compile failed: CompilerError)" in execution.device.description


def test_only_an_overflow_that_a_smaller_scale_can_avoid_is_tolerated(execution):
    assert not execution.fp16_overflowed()  # float32 has no loss scale
    use_device(execution, dtype=torch.float16)
    for scale, expected in ((2.0**16, True), (1.0, True), (0.5, False)):
        execution.scaler.load_state_dict({**execution.scaler.state_dict(), "scale": scale})
        assert execution.fp16_overflowed() == expected


# one_line_errors


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_running_out_of_memory_names_the_fields_to_lower(error):
    with pytest.raises(StoryLLMError, match=r"out of memory.*model\.n_embd.*train\.batch_size"), one_line_errors():
        raise error


def test_an_operating_system_error_names_the_file():
    with pytest.raises(StoryLLMError, match=r"x\.pt.*No space left"), one_line_errors():
        raise OSError(errno.ENOSPC, "No space left on device", "x.pt")


@pytest.mark.parametrize("error", [BrokenPipeError(), StoryLLMError("x"), ZeroDivisionError(), StopRequested()])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, one_line_errors():
        raise error
    assert caught.value is error


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries manage memory differently")
def test_freed_memory_is_kept_while_training_and_returned_afterwards():
    code = """
import mmap, torch
from pathlib import Path
from storyllm.training.execution import reused_memory

def resident_mib():
    print(int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 2**20)

with reused_memory():
    torch.ones(2**26)  # 256 MiB
    resident_mib()
resident_mib()
torch.ones(2**26)
resident_mib()
"""
    # In a process of its own: the heap of this one has what other tests have left.
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    kept, returned, after = map(float, done.stdout.split())
    assert kept - returned > 200
    assert after - returned < 50
