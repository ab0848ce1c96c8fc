"""Tickets through the engine and the rewards, into judged groups."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import partial

from tandem.errors import RunFailure, UserError
from tandem.futures import Future, Later, wait_all
from tandem.rewards.combine import judge
from tandem.rewards.shaping import MissingEos, shape_reward
from tandem.roles import Clock, Engine, Metrics, Reward, RewardBatch
from tandem.rollout.measure import rollout_metrics
from tandem.seeds import derive_seed
from tandem.types import Completion, Group, Prompt, Request, Rollout, SamplingParams, Ticket


def sample_groups(
    engine: Engine,
    prompts: Seq[Prompt],
    sampling: SamplingParams,
    *,
    samples_per_prompt: int,
    seed: int,
    step: int,
) -> list[Group]:
    """Samples every prompt ``samples_per_prompt`` times, as the prompts of a step in this order."""
    requests = requests_of(prompts, sampling, samples_per_prompt=samples_per_prompt, seed=seed, step=step)
    return groups_of(prompts, engine.generate(requests))


def requests_of(
    prompts: Seq[Prompt], sampling: SamplingParams, *, samples_per_prompt: int, seed: int, step: int
) -> list[Request]:
    """What an engine is asked for prompts as those of a step in this order."""
    tickets = [Ticket(number=place, row=place, step=step, place=place) for place in range(len(prompts))]
    return [
        request(prompt, ticket, sampling, samples_per_prompt=samples_per_prompt, seed=seed)
        for prompt, ticket in zip(prompts, tickets, strict=True)
    ]


def request(prompt: Prompt, ticket: Ticket, sampling: SamplingParams, *, samples_per_prompt: int, seed: int) -> Request:
    """What an engine is asked for a ticket.

    A sample's seed is a hash of run seed, the ticket's step and place, prompt and sample index, so it depends neither
    on the order in which samples finish nor on which engine draws it.
    """
    names = (seed, "sample", ticket.step, ticket.place, prompt.prompt_id)
    seeds = tuple(derive_seed(*names, i) for i in range(samples_per_prompt))
    return Request(prompt_ids=prompt.token_ids, seeds=seeds, sampling=sampling)


def groups_of(prompts: Seq[Prompt], completions: Seq[Seq[Completion]]) -> list[Group]:
    """Each prompt with its completions, not judged yet."""
    return [
        Group(prompt=prompt, rollouts=[_rollout(prompt, i, c) for i, c in enumerate(samples)])
        for prompt, samples in zip(prompts, completions, strict=True)
    ]


def _rollout(prompt: Prompt, sample_index: int, completion: Completion) -> Rollout:
    start = len(prompt.token_ids)
    padding = [0.0] * start
    return Rollout(
        prompt_id=prompt.prompt_id,
        sample_index=sample_index,
        token_ids=[*prompt.token_ids, *completion.token_ids],
        prompt_length=start,
        trainable=[False] * start + [True] * len(completion.token_ids),
        behaviour_logp=padding + completion.behaviour_logp,
        untruncated_logp=padding + completion.untruncated_logp,
        stop=completion.stop,
        completion=completion.text,
        version_min=completion.version_min,
        version_max=completion.version_max,
        error=completion.error,
    )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A source of judged groups (``tandem.roles.Source``): prompts through the engine, then through the rewards."""

    engine: Engine
    prompts: Seq[Prompt]
    """By a ticket's row."""
    params: SamplingParams
    samples_per_prompt: int
    judge: Judge
    seed: int
    phase: str = field(default="scoring", init=False)

    def begin(self, tickets: Seq[Ticket], clock: Clock) -> Future[list[Group]]:
        """The tickets' groups, sampled together, and judged together in one call to each reward."""
        prompts = [self.prompts[ticket.row] for ticket in tickets]
        requests = [
            request(prompt, ticket, self.params, samples_per_prompt=self.samples_per_prompt, seed=self.seed)
            for prompt, ticket in zip(prompts, tickets, strict=True)
        ]
        sampling = partial(clock, "sampling", of=len(tickets) * self.samples_per_prompt, done=lambda: self.engine.ended)
        with sampling():
            completions = self.engine.submit(requests)

        def judged() -> list[Group]:
            # Whoever asks for the groups drives the engine: in one process there is nobody else.
            with sampling():
                groups = groups_of(prompts, wait_all(completions))
            first = tickets[0]
            # Tickets in the place of items that were passed over begin within a step: a name of their own.
            names = (first.step, first.place) if first.place else (first.step,)
            with clock("scoring"):
                self.judge.fill(groups, derive_seed(self.seed, "judge", *names))
            return groups

        return Later(judged)

    def check(self, items: Seq[Group]) -> None:
        """See ``Judge.check``."""
        self.judge.check(items)

    def metrics(self, items: Seq[Group]) -> Metrics:
        """See ``rollout_metrics``."""
        return rollout_metrics(items, judged=bool(self.judge.rewards))


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The rewards of a run: functions and models, their weights, and what a missing end of sequence costs.

    Without any reward every sample gets 0, which says nothing of it.
    """

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    missing_eos: MissingEos = "none"
    missing_eos_penalty: float = 0.0

    def __call__(self, groups: Seq[Group], seed: int | None = None) -> None:
        """``fill`` and ``check``."""
        self.fill(groups, seed)
        self.check(groups)

    def fill(self, groups: Seq[Group], seed: int | None = None) -> None:
        """Fills ``reward`` and ``reward_parts`` of every rollout that ended without an error, all in one call.

        ``seed`` is for rewards that draw from the global random generators (``RewardBatch.seed``).
        """
        pairs = [(group.prompt, r) for group in groups for r in group.rollouts if r.stop != "error"]
        if not pairs:
            return
        totals, parts = judge(self.rewards, self.weights, replace(reward_batch(pairs), seed=seed))
        for (_, rollout), total, part in zip(pairs, totals, parts, strict=True):
            rollout.reward_parts = part
            rollout.reward = shape_reward(
                total, rollout.stop, missing_eos=self.missing_eos, penalty=self.missing_eos_penalty
            )

    def check(self, groups: Seq[Group]) -> None:
        """Raises UserError where no sample of filled groups has got a reward, RunFailure where each of them failed."""
        rollouts = [r for group in groups for r in group.rollouts]
        drawn = [r for r in rollouts if r.stop != "error"]
        if not drawn:
            error = next((r.error for r in rollouts if r.error), "the engine does not say why")
            raise RunFailure(f"no sample could be drawn: {error}")
        if not any(r.usable for r in drawn):
            names = " and ".join(repr(reward.name) for reward in self.rewards)
            raise UserError(
                f"reward {names} left out (None) every one of {len(drawn)} samples, so nothing can be learned; "
                "None is for a sample that cannot be judged"
            )


def reward_batch(pairs: Seq[tuple[Prompt, Rollout]]) -> RewardBatch:
    """Prompts and completions as reward functions expect them: chat prompts get chat completions (TRL)."""
    names = {name for prompt, _ in pairs for name in prompt.columns}
    return RewardBatch(
        prompts=[prompt.prompt for prompt, _ in pairs],
        completions=[
            r.completion if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": r.completion}]
            for prompt, r in pairs
        ],
        rollouts=[r for _, r in pairs],
        columns={name: [prompt.columns.get(name) for prompt, _ in pairs] for name in sorted(names)},
    )
