"""Packed sequences as tensors, and what a model says about them. Names end in their shape: T tokens, S segments.

A segment is a sequence of a batch. Everything that concerns one token is stored at that token's own index:
``logp_T[t]`` is the log-probability of token ``t`` given the tokens before it in its segment, ``value_T[t]`` the value
of the state in which token ``t`` was chosen. The first token of a segment has no such numbers; it is never trainable.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_ON_THE_CPU = ("bounds", "group_S", "prefix_S")


@dataclass(kw_only=True)
class Batch:
    """Packed sequences: segment ``s`` is ``[bounds[s], bounds[s + 1])`` of every ``_T`` tensor.

    ``weight_T`` is stamped from counts over everything that one optimizer step sees, so that
    ``(loss_T * weight_T).sum()`` is the whole reduction, exact under any packing, micro-batching or sharding.
    Fields named ``*_T`` have one entry a token, ``*_S`` one a segment; ``select`` relies on the names.
    """

    bounds: Tensor
    """int64 [S + 1], on the CPU."""
    token_ids_T: Tensor
    """int64"""
    position_T: Tensor
    """int64, from 0 in every segment."""
    trainable_T: Tensor
    """bool; always False at position 0."""
    weight_T: Tensor
    """float32; 0 where not trainable."""
    segments_per_unit: int = 1
    """Segments that must stay together: 2 for preference pairs (chosen, rejected), else 1."""
    kl_coef: float = 0.0
    """Coefficient of the KL term for this step (adaptive controllers change it)."""
    on_policy: bool = False
    """Ratios are taken against the log-probs of the very forward that is trained on, which the trainer puts into
    ``old_logp_T``: they are 1, and only their gradient is not 0."""
    behaviour_logp_T: Tensor | None = None
    """Untruncated, at the sampling temperature, from the weights that sampled."""
    old_logp_T: Tensor | None = None
    """From the trainer at the start of the step; None: the sampler's are used."""
    reference_logp_T: Tensor | None = None
    advantage_T: Tensor | None = None
    return_T: Tensor | None = None
    old_value_T: Tensor | None = None
    reward_S: Tensor | None = None
    margin_S: Tensor | None = None
    index_S: Tensor | None = None
    """int64: which rollout or row a segment came from, for messages that name it."""
    group_S: Tensor | None = None
    """int64, on the CPU: segments with the same number begin with the same ``prefix_S`` tokens."""
    prefix_S: Tensor | None = None
    """int64, on the CPU: leading tokens, fewer than all, that go through a model once for all of ``group_S``."""
    trainable_N: Tensor | None = None
    """int64: where ``trainable_T`` is true. Stamped by ``to``, so that no device has to be asked and waited for."""

    @property
    def tokens(self) -> int:
        return self.token_ids_T.numel()

    @property
    def segments(self) -> int:
        return self.bounds.numel() - 1

    @property
    def units(self) -> int:
        return self.segments // self.segments_per_unit

    @property
    def lengths(self) -> list[int]:
        return self.bounds.diff().tolist()

    @property
    def segment_T(self) -> Tensor:
        """int64 [T]: the segment each token belongs to."""
        segment_T = torch.repeat_interleave(torch.arange(self.segments), self.bounds.diff())
        return send(segment_T, self.token_ids_T.device)

    @property
    def last_S(self) -> Tensor:
        """int64 [S]: index of each segment's last token."""
        return send(self.bounds[1:] - 1, self.token_ids_T.device)

    @property
    def proximal_logp_T(self) -> Tensor:
        """Log-probs that the policy ratio is taken against: the trainer's own where computed, else the sampler's."""
        if self.on_policy and self.old_logp_T is None:
            raise ValueError("an on_policy batch has old log-probs in the loss only, not before the trainer's forward")
        logp_T = self.old_logp_T if self.old_logp_T is not None else self.behaviour_logp_T
        if logp_T is None:
            raise ValueError("the batch has neither old_logp_T nor behaviour_logp_T")
        return logp_T

    def segments_of(self, units: list[int]) -> Tensor:
        """int64: the segments of these units, in this order."""
        per = self.segments_per_unit
        return torch.tensor([unit * per + i for unit in units for i in range(per)], dtype=torch.int64)

    def tokens_of(self, units: list[int]) -> Tensor:
        """int64: the tokens of these units, in this order."""
        starts, ends = self.bounds[:-1].tolist(), self.bounds[1:].tolist()
        return torch.cat([torch.arange(starts[s], ends[s]) for s in self.segments_of(units).tolist()])

    def select(self, units: list[int]) -> Batch:
        """The batch of these units, in this order."""
        token_index, segment_index = self.tokens_of(units), self.segments_of(units)
        lengths = self.bounds.diff()[segment_index]
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        changes: dict[str, Any] = {"bounds": bounds, "trainable_N": None}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor) and f.name.endswith("_T"):
                changes[f.name] = value[send(token_index, value.device)]
            elif isinstance(value, torch.Tensor) and f.name.endswith("_S"):
                changes[f.name] = value[send(segment_index, value.device)]
        return replace(self, **changes)

    def unshared(self) -> Batch:
        """The same, with every token of every segment going through a model."""
        return replace(self, group_S=None, prefix_S=None)

    def to(self, device: torch.device | str) -> Batch:
        """Moves every tensor but those that say how segments lie, to a GPU without waiting for it."""
        moved: dict[str, Any] = {
            f.name: send(getattr(self, f.name), device)
            for f in fields(self)
            if f.name not in _ON_THE_CPU and isinstance(getattr(self, f.name), torch.Tensor)
        }
        if self.trainable_T.device.type == "cpu":
            moved["trainable_N"] = send(self.trainable_T.nonzero().squeeze(-1), device)
        return replace(self, **moved)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on the device. What goes from the CPU to a GPU is queued there, and nobody waits for it."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def cut(sizes: list[int], budget: int, following: list[int] | None = None) -> list[list[int]]:
    """Consecutive indices of ``sizes`` in lists whose sums are at most ``budget`` (a larger one stands alone).

    ``following`` are the sizes of those that come behind another in their list, where they are not ``sizes``.
    """
    parts: list[list[int]] = []
    total = 0
    for index, size in enumerate(sizes):
        more = size if following is None else following[index]
        if not parts or total + more > budget:
            parts.append([])
            total, more = 0, size
        parts[-1].append(index)
        total += more
    return parts


@dataclass(kw_only=True)
class Outputs:
    """What a model says about a batch. A causal LM fills the first two, a scalar head the last two."""

    logp_T: Tensor | None = None
    """float32, at the sampling temperature; 0 where not trainable."""
    entropy_T: Tensor | None = None
    """float32, in nats; 0 where not trainable. Detached: it is for the metrics unless asked for with gradient."""
    value_T: Tensor | None = None
    """float32; 0 where not trainable."""
    score_S: Tensor | None = None
    """float32: the scalar head at each segment's last token."""


@dataclass(kw_only=True)
class TokenLoss:
    """Unreduced loss, and metrics to be averaged over the tokens whose weight is not zero. All [T].

    Of a metric whose name ends in ``_max``, the largest value is taken instead.
    """

    loss_T: Tensor
    metrics_T: dict[str, Tensor] = field(default_factory=dict)
