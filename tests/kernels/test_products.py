"""Matrix products by oneDNN give what torch's own give, up to rounding, with their gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tandem.kernels import products


@pytest.fixture(autouse=True)
def _through_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where MKL is held back; oneDNN multiplies on every one."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(products, "mkl_is_held_back", lambda: True)


def close(actual: Tensor, expected: Tensor) -> bool:
    """Within the rounding of float32, relative to the largest entry."""
    assert actual.shape == expected.shape
    return float((actual.detach().double() - expected.detach().double()).abs().max()) <= 2e-6 * float(
        expected.detach().abs().max()
    )


@pytest.mark.parametrize("rows", [(5, 60), (16, 1, 40), (1100,)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_gradients(rows: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 200, bias=bias)
    exact = copy.deepcopy(layer).double()
    products.speed_up_linears(layer)
    assert type(layer) is products.Linear
    x = torch.randn(*rows, 96, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    up = torch.randn(*rows, 200)
    out, expected = layer(x), exact(exact_x)
    assert type(out.grad_fn).__name__ == "_LinearBackward"
    out.backward(up)
    expected.backward(up.double())
    assert close(out, expected)
    assert close(x.grad, exact_x.grad)
    for ours, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
        assert close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("left", "right"), [(40, 300), (300, 40)])
def test_products_of_a_head(left: int, right: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(777, left), torch.randn(777, right)
    expected = a.double().T @ b.double()
    assert close(products.transposed_product(a, b), expected)
    total = torch.ones(left, right)
    products.add_transposed_product_(total, a, b)
    assert close(total, expected + 1)
    assert close(products.product(a, torch.eye(left, right)), a.double() @ torch.eye(left, right).double())


def test_no_gradient_for_what_is_frozen() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, 256).requires_grad_(False)
    products.speed_up_linears(layer)
    x = torch.randn(300, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_a_bias_that_learns_alone() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, 256)
    layer.weight.requires_grad_(False)
    products.speed_up_linears(layer)
    layer(torch.randn(300, 128)).sum().backward()
    assert close(layer.bias.grad, torch.full((256,), 300.0))
    assert layer.weight.grad is None


def test_other_types_and_subclasses_stay_as_they_are() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(128, 128), nn.Linear(128, 128)).to(torch.bfloat16)
    products.speed_up_linears(model)
    assert type(model[0]) is Own
    x = torch.randn(300, 128, dtype=torch.bfloat16)
    assert torch.equal(model[1](x), nn.functional.linear(x, model[1].weight, model[1].bias))


@pytest.mark.parametrize("rows", [17, 32, 300])
def test_a_product_may_be_written_to(rows: int) -> None:
    """As Gemma 3n, OLMo (clip_qkv) and Llama 4 do."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 512)
    products.speed_up_linears(layer)
    x = torch.randn(1, rows, 256, requires_grad=True)
    out = layer(x)
    expected = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()).clamp(-0.5, 0.5)
    out.clamp_(-0.5, 0.5)
    assert close(out, expected)
    out.sum().backward()
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    assert close(x.grad, gradient.double())
