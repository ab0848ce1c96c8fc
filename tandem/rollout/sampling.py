"""Tickets through the engine and the rewards, into judged groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tandem.futures import Begun, Done, Future
from tandem.roles import Clock, Engine, Metrics
from tandem.rollout.judging import Called, Judge, Judging, rollout_of
from tandem.rollout.measure import rollout_metrics
from tandem.seeds import derive_seed
from tandem.types import Completion, Ended, Group, Judgement, Prompt, Request, SamplingParams, Ticket


def sample_groups(
    engine: Engine, prompts: Seq[Prompt], sampling: SamplingParams, *, samples_per_prompt: int, seed: int, step: int
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


@dataclass(eq=False, kw_only=True)
class Drawing:
    """A ticket's group on its way (``tandem.futures.Future``): it is done when it is sampled, and judged by itself."""

    ticket: Ticket
    prompt: Prompt
    completions: Future[list[Completion]]
    judging: Judging

    @cached_property
    def group(self) -> Group:
        """Waits until all samples have ended; those that are not being judged yet are from now on."""
        (group,) = groups_of([self.prompt], [self.completions.result()])
        self.judging.finish(group.rollouts)
        return group

    def done(self) -> bool:
        if not self.completions.done():
            return False
        try:
            return bool(self.group) and self.judging.settled
        except Exception:  # which ``result`` raises
            return True

    def result(self) -> Group:
        """The group. What judges all items of a step together has not seen it yet (``Sampling.finish``)."""
        group = self.group
        for number in self.judging.judge.early:
            self.judging.judged(number)
        return group


@dataclass(kw_only=True)
class Sampling:
    """A source of judged groups (``tandem.roles.Source``): prompts through the engine, then through the rewards."""

    engine: Engine
    prompts: Seq[Prompt]
    """The dataset, of which a ticket names a row."""
    params: SamplingParams
    samples_per_prompt: int
    judge: Judge
    seed: int
    phase: str = field(default="scoring", init=False)
    counts: Counter[str] = field(default_factory=Counter, init=False)
    """What the rewards have counted of the step's samples so far."""
    open: list[Drawing] = field(default_factory=list, init=False)
    """The groups that were begun and not finished."""
    calls: list[Begun[Judgement]] = field(default_factory=list, init=False)
    """Of rewards that judge a sample or a group at a time, oldest first, those that are not known to have ended."""
    answered: int = field(default=0, init=False)
    """How many have."""
    refused: Exception | None = field(default=None, init=False)
    """What the first of them has failed with that has."""

    @property
    def busy_seconds(self) -> float:
        """The engine's."""
        return self.engine.busy_seconds

    def begin(self, tickets: Seq[Ticket], clock: Clock) -> list[Drawing]:
        """The tickets' groups, sampled together. What can be judged by itself is, from when it has been sampled."""
        prompts, count = [self.prompts[ticket.row] for ticket in tickets], self.samples_per_prompt
        requests = [
            request(prompt, ticket, self.params, samples_per_prompt=count, seed=self.seed)
            for prompt, ticket in zip(prompts, tickets, strict=True)
        ]
        judgings = [self._judging(ticket) for ticket in tickets]

        def watch(ended: Seq[Ended]) -> None:
            for number, sample, completion in ended:
                judgings[number].hear(sample, completion)
            self._ask_rewards()

        with clock("sampling", of=len(tickets) * count, done=lambda: self.engine.ended):
            completions = self.engine.submit(requests, watch)
        begun = [
            Drawing(ticket=ticket, prompt=prompt, completions=future, judging=judging)
            for ticket, prompt, future, judging in zip(tickets, prompts, completions, judgings, strict=True)
        ]
        self.open.extend(begun)
        return begun

    def wait(self, until: Callable[[], bool], clock: Clock, at_least: int = 0) -> None:
        """Samples, and takes what rewards say, until ``until()``: once ``at_least`` more groups are done or later.

        Raises at once what any group, or a reward of it, has failed with, whether or not ``until`` is about it.
        """
        told: tuple[int, int] | None = None

        def enough() -> bool:
            nonlocal told
            self._ask_rewards()
            before, told = told, (self.engine.ended, self.answered)
            # Where nothing has ended since it was asked the answer is the same.
            return told != before and (self._failure() is not None or until())

        while True:
            if (failure := self._failure()) is not None:
                raise failure
            if until():
                return
            if unsampled := [drawing for drawing in self.open if not drawing.completions.done()]:
                judged = sum(not drawing.done() for drawing in self.open) - len(unsampled)
                told = None
                with self._sampling(unsampled, clock):
                    self.engine.wait(enough, max(0, at_least - judged))
            elif self.calls:
                with clock("scoring"):
                    self.calls[0].look(wait=True)
                    self._ask_rewards()
            else:
                raise RuntimeError("all groups are done, and they are not enough")

    def look(self) -> None:
        """Takes what engines elsewhere have sampled, and what rewards say, and hands rewards what waits for them."""
        self.engine.look()
        self._ask_rewards()

    def finish(self, items: Seq[Drawing], clock: Clock) -> list[Group]:
        """The groups, of which those that are not done are waited for: judged together by what judges a step's."""
        completions = [item.completions for item in items]
        missing = sum(not future.done() for future in completions)
        self.wait(lambda: all(future.done() for future in completions), clock, missing)
        gone = set(items)
        self.open[:] = [drawing for drawing in self.open if drawing not in gone]
        with clock("scoring"):
            groups, judgings = [item.group for item in items], [item.judging for item in items]
            # Named after the first ticket, which is in no other lot.
            first = items[0].ticket
            seed = derive_seed(self.seed, "judge", *((first.step, first.place) if first.place else (first.step,)))
            self.counts.update(self.judge.finish(groups, judgings, seed, self.columns))
        return groups

    def kept(self, item: Drawing) -> dict[str, Any] | None:
        """What a checkpoint holds of it, as plain data: samples, and scores so far. None while it is being sampled."""
        try:
            if not item.completions.done():
                return None
            completions, known = item.completions.result(), item.judging.known
        except Exception:  # it failed, and is drawn anew
            return None
        return {
            "prompt_id": item.prompt.prompt_id,
            "prompt_ids": list(item.prompt.token_ids),
            "completions": [dict(vars(completion)) for completion in completions],
            "scores": [[*called, given.scores, given.counts] for called, given in known.items()],
        }

    def again(self, ticket: Ticket, kept: Mapping[str, Any]) -> Drawing | None:
        """The group that a checkpoint holds; None where its prompt is another one now."""
        prompt = self.prompts[ticket.row]
        if (kept["prompt_id"], tuple(kept["prompt_ids"])) != (prompt.prompt_id, prompt.token_ids):
            return None
        completions = [Completion(**completion) for completion in kept["completions"]]
        known = {(reward, sample): Judgement(*given) for reward, sample, *given in kept["scores"]}
        drawing = Drawing(
            ticket=ticket, prompt=prompt, completions=Done(completions), judging=self._judging(ticket, known)
        )
        self.open.append(drawing)
        return drawing

    def cancel(self) -> None:
        """Gives up all groups that were begun and not finished."""
        self.open.clear()
        self.calls.clear()
        self.refused = None
        self.engine.cancel()

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

    def _ask_rewards(self) -> None:
        if self.calls:
            self.calls[0].look()
            settled = [call for call in self.calls if call.settled]
            self.calls[:] = [call for call in self.calls if not call.settled]
            self.answered += len(settled)
            for call in settled:
                try:
                    call.result()
                except Exception as error:
                    self.refused = self.refused or error

    def _failure(self) -> Exception | None:
        """Why a group that is open will never be done, if there is one."""
        for drawing in self.open:
            if drawing.completions.done():
                try:
                    drawing.group  # noqa: B018
                except Exception as error:
                    return error
        return self.refused

    def _judging(self, ticket: Ticket, known: Mapping[Called, Judgement] | None = None) -> Judging:
        """What a reward gives a sample depends on its ticket, not on those that are sampled or judged beside it."""
        return Judging(
            self.judge,
            self.prompts[ticket.row],
            self.samples_per_prompt,
            seeded=(derive_seed(self.seed, "judge", ticket.step), ticket.place),
            columns=self.columns,
            calls=self.calls,
            known=known,
        )

    def _sampling(self, drawings: Seq[Drawing], clock: Clock) -> AbstractContextManager[None]:
        """The phase in which these are sampled."""
        before = self.engine.ended
        count = len(drawings) * self.samples_per_prompt
        return clock("sampling", of=count, done=lambda: self.engine.ended - before)
