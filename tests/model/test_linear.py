"""The linear layer with oneDNN compared with PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from storyllm.device import is_out_of_memory
from storyllm.model import linear
from storyllm.model.linear import Linear

# PyTorch warns about Intel GPUs whenever a flag of oneDNN is set.
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Patches oneDNN's operator in PyTorch. It is tried once per process, so what was found out is forgotten."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    linear._onednn_works.cache_clear()
    yield monkeypatch
    linear._onednn_works.cache_clear()


def assert_equals_torch(bias: bool = True, shape: tuple[int, ...] = (3, 5, 16)) -> None:
    """Compares outputs and gradients with those of `F.linear`."""
    torch.manual_seed(0)
    layer, x = Linear(16, 77, bias=bias), torch.randn(shape, requires_grad=True)
    inputs, upstream = (x, *layer.parameters()), torch.randn(*shape[:-1], 77)
    outputs = layer(x), F.linear(x, layer.weight, layer.bias)
    gradients = [torch.autograd.grad((y * upstream).sum(), inputs) for y in outputs]
    for ours, expected in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), outputs[1])
        torch.testing.assert_close(linear.linear(x, layer.weight), x @ layer.weight.t())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (1, 16), (3, 5, 16), (0, 16)])
@pytest.mark.parametrize("onednn", [True, False])
def test_outputs_and_gradients_equal_those_of_torch(bias, shape, onednn):
    with torch.backends.mkldnn.flags(enabled=onednn):
        assert_equals_torch(bias, shape)


def test_inputs_need_not_be_contiguous():
    torch.manual_seed(0)
    layer = Linear(4, 3)
    for x in (torch.randn(4, 5).t(), torch.randn(2, 4, 5).transpose(1, 2), torch.randn(5, 8)[:, ::2]):
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_only_the_required_gradients_are_computed():
    layer, x = Linear(4, 3), torch.randn(2, 4)
    layer(x).sum().backward()
    assert x.grad is None and layer.weight.grad is not None
    layer, x = Linear(4, 3).requires_grad_(False), torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
    assert not torch.no_grad()(layer)(x).requires_grad


def test_onednn_is_used_for_large_float32_products_outside_autocast_only(operator):
    calls, original = [], torch.ops.mkldnn._linear_pointwise
    operator.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: calls.append(1) or original(*args))
    layer, x = Linear(4, 3), torch.zeros(2, 4)
    layer(x)
    assert calls
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    with operator.context() as patch:
        patch.setattr(linear, "MIN_MULTIPLICATIONS", 2 * 4 * 3 + 1)
        layer(x)
    layer.bfloat16()(x.bfloat16())
    assert layer.to("meta")(x.bfloat16().to("meta")).device.type == "meta"
    assert not calls


def other_signature(x, weight, bias):
    raise AssertionError("called with the new signature only")


def wrong_result(x, weight, bias, *_):
    return F.linear(x, weight, bias) + 1


def wrong_bias(x, weight, bias, *_):
    return F.linear(x, weight)


def other_error(*_):
    raise RuntimeError("not implemented on this processor")


@pytest.mark.parametrize("replacement", [other_signature, wrong_result, wrong_bias, other_error, None])
def test_a_changed_private_operator_costs_speed_only(operator, replacement):
    """The operator is private: a later PyTorch may remove it, or change its signature or its meaning."""
    operator.setattr(torch.ops.mkldnn, "_linear_pointwise", replacement)
    assert_equals_torch()


@pytest.mark.parametrize("shape", [(2, 5), (2, 3), ()])
def test_other_shapes_raise_pytorchs_own_error(shape):
    with pytest.raises(RuntimeError) as ours:
        Linear(4, 3)(torch.zeros(shape))
    with pytest.raises(RuntimeError) as expected:
        torch.nn.Linear(4, 3)(torch.zeros(shape))
    assert str(ours.value) == str(expected.value)
    assert not is_out_of_memory(ours.value)


@pytest.mark.parametrize("devices", [("cpu", "meta"), ("meta", "cpu")])
def test_input_and_weight_must_be_on_one_device(devices):
    with pytest.raises(RuntimeError, match="device"):
        Linear(4, 3).to(devices[1])(torch.zeros(2, 4, device=devices[0]))


def test_gradients_have_gradients():
    torch.manual_seed(0)
    layer, x = Linear(4, 3), torch.randn(2, 5, 4, requires_grad=True)
    inputs, second = (x, *layer.parameters()), []
    for forward in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        gradients = torch.autograd.grad(forward(x).pow(3).sum(), inputs, create_graph=True)
        second.append(torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), inputs))
    for ours, expected in zip(*second, strict=True):
        torch.testing.assert_close(ours, expected)


def test_gradients_per_row_with_torch_func():
    torch.manual_seed(0)
    layer, x = Linear(4, 3), torch.randn(5, 4)

    def loss(weight, row):
        return (torch.func.functional_call(layer, {"weight": weight, "bias": layer.bias}, (row,)) ** 2).sum()

    per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(layer.weight, x)
    layer(x).square().sum().backward()
    torch.testing.assert_close(per_row.sum(0), layer.weight.grad)


def test_flops_are_counted():
    with FlopCounterMode(display=False) as counter:
        Linear(4, 3)(torch.zeros(5, 4)).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 5 * 4 * 3)  # forward, and the gradient of the weight


def test_a_renamed_private_function_costs_speed_only(monkeypatch):
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    assert_equals_torch()
