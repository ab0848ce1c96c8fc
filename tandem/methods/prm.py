"""Process reward models: a scalar after each step of an answer, the log-odds that the step is right."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from tandem.batch import Batch, Outputs, TokenLoss, filled, send
from tandem.functional.segments import segment_sum
from tandem.lazy import torch
from tandem.methods.base import Estimate, Method, Rows, at_last_trainable
from tandem.roles import Metrics
from tandem.types import Solution

if TYPE_CHECKING:
    from torch import Tensor

RIGHT = 0.5
"""A step whose label is 0.5 or more counts as right in the metrics."""
FOUND, PASSED = "first_error", "all_right"


@dataclass(frozen=True, kw_only=True)
class ProcessReward(Method):
    """Cross-entropy of each step's label, hard (arXiv:2305.20050, section 2.6) or soft (arXiv:2312.08935, eq. 3, 4)."""

    reads: ClassVar = Rows("steps")
    title: ClassVar = "process reward model"
    about: ClassVar = """Train a process reward model on answers in steps, each labelled right or wrong.

    Rows: prompt, completions (the steps' texts) and labels (true or false, + or -, or probabilities), as in TRL; or a
    prompt whose steps end in --step-placeholder, with labels, as in OpenRLHF. The model gets one scalar head, 'score'.
    Example: tandem prm --model runs/sft/model --data steps.jsonl --out runs/prm --steps 500
    """
    head: ClassVar = "scalar"
    learning_rate: ClassVar = 1e-5
    leads: ClassVar = ("first_error_f1", "accuracy", "loss")

    aggregation: Literal["token", "sequence"] = "token"
    """Which mean the loss is: over steps, or over answers of the means over their steps."""

    def estimate(self, items: Seq[Solution], batch: Batch, state: dict[str, float]) -> Estimate:
        """Puts what the metrics are shares of, in the whole step, into ``batch.state``."""
        wrong = sum(min(item.labels) < RIGHT for item in items)
        steps = sum(len(item.labels) for item in items)
        known = {"steps": float(steps), "wrong": float(wrong), "right": float(len(items) - wrong)}
        return Estimate(batch=replace(batch, state=known), state=state)

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """``-(label log p + (1 - label) log(1 - p))`` at each step's last token, in nats, with p = sigmoid(scalar).

        Metrics: ``accuracy`` over steps (p and the label on the same side of 0.5), and where there are such answers
        ``first_error``, the share of those with a wrong step whose first one is the first that the model calls wrong,
        and ``all_right``, the share of those without in which it calls none wrong.
        """
        label_T = filled(batch.label_T, "label_T")
        scalar_T = torch.where(batch.trainable_T, filled(out.scalar_T, "out.scalar_T"), 0.0)
        loss_T = torch.nn.functional.binary_cross_entropy_with_logits(
            scalar_T, label_T.to(scalar_T.dtype), reduction="none"
        )
        called_T, wrong_T = (batch.trainable_T & (x < at) for x, at in ((scalar_T.detach(), 0.0), (label_T, RIGHT)))
        metrics = {"accuracy": (called_T == wrong_T).to(loss_T.dtype)} | self._answers(batch, called_T, wrong_T)
        return TokenLoss(loss_T=loss_T * batch.trainable_T, metrics_T=metrics)

    def measured(self, metrics: Metrics) -> Metrics:
        """``first_error_f1``: the harmonic mean of ``first_error`` and ``all_right`` (arXiv:2412.06559, section 3)."""
        if not {FOUND, PASSED} <= metrics.keys():
            return {}
        found, passed = metrics[FOUND], metrics[PASSED]
        return {"first_error_f1": 2 * found * passed / (found + passed) if found + passed else 0.0}

    def _answers(self, batch: Batch, called_T: Tensor, wrong_T: Tensor) -> dict[str, Tensor]:
        """Of each answer a number at its last step, such that means over steps are shares of answers."""
        bounds, dtype = send(batch.bounds, called_T.device), torch.float32
        start_T = bounds[batch.segment_T]

        def before(x_T: Tensor) -> Tensor:
            """How many tokens of the same segment are true up to and including each."""
            running = torch.cat([x_T.new_zeros(1, dtype=torch.int64), x_T.cumsum(0)])
            return running[1:] - running[start_T]

        # The first of either kind, in the one and in the other, is the same token.
        first_called_T, first_wrong_T = (x_T & (before(x_T) == 1) for x_T in (called_T, wrong_T))
        found_S = segment_sum((first_called_T & first_wrong_T).to(dtype), bounds)
        has_S, calls_S = (segment_sum(x_T.to(dtype), bounds) > 0 for x_T in (wrong_T, called_T))
        known, metrics = batch.state, {}
        for name, count, value_S in (
            (FOUND, known["wrong"], found_S * has_S),
            (PASSED, known["right"], (~has_S & ~calls_S).to(dtype)),
        ):
            if count > 0:
                metrics[name] = at_last_trainable(value_S * (known["steps"] / count), batch)
        return metrics
