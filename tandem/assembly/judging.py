"""The rewards of a config: its functions in their processes, and with its models the judge of its samples."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from tandem.assembly.sections import RewardSection
from tandem.rewards.process import RewardProcesses
from tandem.roles import Reward
from tandem.rollout.judging import Judge


def start_rewards(section: RewardSection, sources: Seq[str], folder: str) -> RewardProcesses | None:
    """Begins the processes of ``sources``, those of ``section`` and others; None without any. ``folder``: the run's."""
    if not sources:
        return None
    return RewardProcesses(
        sources, deadline_s=section.reward_deadline, processes=section.reward_processes, folder=folder
    )


def unweighted(rewards: Seq[Reward]) -> Judge:
    """The plain sum of rewards."""
    return Judge(rewards=tuple(rewards), weights=(1.0,) * len(rewards))


def judge_of(section: RewardSection, rewards: Seq[Reward], max_new_tokens: int | None = None) -> Judge:
    """Rewards, in the order of ``RewardSection.judges``, with what the section says of them and of long samples.

    ``max_new_tokens``: of what is sampled; None where the answers are there already, and none is too long.
    """
    return Judge(
        rewards=tuple(rewards),
        weights=section.reward_weights or (1.0,) * len(rewards),
        missing_eos=section.missing_eos,
        missing_eos_penalty=section.missing_eos_penalty,
        overlong=None if max_new_tokens is None else section.overlong(max_new_tokens),
    )
