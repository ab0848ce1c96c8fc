"""Numbers of judged groups: rewards, lengths, how samples ended."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Seq

import torch

from tandem.rewards.combine import OVERLONG
from tandem.roles import Metrics
from tandem.types import Group, Prompt, Rollout

HELD_OUT = ("reward", "response_length", "eos_share", "left_out")
"""Of held-out samples 4 kinds of metrics are reported: those whose names begin with one of these words."""


def held_out_metrics(groups: Seq[Group], *, judged: bool = True, success: float | None = None) -> Metrics:
    """Of samples that are not trained on: ``rollout_metrics`` of ``HELD_OUT``, and with a ``success`` ``pass_at``.

    ``reward`` is the mean over all samples (mean@n). Beside it and beside each ``pass@k`` stands its standard error, as
    NAME_se, where there are two prompts or more.
    """
    found = {name: v for name, v in rollout_metrics(groups, judged=judged).items() if name.startswith(HELD_OUT)}
    rewards = [group.rewards for group in groups if group.rewards]
    if judged and len(rewards) > 1:
        found["reward_se"] = clustered_error(rewards)
    samples = max(len(group.rollouts) for group in groups)
    return found | (pass_at(rewards, success, samples) if success is not None else {})


def held_out_names(samples: int, success: float | None) -> list[str]:
    """What ``held_out_metrics`` calls its metrics of judged prompts, but for the parts of their rewards."""
    rollout = Rollout.of_answer("", 0, "eos", ids=[0], reward=0.0)
    group = Group(prompt=Prompt(prompt_id="", prompt="", token_ids=()), rollouts=[rollout] * samples)
    return [*held_out_metrics([group, group], success=success)]


def clustered_error(values: Seq[Seq[float]]) -> float:
    """The standard error of the mean over all values, of which those of a cluster (a prompt's) depend on each other.

    Liang and Zeger's, as in arXiv:2411.00640, eq. 4, times C / (C - 1) under the root for C clusters: with as many
    values in each, the deviation of the clusters' means over sqrt(C). Two clusters or more.
    """
    count, clusters = sum(map(len, values)), len(values)
    mean = math.fsum(value for cluster in values for value in cluster) / count
    squares = math.fsum(math.fsum(value - mean for value in cluster) ** 2 for cluster in values)
    return math.sqrt(squares * clusters / (clusters - 1)) / count


def pass_at(rewards: Seq[Seq[float]], success: float, samples: int) -> Metrics:
    """``pass@k``: the chance that one of k samples of a prompt is right, that is has a reward of ``success`` or more.

    For each of ``ks(samples)`` the mean over the prompts with k judged samples or more of the unbiased
    1 - C(n - right, k) / C(n, k) (arXiv:2107.03374, eq. 1), and its standard error over prompts.
    """
    found: Metrics = {}
    for k in ks(samples):
        each = [
            pass_at_k(sum(reward >= success for reward in of_prompt), len(of_prompt), k)
            for of_prompt in rewards
            if len(of_prompt) >= k
        ]
        if each:
            found[f"pass@{k}"] = math.fsum(each) / len(each)
        if len(each) > 1:
            found[f"pass@{k}_se"] = clustered_error([[one] for one in each])
    return found


def ks(samples: int) -> list[int]:
    """1, 2, 4, ... and ``samples`` itself."""
    return sorted({2**power for power in range(samples.bit_length())} | {samples})


def pass_at_k(right: int, samples: int, k: int) -> float:
    """The share of all choices of ``k`` of a prompt's ``samples`` in which one of those that are ``right`` is."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def rollout_metrics(groups: Seq[Group], *, judged: bool = True) -> Metrics:
    """Reward and its spread where something has ``judged``, lengths, how they ended, and how many were left out."""
    rollouts = [r for group in groups for r in group.rollouts]
    usable = [r for r in rollouts if r.usable]
    rewards = torch.tensor([r.reward for r in usable] or [math.nan], dtype=torch.float64)
    lengths = torch.tensor([len(r.token_ids) - r.prompt_length for r in rollouts], dtype=torch.float64)
    metrics: Metrics = {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "reward_min": rewards.min().item(),
        "reward_max": rewards.max().item(),
        "response_length": lengths.mean().item(),
        "response_length_max": lengths.max().item(),
        "eos_share": sum(r.stop not in ("length", "error") for r in rollouts) / len(rollouts),
        "left_out": float(len(rollouts) - len(usable)),
        "sampled_tokens": float(lengths.sum()),
    }
    if any(OVERLONG in r.reward_parts for r in rollouts):
        metrics["overlong_share"] = sum(r.reward_parts.get(OVERLONG, 0.0) < 0 for r in rollouts) / len(rollouts)
    for name in sorted({name for r in rollouts for name in r.reward_parts}):
        parts = [r.reward_parts[name] for r in rollouts if name in r.reward_parts]
        metrics[f"reward/{name}"] = sum(parts) / len(parts)
    return metrics if judged else {name: v for name, v in metrics.items() if not name.startswith("reward")}


def lag_metrics(groups: Seq[Group], version: int) -> Metrics:
    """How many optimizer steps behind ``version`` the weights were that drew the tokens of usable samples.

    ``lag_mean`` and ``lag_max``, and for each lag k that there is ``lag_share_k``, its share of the tokens.
    """
    counts: Counter[int] = Counter()
    for rollout in (rollout for group in groups for rollout in group.usable):
        for drawn_by, tokens in rollout.versions:
            counts[version - drawn_by] += tokens
    total = max(counts.total(), 1)
    found = {"lag_mean": sum(lag * tokens for lag, tokens in counts.items()) / total}
    found["lag_max"] = float(max((lag for lag, tokens in counts.items() if tokens), default=0))
    return found | {f"lag_share_{lag}": tokens / total for lag, tokens in sorted(counts.items()) if tokens}
