"""What methods on samples share: the clipped surrogate, the KL to the reference, and their common knobs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from tandem.batch import Asks, Batch, Outputs, TokenLoss, filled
from tandem.errors import UserError
from tandem.functional.corrections import correction
from tandem.functional.kl import adaptive_kl_coef, kl_estimate, kl_loss
from tandem.functional.policy import clipped_policy_loss, importance_ratio
from tandem.functional.segments import segment_sum
from tandem.keys import ABOVE_0
from tandem.lazy import torch
from tandem.methods.base import REFERENCE, Estimate, Method, Need, spread
from tandem.methods.knobs import Clip, Correction, ReferenceKL
from tandem.roles import Metrics
from tandem.types import Group

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenMethod(Method):
    """A method on samples whose loss is one number for each sampled token: a surrogate, a KL, an entropy bonus.

    A simple one defines ``advantages``; one whose advantages are not of a group by itself overrides ``credit``, and
    one with another ratio or another bound ``surrogate``.
    """

    models: ClassVar[tuple[Need, ...]] = (REFERENCE,)
    leads: ClassVar[tuple[str, ...]] = ("reward", "kl", "entropy", "response_length", "eos_share")

    clip: Clip = Clip()
    reference_kl: ReferenceKL = ReferenceKL()
    importance: Correction = Correction()
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, per nat."""
    reward_clip: float | None = field(default=None, metadata=ABOVE_0)
    """Rewards are clipped to ±reward_clip before anything is added or any baseline taken. None: not clipped."""

    def needs(self) -> tuple[Need, ...]:
        return tuple(need for need in self.models if need.role != "reference" or self.reference_kl.counts)

    @property
    def asks(self) -> Asks:
        return Asks(entropy=True, entropy_gradient=self.entropy_coef != 0)

    @property
    def needs_old_logp(self) -> bool:
        return super().needs_old_logp or self.importance.correction != "none"

    def initial_state(self) -> dict[str, float]:
        """The KL coefficient, where the KL counts."""
        return {"kl_coef": self.reference_kl.kl_coef} if self.reference_kl.counts else {}

    def estimate(self, groups: Seq[Group], batch: Batch, state: dict[str, float]) -> Estimate:
        """Fills ``advantage_T`` (``credit``) and ``state``.

        Metrics: those of ``charge_kl``, ``clipped_rewards``, ``credit`` and ``corrected``, and where samples are
        compared ``equal_reward_groups``, the share of groups whose rewards are equal as they were given.
        """
        metrics: Metrics = {}
        if self.samples.at_least > 1:
            judged = [group.rewards for group in groups if group.rewards]
            metrics["equal_reward_groups"] = sum(len(set(rewards)) == 1 for rewards in judged) / len(judged)
        groups, clip_metrics = self.clipped_rewards(groups)
        cost_T, kept, kl_metrics = charge_kl(self.reference_kl, batch, state)
        batch = replace(batch, state=state_of_step(state))
        advantage_T, kept, more = self.credit(groups, batch, cost_T, kept)
        batch, corrected_metrics = corrected(replace(batch, advantage_T=advantage_T), self.importance)
        metrics |= clip_metrics | kl_metrics | more | corrected_metrics
        return Estimate(batch=batch, state=kept, metrics=metrics)

    def credit(
        self, groups: Seq[Group], batch: Batch, cost_T: Tensor, state: dict[str, float]
    ) -> tuple[Tensor, dict[str, float], Metrics]:
        """Each token's advantage, [T], the state as it is kept, and metrics.

        ``cost_T``, [T], is what the KL takes off the reward at each token. Here a sample is judged as a whole:
        ``advantages`` of groups whose rewards are less the sum of their samples' costs.
        """
        costs = segment_sum(cost_T, batch.bounds).tolist()
        if any(costs):
            rewards = [reward for group in groups for reward in group.rewards]
            groups = with_rewards(groups, [reward - cost for reward, cost in zip(rewards, costs, strict=True)])
        return spread([a for group in groups for a in self.advantages(group)], batch), state, {}

    def clipped_rewards(self, groups: Seq[Group]) -> tuple[Seq[Group], Metrics]:
        """The groups with their rewards within ±``reward_clip``, and ``reward_clip_fraction``."""
        limit = self.reward_clip
        if limit is None:
            return groups, {}
        rewards = [reward for group in groups for reward in group.rewards]
        outside = sum(abs(reward) > limit for reward in rewards)
        clipped = with_rewards(groups, [min(max(reward, -limit), limit) for reward in rewards])
        return clipped, {"reward_clip_fraction": outside / max(len(rewards), 1)}

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """``surrogate``, plus the KL where ``kl="loss"``, minus the entropy bonus.

        ``kl_loss`` is the KL's metric, in nats. ``kl_coef`` (``batch.state``) is in units of the advantages a nat: of
        rewards, where nothing has scaled the advantages. Where the forward gave it, ``entropy`` is a metric, too.
        """
        token_loss = self.surrogate(out, batch)
        loss_T, metrics_T = token_loss.loss_T, dict(token_loss.metrics_T)
        if out.entropy_T is not None:
            metrics_T["entropy"] = out.entropy_T.detach()
        if self.reference_kl.kl == "loss" and self.reference_kl.counts:
            logp_T = filled(out.logp_T, "out.logp_T")
            ratio_T = importance_ratio(logp_T, batch.proximal_logp_T)
            kl_T = kl_loss(logp_T, batch.logp_by("reference"), ratio_T, self.reference_kl.estimator)
            loss_T = loss_T + batch.state["kl_coef"] * kl_T
            metrics_T = metrics_T | {"kl_loss": kl_T.detach()}
        if self.entropy_coef:
            loss_T = loss_T - self.entropy_coef * filled(out.entropy_T, "out.entropy_T")
        return TokenLoss(loss_T=loss_T, metrics_T=metrics_T)

    def surrogate(self, out: Outputs, batch: Batch) -> TokenLoss:
        """PPO's clipped loss. While the ratio is 1, its gradient is REINFORCE's."""
        return clipped_surrogate(out, batch, self.clip)


def clipped_surrogate(
    out: Outputs, batch: Batch, clip: Clip, formula: Callable[..., tuple[Tensor, Tensor]] = clipped_policy_loss
) -> TokenLoss:
    """PPO's clipped loss against ``batch.proximal_logp_T``, or that of another ``formula`` with the same arguments.

    Metrics: ``policy_loss``, ``ratio``, ``clip_fraction`` and ``approx_kl`` (k3 of KL(old || new), nats per token).
    """
    logp_T, old_logp_T = filled(out.logp_T, "out.logp_T"), batch.proximal_logp_T
    advantage_T = filled(batch.advantage_T, "advantage_T")
    loss_T, clipped_T = formula(logp_T, old_logp_T, advantage_T, clip.clip_low, clip.clip_high, clip.dual_clip)
    metrics_T = {
        "policy_loss": loss_T.detach(),
        "ratio": importance_ratio(logp_T.detach(), old_logp_T),
        "clip_fraction": clipped_T,
        "approx_kl": kl_estimate(old_logp_T, logp_T.detach(), "k3"),
    }
    return TokenLoss(loss_T=loss_T, metrics_T=metrics_T)


def corrected(batch: Batch, knobs: Correction) -> tuple[Batch, Metrics]:
    """The batch with its advantages weighted, without the tokens that the rule leaves out: no mean counts them.

    A weight on the advantage is one on the surrogate. Sequences of which nothing is left are left out whole. Metrics:
    ``masked_positive`` and ``masked_negative``, the shares of the tokens with a positive or negative advantage that are
    left out. Raises UserError where nothing is left.
    """
    if knobs.correction == "none":
        return batch, {"masked_positive": 0.0, "masked_negative": 0.0}
    low, high = knobs.bounds
    advantage_T = filled(batch.advantage_T, "advantage_T")
    weight_T, kept_T = correction(
        batch.logp_by("actor"),
        filled(batch.untruncated_logp_T, "untruncated_logp_T"),
        batch.trainable_T,
        batch.bounds,
        knobs.correction,
        low=low,
        high=high,
        gap=knobs.correction_gap,
    )
    if not kept_T.any():
        raise UserError(
            f"correction: {knobs.correction} leaves out every token of the step, so far are the sampler's "
            "probabilities from the trainer's (sampler_gap_mean of earlier steps says how far); give it wider bounds"
        )
    metrics: Metrics = {}
    for name, sign_T in (("masked_positive", advantage_T > 0), ("masked_negative", advantage_T < 0)):
        count = int((sign_T & batch.trainable_T).sum())
        metrics[name] = int((sign_T & batch.trainable_T & ~kept_T).sum()) / max(count, 1)
    batch = replace(batch, advantage_T=advantage_T * weight_T, trainable_T=kept_T, trainable_N=None)
    left_S = segment_sum(kept_T.float(), batch.bounds) > 0
    return batch if left_S.all() else batch.select(left_S.nonzero().squeeze(-1).tolist()), metrics


def sampled_kl(batch: Batch, role: str = "reference", name: str = "kl") -> tuple[Tensor, Metrics]:
    """k1 of KL(sampling policy || the model of that ``role``) for each token, [T], 0 where not trainable.

    Metrics: ``<name>``, its mean over tokens, and ``<name>_per_sequence``, the mean over sequences of its sum, in nats.
    """
    k1_T = kl_estimate(batch.proximal_logp_T, batch.logp_by(role), "k1")
    k1_T = torch.where(batch.trainable_T, k1_T, 0.0)
    return k1_T, {
        name: k1_T[batch.trainable_T].mean().item(),
        f"{name}_per_sequence": segment_sum(k1_T, batch.bounds).mean().item(),
    }


def charge_kl(knobs: ReferenceKL, batch: Batch, state: dict[str, float]) -> tuple[Tensor, dict[str, float], Metrics]:
    """What the KL takes off the reward at each token, [T]: ``kl_coef`` times it with ``kl="reward"``, else 0.

    Then the state with the next step's coefficient, and metrics: those of ``sampled_kl``, and ``kl_coef``.
    """
    cost_T = torch.zeros_like(batch.weight_T)
    if not knobs.counts:
        return cost_T, state, {}
    coef = state["kl_coef"]
    _, metrics = sampled_kl(batch)
    if knobs.kl == "reward":
        estimate_T = kl_estimate(batch.proximal_logp_T, batch.logp_by("reference"), knobs.estimator)
        cost_T = coef * torch.where(batch.trainable_T, estimate_T, 0.0)
    if knobs.kl_target is not None:
        state = state | {
            "kl_coef": adaptive_kl_coef(
                coef,
                metrics["kl_per_sequence"],
                target=knobs.kl_target,
                samples=batch.segments,
                horizon=knobs.kl_horizon,
            )
        }
    return cost_T, state, metrics | {"kl_coef": coef}


def state_of_step(state: dict[str, float]) -> dict[str, float]:
    """What of a method's state its losses read: the KL coefficient, where there is one."""
    return {name: value for name, value in state.items() if name == "kl_coef"}


def with_rewards(groups: Seq[Group], rewards: Seq[float]) -> list[Group]:
    """The groups with their usable rollouts alone, and these as their rewards, in order."""
    left = iter(rewards)
    return [
        replace(group, rollouts=[replace(rollout, reward=next(left)) for rollout in group.usable]) for group in groups
    ]


def kl_size(knobs: ReferenceKL, batch: Batch, state: dict[str, float]) -> Tensor:
    """[T]: the sizes of the numbers that a token's KL in the reward is a difference of; 0 where it counts elsewhere."""
    if knobs.kl != "reward" or not knobs.counts:
        return torch.zeros_like(batch.weight_T)
    return state["kl_coef"] * (batch.proximal_logp_T.abs() + batch.logp_by("reference").abs())
