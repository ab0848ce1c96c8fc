"""Whole sequences through Mamba 2: the module's own part, on a scan of ours.

Without the kernels of mamba_ssm transformers has one that makes a tensor of all pairs of a chunk's tokens, each with
the states of all heads (before 5.19): 112 GiB for 256 prompts of 64 tokens.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tandem.kernels import states as kernels

log = logging.getLogger("tandem")

SCAN = "mamba2_chunk_scan"
CLOSE = 1e-4
"""A difference of two scans in float32, over what they give, that is rounding."""


def speed_up_scans(module: Any) -> None:
    """Lets all parts of a module that scan as Mamba 2 does use our scan, unless mamba_ssm's kernels are there."""
    if _has_kernels():
        return
    for part in module.modules():
        kind: Any = type(part)
        if (scanning := _scanning(kind)) is not kind:
            part.__class__ = scanning


@functools.cache
def _has_kernels() -> bool:
    """Whether transformers calls mamba_ssm's: they can be imported (they need not fit the torch that is installed)."""
    try:
        return hasattr(importlib.import_module("mamba_ssm.ops.triton.ssd_combined"), "mamba_chunk_scan_combined")
    except Exception:  # As transformers does: what fails in there is of any kind.
        return False


@functools.cache
def _scanning(kind: Any) -> Any:
    """The class of a part whose forward calls our scan: its own where it does already, or calls none that ours is."""
    forward = calling(kind.forward, {SCAN: _scan})
    if forward is None:
        return kind
    scan = forward.__globals__[SCAN]
    if isinstance(scan.args[0], functools.partial):
        return kind
    if not _is_ours(scan):
        log.warning("%s: the scan of this transformers is not the one that ours is: it takes its own", kind.__name__)
        return kind
    return type(kind.__name__, (kind,), {"__module__": __name__, "forward": forward})


def calling(forward: Any, ours: Mapping[str, Callable[..., Any]]) -> Any:
    """A module's forward that calls ours under the names by which it calls transformers', each given theirs first.

    None where it calls none of them.
    """
    forward = inspect.unwrap(forward)
    if not isinstance(forward, FunctionType):
        return None
    called = {name: forward.__globals__.get(name) for name in ours if name in forward.__code__.co_names}
    found = {name: functools.partial(ours[name], theirs) for name, theirs in called.items() if theirs is not None}
    if not found:
        return None
    changed = FunctionType(
        forward.__code__, forward.__globals__ | found, forward.__name__, forward.__defaults__, forward.__closure__
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


@torch.no_grad()
def _is_ours(scan: Any) -> bool:
    """Whether it computes what transformers' scan does, with its arguments, of more than one chunk."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    given = some(2, 7, 4, 3), some(2, 7, 4), -some(4).exp(), some(2, 7, 2, 5), some(2, 7, 2, 5)
    options = {
        "chunk_size": 3, "D": some(4), "dt_bias": some(4), "initial_states": some(2, 4, 3, 5), "dt_softplus": True,
        "dt_limit": (0.3, 2.0), "return_final_states": True, "z": None,
    }  # fmt: skip
    try:
        pairs = zip(scan(*given, **options), inspect.unwrap(scan.args[0])(*given, **options), strict=True)
        return all((one - two).norm() <= CLOSE * two.norm() for one, two in pairs)
    except (TypeError, ValueError, RuntimeError):  # Other arguments, or another result.
        return False


def _scan(
    theirs: Callable[..., Any],
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: Tensor | None = None,
    **options: Any,
) -> Any:
    """``mamba2_chunk_scan``, which knows other options no more than theirs does."""
    if D is None or dt_bias is None or not dt_softplus or z is not None:
        named = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "z": z}
        named |= {"initial_states": initial_states, "return_final_states": return_final_states}
        return theirs(hidden_states, dt, A, B, C, chunk_size, **named, **options)

    def run(x: Tensor, dt: Tensor, bias: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        step = F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + bias).clamp(*dt_limit)
        return kernels.scan(x, step, *others, chunk=chunk_size)

    given = (hidden_states, dt, dt_bias, A, B, C, D, initial_states)
    if torch.is_grad_enabled():
        # What tokens of a chunk are to each other, and all states, are made again in the backward pass.
        out, state = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)
    else:
        out, state = run(*given)
    return (out, state) if return_final_states else out
