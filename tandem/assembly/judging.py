"""The rewards of a config: its functions in their processes, and with its models the judge of its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from functools import partial
from typing import Any

from tandem.assembly.configs.sections import ModelSection, RewardSection
from tandem.assembly.models import frozen, load
from tandem.assembly.placing import Homes
from tandem.data.tokenize import same_tokenizer
from tandem.models.description import read_score_scale
from tandem.models.loading import load_tokenizer
from tandem.models.proof.limits import read_limits
from tandem.models.scalar import require_head
from tandem.rewards.function import FunctionReward
from tandem.rewards.model import RewardModel, ScoreScale
from tandem.rewards.process import RewardProcesses
from tandem.roles import Home, Reward, Seat
from tandem.rollout.judging import Judge
from tandem.runs.progress import say


def start_rewards(
    section: RewardSection, sources: Seq[str], folder: str, stack: ExitStack
) -> Callable[[], list[FunctionReward]]:
    """Begins the processes of ``sources``, those of ``section`` and others, which end with ``stack``.

    Returns what waits until all are imported and gives the rewards. ``folder``: the run's.
    """
    if not sources:
        return list
    processes = RewardProcesses(
        sources, deadline_s=section.reward_deadline, processes=section.reward_processes, folder=folder
    )
    stack.callback(processes.close)
    return processes.rewards


def score_scales(section: RewardSection, model: ModelSection) -> list[ScoreScale | None]:
    """How the scores of each reward model are normalised; None where they are not.

    Raises UserError where a model has no trained head, or its config does not say.
    """
    for source in section.reward_model:
        require_head(source)
    if not section.normalize_scores:
        return [None] * len(section.reward_model)
    return [read_score_scale(source) for source in model.sources_of(section.models).values()]


def reward_models(
    section: RewardSection, model: ModelSection, seats: Mapping[str, Seat], policy_tokenizer: Any | None
) -> list[Reward]:
    """The section's reward models on their seats, which are found by their roles.

    ``policy_tokenizer``: of the sampled tokens; None where there are none to be read.
    """
    scales = score_scales(section, model)
    found: list[Reward] = []
    for (role, source), scale in zip(model.sources_of(section.models).items(), scales, strict=True):
        tokenizer = load_tokenizer(source)
        reads_ids = policy_tokenizer is not None and same_tokenizer(policy_tokenizer, tokenizer)
        limits = read_limits(source, head="scalar") if policy_tokenizer is None else None
        budget = model.token_budget
        found.append(
            RewardModel(seats[role], tokenizer, reads_ids=reads_ids, scale=scale, limits=limits, token_budget=budget)
        )
    return found


def placed_reward_models(
    section: RewardSection, model: ModelSection, homes: Homes | Home, policy_tokenizer: Any | None = None
) -> list[Reward]:
    """Loads the section's reward models into their place. See ``reward_models``."""
    seats: dict[str, Seat] = {}
    for role, source in model.sources_of(section.models).items():
        say(f"loading the reward model from {source}")
        build = partial(load, section=model, source=source, head="scalar")
        seats[role] = homes.place(role, partial(frozen, load=build, section=model))
    return reward_models(section, model, seats, policy_tokenizer)


def judge_of(section: RewardSection, rewards: Seq[Reward], max_new_tokens: int | None = None) -> Judge:
    """Rewards, in the order of ``RewardSection.judges``, with what the section says of them and of long samples.

    ``max_new_tokens``: of what is sampled; None where the answers are there already, and none is too long.
    """
    return Judge(
        rewards=tuple(rewards),
        weights=section.weights,
        missing_eos=section.missing_eos,
        missing_eos_penalty=section.missing_eos_penalty,
        overlong=None if max_new_tokens is None else section.overlong(max_new_tokens),
    )
