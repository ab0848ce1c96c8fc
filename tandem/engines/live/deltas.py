"""A step of the gated delta rule as Qwen 3 Next, Qwen 3.5 and OLMo Hybrid have it, in five operations."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tandem.engines.live.layers import Product
from tandem.engines.live.stacked import is_linear
from tandem.kernels import states as kernels
from tandem.kernels.layers import Norm

WIDE = (("in_proj_qkvz",), ("in_proj_qkv", "in_proj_z"), ("q_proj", "k_proj", "v_proj", "g_proj"))
"""By what names modules have products of what goes in, whose columns are queries, keys, values, and gates."""
NARROW = (("in_proj_ba",), ("in_proj_b", "in_proj_a"), ("b_proj", "a_proj"))
"""Those of shares of changes and steps of decay: apart, since a product of an odd number of columns is slow."""
NORMS, OUTPUTS = (("norm",), ("o_norm",)), (("out_proj",), ("o_proj",))
RULE = "torch_recurrent_gated_delta_rule"


@dataclass(frozen=True, kw_only=True)
class GatedDelta:
    """From what goes into such a layer to what comes out of it, for one token of each sequence."""

    number: int
    """Of the layer, in a cache."""
    wide: Product
    narrow: Product
    convolution: nn.Conv1d
    groups: int
    """Heads of queries and keys, for one or more heads of values each."""
    keys: int
    values: int
    column_C: Tensor | None
    """Where in the wide product the convolution's channels are, if it has all of a head of keys behind one another."""
    gates: kernels.DeltaGates
    output: Product

    def products(self) -> tuple[Product, ...]:
        return self.wide, self.narrow, self.output

    def __call__(self, x_TE: Tensor, past_TCK: Tensor, state_THKV: Tensor) -> Tensor:
        """Both states change in place."""
        rows, groups = len(x_TE), self.groups
        weight_CW, bias_C = self.convolution.weight.flatten(1), self.convolution.bias
        wide_TX, narrow_TX = self.wide(x_TE), self.narrow(x_TE)
        channels = len(weight_CW)
        if self.column_C is None:
            wide_TX, gate = wide_TX.tensor_split([channels], dim=1)
            gate = gate.view(rows, groups, -1)
            share, step = narrow_TX.view(rows, 2, groups, -1).unbind(1)
        else:
            gate = wide_TX.view(rows, groups, -1)[..., channels // groups :]
            share, step = narrow_TX.view(rows, groups, -1).chunk(2, dim=2)
        mixed_TC = kernels.convolve(wide_TX, past_TCK, weight_CW, bias_C, silu=True, column_C=self.column_C)
        query, key = mixed_TC[:, : 2 * groups * self.keys].view(rows, 2, groups, self.keys).unbind(1)
        value = mixed_TC[:, 2 * groups * self.keys :].view(rows, -1, self.values)
        gate = gate.unflatten(2, (-1, self.values))
        out_THV = kernels.delta_step(query, key, value, step, share, gate, self.gates, state_THKV)
        return self.output(out_THV.flatten(1))

    def of_all(self, x_TE: Tensor) -> Tensor:
        """Of the tokens of one sequence, [T, E]."""
        weight = self.convolution.weight
        past = weight.new_zeros(1, len(weight), weight.shape[-1])
        heads = len(self.gates.log_rate_H)
        state = x_TE.new_zeros(1, heads, self.keys, self.values, dtype=torch.promote_types(x_TE.dtype, torch.float32))
        return torch.cat([self(x_1E, past, state) for x_1E in x_TE.split(1)])


def read_delta(module: Any) -> GatedDelta | None:
    """What a module is if it is such a layer, by its names; None where it lacks any. What it computes is not proved."""
    called = getattr(getattr(inspect.unwrap(type(module).forward), "__code__", None), "co_names", ())
    wide, narrow, norm, output = (_named(module, either) for either in (WIDE, NARROW, NORMS, OUTPUTS))
    if RULE not in called or "forward" in vars(module) or not (wide and narrow and norm and output):
        return None
    curves = {getattr(part, "activation", None) for part in (module, *norm)}
    if curves != {"silu"} or not all(is_linear(x) for x in (*wide, *narrow, *output)):
        return None
    groups, keys, values = module.num_k_heads, module.head_k_dim, module.head_v_dim
    column_C = None
    if len(wide) == 1:
        # A head of keys' queries, keys, values and gates behind one another, and then the next one's.
        column = torch.arange(wide[0].out_features, dtype=torch.int32, device=module.A_log.device).view(groups, -1)
        shared = module.num_v_heads // groups * values
        column_C = torch.cat([x.flatten() for x in column.split([keys, keys, shared, shared], dim=1)[:3]])
    return GatedDelta(
        number=module.layer_idx, wide=Product(wide), narrow=Product(narrow), convolution=module.conv1d,
        groups=groups, keys=keys, values=values, column_C=column_C,
        gates=kernels.DeltaGates(
            log_rate_H=module.A_log, step_bias_H=module.dt_bias,
            most=2.0 if getattr(module, "allow_neg_eigval", False) else 1.0,
            norm=Norm(norm[0].weight, eps=norm[0].variance_epsilon),
        ),
        output=Product(output),
    )  # fmt: skip


def _named(module: nn.Module, either: tuple[tuple[str, ...], ...]) -> list[Any]:
    """Its parts of the first of these names that it has all of."""
    return next(([getattr(module, x) for x in names] for names in either if all(hasattr(module, x) for x in names)), [])
