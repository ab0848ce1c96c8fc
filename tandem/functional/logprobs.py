"""Token log-probabilities and entropies, without ever holding all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tandem.functional.distillation import Against
from tandem.kernels import products
from tandem.kernels.logprob import PLAIN, HeadShape, entropy_of, logits_gradient_, row_stats

CHUNK_BYTES = {"cuda": 480_000_000, "cpu": 1 << 21}
"""Logits that exist at a time, by device, 256 rows at least: on a GPU 1,536 of a vocabulary of 152k in bfloat16."""
Head = Callable[[Tensor], Tensor]
GradientBuffer = Callable[[], Tensor]
"""Gives the tensor that the gradient of a head's weight is to be added to, [V, D]."""


class Added(NamedTuple):
    """What is added to a head's logits: ``inner @ up.T``, made a chunk at a time as they are."""

    inner_NR: Tensor
    up_VR: Tensor


class OfHead(NamedTuple):
    """What ``chunked_head`` gives, [N] each."""

    logp_N: Tensor
    entropy_N: Tensor | None
    divergence_N: Tensor | None


def chunked_head(
    head: Head,
    hidden_ND: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    entropy: bool = False,
    entropy_grad: bool = False,
    weight_gradient: GradientBuffer | None = None,
    against: Against | None = None,
    shape: HeadShape = PLAIN,
    added: Added | None = None,
) -> OfHead:
    """Log-probability of each target and the entropy of its distribution, in nats, ``chunk_tokens`` rows at a time.

    ``logp_n = z_n[target_n] - logsumexp(z_n)`` and ``H_n = -sum_v p_nv log p_nv`` with ``z = shape(head(hidden)) /
    temperature``: the distribution that tokens are drawn from at that temperature.

    With ``against`` the divergence from a teacher's distribution, too, with its gradient.

    ``head`` maps [n, D] to logits [n, V], and ``added`` is added to them; ``target_N`` is int64. Results are [N], in
    float32 (float64 where the head's logits are). With gradients enabled, logits are computed again in the backward
    pass, so that no more than one chunk [chunk_tokens, V] of them exists (None: ``CHUNK_BYTES``, or 2,048 rows of a
    head of unknown size). The entropy is None unless asked for, and detached unless ``entropy_grad``. Raises ValueError
    for a temperature that is not positive.

    An ``nn.Linear`` goes through ``LinearHead``, which saves nothing of a chunk's size and whose weight's gradient may
    be gathered elsewhere (``weight_gradient``); of any other head each chunk is checkpointed.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: log-probabilities need a positive one")
    if shape.cap is None and against is None:
        # The same, without touching a logit.
        temperature, shape = temperature / shape.scale, PLAIN
    if isinstance(head, nn.Linear) and _is_plain(head):
        rows = chunk_tokens or _chunk_rows(head.weight)
        ask = _Ask(temperature, rows, entropy, entropy_grad, torch.is_grad_enabled(), weight_gradient, against, shape)
        return OfHead(*LinearHead.apply(hidden_ND, head.weight, head.bias, *(added or (None, None)), target_N, ask))
    width = hidden_ND.shape[1]
    if added is not None:
        hidden_ND = torch.cat((hidden_ND, added.inner_NR), dim=1)

    def whole(row_nW: Tensor) -> Tensor:
        logits_nV = head(row_nW[:, :width])
        return shape.of(logits_nV if added is None else logits_nV + row_nW[:, width:] @ added.up_VR.T)

    return _checkpointed(whole, hidden_ND, target_N, temperature, chunk_tokens or 2048, entropy, entropy_grad, against)


def _chunk_rows(weight_VD: Tensor) -> int:
    """Rows of logits that ``CHUNK_BYTES`` hold: a multiple of 256."""
    limit = CHUNK_BYTES.get(weight_VD.device.type, CHUNK_BYTES["cpu"])
    return max(1, limit // (len(weight_VD) * weight_VD.element_size()) // 256) * 256


def _is_plain(head: nn.Linear) -> bool:
    """Whether calling ``head`` is a matrix product and nothing else: no subclass, hook or slice of a weight."""
    return (
        type(head) in (nn.Linear, products.Linear)
        and type(head.weight) is nn.Parameter
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or "forward" in vars(head))
    )


@dataclass(frozen=True)
class _Ask:
    """What ``LinearHead`` is asked for; see ``chunked_head``."""

    temperature: float
    chunk_tokens: int
    entropy: bool
    entropy_grad: bool
    backward: bool
    weight_gradient: GradientBuffer | None
    against: Against | None = None
    shape: HeadShape = PLAIN


class LinearHead(torch.autograd.Function):
    """``chunked_head`` of ``hidden @ weight.T + bias``, a chunk of rows at a time, forward and backward.

    ``inner @ up.T`` is added to the logits, where it is given. Saved are the inputs, [N, D], and three numbers a row.
    The backward pass makes a chunk's logits again, turns them into their gradient in place and adds the chunk's part to
    the weight's gradient, in float32 or higher. The last chunk's logits are kept for it instead: it is where the
    backward pass begins, so they are no more than it takes.

    Where the log-probs alone have a gradient and nothing but ``hidden`` wants it, the forward pass makes that of each
    row up to its factor, which is all that the backward pass brings: no logits are made twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        inner_NR: Tensor | None,
        up_VR: Tensor | None,
        target_N: Tensor,
        ask: _Ask,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logsumexps, logps, entropies, divergences = [], [], [], []
        kept_nV: Tensor | None = None
        simple = ask.against is None and not (ask.entropy and ask.entropy_grad)
        at_once = ask.backward and simple and [*ctx.needs_input_grad[:5]] == [True, *[False] * 4]
        slope_ND = torch.empty_like(hidden_ND) if at_once else None
        for number, (hidden_nD, target_n) in enumerate(
            zip(*(x.split(ask.chunk_tokens) for x in (hidden_ND, target_N)), strict=True)
        ):
            del kept_nV  # Before the next chunk's are made.
            rows = slice(number * ask.chunk_tokens, number * ask.chunk_tokens + len(hidden_nD))
            kept_nV = _logits(hidden_nD, weight_VD, bias_V, _at(inner_NR, rows), up_VR, ask.shape)
            logsumexp_n, logp_n, entropy_n = row_stats(kept_nV, target_n, ask.temperature, entropy=ask.entropy)
            logsumexps.append(logsumexp_n)
            logps.append(logp_n)
            entropies += [] if entropy_n is None else [entropy_n]
            if ask.against is not None:
                divergences.append(ask.against.values(kept_nV, number * ask.chunk_tokens))
            if slope_ND is not None:
                slope = ask.shape.slope(kept_nV)
                logits_gradient_(kept_nV, target_n, logsumexp_n, torch.ones_like(logsumexp_n), ask.temperature)
                if ask.shape != PLAIN:
                    kept_nV *= slope
                products.product(kept_nV, weight_VD, out_MN=slope_ND[rows])
        logsumexp_N, logp_N = torch.cat(logsumexps), torch.cat(logps)
        entropy_N = torch.cat(entropies) if entropies else None
        ctx.ask, ctx.at_once = ask, at_once
        ctx.last_logits = kept_nV if ask.backward and not at_once else None
        if entropy_N is not None and not ask.entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        ctx.set_materialize_grads(False)
        if at_once:
            ctx.save_for_backward(slope_ND)
            return logp_N, entropy_N, None
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, inner_NR, up_VR, target_N, logsumexp_N, entropy_N)
        return logp_N, entropy_N, torch.cat(divergences) if divergences else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logp_N: Tensor | None, grad_entropy_N: Tensor | None, grad_divergence_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_logp_N is None and grad_entropy_N is None and grad_divergence_N is None:
            return (None,) * 7
        if ctx.at_once:
            assert grad_logp_N is not None
            (slope_ND,) = ctx.saved_tensors
            return ((slope_ND * grad_logp_N[:, None]).to(slope_ND.dtype), *[None] * 6)
        hidden_ND, weight_VD, bias_V, inner_NR, up_VR, target_N, logsumexp_N, entropy_N = ctx.saved_tensors
        ask, (for_hidden, for_weight, for_bias, for_inner, for_up, *_) = ctx.ask, ctx.needs_input_grad
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        elsewhere = ask.weight_gradient is not None
        grad_hidden_ND = torch.empty_like(hidden_ND) if for_hidden else None
        grad_weight_VD = None
        if for_weight:
            grad_weight_VD = ask.weight_gradient() if elsewhere else torch.zeros_like(weight_VD, dtype=wide)
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if for_bias else None
        grad_inner_NR = torch.empty_like(inner_NR) if for_inner else None
        grad_up_VR = torch.zeros_like(up_VR, dtype=wide) if for_up else None
        for start in reversed(range(0, len(hidden_ND), ask.chunk_tokens)):
            rows = slice(start, start + ask.chunk_tokens)
            logits_nV, ctx.last_logits = ctx.last_logits, None
            if logits_nV is None:
                logits_nV = _logits(hidden_ND[rows], weight_VD, bias_V, _at(inner_NR, rows), up_VR, ask.shape)
            slope = ask.shape.slope(logits_nV)
            further_nV = None
            if grad_divergence_N is not None:
                assert ask.against is not None
                further_nV = ask.against.gradient(logits_nV, start, grad_divergence_N[rows])
            if further_nV is not None and grad_logp_N is None and grad_entropy_N is None:
                logits_nV = further_nV
            else:
                entropies = {"entropy_n": _at(entropy_N, rows), "grad_entropy_n": _at(grad_entropy_N, rows)}
                logits_gradient_(
                    logits_nV, target_N[rows], logsumexp_N[rows], _at(grad_logp_N, rows), ask.temperature, **entropies
                )
                if further_nV is not None:
                    logits_nV += further_nV
            if ask.shape != PLAIN:
                logits_nV *= slope
            del further_nV, slope
            if grad_hidden_ND is not None:
                products.product(logits_nV, weight_VD, out_MN=grad_hidden_ND[rows])
            if grad_weight_VD is not None:
                products.add_transposed_product_(grad_weight_VD, logits_nV, hidden_ND[rows])
            if grad_bias_V is not None:
                grad_bias_V += logits_nV.sum(0, dtype=wide)
            if grad_inner_NR is not None:
                products.product(logits_nV, up_VR, out_MN=grad_inner_NR[rows])
            if grad_up_VR is not None:
                products.add_transposed_product_(grad_up_VR, logits_nV, inner_NR[rows])
            del logits_nV  # Before the next chunk's are made.
        return (
            grad_hidden_ND,
            None if grad_weight_VD is None or elsewhere else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(weight_VD.dtype),
            grad_inner_NR,
            None if grad_up_VR is None else grad_up_VR.to(up_VR.dtype),
            None,
            None,
        )


def _at(x_N: Tensor | None, rows: slice) -> Tensor | None:
    return None if x_N is None else x_N[rows]


def _logits(
    hidden_nD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    inner_nR: Tensor | None,
    up_VR: Tensor | None,
    shape: HeadShape,
) -> Tensor:
    """Logits of a chunk."""
    logits_nV = products.linear(hidden_nD, weight_VD, bias_V)
    if inner_nR is not None and up_VR is not None:
        logits_nV.addmm_(inner_nR, up_VR.T)
    return shape.of(logits_nV, in_place=True)


def _checkpointed(
    head: Head,
    hidden_ND: Tensor,
    target_N: Tensor,
    temperature: float,
    chunk_tokens: int,
    entropy: bool,
    entropy_grad: bool,
    against: Against | None,
) -> OfHead:
    """``chunked_head`` of any head. One chunk alone is not computed again."""
    hidden_chunks, target_chunks = hidden_ND.split(chunk_tokens), target_N.split(chunk_tokens)
    recompute = torch.is_grad_enabled() and len(hidden_chunks) > 1

    def one_chunk(hidden_nD: Tensor, target_n: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        logits_nV = head(hidden_nD)
        divergence_n = against.of(logits_nV, slice(start, start + len(target_n))) if against else torch.zeros(0)
        # Out of place: the backward pass of the head or of an entropy bonus may still need the logits.
        logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32)) / temperature
        logsumexp_n = logits_nV.logsumexp(-1)
        logp_n = logits_nV.gather(-1, target_n[:, None]).squeeze(-1) - logsumexp_n
        if not entropy:
            return logp_n, torch.zeros_like(logp_n), divergence_n
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            return logp_n, entropy_of(logits_nV - logsumexp_n[:, None]), divergence_n

    parts = [
        checkpoint(one_chunk, h, t, i * chunk_tokens, use_reentrant=False)
        if recompute
        else one_chunk(h, t, i * chunk_tokens)
        for i, (h, t) in enumerate(zip(hidden_chunks, target_chunks, strict=True))
    ]
    logp_N, entropy_N, divergence_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return OfHead(logp_N, entropy_N if entropy else None, divergence_N if against else None)
