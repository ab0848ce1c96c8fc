"""Adapters on stacked experts: each expert's pair multiplies its own tokens, and no merged copy of the stack is made.

peft's own forward of a stacked parameter makes ``W + s B A`` of all experts in every layer and keeps it for the
backward: as much memory as the experts themselves. The parameters, their names and their files are peft's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from tandem.models.pairs import NAME, by_expert

GRAIN = 16
"""Bytes of which grouped products take multiples, in every dimension."""


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


def speed_up_stacks(module: nn.Module) -> None:
    """Makes peft's outermost wrapper of each part's stacks compute as it says above."""
    within = {id(part.base_layer) for part in module.modules() if is_stack(part)}
    for part in module.modules():
        if is_stack(part) and id(part) not in within:
            kind: Any = type(part)
            part.__class__ = _grouped_class(kind)


def is_stack(part: Any) -> bool:
    """Whether it is peft's wrapper of a stacked parameter."""
    return hasattr(part, "parameter_name") and hasattr(part, "lora_A")


@functools.cache
def _grouped_class(kind: Any) -> Any:
    """A class, and not a ``forward`` of each part's own: compiled layers share a graph where their parts are of one."""
    return type(kind.__name__, (kind,), {"__module__": __name__, "forward": _forward})


def _forward(self: Any, hidden_TE: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """transformers' grouped forward of experts, bit for bit, and what the adapters add to each product.

    ``index`` and ``weight``: of the K experts that a token's router has picked.
    """
    layers: dict[str, Any] = {}
    experts: Any = self
    while is_stack(experts):
        layers[experts.parameter_name], experts = experts, experts.base_layer
    if self.disable_adapters:
        return experts(hidden_TE, index_TK, weight_TK)
    tokens, picks = index_TK.shape
    expert_N, order_N = torch.sort(index_TK.reshape(-1))
    counted_N = expert_N.float() if expert_N.device.type == "cpu" else expert_N.int()
    counts_X = torch.histc(counted_N, bins=experts.num_experts, min=0, max=experts.num_experts - 1)
    ends_X = torch.cumsum(counts_X, dim=0, dtype=torch.int32)

    def product(x_NI: Tensor, name: str) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[expert_N] if experts.has_bias else None
        weight = getattr(experts, name)
        out_NO = _grouped_linear(x_NI, weight, ends_X, bias=bias, is_transposed=experts.is_transposed)
        return out_NO + _added(layers[name], x_NI, ends_X) if name in layers else out_NO

    up_NO = product(hidden_TE[order_N // picks], "gate_up_proj" if experts.has_gate else "up_proj")
    out_NE = product(experts._apply_gate(up_NO) if experts.has_gate else experts.act_fn(up_NO), "down_proj")
    out_NE = out_NE * weight_TK.reshape(-1)[order_N].unsqueeze(-1)
    back_N = torch.empty_like(order_N)
    back_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return out_NE[back_N].view(tokens, picks, -1).sum(dim=1).to(hidden_TE.dtype)


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
