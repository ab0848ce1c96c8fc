"""PPO with a critic and a KL penalty to a reference: RLHF as in InstructGPT."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from tandem.batch import Batch, Outputs, TokenLoss, filled
from tandem.errors import UserError
from tandem.functional.advantages import gae, length_adaptive_lambda, whiten
from tandem.functional.moments import Moments, merge, moments
from tandem.functional.rounding import rounding_of
from tandem.functional.segments import segment_sum
from tandem.functional.value import clipped_value_loss, explained_variance
from tandem.keys import ABOVE_0, AT_LEAST_0, FROM_0_TO_1, needs
from tandem.lazy import torch
from tandem.methods.base import REFERENCE, Estimate, Need, Samples, at_last_trainable
from tandem.methods.knobs import ReferenceKL
from tandem.methods.tokens import TokenMethod, charge_kl, corrected, kl_size, state_of_step
from tandem.roles import LossFn, Metrics
from tandem.types import Group

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PPO(TokenMethod):
    """Proximal policy optimization (arXiv:1707.06347) as used for RLHF (arXiv:1909.08593, arXiv:2203.02155).

    The reward of a sequence, clipped, is given at its last trainable token; with ``kl="reward"`` every token also
    costs ``kl_coef * (logp - reference_logp)``. Advantages come from GAE with the critic's values.
    """

    reads: ClassVar = Samples()
    title: ClassVar = "PPO"
    about: ClassVar = "Improve a model against a reward with PPO: actor, critic, and a frozen reference for the KL."
    example: ClassVar = "--reward-model runs/rm/model"
    models: ClassVar = (
        REFERENCE,
        Need(
            role="critic",
            doc="Folder it starts from. None: the reward model (the first), or else the model with a head that says 0.",
            head="scalar",
            sources=("reward_model", "model"),
            trained=True,
        ),
    )
    leads: ClassVar = (*TokenMethod.leads, "explained_variance")

    reference_kl: ReferenceKL = ReferenceKL(kl="reward", kl_coef=0.05)
    reward_clip: float | None = 10.0
    """Rewards are clipped to ±reward_clip, after normalization and before anything is added. None: not clipped."""
    value_clip: float | None = field(
        default=0.2, metadata=ABOVE_0 | needs(("part", "second optimizer step on a step's samples"))
    )
    """How far a value may move from its old one before its error stops counting. None: plain squared error."""
    gamma: float = field(default=1.0, metadata=FROM_0_TO_1)
    """Discount per trainable token."""
    lam: float = field(default=0.95, metadata=FROM_0_TO_1 | needs(("gamma",)))
    """GAE's lambda: 1 trusts the returns (no bias), 0 trusts the critic (little variance)."""
    lam_alpha: float | None = field(default=None, metadata=ABOVE_0 | needs(("gamma",)))
    """Length-adaptive GAE: lambda is 1 - 1 / (lam_alpha x an answer's tokens), 0.05 in VAPO. None: lam for all."""
    critic_lam: float | None = field(default=None, metadata=FROM_0_TO_1 | needs(("gamma",)))
    """Lambda of the returns that the critic learns; 1: the rewards themselves. None: the same as the advantages'."""
    critic_warmup_steps: int = field(default=0, metadata=AT_LEAST_0)
    """The run's first steps, in which the critic alone is trained."""
    normalize_rewards: bool = False
    """Subtract the running mean of all rewards so far and divide by their standard deviation."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the trainable tokens of the step, unless all is rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lam_alpha is not None and self.lam != type(self).lam:
            raise UserError("lam: has no effect with lam_alpha, which gives each answer its own lambda; leave one out")

    def initial_state(self) -> dict[str, float]:
        """The KL coefficient, where the KL counts, the rewards' moments, and the steps that train the critic alone."""
        return super().initial_state() | _state(Moments(), self.critic_warmup_steps)

    def check(self, steps: int) -> None:
        """The policy must be trained, too."""
        if steps <= self.critic_warmup_steps:
            raise UserError(
                f"critic_warmup_steps: {self.critic_warmup_steps}, and the run has {steps} steps: the policy would "
                "never be trained; give fewer, or a longer run"
            )

    def trains(self, state: dict[str, float]) -> tuple[str, ...]:
        """The critic alone while there are steps of its warmup left, both after them."""
        return ("critic",) if state["critic_warmup"] > 0 else super().trains(state)

    def estimate(self, groups: Seq[Group], batch: Batch, state: dict[str, float]) -> Estimate:
        """Fills ``advantage_T``, ``return_T`` and ``state`` from rewards, reference, critic and sampler.

        The advantages' lambda and that of the critic's returns may differ (decoupled GAE, VC-PPO, arXiv:2503.01491).
        Needs ``reward_S``, and what the critic and, where the KL counts, the reference have said.
        """
        value_T = batch.values_by("critic")
        reward_S, seen, metrics = self._shape_rewards(filled(batch.reward_S, "reward_S"), state)
        reward_T = at_last_trainable(reward_S, batch)
        cost_T, kept, kl_metrics = charge_kl(self.reference_kl, batch, state)
        metrics |= kl_metrics
        reward_T = reward_T - cost_T
        if state["critic_warmup"] > 0:
            # A policy that does not move yet says nothing of where the coefficient leads it.
            kept = state
        advantage_T, return_T = self._gae(reward_T, value_T, batch)
        advantage_N = advantage_T[batch.trainable_T]
        metrics |= {
            "reward_shaped": segment_sum(reward_T, batch.bounds).mean().item(),
            "advantage_mean": advantage_N.mean().item(),
            "advantage_std": advantage_N.std(correction=0).item(),
            "return_mean": return_T[batch.trainable_T].mean().item(),
            "value_mean": value_T[batch.trainable_T].mean().item(),
            "explained_variance": explained_variance(value_T, return_T, batch.trainable_T),
        }
        if self.whiten_advantages:
            advantage_T = whiten(advantage_T, batch.trainable_T, self._rounding(batch, state, return_T))
        ready = replace(batch, advantage_T=advantage_T, return_T=return_T, state=state_of_step(state))
        kept = kept | _state(seen, max(0, state["critic_warmup"] - 1))
        ready, corrected_metrics = corrected(ready, self.importance)
        return Estimate(batch=ready, state=kept, metrics=metrics | corrected_metrics)

    def value_loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """Clipped squared error of the critic. Metrics: ``value_loss``, ``value_clip_fraction``."""
        loss_T, clipped_T = clipped_value_loss(
            batch.values(out), batch.values_by("critic"), filled(batch.return_T, "return_T"), self.value_clip
        )
        return TokenLoss(loss_T=loss_T, metrics_T={"value_loss": loss_T.detach(), "value_clip_fraction": clipped_T})

    def losses(self) -> dict[str, LossFn]:
        return {"actor": self.loss, "critic": self.value_loss}

    def _rounding(self, batch: Batch, state: dict[str, float], return_T: Tensor) -> float:
        """What rounding can make of advantages: log-probs, added up as GAE adds them, and values and returns."""
        value_T = batch.values_by("critic")
        size_T = kl_size(self.reference_kl, batch, state).to(value_T.dtype)
        zero_T = torch.zeros_like(value_T)
        summed_T, _ = gae(size_T, zero_T, batch.trainable_T, batch.bounds, self.gamma, self._lambda(batch))
        return rounding_of(*(x_T[batch.trainable_T] for x_T in (summed_T, value_T, return_T)))

    def _gae(self, reward_T: Tensor, value_T: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Advantages with the policy's lambda, and returns with the critic's."""
        trainable_T, bounds = batch.trainable_T, batch.bounds
        advantage_T, return_T = gae(reward_T, value_T, trainable_T, bounds, self.gamma, self._lambda(batch))
        if self.critic_lam is not None:
            _, return_T = gae(reward_T, value_T, trainable_T, bounds, self.gamma, self.critic_lam)
        return advantage_T, return_T

    def _lambda(self, batch: Batch) -> float | Tensor:
        """The policy's: one number, or one of each segment [S]."""
        if self.lam_alpha is None:
            return self.lam
        return length_adaptive_lambda(batch.trainable_T, batch.bounds, self.lam_alpha)

    def _shape_rewards(self, reward_S: Tensor, state: dict[str, float]) -> tuple[Tensor, Moments, Metrics]:
        """Normalized and clipped rewards, the moments including this step's, and metrics."""
        seen = Moments(state["reward_count"], state["reward_mean"], state["reward_squares"])
        metrics: Metrics = {}
        if self.normalize_rewards:
            seen = merge(seen, moments(reward_S.tolist()))
            reward_S = (reward_S - seen.mean) / (seen.std + 1e-8)
            metrics |= {"reward_running_mean": seen.mean, "reward_running_std": seen.std}
        if self.reward_clip is not None:
            clipped_S = reward_S.clamp(-self.reward_clip, self.reward_clip)
            metrics["reward_clip_fraction"] = (clipped_S != reward_S).float().mean().item()
            reward_S = clipped_S
        return reward_S, seen, metrics


def _state(seen: Moments, critic_warmup: float) -> dict[str, float]:
    return {
        "critic_warmup": float(critic_warmup),
        "reward_count": seen.count,
        "reward_mean": seen.mean,
        "reward_squares": seen.squares,
    }
