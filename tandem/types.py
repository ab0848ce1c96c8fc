"""The data that travels between the rooms. Names end in their shape: T tokens, S segments (sequences).

Everything that concerns one token is stored at that token's own index: ``logp_T[t]`` is the log-probability of
token ``t`` given the tokens before it in its segment, ``value_T[t]`` the value of the state in which token ``t`` was
chosen. The first token of a segment has no such numbers; it is never trainable.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


StopReason = Literal["eos", "length", "stop_string", "tool", "error"]
Aggregation = Literal["token", "sequence", "constant"]
"""Which mean a loss is: see ``tandem.data.packing.stamp_weights``."""
Message = dict[str, Any]
"""One chat turn, ``{"role": ..., "content": ...}``."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a model can read. None: without a limit."""

    positions: int | None = None
    """Tokens of a whole sequence."""
    vocabulary: int | None = None
    """Rows of its embedding: token ids are below it."""
    whose: str = "the model"
    """The folder or hub name that has these limits, for messages."""


class Held(NamedTuple):
    """An engine's copy of a pushed tensor: which one, the engine's own parameter that it lies in, and its checksum."""

    part: str
    where: str
    sum: int
    """``tandem.sync.checksum``: of the whole tensor, in the dtype in which it came."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Logits are divided by ``temperature`` first, then truncated.

    ``temperature=0`` is greedy. ``top_k=0``, ``top_p=1`` and ``min_p=0`` truncate nothing. Sampling stops after
    ``max_new_tokens`` tokens, at the tokenizer's end-of-sequence id, at any of ``stop_token_ids`` or once the
    decoded completion contains one of ``stop`` (the text ends before it, its tokens are kept).
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to sample ``len(seeds)`` times. Sample ``i`` depends on ``seeds[i]`` and the prompt alone."""

    prompt_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    sampling: SamplingParams


@dataclass(kw_only=True)
class Completion:
    """What an engine returns for one sample: the sampled tokens (a stop token included) and their log-probs.

    ``behaviour_logp`` is under the distribution that each token was drawn from (temperature and truncation);
    ``untruncated_logp`` at the same temperature but without top-k, top-p and min-p: what a trainer computes.
    """

    token_ids: list[int]
    behaviour_logp: list[float]
    untruncated_logp: list[float]
    stop: StopReason
    text: str = ""
    version_min: int = 0
    version_max: int = 0
    error: str | None = None


@dataclass(kw_only=True)
class Rollout:
    """One sampled sequence, prompt and completion. All lists are as long as ``token_ids``.

    Worked example: a prompt of two tokens answered with ``7`` and the end-of-sequence token ``1``::

        Rollout(prompt_id="p0", sample_index=0, token_ids=[5, 6, 7, 1], prompt_length=2,
                trainable=[False, False, True, True], behaviour_logp=[0, 0, -0.7, -0.1],
                untruncated_logp=[0, 0, -0.7, -0.1], stop="eos", reward=1.0)
    """

    prompt_id: str
    sample_index: int
    token_ids: list[int]
    prompt_length: int
    trainable: list[bool]
    """False on the prompt and on tool output."""
    behaviour_logp: list[float]
    """Under the distribution the token was drawn from, in nats; 0 where not trainable."""
    untruncated_logp: list[float]
    """At the sampling temperature without truncation, in nats: what ratios are taken against."""
    stop: StopReason
    completion: str = ""
    version_min: int = 0
    """Optimizer steps that the oldest weights behind any of its tokens had seen."""
    version_max: int = 0
    reward: float | None = None
    """None: a reward function left the sample out. It enters no baseline."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    advantage: float | None = None
    """Mean over its trainable tokens; None where it was not trained on."""
    error: str | None = None

    @property
    def completion_ids(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    @property
    def usable(self) -> bool:
        """Whether it may be trained on: it ended without an error and has a reward."""
        return self.stop != "error" and self.reward is not None


@dataclass(kw_only=True)
class Prompt:
    """One row of an online dataset, tokenized. ``columns`` are the row's other fields, handed to reward functions."""

    prompt_id: str
    prompt: str | list[Message]
    token_ids: tuple[int, ...]
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Group:
    """The rollouts of one prompt."""

    prompt: Prompt
    rollouts: list[Rollout]

    @property
    def usable(self) -> list[Rollout]:
        return [rollout for rollout in self.rollouts if rollout.usable]

    @property
    def rewards(self) -> list[float]:
        """Rewards of the usable rollouts, in their order."""
        return [rollout.reward for rollout in self.rollouts if rollout.usable and rollout.reward is not None]


@dataclass(kw_only=True)
class Sequence:
    """One tokenized sequence for an offline method. ``trainable`` is as long as ``token_ids``."""

    token_ids: list[int]
    trainable: list[bool]


@dataclass(kw_only=True)
class PreferencePair:
    """A tokenized preference: two full sequences (prompt and answer) of the same prompt."""

    chosen: Sequence
    rejected: Sequence
    margin: float = 0.0


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
