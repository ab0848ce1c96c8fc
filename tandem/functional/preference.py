"""Losses on pairs of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def reward_pair_loss(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor | float = 0.0) -> Tensor:
    """Bradley-Terry: ``-log sigmoid(chosen - rejected - margin)``, one a pair, [P], in nats.

    InstructGPT, arXiv:2203.02155, eq. 1; the margin is that of Llama 2, arXiv:2307.09288, eq. 2.
    """
    return -torch.nn.functional.logsigmoid(chosen_P - rejected_P - margin_P)
