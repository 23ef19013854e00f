"""The fast products against PyTorch's plain ones: the same values, the same gradients."""

import pytest
import torch
import torch.nn.functional as F

from storyllm import linear
from storyllm.linear import Linear, linear_cross_entropy

VOCAB = 77  # not a multiple of anything


@pytest.fixture
def problem():
    torch.manual_seed(0)
    x, weight = torch.randn(50, 16), torch.randn(VOCAB, 16)
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(VOCAB, (50,))


def gradients(loss, *inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (1, 16), (3, 5, 16)])
@pytest.mark.parametrize("onednn", [True, False])
def test_a_linear_layer_is_torchs(monkeypatch, bias, shape, onednn):
    if not onednn:
        monkeypatch.setattr(linear, "_onednn_applies", lambda x, weight: False)
    torch.manual_seed(0)
    layer, x = Linear(16, VOCAB, bias=bias), torch.randn(shape, requires_grad=True)
    slope = torch.randn(*shape[:-1], VOCAB)
    ours = gradients((layer(x) * slope).sum(), x, *layer.parameters())
    theirs = gradients((F.linear(x, layer.weight, layer.bias) * slope).sum(), x, *layer.parameters())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_linear_layer_asks_for_no_gradient_that_nobody_wants():
    layer, x = Linear(4, 3), torch.randn(2, 4)
    layer(x).sum().backward()
    assert x.grad is None and layer.weight.grad is not None
    assert not torch.no_grad()(layer)(x).requires_grad


def test_this_machines_cpu_takes_onednn_where_it_is_float32_and_nowhere_else():
    x, weight = torch.zeros(2, 4), torch.zeros(3, 4)
    assert linear._onednn_applies(x, weight) == torch.backends.mkldnn.is_available()
    assert not linear._onednn_applies(x.bfloat16(), weight.bfloat16())
    assert not linear._onednn_applies(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not linear._onednn_applies(x, weight)
        assert Linear(4, 3)(x).dtype == torch.bfloat16


def test_pytorchs_switch_for_onednn_is_obeyed():
    """Then second derivatives and torch.func work as with any module."""
    layer, x = Linear(4, 3), torch.randn(5, 4)

    def loss(weight, row):
        return (torch.func.functional_call(layer, {"weight": weight, "bias": layer.bias}, (row,)) ** 2).sum()

    with torch.backends.mkldnn.flags(enabled=False):
        per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(layer.weight, x)
    layer(x).square().sum().backward()
    torch.testing.assert_close(per_row.sum(0), layer.weight.grad)


@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
@pytest.mark.parametrize("onednn", [True, False])
def test_loss_and_gradients_are_those_of_all_the_logits(monkeypatch, problem, rows, onednn):
    monkeypatch.setattr(linear, "CPU_LOGITS", rows * VOCAB)
    if not onednn:
        monkeypatch.setattr(linear, "_onednn_applies", lambda x, weight: False)
    x, weight, targets = problem
    ours = gradients(3 * linear_cross_entropy(x, weight, targets), x, weight)
    theirs = gradients(3 * F.cross_entropy(x @ weight.t(), targets), x, weight)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(3 * linear_cross_entropy(x, weight, targets), theirs[0])


@pytest.mark.parametrize("padding", [0, 51])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_loss_is_that_of_all_the_logits_to_its_rounding(monkeypatch, problem, dtype, padding):
    monkeypatch.setattr(linear, "_padding", lambda vocab_size, device: padding)
    monkeypatch.setattr(linear, "CPU_LOGITS", 20 * VOCAB)
    x, weight, targets = problem
    with torch.autocast("cpu", dtype=dtype):
        ours = gradients(linear_cross_entropy(x, weight, targets), x, weight)
    theirs = gradients(F.cross_entropy(x @ weight.t(), targets), x, weight)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.01 * other.norm()


def test_padding_inside_the_product_is_never_seen(monkeypatch, problem):
    x, weight, targets = problem
    plain = gradients(linear_cross_entropy(x, weight, targets), x, weight)
    monkeypatch.setattr(linear, "_padding", lambda vocab_size, device: 51)
    padded = gradients(linear_cross_entropy(x, weight, targets), x, weight)
    assert padded[2].shape == weight.shape
    for one, other in zip(plain, padded, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)


def test_a_gpu_gets_a_vocabulary_that_is_a_multiple_of_64():
    assert linear._padding(50_257, torch.device("cuda")) == 47
    assert linear._padding(1_024, torch.device("cuda")) == 0
    assert linear._padding(50_257, torch.device("cpu")) == 0


def test_small_gradients_survive_fp16(monkeypatch):
    """A probability of 1e-4 in a mean over many rows: its gradient is under what fp16 can hold, unless it is scaled."""
    torch.manual_seed(0)
    x, weight = (0.01 * torch.randn(2_000, 16)).requires_grad_(), torch.randn(10_000, 16, requires_grad=True)
    targets = torch.randint(10_000, (2_000,))
    with torch.autocast("cpu", dtype=torch.float16):
        ours = gradients(65_536 * linear_cross_entropy(x, weight, targets), weight)
    theirs = gradients(65_536 * F.cross_entropy(x @ weight.t(), targets), weight)
    assert (ours[1] - theirs[1]).norm() < 0.01 * theirs[1].norm()


def test_sums_over_many_rows_do_not_overflow_fp16():
    """A token that is the target of every row: its gradient is a sum that fp16 cannot hold, with any loss scale."""
    x, weight = torch.full((6_000, 16), 20.0, requires_grad=True), torch.zeros(100, 16, requires_grad=True)
    targets = torch.zeros(6_000, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(x, weight, targets)
    ours, theirs = gradients(loss, weight), gradients(F.cross_entropy(x @ weight.t(), targets), weight)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0.01, atol=0.01)


def test_the_loss_keeps_a_third_of_the_memory_at_most():
    """What autograd keeps for the backward pass, for 512 rows of a vocabulary that is large beside the channels."""
    x, weight = torch.randn(512, 16, requires_grad=True), torch.randn(20_000, 16, requires_grad=True)
    targets = torch.randint(20_000, (512,))
    kept = []
    for loss_of in (linear_cross_entropy, lambda x, w, y: F.cross_entropy(x @ w.t(), y)):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            loss_of(x, weight, targets)
        kept.append(sum(sizes))
    assert kept[0] < kept[1] / 3
