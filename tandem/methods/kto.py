"""KTO: answers that are each labelled desirable or not train the policy, without pairs."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import ClassVar

from tandem.batch import Batch, Outputs, TokenLoss, filled
from tandem.errors import UserError
from tandem.functional.preference import labelled_loss
from tandem.keys import ABOVE_0, AT_LEAST_0
from tandem.lazy import torch
from tandem.methods.base import Estimate, Method, Rows
from tandem.methods.dpo import PAIR_REFERENCE, of_answers
from tandem.types import LabelledAnswer, Sequence

BALANCE = (1.0, 4 / 3)
"""Between 1 and 4/3 the paper wants the weight of all desirable answers over that of all undesirable ones (eq. 8)."""


@dataclass(frozen=True, kw_only=True)
class KTO(Method):
    """Kahneman-Tversky optimization (arXiv:2402.01306, eq. 7).

    What an answer is worth counts from a point of reference: the KL of policy and reference, estimated from answers to
    other prompts of the same step, over all devices.
    """

    reads: ClassVar = Rows("unpaired", at_least=2)
    title: ClassVar = "KTO"
    about: ClassVar = """Improve a model with KTO, on answers that are each labelled good or bad: no pairs are needed.

    Rows: prompt and completion (strings or lists of messages) and label (true: desirable), as in TRL. A row of chosen
    and rejected counts as two.
    Example: tandem kto --model runs/sft/model --data labelled.jsonl --out runs/kto --steps 500
    """
    models: ClassVar = (PAIR_REFERENCE,)
    pairwise: ClassVar = True
    leads: ClassVar = ("accuracy", "loss", "kl")

    beta: float = field(default=0.1, metadata=ABOVE_0)
    """How strongly the policy is held to the reference: an answer's implicit reward is beta log(policy / reference)."""
    desirable_weight: float = field(default=1.0, metadata=AT_LEAST_0)
    """Weight of a desirable answer's loss, against an unequal number of labels."""
    undesirable_weight: float = field(default=1.0, metadata=AT_LEAST_0)
    """Weight of an undesirable answer's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.desirable_weight == self.undesirable_weight == 0:
            raise UserError("desirable_weight: it and undesirable_weight are 0, so nothing would be learned")

    def notes(self, items: Seq[LabelledAnswer]) -> list[str]:
        """How many answers have each label, and a better weight where they are out of balance."""
        good = sum(item.desirable for item in items)
        bad = len(items) - good
        counted = f"{good} desirable and {bad} undesirable answers"
        if not good or not bad:
            return [f"{counted}: with labels of one kind KTO only learns to {'keep to' if good else 'avoid'} them"]
        weight_good, weight_bad = self.desirable_weight * good, self.undesirable_weight * bad
        low, high = BALANCE
        if not weight_good or not weight_bad or low <= weight_good / weight_bad <= high:
            return [counted]
        better = (
            f"--desirable-weight {low * weight_bad / good:.3g}"
            if weight_good < weight_bad
            else f"--undesirable-weight {weight_good / high / bad:.3g}"
        )
        return [
            f"{counted}: with their weights the desirable ones count {weight_good / weight_bad:.2g} times as much as "
            f"the others, and KTO's paper wants 1 to 1.33 times; {better} would do that"
        ]

    def aside(self, items: Seq[LabelledAnswer], longest: int | None) -> list[Sequence]:
        """Each item's prompt with the answer of the nearest item before it that has another prompt (the first item
        comes after the last), cut off at ``longest`` tokens.

        Raises UserError where all have one prompt.
        """
        parts = [_parts(item.answer) for item in items]
        made = []
        for number, (prompt, _) in enumerate(parts):
            others = (parts[number - back] for back in range(1, len(parts)))
            answer = next((answer for other, answer in others if other.token_ids != prompt.token_ids), None)
            if answer is None:
                raise UserError(
                    f"KTO measures its KL on answers to other prompts, and all {len(items)} rows of a step have the "
                    "same one; give more rows to a step (--batch-size), or rows of more prompts"
                )
            made.append(
                Sequence(
                    token_ids=(prompt.token_ids + answer.token_ids)[:longest],
                    trainable=(prompt.trainable + answer.trainable)[:longest],
                )
            )
        return made

    def estimate(self, items: Seq[LabelledAnswer], batch: Batch, state: dict[str, float]) -> Estimate:
        """Puts the KL and the share of desirable answers, of the whole step, into ``batch.state``.

        The KL is the mean of log(policy / reference) over the mismatched answers, in nats, and at least 0.
        """
        if batch.aside is None:
            raise ValueError("batch.aside is not filled; what should fill it is not wired")
        ratio_S = of_answers(batch.aside, batch.aside.logp_by("actor") - batch.aside.logp_by("reference"))
        desirable_S = filled(batch.desirable_S, "desirable_S")
        known = {"kl": max(ratio_S.double().mean().item(), 0.0), "desirable": desirable_S.double().mean().item()}
        return Estimate(batch=replace(batch, aside=None, state=known), state=state)

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """One loss an answer, at its last token: see ``labelled_loss``.

        Metrics at the same tokens: ``accuracy`` (whether a desirable answer's log(policy / reference) is above the KL,
        and an undesirable one's below it), ``kl`` in nats, and where there are such answers ``desirable_reward`` and
        ``undesirable_reward``, the means of beta log(policy / reference) over those of each kind.
        """
        logp_T = filled(out.logp_T, "out.logp_T")
        ratio_S, kl = of_answers(batch, logp_T - batch.logp_by("reference")), batch.state["kl"]
        desirable_S = filled(batch.desirable_S, "desirable_S")
        weight_S = torch.where(desirable_S, self.desirable_weight, self.undesirable_weight).to(ratio_S.dtype)
        loss_S = weight_S * labelled_loss(ratio_S, desirable_S, kl, self.beta)
        right_S = torch.where(desirable_S, ratio_S > kl, ratio_S < kl)
        metrics = {"accuracy": right_S.to(ratio_S.dtype), "kl": torch.full_like(ratio_S, kl)}
        for name, of_kind_S, share in (
            ("desirable_reward", desirable_S, batch.state["desirable"]),
            ("undesirable_reward", ~desirable_S, 1 - batch.state["desirable"]),
        ):
            if share > 0:  # A metric is a mean over all answers: the share makes it one over those of a kind.
                metrics[name] = self.beta * ratio_S * of_kind_S / share
        return batch.loss_of_units(loss_S, metrics)


def _parts(answered: Sequence) -> tuple[Sequence, Sequence]:
    """A prompt, and the answer to it."""
    start = answered.trainable.index(True)
    prompt, answer = (
        Sequence(token_ids=answered.token_ids[part], trainable=answered.trainable[part])
        for part in (slice(start), slice(start, None))
    )
    return prompt, answer
