"""The one schedule: items from a source, prepared, trained on, and the new weights given to the sampler."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from tandem.errors import UserError
from tandem.roles import Metrics, Source
from tandem.rollout.measure import lag_metrics
from tandem.schedules.buffer import Buffer, Place
from tandem.schedules.crew import Crew
from tandem.schedules.session import Carried, Session, StepClock
from tandem.stages import stage
from tandem.types import Group

STEPS_ALIKE = 5
"""After 5 steps in a row whose rewards teach nothing, it is said."""
TRIES = 10
"""A step ends the run where the items of 10 steps do not give it those of one that its method keeps."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Step by step: SFT over a dataset, or samples of the very weights that a step starts from.

    With ``max_lag`` samples of up to so many more steps are open at any time, and go on while others are trained on;
    ``window`` says how far younger ones may pass older ones (``tandem.schedules.buffer``).
    """

    steps: int
    items_per_step: int
    max_lag: int = 0
    window: float = 1.0
    token_budget: int | None = None
    """Tokens of a micro-batch, above which it is said once that it has more. None: nobody is told."""

    def run(self, crew: Crew, session: Session) -> None:
        """Runs from where the session's newest checkpoint stands to ``steps``, or until its goals are met."""
        with stage("checkpoint"):
            session.resume(crew.method.initial_state())
        buffer = self._buffer(crew, session)
        clock, alike, lost, budget = session.clock, 0, 0.0, self.token_budget
        with ended(crew.source, buffer), session.kept():
            with stage("weights"):
                crew.publish(clock)
            session.ready()
            ahead = crew.ahead(session.progress) if session.step < self.steps else ()
            session.record(crew.evaluate)
            while session.step < self.steps and not session.stop:
                clock.start()
                busy = crew.source.busy_seconds
                if crew.refresh is not None:
                    crew.refresh(session.step)
                self._take(crew, session, buffer)
                items = [place.made for place in buffer.taken]
                session.record_groups([(place.ticket, place.made) for place in buffer.taken])
                metrics = self._lag(crew, buffer)
                with clock(crew.source.phase):
                    prepared = crew.prepare(items, session.state, session.step + 1)
                if budget is not None and (largest := prepared.batch.largest_unit) > budget:
                    session.note(over_budget(largest, budget, pairs=prepared.batch.segments_per_unit == 2))
                    budget = None
                with clock("training"):
                    for future in ahead:
                        future.result()
                    ahead = ()
                    roles = crew.method.trains(session.state)
                    metrics |= crew.train(prepared, roles=roles, done=session.step, changing=session.changing)
                passed = [place.made for place in buffer.passed]
                metrics |= crew.source.metrics([*items, *passed])
                if groups := [item for item in items if isinstance(item, Group)]:
                    session.run.event("taken", step=session.step + 1, **taken_in(buffer))
                # First: whatever ends the run once the step counts as reached saves what is in the buffer.
                buffer.trained()
                session.reached(prepared.state, self._timed(crew, clock, metrics, passed, busy), groups)
                # Behind it: what is trained is kept, though weights may not reach the sampler before the run ends.
                metrics = self._timed(crew, clock, metrics | crew.publish(clock), passed, busy)
                session.measured(metrics)
                if (left_out := metrics.get("left_out", 0.0)) and not lost:
                    session.note(
                        f"samples without a reward, which are left out: {left_out:.0f} (left_out in metrics.jsonl)"
                    )
                lost = lost or left_out
                alike = alike + 1 if rewards_alike(metrics) else 0
                if alike == STEPS_ALIKE:
                    session.note(
                        f"rewards have told no samples apart for {alike} steps (mean {metrics['reward']:.4g} now), so "
                        "nothing is learned from them; rollouts.jsonl has samples with their rewards"
                    )
                session.record(crew.evaluate)
                session.save_if_due(last=session.step == self.steps or bool(session.stop))

    def _take(self, crew: Crew, session: Session, buffer: Buffer) -> None:
        """The step's items, and those that the method passes over: the source's next ones come in their places."""
        source, clock = crew.source, session.clock
        while (missing := self.items_per_step - len(buffer.taken)) > 0:
            if len(buffer.passed) >= TRIES * self.items_per_step:
                seen = "what rollouts.jsonl says of earlier steps" if session.step else "its samples with 'tandem eval'"
                raise UserError(
                    f"{crew.method.title} keeps {len(buffer.taken)} of the {len(buffer.taken) + len(buffer.passed)} "
                    f"items of this step, and needs {self.items_per_step}: nothing is left to learn from such data, or "
                    f"nothing yet; see {seen}"
                )
            if room := buffer.room(self.steps - session.step):
                tickets = crew.tickets(session.take(room))
                for ticket, item in zip(tickets, source.begin(tickets, clock), strict=True):
                    buffer.add(Place(ticket, item, admitted=session.step))
            source.wait(partial(buffer.ready, missing), clock, buffer.missing(missing))
            lot = buffer.take(missing, session.step)
            for place, item in zip(lot, source.finish([place.item for place in lot], clock), strict=True):
                place.made = item
                if not crew.method.keep(item):
                    buffer.pass_over(place)
            source.check([place.made for place in (*buffer.taken, *buffer.passed)])

    def _buffer(self, crew: Crew, session: Session) -> Buffer:
        """With what the session's checkpoint holds of it; and a checkpoint holds what becomes of it."""
        buffer = Buffer(items_per_step=self.items_per_step, max_lag=self.max_lag, window=self.window)
        for carried in session.carried:
            (ticket,) = crew.tickets([carried["number"]])
            item = crew.source.again(ticket, carried["item"])
            if item is None:
                session.give_back(ticket.number)
            else:
                buffer.add(Place(ticket, item, admitted=carried["admitted"]))

        def carries(below: int) -> list[Carried]:
            return [
                {"number": place.number, "admitted": place.admitted, "item": crew.source.kept(place.item)}
                for place in buffer.untrained(below)
            ]

        session.carries = carries
        return buffer

    def _timed(self, crew: Crew, clock: StepClock, metrics: Metrics, passed: Seq[Any], busy: float) -> Metrics:
        """A step's metrics with its seconds so far, and what follows from them; the engine was ``busy`` before it."""
        metrics = metrics | clock.metrics()
        busy_now = {"engine_busy_seconds": crew.source.busy_seconds - busy} if self.max_lag else {}
        return metrics | rates(metrics, passed) | busy_now

    def _lag(self, crew: Crew, buffer: Buffer) -> Metrics:
        """How old the weights are that the step's samples come from, where they may be old."""
        if not self.max_lag:
            return {}
        found = lag_metrics([place.made for place in buffer.taken], crew.trainers["actor"].call("version"))
        return found | {"open_groups": float(len(buffer.open))}


@contextmanager
def ended(source: Source[Any], buffer: Buffer) -> Iterator[None]:
    """Gives up what is open when the body ends, however it does."""
    try:
        yield
    except BaseException:
        # What the step in progress has taken may be open, too.
        with suppress(Exception):  # what ended the body is what is told
            source.cancel()
        raise
    if buffer.open:
        source.cancel()


def taken_in(buffer: Buffer) -> dict[str, list[Any]]:
    """What a step has taken: numbers of tickets in the order in which they were trained on, of those that the method
    passed over, and of each of the first the versions of the oldest and the newest weights behind it."""
    versions = [[r.versions for r in place.made.rollouts] for place in buffer.taken]
    runs = [[version for of_sample in of_group for version, _ in of_sample] for of_group in versions]
    return {
        "tickets": [place.number for place in buffer.taken],
        "passed": [place.number for place in buffer.passed],
        "versions": [[min(of_group), max(of_group)] for of_group in runs],
    }


def over_budget(tokens: int, budget: int, *, pairs: bool) -> str:
    """Says that nothing is cut into pieces, however many tokens a micro-batch may have."""
    return (
        f"token_budget: a {'pair' if pairs else 'sequence'} of {tokens} tokens is more than {budget} and goes through "
        "whole, so memory follows the longest, not the budget: bound it with --max-length, or, where it is sampled, "
        "--max-new-tokens; --activation-checkpointing takes less memory a token"
    )


def rates(metrics: Metrics, passed: Seq[Any]) -> Metrics:
    """Tokens a second, sampled or else trained, and how many items were passed over, where any were."""
    tokens = metrics.get("sampled_tokens", metrics["trained_tokens"])
    found = {"tokens_per_second": tokens / metrics["seconds"]}
    return found | ({"passed_over": float(len(passed))} if passed else {})


def rewards_alike(metrics: Metrics) -> bool:
    """Whether the samples of each prompt got one reward (``equal_reward_groups``), or all samples of the step did."""
    if "reward_min" not in metrics:
        return False
    return metrics.get("equal_reward_groups") == 1 or metrics["reward_min"] == metrics["reward_max"]
