"""Numbers of judged groups: rewards, lengths, how samples ended."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from tandem.roles import Metrics
from tandem.types import Group

HELD_OUT = ("reward", "response_length", "eos_share")
"""Of held-out samples 3 kinds of metrics are reported: those whose names begin with one of these words."""


def held_out_metrics(groups: Seq[Group], *, judged: bool = True) -> Metrics:
    """Reward, lengths and how they ended, of samples that are not trained on: names begin with ``eval/``."""
    found = rollout_metrics(groups, judged=judged)
    return {f"eval/{name}": v for name, v in found.items() if name.startswith(HELD_OUT)}


def rollout_metrics(groups: Seq[Group], *, judged: bool = True) -> Metrics:
    """Reward and its spread where something has ``judged``, lengths, how they ended, and how many were left out."""
    rollouts = [r for group in groups for r in group.rollouts]
    usable = [r for r in rollouts if r.usable]
    rewards = torch.tensor([r.reward for r in usable], dtype=torch.float64)
    lengths = torch.tensor([len(r.completion_ids) for r in rollouts], dtype=torch.float64)
    metrics: Metrics = {
        "reward": rewards.mean().item() if usable else float("nan"),
        "reward_std": rewards.std(correction=0).item() if usable else float("nan"),
        "reward_min": rewards.min().item() if usable else float("nan"),
        "reward_max": rewards.max().item() if usable else float("nan"),
        "response_length": lengths.mean().item(),
        "response_length_max": lengths.max().item(),
        "eos_share": sum(r.stop != "length" for r in rollouts) / len(rollouts),
        "left_out": float(len(rollouts) - len(usable)),
        "sampled_tokens": float(lengths.sum()),
    }
    for name in sorted({name for r in rollouts for name in r.reward_parts}):
        parts = [r.reward_parts[name] for r in rollouts if name in r.reward_parts]
        metrics[f"reward/{name}"] = sum(parts) / len(parts)
    return metrics if judged else {name: v for name, v in metrics.items() if not name.startswith("reward")}
