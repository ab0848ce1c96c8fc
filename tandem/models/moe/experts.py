"""Stacked experts by grouped products, and adapters on them.

Rows go to experts and back by gathers, and so do their gradients, and a bias's is a product: autograd's own of an index
adds row to row with atomics, in an order that changes.

Each expert's adapter pair multiplies its own tokens, and no merged copy of the stack is made. peft's own forward of a
stacked parameter makes ``W + s B A`` of all experts in every layer and keeps it for the backward: as much memory as the
experts themselves. The parameters, their names and their files are peft's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, _grouped_linear

from tandem.kernels.available import on_triton
from tandem.models.kinds import kind_of
from tandem.models.lora.pairs import NAME, by_expert

IMPLEMENTATION = "tandem"
"""What transformers knows ``grouped_experts`` by."""
GRAIN = 16
"""Bytes of which grouped products take multiples, in every dimension."""
SILU = (nn.SiLU, SiLUActivation)
"""Activations that are SiLU."""
FEW = 4096
"""Picks up to which kernels of our own compute, where nothing is trained: experts are read for so few rows each that a
step takes about as long as reading them, and twenty launches less are felt. More, where torch waits for the host."""


def stacks_of(module: nn.Module) -> dict[str, list[str]]:
    """The names of the parts that are stacked experts, and of their stacked matrices, [experts, ...], in each."""
    found = {}
    for name, part in module.named_modules():
        count = getattr(part, "num_experts", None)
        stacked = [n for n, p in part.named_parameters(recurse=False) if p.ndim == 3 and len(p) == count]
        if stacked and is_grouped(part):
            found[name] = sorted(stacked)
    return found


def is_grouped(part: nn.Module) -> bool:
    """Whether transformers computes them by grouped products: experts of one class are told apart by their layout."""
    return all(hasattr(part, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def called_experts(module: nn.Module) -> list[nn.Module]:
    """The parts that a layer gives tokens, the experts picked for each, and their weights: stacked experts, or peft's
    outermost wrapper of them."""
    within = {id(part.base_layer) for part in module.modules() if is_stack(part)}
    return [part for part in module.modules() if (is_stack(part) or is_grouped(part)) and id(part) not in within]


def speed_up_stacks(module: nn.Module) -> None:
    """Makes peft's outermost wrapper of each part's stacks compute as it says above."""
    for part in called_experts(module):
        if is_stack(part):
            kind: Any = type(part)
            part.__class__ = _grouped_class(kind)


def is_stack(part: Any) -> bool:
    """Whether it is peft's wrapper of a stacked parameter."""
    return hasattr(part, "parameter_name") and hasattr(part, "lora_A")


@functools.cache
def _grouped_class(kind: Any) -> Any:
    """A class, and not a ``forward`` of each part's own: compiled layers share a graph where their parts are of one."""
    return kind_of(_grouped_class, kind, forward=_forward)


def _forward(self: Any, hidden_TE: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """``grouped_experts``, and what the adapters add to each product."""
    layers: dict[str, Any] = {}
    experts: Any = self
    while is_stack(experts):
        layers[experts.parameter_name], experts = experts, experts.base_layer
    if self.disable_adapters:
        return experts(hidden_TE, index_TK, weight_TK)
    return grouped_experts(experts, hidden_TE, index_TK, weight_TK, layers)


def grouped_experts(
    experts: Any, hidden_TE: Tensor, index_TK: Tensor, weight_TK: Tensor, layers: Mapping[str, Any] | None = None
) -> Tensor:
    """What the experts make of tokens, [T, E]: each row's product is with its own expert's matrices.

    ``index`` and ``weight``: of the K experts that a token's router has picked. The weight multiplies what goes into
    the second product, which of most models is narrower than what comes out of it. An index past the last expert picks
    none: nothing is added. ``layers``: peft's, by the stack they are on.
    """
    if not layers and _are_few(experts, hidden_TE, index_TK):
        return _few_experts(experts, hidden_TE, index_TK, weight_TK)
    picks, count = index_TK.shape[1], experts.num_experts
    # A product leaves rows that no expert has as memory was: the last one takes them, at a weight of 0.
    weight_TK = weight_TK * (index_TK < count)
    expert_N, order_N = torch.sort(index_TK.reshape(-1).clamp(max=count - 1))
    back_N = torch.empty_like(order_N)
    back_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    number_X = torch.arange(count, device=order_N.device, dtype=expert_N.dtype)
    ends_X = torch.searchsorted(expert_N, number_X, right=True, out_int32=True)
    token_N = order_N // picks
    weight_N1 = _Spread.apply(weight_TK.reshape(-1, 1), order_N, back_N, 1)

    def product(x_NI: Tensor, name: str, weight_N1: Tensor | None = None) -> Tensor:
        x_NI = x_NI if weight_N1 is None else (x_NI * weight_N1).to(x_NI.dtype)
        out_NO = _grouped_linear(x_NI, getattr(experts, name), ends_X, is_transposed=experts.is_transposed)
        if layers and name in layers:
            out_NO = out_NO + _added(layers[name], x_NI, ends_X)
        if experts.has_bias:
            bias_NO = _OfExperts.apply(getattr(experts, f"{name}_bias"), expert_N)
            out_NO = out_NO + (bias_NO if weight_N1 is None else bias_NO * weight_N1)
        return out_NO

    up_NO = product(_Spread.apply(hidden_TE, token_N, back_N, picks), "gate_up_proj" if experts.has_gate else "up_proj")
    inner_NI = experts._apply_gate(up_NO) if experts.has_gate else experts.act_fn(up_NO)
    out_NE = product(inner_NI, "down_proj", weight_N1)
    return _Collect.apply(out_NE, token_N, back_N, picks).to(hidden_TE.dtype)


def _are_few(experts: Any, hidden_TE: Tensor, index_TK: Tensor) -> bool:
    """Whether ``_few_experts`` computes them: in a step of decoding on a GPU."""
    return (
        # First, so that no compiled graph depends on the size.
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and on_triton(hidden_TE)
        and hidden_TE.dtype == experts.down_proj.dtype
        and index_TK.numel() > 0
        and (index_TK.numel() <= FEW or _waits(hidden_TE))
    )


def _waits(x: Tensor) -> bool:
    """Whether torch's grouped products wait for the host, so that none can be captured."""
    return x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device)[0] not in (9, 10)


def _few_experts(experts: Any, hidden_TE: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """``grouped_experts`` by kernels of our own, which round where it does."""
    from tandem.kernels import experts_triton as kernels

    weight_N, index_N = weight_TK.reshape(-1), index_TK.reshape(-1)
    places = kernels.place(index_N, experts.num_experts)

    def product(x_RI: Tensor, name: str, weight_N: Tensor | None = None) -> Tensor:
        stack = getattr(experts, name)
        bias_XO = getattr(experts, f"{name}_bias") if experts.has_bias else None
        return kernels.product(x_RI, stack.mT if experts.is_transposed else stack, bias_XO, places, weight_N)

    inner_NI = product(hidden_TE.contiguous(), "gate_up_proj" if experts.has_gate else "up_proj")
    if experts.has_gate and type(experts)._apply_gate is _default_apply_gate and type(experts.act_fn) in SILU:
        inner_NI = kernels.weighted(inner_NI, weight_N, "silu")
    else:
        inner_NI = experts._apply_gate(inner_NI) if experts.has_gate else experts.act_fn(inner_NI)
        inner_NI = kernels.weighted(inner_NI, weight_N)
    out_NE = product(inner_NI, "down_proj", weight_N)
    return kernels.collect(out_NE, index_N, experts.num_experts, hidden_TE)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, grouped_experts)


def group_experts(module: Any) -> None:
    """Takes ``grouped_experts`` where transformers has taken grouped products of its own."""
    own = module.get_experts_implementation()
    module.set_experts_implementation({k: IMPLEMENTATION if v == "grouped_mm" else v for k, v in own.items()})


def _collect(x_ND: Tensor, back_N: Tensor, picks: int) -> Tensor:
    """The sum of each token's rows."""
    return x_ND[back_N].unflatten(0, (-1, picks)).sum(dim=1)


class _Spread(torch.autograd.Function):
    """A token's row for each of its picks, in the order of experts, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, back_N: Tensor, picks: int) -> Tensor:
        ctx.picks = picks
        ctx.save_for_backward(back_N)
        return x_TD[token_N]

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> Any:
        (back_N,) = ctx.saved_tensors
        return _collect(gradient_ND, back_N, ctx.picks), None, None, None


class _Collect(torch.autograd.Function):
    """``_collect``, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_N: Tensor, back_N: Tensor, picks: int) -> Tensor:
        ctx.save_for_backward(token_N)
        return _collect(x_ND, back_N, picks)

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> Any:
        (token_N,) = ctx.saved_tensors
        return gradient_TD[token_N], None, None, None


class _OfExperts(torch.autograd.Function):
    """Each row's own expert's bias [X, O], with its gradient as a product."""

    @staticmethod
    def forward(ctx: Any, bias_XO: Tensor, expert_N: Tensor) -> Tensor:
        ctx.experts = len(bias_XO)
        ctx.save_for_backward(expert_N)
        return bias_XO[expert_N]

    @staticmethod
    def backward(ctx: Any, gradient_NO: Tensor) -> Any:
        (expert_N,) = ctx.saved_tensors
        own_XN = torch.arange(ctx.experts, device=expert_N.device)[:, None] == expert_N
        return own_XN.to(gradient_NO.dtype) @ gradient_NO, None


def _added(layer: Any, x_NI: Tensor, ends_X: Tensor) -> Tensor:
    """``s B A x`` of each row's own expert."""
    a_XRI, b_XOR = by_expert(layer, layer.lora_A[NAME].weight, layer.lora_B[NAME].weight)
    if spare := -a_XRI.shape[1] % (GRAIN // a_XRI.element_size()):
        a_XRI, b_XOR = F.pad(a_XRI, (0, 0, 0, spare)), F.pad(b_XOR, (0, spare))
    inner_NR = _grouped_linear(x_NI, a_XRI, ends_X)
    # Compiled, a copy that is only contiguous gets the strides of what it copies, which the product refuses.
    rows, width = b_XOR.shape[1:]
    b_XOR = b_XOR.contiguous().as_strided(b_XOR.shape, (rows * width, width, 1))
    return _grouped_linear(inner_NR, b_XOR, ends_X) * layer.scaling[NAME]
