"""`linear_cross_entropy` compared with `F.cross_entropy` of all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from storyllm.model import loss as loss_module
from storyllm.model.loss import linear_cross_entropy

# PyTorch warns about Intel GPUs whenever a flag of oneDNN is set.
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")

ROWS, WIDTH, VOCAB_SIZE = 50, 16, 77  # a vocabulary size that no chunk size divides


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(VOCAB_SIZE, WIDTH)
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(VOCAB_SIZE, (ROWS,))


def reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.t(), targets)


def with_gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def set_rows_per_chunk(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Patches the chunk size, which otherwise exceeds any test's input."""
    monkeypatch.setattr(loss_module, "CPU_LOGITS", rows * VOCAB_SIZE)


@pytest.mark.parametrize("rows", [1, 7, 25, 49, 50, 1000])
@pytest.mark.parametrize("onednn", [True, False])
def test_loss_and_gradients_in_float32(monkeypatch, problem, rows, onednn):
    set_rows_per_chunk(monkeypatch, rows)
    x, weight, targets = problem
    expected = with_gradients(3 * reference(x, weight, targets), x, weight)
    with torch.backends.mkldnn.flags(enabled=onednn):
        got = with_gradients(3 * linear_cross_entropy(x, weight, targets), x, weight)
        with torch.no_grad():
            torch.testing.assert_close(3 * linear_cross_entropy(x, weight, targets), expected[0])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 20, 1000])  # 1 and 3: several sums over CPU_CHUNKS_PER_SUM chunks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_gradients_under_autocast(monkeypatch, problem, dtype, rows):
    set_rows_per_chunk(monkeypatch, rows)
    x, weight, targets = problem
    with torch.autocast("cpu", dtype=dtype):
        got = with_gradients(linear_cross_entropy(x, weight, targets), x, weight)
        with torch.no_grad():
            torch.testing.assert_close(linear_cross_entropy(x, weight, targets), got[0], atol=1e-2, rtol=1e-2)
    for a, b in zip(got, with_gradients(reference(x, weight, targets), x, weight), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_of_the_vocabulary_changes_nothing(monkeypatch, problem, dtype):
    x, weight, targets = problem
    results = []
    for padding in (0, 51):
        # A GPU pads to a multiple of 64. Patched, because no GPU may be available.
        monkeypatch.setattr(loss_module, "_padding", lambda *_, padding=padding: padding)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            results.append(with_gradients(linear_cross_entropy(x, weight, targets), x, weight))
            with torch.no_grad():
                results[-1].append(linear_cross_entropy(x, weight, targets))
    assert results[1][2].shape == weight.shape
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_loss_and_gradients_on_a_gpu(problem):
    x, weight, targets = (tensor.detach().cuda() for tensor in problem)
    inputs = x.requires_grad_(), weight.requires_grad_()
    expected = with_gradients(reference(x, weight, targets), *inputs)
    for a, b in zip(with_gradients(linear_cross_entropy(x, weight, targets), *inputs), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_single_row(problem):
    x, weight, targets = problem[0][:1], problem[1], problem[2][:1]
    torch.testing.assert_close(linear_cross_entropy(x, weight, targets), reference(x, weight, targets))


def test_large_logits_stay_finite(problem):
    x, weight, targets = problem
    got = with_gradients(linear_cross_entropy(1e4 * x, weight, targets), x, weight)
    for a, b in zip(got, with_gradients(reference(1e4 * x, weight, targets), x, weight), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-4)


def test_small_gradients_do_not_underflow_in_fp16():
    """Gradients of probabilities of 1e-4, averaged over many rows, are below fp16's range unless they are scaled."""
    torch.manual_seed(0)
    x, weight = 0.01 * torch.randn(2_000, WIDTH), torch.randn(10_000, WIDTH, requires_grad=True)
    targets = torch.randint(10_000, (2_000,))
    with torch.autocast("cpu", dtype=torch.float16):
        loss = 65_536 * linear_cross_entropy(x, weight, targets)
    got, expected = (with_gradients(y, weight)[1] for y in (loss, 65_536 * reference(x, weight, targets)))
    assert (got - expected).norm() < 0.01 * expected.norm()


def test_large_sums_do_not_overflow_in_fp16():
    """If all rows have the same target, the sum of its gradients exceeds fp16's range."""
    x, weight = torch.full((6_000, WIDTH), 20.0), torch.zeros(100, WIDTH, requires_grad=True)
    targets = torch.zeros(6_000, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(x, weight, targets)
    got, expected = (with_gradients(y, weight)[1] for y in (loss, reference(x, weight, targets)))
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01)


def test_less_than_a_third_of_the_memory_is_kept_for_the_backward_pass():
    x, weight = torch.randn(512, WIDTH, requires_grad=True), torch.randn(20_000, WIDTH, requires_grad=True)
    targets = torch.randint(20_000, (512,))
    kept = []
    for function in (linear_cross_entropy, reference):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            function(x, weight, targets)
        kept.append(sum(sizes))
    assert kept[0] < kept[1] / 3


@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_targets_of_minus_100_do_not_count(monkeypatch, problem, dtype, rows):
    set_rows_per_chunk(monkeypatch, rows)
    x, weight, targets = problem
    targets[::3] = -100
    targets[:14] = -100  # two whole chunks of 7
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        got = with_gradients(linear_cross_entropy(x, weight, targets), x, weight)
        with torch.no_grad():
            torch.testing.assert_close(linear_cross_entropy(x, weight, targets), got[0], atol=0, rtol=tolerance)
    for a, b in zip(got, with_gradients(reference(x, weight, targets), x, weight), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
    assert not got[1][targets == -100].any()


@pytest.mark.parametrize("grad", [True, False])
def test_without_any_target_the_loss_is_nan_as_in_pytorch(problem, grad):
    x, weight, targets = problem
    with torch.set_grad_enabled(grad):
        assert linear_cross_entropy(x, weight, torch.full_like(targets, -100)).isnan()
        assert reference(x, weight, torch.full_like(targets, -100)).isnan()


@pytest.mark.parametrize("target", [-1, VOCAB_SIZE])
@pytest.mark.parametrize("grad", [True, False])
def test_other_ids_outside_the_vocabulary_are_rejected(problem, target, grad):
    x, weight, targets = problem
    targets[3] = target
    with torch.set_grad_enabled(grad), pytest.raises(IndexError, match=f"{target} is out of bounds"):
        linear_cross_entropy(x, weight, targets)
