"""Losses on pairs of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

PreferenceLoss = Literal["sigmoid", "ipo", "hinge", "apo_zero"]
"""What is made of how much more likely the policy finds a chosen and a rejected answer than the reference does."""


def reward_pair_loss(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor | float = 0.0) -> Tensor:
    """Bradley-Terry: ``-log sigmoid(chosen - rejected - margin)``, one a pair, [P], in nats.

    InstructGPT, arXiv:2203.02155, eq. 1; the margin is that of Llama 2, arXiv:2307.09288, eq. 2.
    """
    return -torch.nn.functional.logsigmoid(chosen_P - rejected_P - margin_P)


def preference_loss(
    chosen_P: Tensor, rejected_P: Tensor, beta: float, kind: PreferenceLoss = "sigmoid", label_smoothing: float = 0.0
) -> Tensor:
    """A policy's loss, one a pair, [P]. Given: log(policy / reference) of the chosen answers, and of the rejected ones.

    With x = chosen - rejected:

    - ``sigmoid``: ``-log sigmoid(beta x)``, in nats (DPO, arXiv:2305.18290, eq. 7).
    - ``ipo``: ``(x - 1 / (2 beta))^2``, in nats squared (IPO, arXiv:2310.12036, eq. 17, where beta is tau).
    - ``hinge``: ``max(0, 1 - beta x)`` (SLiC, arXiv:2305.10425, eq. 1, relative to the reference as in RSO,
      arXiv:2309.06657, table 1).
    - ``apo_zero``: ``1 - sigmoid(beta chosen) + sigmoid(beta rejected)`` (APO, arXiv:2408.06266, eq. 7).

    With ``label_smoothing`` e it is ``(1 - e) loss(chosen, rejected) + e loss(rejected, chosen)``, the expectation
    where a share e of preferences is the wrong way round (with ``sigmoid``: cDPO, ericmitchell.ai/cdpo.pdf, eq. 3).
    """

    def loss(better_P: Tensor, worse_P: Tensor) -> Tensor:
        if kind == "ipo":
            return (better_P - worse_P - 1 / (2 * beta)).square()
        if kind == "hinge":
            return (1 - beta * (better_P - worse_P)).relu()
        if kind == "apo_zero":
            return (-beta * better_P).sigmoid() + (beta * worse_P).sigmoid()
        return -torch.nn.functional.logsigmoid(beta * (better_P - worse_P))

    return (1 - label_smoothing) * loss(chosen_P, rejected_P) + label_smoothing * loss(rejected_P, chosen_P)


def labelled_loss(ratio_S: Tensor, desirable_S: Tensor, kl: float, beta: float) -> Tensor:
    """KTO's loss, one an answer, [S]: ``1 - sigmoid(beta (ratio - kl))`` of a desirable one, and of an undesirable one
    ``1 - sigmoid(beta (kl - ratio))``.

    arXiv:2402.01306, eq. 7, before the weights of the two kinds. ``ratio_S`` is log(policy / reference), and
    ``kl`` what the paper calls z_0, in nats.
    """
    return (torch.where(desirable_S, -beta, beta) * (ratio_S - kl)).sigmoid()
