"""Linear layers that are multiplied together: parameters behind one another, and what adapters add to a product."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from tandem.kernels import products
from tandem.models.lora.pairs import NAME
from tandem.models.quantized.layers import Quantized, is_plain_linear


class Additions:
    """What the adapters of some layers add to their product, by ``s B A x`` each: nothing, bit for bit, where B is 0.

    All A's are one product, each B is added into its layer's columns. They are the module's own parameters.
    """

    def __init__(self, layers: Seq[Any]) -> None:
        """``layers``: as ``is_linear`` lets through, in the order of their columns."""
        self.downs: list[Tensor] = []
        self.ups: list[tuple[slice, slice, Tensor, float]] = []
        """Of each adapter: its columns of the A's product, those of the layers' product, its B, and its scale."""
        row = column = 0
        for layer in layers:
            end = column + layer.out_features
            if hasattr(layer, "lora_A"):
                b_OR = layer.lora_B[NAME].weight
                self.downs.append(layer.lora_A[NAME].weight)
                self.ups.append((slice(row, row + b_OR.shape[1]), slice(column, end), b_OR, layer.scaling[NAME]))
                row += b_OR.shape[1]
            column = end

    def stack(self) -> None:
        """Lays the A's behind one another, where they were taken apart."""
        self.down_RI = stack(self.downs)

    def add_(self, out_TO: Tensor, x_TI: Tensor) -> Tensor:
        """Adds to the product of the layers with ``x``."""
        inner_TR = products.linear(x_TI, self.down_RI)
        for inner, columns, b_OR, scale in self.ups:
            out_TO[:, columns].addmm_(inner_TR[:, inner], b_OR.T, alpha=scale)
        return out_TO


def is_linear(module: Any) -> bool:
    """Whether it is a matrix product and nothing else, or one with LoRA's adapters: another subclass computes more."""
    if hasattr(module, "lora_A"):
        # DoRA, and whatever else peft knows; several, or under a name of somebody's own.
        plain = list(module.lora_A) == [NAME] and not getattr(module, "lora_variant", None)
        return plain and is_linear(module.base_layer)
    return is_plain_linear(module) or isinstance(module, Quantized) or type(module) is Conv1D


def weight_of(module: Any) -> Tensor:
    """[O, I]: what one that ``is_linear`` multiplies by."""
    base = getattr(module, "base_layer", module)
    weight: Tensor = base.weight.T if isinstance(base, Conv1D) else base.weight
    return weight


@torch.no_grad()
def stack(parameters: Seq[Tensor]) -> Tensor:
    """One tensor of all their rows, which they become views of. Costs a copy the first time only."""
    first = parameters[0]
    sizes = [len(p) for p in parameters]
    shape = (sum(sizes), *first.shape[1:])
    expected = first.data_ptr()
    apart = False
    for p in parameters:
        apart |= p.data_ptr() != expected or p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        expected += p.numel() * p.element_size()
    if not apart:
        return first.data.as_strided(shape, first.stride(), first.storage_offset())
    stacked = torch.cat([p.data for p in parameters])
    for p, part in zip(parameters, stacked.split(sizes), strict=True):
        p.data = part
    return stacked
