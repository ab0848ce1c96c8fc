"""A step of parts that carry a state from token to token: the module's own, on kernels of ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from tandem.kernels import states as kernels
from tandem.kernels.layers import Norm
from tandem.models.recurrent.scans import calling
from tandem.models.recurrent.states import Held

if TYPE_CHECKING:
    from tandem.engines.live.deltas import GatedDelta


class Mixer:
    """In an attention's place what carries a state from token to token: the module's own part, over its states.

    Its forward calls functions which transformers replaces by those of other packages (causal_conv1d,
    flash-linear-attention, mamba_ssm) where they are installed. Here it calls ours, which change states in place.
    """

    def __init__(self, module: nn.Module, cache: str) -> None:
        """``cache``: the name of the cache among its arguments."""
        self.module, self.cache = module, cache
        self.forward = _with_ours(module)
        self.delta: GatedDelta | None = None
        """A ``deltas.GatedDelta`` that computes the same in fewer operations."""

    def products(self) -> tuple[Any, ...]:
        return () if self.delta is None else self.delta.products()

    def norms(self) -> tuple[Norm, ...]:
        return ()

    def __call__(self, x_TE: Tensor, held: Held) -> Tensor:
        """Of one token each of T sequences, whose states change in place."""
        if self.delta is not None:
            layer = held.layers[self.delta.number]
            return self.delta(x_TE, layer.conv_states[0], layer.recurrent_states[0])
        out_T1E: Tensor = self.forward(x_TE[:, None], **{self.cache: held})
        return out_T1E[:, 0]


def _with_ours(module: nn.Module) -> Callable[..., Any]:
    """The module's forward, with functions of ours under the names by which it calls them."""
    changed = calling(type(module).forward, OURS)
    return module if changed is None or "forward" in vars(module) else partial(changed, module)


def _convolve(
    theirs: Callable[..., Tensor],
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``causal_conv1d_update``: [B, C, 1] → [B, C, 1]."""
    known = activation in (None, "silu", "swish") and hidden_states.shape[-1] == 1
    if not known or conv_state.shape[-1] < weight.shape[-1]:
        return theirs(hidden_states, conv_state, weight, bias, activation)
    silu = activation is not None
    return kernels.convolve(hidden_states[..., 0], conv_state, weight, bias, silu=silu)[..., None]


def _select(
    theirs: Callable[..., Tensor],
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``selective_state_update`` of Mamba 2: one step, rate and skip a head, expanded over its lines."""
    alike = not any(x is None or x.stride(-1) for x in (dt, A, D, dt_bias))
    if not alike or A.stride(1) or not dt_softplus or D is None or dt_bias is None:
        named = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "z": z}
        return theirs(state, hidden_states, dt, A, B, C, **named, **options)
    step = F.softplus(dt[..., 0].float() + dt_bias[:, 0])
    out = kernels.select_step(hidden_states, step, A[:, 0, 0].contiguous(), B, C, D[:, 0].contiguous(), state)
    return out if z is None else out * F.silu(z)


def _select_channels(
    theirs: Callable[..., Tensor],
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``selective_state_update`` of Mamba: one step, rate and skip a channel, and a gate."""
    given = hidden_states, dt, A, B, C
    if D is None or dt_bias is None or z is None or not dt_softplus or any(x.stride(-1) != 1 for x in (*given, z)):
        named = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "z": z}
        return theirs(state, *given, **named, **options)
    return kernels.select_channels(hidden_states, dt, dt_bias, A, B, C, D, z, state)


OURS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_update": _convolve,
    "mamba_selective_state_update": _select_channels,
    "mamba2_selective_state_update": _select,
}
"""By the names that transformers has for them."""
