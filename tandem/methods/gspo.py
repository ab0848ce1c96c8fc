"""GSPO: GRPO whose ratio, and whose clipping, are those of whole sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from tandem.batch import Batch, Outputs, TokenLoss, filled
from tandem.functional.advantages import group_normalised
from tandem.functional.policy import sequence_logp
from tandem.methods.base import Samples
from tandem.methods.knobs import Clip
from tandem.methods.tokens import TokenMethod, clipped_surrogate
from tandem.types import Aggregation, Group


@dataclass(frozen=True, kw_only=True)
class GSPO(TokenMethod):
    """Group sequence policy optimization (arXiv:2507.18071, eq. 5 to 7): without a KL, unless it is asked for."""

    reads: ClassVar = Samples(at_least=2)
    title: ClassVar = "GSPO"
    about: ClassVar = "Improve a model against a reward with GSPO: GRPO with one ratio for each sequence."

    aggregation: Aggregation = "sequence"
    clip: Clip = Clip(clip_low=3e-4, clip_high=4e-4)

    def advantages(self, group: Group) -> list[float]:
        """One number for each usable rollout: its reward, normalised in its group (eq. 6)."""
        return group_normalised(group.rewards)

    def surrogate(self, out: Outputs, batch: Batch) -> TokenLoss:
        """PPO's clipped loss of each sequence's ratio ``exp(mean log-prob - mean old log-prob)``, at all its tokens.

        Metrics are those of ``clipped_surrogate``, of sequences.
        """
        means = [
            sequence_logp(logp_T, batch.trainable_T, batch.bounds)
            for logp_T in (filled(out.logp_T, "out.logp_T"), batch.proximal_logp_T)
        ]
        seen = batch.seen | {"actor": Outputs(logp_T=means[1])}
        return clipped_surrogate(Outputs(logp_T=means[0]), replace(batch, seen=seen), self.clip)
