"""Whole sequences, rows or packed, through Mamba, Mamba 2 and the gated delta rule: the module's own part, our scan.

Without the kernels of mamba_ssm transformers goes through Mamba's tokens one by one, and makes a tensor of all of them
for the gradient of each; for Mamba 2 it makes one of all pairs of a chunk's tokens, each with the states of
all heads (before 5.19): 112 GiB for 256 prompts of 64 tokens. Without those of flash-linear-attention its gated delta
rule keeps 15 KB of a token and head for the backward pass (keys and values of 128), where ours keeps what goes in.
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
from tandem.kernels.chunks import Chunks
from tandem.models.attention import UnsupportedAttention
from tandem.models.kinds import kind_of
from tandem.models.recurrent.segments import Segments

log = logging.getLogger("tandem")

CLOSE = 1e-4
"""A difference of two scans in float32, over what they give, that is rounding."""
LONGEST_CHUNK = 128
"""Tokens of Mamba 2 that weigh each other all at once: twice as many take twice the memory for that, and half for
states."""
LARGEST = 2**26
"""Most numbers in all states of the tokens of Mamba that are computed at once: 256 MiB, of which there are some."""


def speed_up_scans(module: Any) -> None:
    """Lets all parts of a module that scan as those of ``SCANS`` use our scan, unless kernels for it are there.

    Those that have a convolution can then be given ``Segments`` of packed tokens (``argument_of_segments``).
    """
    for part in module.modules():
        kind: Any = type(part)
        if (scanning := _scanning(kind)) is not kind:
            part.__class__ = scanning


@functools.cache
def _has_kernel(path: str, name: str) -> bool:
    """Whether transformers calls this one: it can be imported (it need not fit the torch that is installed)."""
    try:
        return hasattr(importlib.import_module(path), name)
    except Exception:  # As transformers does: what fails in there is of any kind.
        return False


@functools.cache
def _scanning(kind: Any) -> Any:
    """The class of a part whose forward calls our scan: its own where it does already, or calls none that ours is."""
    forward = calling(kind.forward, {CONVOLUTION: _convolve} | {name: ours for name, (ours, *_) in SCANS.items()})
    if forward is None or kind.__module__ == __name__:
        return kind
    for name in SCANS.keys() & set(forward.__code__.co_names):
        scan, (_, kernel, trial) = forward.__globals__.get(name), SCANS[name]
        if _has_kernel(*kernel):
            return kind
        if not _is_ours(scan, *trial()):
            log.warning(
                "%s: the scan of this transformers is not the one that ours is: it takes its own", kind.__name__
            )
            return kind
    return kind_of(_scanning, kind, forward=forward)


def argument_of_segments(part: Any) -> str:
    """By which name the forward of a part takes ``Segments`` of packed tokens, [1, T, ...]; empty: it takes none.

    It does if all that goes from token to token in it is a convolution and a scan that do.
    """
    kind: Any = type(part)
    if kind.__module__ != __name__:
        return ""
    called = set(kind.forward.__code__.co_names)
    known = inspect.signature(kind.forward).parameters
    if CONVOLUTION not in called:
        return ""
    if called & PACKED:
        return "segments" if any(x.kind is inspect.Parameter.VAR_KEYWORD for x in known.values()) else ""
    return SEGMENTS_OF_ROWS if SEGMENTS_OF_ROWS in known and not called & SCANS.keys() else ""


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
    # By the name of a module torch.compile would look for them there, and find others than it has been told of.
    known = {name: value for name, value in forward.__globals__.items() if name != "__name__"} | found
    changed = FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__, changed.__module__ = forward.__kwdefaults__, forward.__module__
    return changed


@torch.no_grad()
def _is_ours(scan: Any, given: list[Tensor], options: dict[str, Any]) -> bool:
    """Whether it computes what transformers' does of these arguments, which are of more than one chunk."""
    try:
        pairs = zip(scan(*given, **options), inspect.unwrap(scan.args[0])(*given, **options), strict=True)
        return all((one - two).norm() <= CLOSE * two.norm() for one, two in pairs)
    except (TypeError, ValueError, RuntimeError):  # Other arguments, or another result.
        return False


def _drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]


def _trial() -> tuple[list[Tensor], dict[str, Any]]:
    x, dt, rate, into, out_of = _drawn((2, 7, 4, 3), (2, 7, 4), (4,), (2, 7, 2, 5), (2, 7, 2, 5))
    skip, bias, state = _drawn((4,), (4,), (2, 4, 3, 5))
    options = {"chunk_size": 3, "D": skip, "dt_bias": bias, "initial_states": state, "dt_softplus": True, "z": None}
    return [x, dt, -rate.exp(), into, out_of], options | {"dt_limit": (0.3, 2.0), "return_final_states": True}


def _channel_trial() -> tuple[list[Tensor], dict[str, Any]]:
    x, dt, rate, into, out_of = _drawn((2, 3, 7), (2, 3, 7), (3, 5), (2, 5, 7), (2, 5, 7))
    skip, bias, gate = _drawn((3,), (3,), (2, 3, 7))
    options = {"D": skip, "z": gate, "delta_bias": bias, "delta_softplus": True, "return_last_state": True}
    return [x, dt, -rate.exp(), into, out_of], options


def _delta_trial() -> tuple[list[Tensor], dict[str, Any]]:
    *given, decay, beta = _drawn((2, 7, 3, 4), (2, 7, 3, 4), (2, 7, 3, 5), (2, 7, 3), (2, 7, 3))
    options = {"g": -decay.exp(), "beta": 2 * beta.sigmoid(), "chunk_size": 3, "initial_state": _drawn((2, 3, 4, 5))[0]}
    return given, options | {"output_final_state": True, "use_qk_l2norm_in_kernel": True}


def _convolve(
    theirs: Callable[..., Tensor],
    hidden_states: Tensor,
    weight: Tensor,
    *others: Any,
    segments: Segments | None = None,
    **options: Any,
) -> Tensor:
    """``causal_conv1d_fn``, [B, C, T]: of ``segments`` each as if nothing were before it."""
    if isinstance(options.get(SEGMENTS_OF_ROWS), Segments):
        segments = options.pop(SEGMENTS_OF_ROWS)
    if segments is None:
        return theirs(hidden_states, weight, *others, **options)
    apart, place_T = segments.apart(hidden_states.mT, weight.shape[-1] - 1)
    return theirs(apart.mT, weight, *others, **options).mT.index_select(1, place_T).mT


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
    segments: Segments | None = None,
    **options: Any,
) -> Any:
    """``mamba2_chunk_scan``, which knows other options no more than theirs does, but for ``segments``."""
    if D is None or dt_bias is None or not dt_softplus or z is not None:
        _require_rows(segments)
        named = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "z": z}
        named |= {"initial_states": initial_states, "return_final_states": return_final_states}
        return theirs(hidden_states, dt, A, B, C, chunk_size, **named, **options)

    chunks = _chunks(hidden_states, segments, min(chunk_size, LONGEST_CHUNK))

    def run(x: Tensor, dt: Tensor, bias: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        step = F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + bias).clamp(*dt_limit)
        return kernels.scan(x, step, *others, chunks=chunks)

    out, state = _again(run, hidden_states, dt, dt_bias, A, B, C, D, initial_states)
    return (out, state) if return_final_states else out


def _scan_channels(
    theirs: Callable[..., Any],
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    **options: Any,
) -> Any:
    """``mamba_selective_scan``, [B, D, T]. Where a config asks for mambapy it is theirs."""
    if use_mambapy:
        named = {"D": D, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
        named |= {"return_last_state": return_last_state, "use_mambapy": True}
        return theirs(hidden_states, dt, A, B, C, **named, **options)
    # As in the step for one more token, which is the module's own.
    step = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[:, None]
    step = F.softplus(step) if delta_softplus else step
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    state = torch.zeros(len(dt), *A.shape, dtype=wide, device=dt.device)
    given = []
    at_once = max(1, LARGEST // state.numel())
    for x, steps, into, out_of in zip(*(y.mT.split(at_once, 1) for y in (hidden_states, step, B, C)), strict=True):
        out, state = _again(kernels.scan_channels, x, steps, A, into, out_of, state)
        given.append(out)
    scanned = torch.cat(given, 1).mT
    scanned = scanned if D is None else scanned + hidden_states * D[:, None]
    scanned = scanned if z is None else scanned * F.silu(z)
    return (scanned, state) if return_last_state else scanned


def _scan_delta(
    theirs: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    segments: Segments | None = None,
    **options: Any,
) -> Any:
    """``torch_chunk_gated_delta_rule``, which knows other options no more than theirs does, but for ``segments``."""
    if not use_qk_l2norm_in_kernel:
        _require_rows(segments)
        named = {"initial_state": initial_state, "output_final_state": output_final_state}
        return theirs(query, key, value, g, beta, chunk_size, **named, **options)
    run = functools.partial(kernels.scan_delta, chunks=_chunks(query, segments, chunk_size))
    out, state = _again(run, query, key, value, g, beta, initial_state)
    return out, state if output_final_state else None


def _chunks(x: Tensor, segments: Segments | None, most: int) -> Chunks:
    return Chunks.of_rows(x, most) if segments is None else segments.chunks(most)


def _require_rows(segments: Segments | None) -> None:
    if segments is not None:
        raise UnsupportedAttention("packed segments for a scan that is transformers' own")


def _again(run: Callable[..., tuple[Tensor, Tensor]], *given: Tensor | None) -> tuple[Tensor, Tensor]:
    """``run(*given)``, of which nothing is kept for the backward pass, where it runs again."""
    if not torch.is_grad_enabled():
        return run(*given)
    found: tuple[Tensor, Tensor] = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)
    return found


CONVOLUTION = "causal_conv1d_fn"
SEGMENTS_OF_ROWS = "seq_idx"
"""What transformers calls the segments that its kernels are given."""
PACKED = {"mamba2_chunk_scan", "torch_chunk_gated_delta_rule"}
"""Those of our scans that take segments."""
SCANS: dict[str, tuple[Callable[..., Any], tuple[str, str], Callable[..., Any]]] = {
    "mamba2_chunk_scan": (_scan, ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"), _trial),
    "mamba_selective_scan": (
        _scan_channels, ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"), _channel_trial,
    ),
    "torch_chunk_gated_delta_rule": (
        _scan_delta, ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"), _delta_trial,
    ),
}  # fmt: skip
"""By the names that transformers has for them: ours, the kernel, and arguments of which both give the same."""
