"""peft's linear layers with one pair of matrices, multiplied as ``tandem.kernels.adapted`` says."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from tandem.kernels import adapted as kernels
from tandem.models.kinds import kind_of
from tandem.models.lora.pairs import NAME, adapted
from tandem.models.quantized.layers import Quantized, is_plain_linear


def speed_up_pairs(module: nn.Module) -> None:
    """Makes peft's linear layers compute so, where nothing but a pair is added: no DoRA. Parameters and names stay."""
    for layer in adapted(module).values():
        base = layer.get_base_layer()
        if (is_plain_linear(base) or isinstance(base, Quantized)) and not layer.lora_variant:
            kind: Any = type(layer)
            layer.__class__ = _class_of(kind)


@functools.cache
def _class_of(kind: Any) -> Any:
    """A class, not a ``forward`` of each layer's own: compiled layers share a graph where their parts are of one."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base, a_RI, b_OR = self.base_layer, self.lora_A[NAME].weight, self.lora_B[NAME].weight
        # Before a trainer has cast them, adapters of a base in bfloat16 are float32.
        if self.disable_adapters or x.dtype != a_RI.dtype:
            found: Tensor = kind.forward(self, x, *args, **kwargs)
            return found
        weight = base.coded if isinstance(base, Quantized) else base.weight
        return kernels.linear(x, weight, base.bias, a_RI, b_OR, self.scaling[NAME])

    return kind_of(_class_of, kind, forward=forward)
