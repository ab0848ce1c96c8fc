"""Losses on pairs of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

PreferenceLoss = Literal["sigmoid", "ipo"]
"""What is made of how much more the policy prefers the chosen answer than the reference does."""


def reward_pair_loss(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor | float = 0.0) -> Tensor:
    """Bradley-Terry: ``-log sigmoid(chosen - rejected - margin)``, one a pair, [P], in nats.

    InstructGPT, arXiv:2203.02155, eq. 1; the margin is that of Llama 2, arXiv:2307.09288, eq. 2.
    """
    return -torch.nn.functional.logsigmoid(chosen_P - rejected_P - margin_P)


def preference_loss(x_P: Tensor, beta: float, kind: PreferenceLoss = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """A policy's loss, one a pair, [P]. ``x_P``: log(policy / reference) of the chosen answer less the rejected one's.

    - ``sigmoid``: ``-log sigmoid(beta x)``, in nats (DPO, arXiv:2305.18290, eq. 7).
    - ``ipo``: ``(x - 1 / (2 beta))^2``, in nats squared (IPO, arXiv:2310.12036, eq. 17, where beta is tau).

    With ``label_smoothing`` e it is ``(1 - e) loss(x) + e loss(-x)``, the expectation where a share e of preferences
    is the wrong way round (with ``sigmoid``: cDPO, ericmitchell.ai/cdpo.pdf, eq. 3).
    """

    def loss(x_P: Tensor) -> Tensor:
        return (x_P - 1 / (2 * beta)).square() if kind == "ipo" else -torch.nn.functional.logsigmoid(beta * x_P)

    return (1 - label_smoothing) * loss(x_P) + label_smoothing * loss(-x_P)
