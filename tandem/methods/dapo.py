"""DAPO: GRPO's advantages, clipped higher, of groups that tell good from bad, with answers near the limit punished."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from tandem.batch import Batch
from tandem.errors import UserError, expect, needs
from tandem.functional.advantages import group_normalised
from tandem.methods.base import Estimate, Samples
from tandem.methods.knobs import Clip
from tandem.methods.tokens import TokenMethod
from tandem.types import Group, Rollout


@dataclass(frozen=True, kw_only=True)
class DAPO(TokenMethod):
    """Decoupled clip and dynamic sampling policy optimization (arXiv:2503.14476, eq. 8 to 13).

    It has no KL, unless one is asked for.
    """

    reads: ClassVar = Samples(at_least=2)
    title: ClassVar = "DAPO"
    about: ClassVar = """Improve a model against a reward with DAPO: groups of equal rewards are replaced by others.

    Rows: prompt (a string or a list of messages); other columns go to the reward functions, as in TRL.
    Example: tandem dapo --model runs/sft/model --reward check.py:right --data prompts.jsonl --out runs/dapo
    --steps 200
    """
    leads: ClassVar = ("reward", "passed_over", "entropy", "response_length", "eos_share")

    clip: Clip = Clip(clip_high=0.28)
    overlong_length: int | None = None
    """Tokens of an answer at which its punishment is whole: max_new_tokens, as a rule. None: length costs nothing."""
    overlong_buffer: int | None = field(default=None, metadata=needs(("overlong_length",)))
    """The last tokens before overlong_length, over which the punishment rises from 0."""
    overlong_penalty: float = field(default=1.0, metadata=needs(("overlong_length",)))
    """The whole punishment, which comes off the reward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "1 or more", lambda x: x >= 1, "overlong_length", "overlong_buffer")
        expect(self, "more than 0", lambda x: x > 0, "overlong_penalty")
        if self.overlong_length is not None and not 1 <= (self.overlong_buffer or 0) <= self.overlong_length:
            raise UserError(
                f"overlong_buffer: expected from 1 to overlong_length, {self.overlong_length}, "
                f"got {self.overlong_buffer}"
            )

    @property
    def samples(self) -> Samples:
        return Samples(at_least=2, longer_than=(self.overlong_length or 0) - (self.overlong_buffer or 0))

    def keep(self, item: Any) -> bool:
        """Not a group with fewer than 2 rewards, or with equal ones before any punishment of length (eq. 11)."""
        (group,), _ = self.clipped_rewards([item])
        return len(set(group.rewards)) > 1

    def punishment(self, rollout: Rollout) -> float:
        """What a sample's length takes off its reward (eq. 13): from 0 to ``overlong_penalty``."""
        if self.overlong_length is None or self.overlong_buffer is None:
            return 0.0
        beyond = sum(rollout.trainable) - (self.overlong_length - self.overlong_buffer)
        return self.overlong_penalty * min(max(beyond / self.overlong_buffer, 0.0), 1.0)

    def advantages(self, group: Group) -> list[float]:
        """One number for each usable rollout: its reward, less the punishment, normalised in its group (eq. 9)."""
        rewards = zip(group.rewards, group.usable, strict=True)
        return group_normalised([reward - self.punishment(rollout) for reward, rollout in rewards])

    def estimate(self, groups: Seq[Group], batch: Batch, state: dict[str, float]) -> Estimate:
        """Fills ``advantage_T``. ``overlong_share`` is the share of samples trained on whose length is punished."""
        estimate = super().estimate(groups, batch, state)
        if self.overlong_length is None:
            return estimate
        punished = [self.punishment(rollout) > 0 for group in groups for rollout in group.usable]
        return replace(estimate, metrics=estimate.metrics | {"overlong_share": sum(punished) / len(punished)})
