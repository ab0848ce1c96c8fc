"""Packed sequences as tensors, and what a model says about them. Names end in their shape: T tokens, S segments.

A segment is a sequence of a batch. Everything that concerns one token is stored at that token's own index:
``logp_T[t]`` is the log-probability of token ``t`` given the tokens before it in its segment, ``value_T[t]`` the value
of the state in which token ``t`` was chosen. The first token of a segment has no such numbers; it is never trainable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from tandem.functional.divergence import Divergence

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
    seen: dict[str, Outputs] = field(default_factory=dict)
    """What models said about this batch before it is trained on, by role: a reference's log-probs, a critic's old
    values; those of the policy itself (``actor``) where the trainer was asked for them at the start of the step."""
    state: dict[str, float] = field(default_factory=dict)
    """The method's numbers of this step, such as a KL coefficient that a controller changes."""
    on_policy: bool = False
    """Ratios are taken against the log-probs of the very forward that is trained on, which the trainer puts into
    ``seen["actor"]``: they are 1, and only their gradient is not 0."""
    untruncated_logp_T: Tensor | None = None
    """At the sampling temperature without truncation, in nats, from the weights that sampled."""
    advantage_T: Tensor | None = None
    return_T: Tensor | None = None
    reward_S: Tensor | None = None
    margin_S: Tensor | None = None
    desirable_S: Tensor | None = None
    """bool: the label of each answer, where answers are labelled."""
    label_T: Tensor | None = None
    """float32: from 0 (wrong) to 1 (right), of each step at its last token, which is trainable; 0 elsewhere."""
    aside: Batch | None = None
    """Sequences that models have seen beside this batch, for a method's ``estimate``. Nothing of it is trained on."""
    share_S: Tensor | None = None
    """float32: one over the segments that one optimizer step sees, stamped as ``weight_T`` is: what a loss of whole
    segments is multiplied by."""
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
    def largest_unit(self) -> int:
        """Tokens of the largest that is never cut: a segment, or a pair, whose common beginning goes through once."""
        size_U = self.bounds[:: self.segments_per_unit].diff()
        if self.segments_per_unit == 2 and self.group_S is not None and self.prefix_S is not None:
            size_U = size_U - self.prefix_S[1::2] * (self.group_S[::2] == self.group_S[1::2])
        return int(size_U.max())

    @property
    def segment_T(self) -> Tensor:
        """int64 [T]: the segment each token belongs to."""
        segment_T = torch.repeat_interleave(torch.arange(self.segments), self.bounds.diff())
        return send(segment_T, self.token_ids_T.device)

    @property
    def index_N(self) -> Tensor:
        """int64 [N]: where ``trainable_T`` is true. Waits for the device where ``to`` has not stamped it."""
        return self.trainable_T.nonzero().squeeze(-1) if self.trainable_N is None else self.trainable_N

    @property
    def last_S(self) -> Tensor:
        """int64 [S]: index of each segment's last token."""
        return send(self.bounds[1:] - 1, self.token_ids_T.device)

    @property
    def proximal_logp_T(self) -> Tensor:
        """Log-probs that the policy ratio is taken against: the trainer's own where computed, else the sampler's."""
        if "actor" in self.seen:
            return self.logp_by("actor")
        if self.on_policy:
            raise ValueError("an on_policy batch has old log-probs in the loss only, not before the trainer's forward")
        return filled(self.untruncated_logp_T, "untruncated_logp_T")

    def logp_by(self, role: str) -> Tensor:
        """Log-probs [T] that a model gave this batch. Raises ValueError where it has not seen the batch."""
        return filled(self.by(role).logp_T, f"seen[{role!r}].logp_T")

    def values_by(self, role: str) -> Tensor:
        """Values [T] that a model gave this batch, as ``values`` reads them."""
        return self.values(self.by(role))

    def values(self, out: Outputs) -> Tensor:
        """[T]: the scalar head's value of the state in which each trainable token was chosen, 0 for other tokens."""
        scalar_T = filled(out.scalar_T, "out.scalar_T")
        return torch.cat([scalar_T.new_zeros(1), scalar_T[:-1]]) * self.trainable_T

    def scores(self, out: Outputs) -> Tensor:
        """[S]: the scalar head at each segment's last token."""
        return filled(out.scalar_T, "out.scalar_T").index_select(0, self.last_S)

    def of_units(self, x_U: Tensor) -> Tensor:
        """[T]: each unit's number at the last token of its first segment, where a unit has its weight; 0 elsewhere."""
        return x_U.new_zeros(self.tokens).index_put((self.last_S[:: self.segments_per_unit],), x_U)

    def loss_of_units(self, loss_U: Tensor, metrics: Mapping[str, Tensor]) -> TokenLoss:
        """A loss and metrics of one number for each unit (``of_units``)."""
        metrics_T = {name: self.of_units(x_U.detach()) for name, x_U in metrics.items()}
        return TokenLoss(loss_T=self.of_units(loss_U), metrics_T=metrics_T)

    def by(self, role: str) -> Outputs:
        """What a model said of this batch. Raises ValueError where it has not seen the batch."""
        if role not in self.seen:
            raise ValueError(f"the {role} has not seen the batch; what should ask it is not wired")
        return self.seen[role]

    def segments_of(self, units: list[int]) -> Tensor:
        """int64: the segments of these units, in this order."""
        unit_U1 = torch.tensor(units, dtype=torch.int64)[:, None]
        return (unit_U1 * self.segments_per_unit + torch.arange(self.segments_per_unit)).flatten()

    def tokens_of(self, units: list[int]) -> Tensor:
        """int64: the tokens of these units, in this order."""
        segments = self.segments_of(units)
        length_S = self.bounds.diff()[segments]
        return positions(length_S) + self.bounds[segments].repeat_interleave(length_S)

    def select(self, units: list[int]) -> Batch:
        """The batch of these units, in this order."""
        token_index, segment_index = self.tokens_of(units), self.segments_of(units)
        lengths = self.bounds.diff()[segment_index]
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        changes: dict[str, Any] = {"bounds": bounds, "trainable_N": None}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor) and f.name.endswith("_T"):
                changes[f.name] = value.index_select(0, send(token_index, value.device))
            elif isinstance(value, torch.Tensor) and f.name.endswith("_S"):
                changes[f.name] = value.index_select(0, send(segment_index, value.device))
        changes["seen"] = {
            role: out.map(lambda x: x.index_select(0, send(token_index, x.device))) for role, out in self.seen.items()
        }
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
        moved["seen"] = {role: out.map(lambda x: send(x, device)) for role, out in self.seen.items()}
        return replace(self, **moved)


def positions(length_S: Tensor) -> Tensor:
    """int64 [T]: of each token of segments of these lengths, int64 on the CPU, its place in its own, from 0."""
    start_S = length_S.cumsum(0) - length_S
    return torch.arange(int(length_S.sum())) - start_S.repeat_interleave(length_S)


def filled(value: Tensor | None, name: str) -> Tensor:
    """The tensor itself. Raises ValueError where it is None: something that should have filled ``name`` did not."""
    if value is None:
        raise ValueError(f"{name} is not filled; what should fill it is not wired")
    return value


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
    """What a model says about a batch: [T] each, or [T, D]. A causal LM fills the first two, a scalar head the third.

    The others are what distillation asks for, of the student and of its teacher.
    """

    logp_T: Tensor | None = None
    """float32, at the sampling temperature; 0 where not trainable."""
    entropy_T: Tensor | None = None
    """float32, in nats; 0 where not trainable. Detached: it is for the metrics unless asked for with gradient."""
    scalar_T: Tensor | None = None
    """float32: the head where it has read up to and including each token (``Batch.values``, ``Batch.scores``)."""
    divergence_T: Tensor | None = None
    """float32: of the distribution that each trainable token is one draw of, from the teacher's (``Divergence``)."""
    state_TD: Tensor | None = None
    """The last hidden state in which each trainable token was chosen, in the precision of the model."""
    top_logp_TK: Tensor | None = None
    """float32 [T, K + 1]: of the K likeliest tokens in the place of each trainable one, and of all others together."""
    top_id_TK: Tensor | None = None
    """int64 [T, K]: which tokens they are."""
    balance_S: Tensor | None = None
    """[S]: the load-balancing loss of each segment's routers (``functional.balance``), if asked for."""
    load_LE: Tensor | None = None
    """int64 [L, E]: how many of the batch's tokens each of E experts had in each of L layers, if asked for."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        """Every tensor that is filled, changed."""
        return Outputs(**{name: x if x is None else change(x) for name, x in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Asks:
    """What a forward of a model is to give besides log-probs; a teacher's ``states`` or ``top_k`` instead of them.

    A scalar model gives ``scalar_T``, whatever is asked.
    """

    temperature: float = 1.0
    """Divides the logits."""
    entropy: bool = False
    entropy_gradient: bool = False
    """Whether a loss differentiates ``entropy_T``."""
    divergence: Divergence | None = None
    """From a teacher that gives ``states`` or ``top_k``."""
    states: bool = False
    """A teacher's hidden states, of which its head, given to the policy at the start, makes whole distributions."""
    top_k: int = 0
    """So many of a teacher's likeliest tokens, and the rest as one."""
    balance: bool = False
    """``balance_S``."""
    load: bool = False
    """``load_LE``, of a model with ``picks``."""


@dataclass(kw_only=True)
class TokenLoss:
    """Unreduced loss, and metrics to be averaged over the tokens whose weight is not zero. All [T].

    Of a metric whose name ends in ``_max``, the largest value is taken instead.
    """

    loss_T: Tensor
    metrics_T: dict[str, Tensor] = field(default_factory=dict)
