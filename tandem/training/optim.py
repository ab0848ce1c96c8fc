"""AdamW and its learning-rate schedule, as a function of how much of the run is done."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimParams:
    """AdamW (arXiv:1711.05101) with warmup. ``total_steps`` and ``warmup_steps`` are steps of the run.

    A run's step may take several optimizer steps, or none where it has nothing to learn from.
    """

    learning_rate: float
    total_steps: int
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0


def learning_rate_at(done: float, params: OptimParams) -> float:
    """Learning rate once ``done`` steps of the run are behind: linear warmup, then constant, or down to 0 at the end.

    ``done`` is a fraction within a step that takes several optimizer steps. A pure function of it, so that a resumed
    run needs no scheduler state, and a step that takes fewer optimizer steps than another, or none, leaves the end
    where it is.
    """
    if done < params.warmup_steps:
        return params.learning_rate * (done + 1) / (params.warmup_steps + 1)
    share = min(1.0, (done - params.warmup_steps) / max(1, params.total_steps - params.warmup_steps))
    if params.lr_schedule == "linear":
        return params.learning_rate * (1 - share)
    if params.lr_schedule == "cosine":
        return params.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    return params.learning_rate


def build_optimizer(parameters: Iterable[nn.Parameter], params: OptimParams) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: biases and norms are left alone, as usual."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": params.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=params.learning_rate, betas=params.betas, fused=True)
