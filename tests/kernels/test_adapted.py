"""A frozen layer's product with its adapter, and its gradients, against the formula in float64 and peft's own layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tandem.kernels import adapted, quantized
from tandem.models.lora import linear as adapted_linear
from tandem.models.lora.pairs import NAME

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE, INPUTS, OUTPUTS, RANK = 1.5, 64, 80, 5
FEW, MANY = (2, 7), (3, 50)
"""Rows that are less than the weight, and more."""


def inputs_of(rows: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias, A, B, and the gradient of the product: A and B matter as much as the weight."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*rows, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS,), (RANK, INPUTS), (OUTPUTS, RANK), (*rows, OUTPUTS))
    sizes = (1, INPUTS**-0.5, 1, INPUTS**-0.5, RANK**-0.5, 1)
    return [
        (torch.randn(s, generator=generator) * size).to(DEVICE, dtype) for s, size in zip(shapes, sizes, strict=True)
    ]


def formula(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, up: Tensor) -> list[Tensor]:
    """The product and the gradients of x, A and B, in float64, as they are written."""
    x, weight, a, b, up = (t.detach().double() for t in (x, weight, a, b, up))
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    out = x @ weight.T + SCALE * ((x @ a.T) @ b.T) + (0 if bias is None else bias.double())
    return [out.detach(), *torch.autograd.grad(out, (x, a, b), up)]


def found_by(weight: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, up: Tensor) -> list[Tensor]:
    x, a, b = (t.clone().requires_grad_() for t in (x, a, b))
    out = adapted.linear(x, weight, bias, a, b, SCALE)
    return [out.detach(), *torch.autograd.grad(out, (x, a, b), up)]


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("rows", [FEW, MANY, (1,), (200,)])
def test_the_product_and_its_gradients_are_the_formulas(rows: tuple[int, ...], dtype: torch.dtype, most: float) -> None:
    x, weight, bias, a, b, up = inputs_of(rows, dtype)
    for with_bias in (None, bias):
        exact = formula(x, weight, with_bias, a, b, up)
        for found, wanted in zip(found_by(weight, x, with_bias, a, b, up), exact, strict=True):
            assert found.dtype == dtype
            assert error(found, wanted) < most


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_a_weight_in_eight_bits(rows: tuple[int, ...]) -> None:
    x, weight, bias, a, b, up = inputs_of(rows, torch.float32)
    coded = quantized.quantize(weight, "fp8")
    exact = formula(x, quantized.dequantize(coded, torch.float32), bias, a, b, up)
    for found, wanted in zip(found_by(coded, x, bias, a, b, up), exact, strict=True):
        assert error(found, wanted) < 1e-6


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_at_zero_add_nothing_bit_for_bit(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias, a, b, _ = inputs_of(rows, dtype)
    found = adapted.linear(x, weight, bias, a, torch.zeros_like(b), SCALE)
    assert torch.equal(found, nn.functional.linear(x, weight, bias))


def test_an_input_without_a_gradient_gets_none() -> None:
    x, weight, bias, a, b, up = inputs_of(MANY, torch.float32)
    exact = formula(x, weight, bias, a, b, up)
    a, b = a.requires_grad_(), b.requires_grad_()
    adapted.linear(x, weight, bias, a, b, SCALE).backward(up)
    assert x.grad is None
    assert error(a.grad, exact[2]) < 1e-6
    assert error(b.grad, exact[3]) < 1e-6


@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_of_pefts_gives_what_pefts_own_does(dora: bool) -> None:
    """With DoRA it is peft's own still; without, its parameters have its names and its class's other methods."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    module = nn.ModuleDict({"q_proj": nn.Linear(INPUTS, OUTPUTS)})
    config = peft.LoraConfig(r=RANK, lora_alpha=7, target_modules=["q_proj"], init_lora_weights=False, use_dora=dora)
    peft.inject_adapter_in_model(config, module, adapter_name=NAME)
    layer = module["q_proj"]
    kind, names = type(layer), [name for name, _ in layer.named_parameters()]

    def run(rows: int) -> list[Tensor]:
        x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(1), requires_grad=True)
        trained = [p for p in layer.parameters() if p.requires_grad]
        out = layer(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *trained])]

    before = {rows: run(rows) for rows in (7, 150)}
    adapted_linear.speed_up_pairs(module)
    assert (type(layer) is kind) == dora
    assert isinstance(layer, kind)
    assert [name for name, _ in layer.named_parameters()] == names
    for rows, wanted in before.items():
        for found, one in zip(run(rows), wanted, strict=True):
            assert error(found, one.double()) < 1e-6
    x = torch.randn(150, INPUTS)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is type(layer)
        assert torch.equal(again(x), layer(x))
    layer._disable_adapters = True
    assert torch.equal(layer(x), layer.base_layer(x))
