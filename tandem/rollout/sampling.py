"""Tickets through the engine and the rewards, into judged groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property, partial

from tandem.futures import Future, Later, wait_all
from tandem.roles import Clock, Engine, Metrics
from tandem.rollout.judging import Judge, rollout_of
from tandem.rollout.measure import rollout_metrics
from tandem.seeds import derive_seed
from tandem.types import Completion, Group, Prompt, Request, SamplingParams, Ticket


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
        Group(prompt=prompt, rollouts=[rollout_of(prompt, i, c) for i, c in enumerate(samples)])
        for prompt, samples in zip(prompts, completions, strict=True)
    ]


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
    counts: Counter[str] = field(default_factory=Counter, init=False)
    """What the rewards have counted in the step so far."""

    def begin(self, tickets: Seq[Ticket], clock: Clock) -> Future[list[Group]]:
        """The tickets' groups, sampled together. What can be judged by itself is, from when it has been sampled."""
        prompts = [self.prompts[ticket.row] for ticket in tickets]
        requests = [
            request(prompt, ticket, self.params, samples_per_prompt=self.samples_per_prompt, seed=self.seed)
            for prompt, ticket in zip(prompts, tickets, strict=True)
        ]
        first = tickets[0]
        # Tickets in the place of items that were passed over begin within a step: a name of their own.
        names = (first.step, first.place) if first.place else (first.step,)
        judging = self.judge.begin(
            prompts, self.samples_per_prompt, derive_seed(self.seed, "judge", *names), self.columns
        )
        sampling = partial(clock, "sampling", of=len(tickets) * self.samples_per_prompt, done=lambda: self.engine.ended)
        with sampling():
            completions = self.engine.submit(requests, judging.watch)

        def judged() -> list[Group]:
            # Whoever asks for the groups drives the engine: in one process there is nobody else.
            with sampling():
                groups = groups_of(prompts, wait_all(completions))
            with clock("scoring"):
                self.counts.update(judging.finish(groups))
            return groups

        return Later(judged)

    def check(self, items: Seq[Group]) -> None:
        """See ``Judge.check``."""
        self.judge.check(items)

    def metrics(self, items: Seq[Group]) -> Metrics:
        """See ``rollout_metrics``; and what the rewards have counted."""
        counts = {f"reward/{name}": float(count) for name, count in self.counts.items()}
        self.counts.clear()
        return rollout_metrics(items, judged=bool(self.judge.rewards)) | counts

    @cached_property
    def columns(self) -> frozenset[str]:
        """Every column that a row has beside its prompt: rewards get None of a row that lacks one."""
        return frozenset(name for prompt in self.prompts for name in prompt.columns)
