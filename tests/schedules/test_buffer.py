"""Which open tickets a step may take: the bound of the lag, and that nothing is lost, whatever is long or late."""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from helpers.engine_models import EOS, model, tokenizer

from tandem.data.order import InTurn
from tandem.engines.live.engine import LiveEngine
from tandem.methods.base import Method, Samples
from tandem.methods.grpo import GRPO
from tandem.rollout.judging import Judge
from tandem.rollout.sampling import Sampling
from tandem.schedules.buffer import Buffer
from tandem.schedules.crew import Crew
from tandem.schedules.pipeline import Pipeline
from tandem.schedules.session import Session
from tandem.types import Prompt, SamplingParams, Ticket


@dataclass
class Simulated:
    """A source with a clock of its own, in which an item takes as long as ``length`` says."""

    length: Callable[[int], float]
    now: float = 0.0
    phase: str = "scoring"
    begun: list[int] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def begin(self, tickets: list[Ticket], clock: Any) -> list[Item]:
        items = [Item(self, ticket.number, self.now + self.length(ticket.number)) for ticket in tickets]
        self.begun += [item.number for item in items]
        self.ends = sorted([*(end for end in self.ends if end > self.now), *(item.end for item in items)])
        return items

    def wait(self, until: Callable[[], bool], clock: Any, at_least: int = 0) -> None:
        while not until():
            self.now = min(end for end in self.ends if end > self.now)

    def finish(self, items: list[Item], clock: Any) -> list[int]:
        self.now = max(self.now, *(item.end for item in items))
        return [item.number for item in items]

    def check(self, items: Any) -> None: ...


@dataclass
class Item:
    source: Simulated
    number: int
    end: float

    def done(self) -> bool:
        return self.end <= self.source.now


@dataclass(frozen=True, kw_only=True)
class Keeping(Method):
    """Passes over some of the items."""

    reads: ClassVar = Samples()
    title: ClassVar = "Keeping"
    share: float = 1.0

    def keep(self, item: Any) -> bool:
        return random.Random(item).random() < self.share


@dataclass
class Ran:
    source: Simulated
    buffer: Buffer
    trained: list[list[int]]
    passed: list[int]
    lags: list[int]
    """Of each trained item, in steps."""
    most_open: int


def simulated(
    steps: int,
    items_per_step: int,
    max_lag: int,
    window: float,
    length: Callable[[int], float],
    share: float = 1.0,
    kills: random.Random | None = None,
) -> Ran:
    """The pipeline's own way through the tickets; a step of training takes one tick."""
    source = Simulated(length)
    buffer = Buffer(items_per_step=items_per_step, max_lag=max_lag, window=window)
    ran = Ran(source, buffer, [], [], [], 0)
    for step in steps_of(source, Keeping(share=share), buffer, steps, kills):
        ran.most_open = max(ran.most_open, len(buffer.open) + len(buffer.taken))
        ran.trained.append([place.number for place in buffer.taken])
        ran.passed += [place.number for place in buffer.passed]
        ran.lags += [step - place.admitted for place in buffer.taken]
        source.now += 1
    return ran


def steps_of(
    source: Any, method: Method, buffer: Buffer, steps: int, kills: random.Random | None = None
) -> Iterator[int]:
    """The steps of a run, as it has taken what each trains on, which it is done with then.

    With ``kills`` it is killed again and again, between two steps or amid one, and resumed.
    """
    pipeline = Pipeline(steps=steps, items_per_step=buffer.items_per_step)
    clock: Any = lambda *phase, **options: nullcontext()  # noqa: E731
    session: Any = Session(run=None, store=None, save_every=None, trainers={}, progress=None, clock=clock)
    crew: Any = Crew(
        method=method,
        tickets=lambda positions: InTurn().tickets(positions, buffer.items_per_step),
        source=source,
        prepare=None,
        trainers={},
        push_weights=None,
        evaluate=None,
    )
    for step in range(steps):
        session.step = step
        while kills and kills.random() < 0.25:
            before = session.handed_out, [*session.returned]
            if kills.random() < 0.5:
                pipeline._take(crew, session, buffer)
            resumed(buffer, session, *before)
        pipeline._take(crew, session, buffer)
        yield step
        buffer.trained()


def resumed(buffer: Buffer, session: Session, handed_out: int, returned: list[int]) -> None:
    """As from a checkpoint of the last step (``Session.save``), by which so many tickets had been handed out and these
    were to be handed out again: what has ended since is kept, and what is open is drawn anew."""
    places = buffer.untrained(handed_out)
    begun = {place.number for place in places}
    again = [*(n for n in returned if n not in begun), *(place.number for place in places if not place.done)]
    session.handed_out, session.returned = handed_out, sorted(again)
    buffer.open, buffer.taken, buffer.passed = [place for place in places if place.done], [], []


@pytest.mark.parametrize("cut", [False, True])
def test_what_a_step_takes_again_is_in_its_checkpoint_whether_it_is_begun_or_not(cut):
    """Of 6 that a resumed run hands out again, two steps to come have room for 4, and the second of them for the rest.
    It is interrupted as these are begun, or behind that."""
    saved: list[dict[str, Any]] = []
    store = SimpleNamespace(save=lambda step, parts, state: saved.append(state))
    progress = SimpleNamespace(phase=lambda name: nullcontext())
    run = SimpleNamespace(event=lambda *args, **about: None, log_rollouts=lambda *args: None)
    parts: Any = {"run": run, "store": store, "save_every": None, "progress": progress, "clock": None}
    session = Session(trainers={}, **parts)
    session.handed_out, session.returned = 8, [2, 3, 4, 5, 6, 7]
    open_tickets = [*session.take(4)]
    session.carries = lambda below: [{"number": n, "admitted": 1, "item": None} for n in open_tickets if n < below]
    del open_tickets[:2]
    session.reached({}, {})
    taken = session.take(2)
    open_tickets += [] if cut else taken
    session.save()
    assert (taken, saved[0]["taken"], saved[0]["open"]) == ([6, 7], 8, [4, 5, 6, 7])


def heavy(seed: int) -> Callable[[int], float]:
    """Most lengths are short, some very long."""
    return lambda number: random.Random(f"{seed} {number}").paretovariate(0.7)


def test_the_lag_is_bounded_and_nothing_is_lost_whatever_the_lengths():
    """And the bound is met: it cannot be smaller. Half of the runs are killed in between, and resumed."""
    draw, met = random.Random(0), set()
    for trial in range(300):
        steps, a_step, max_lag = draw.randint(1, 30), draw.randint(1, 5), draw.randint(0, 3)
        window, share = draw.choice([0, 0.1, 0.3, 0.7, 1]), draw.choice([1.0, 0.6])
        long = {draw.randrange(steps * a_step) for _ in range(4)}
        lengths = draw.choice([heavy(trial), lambda n, long=long: 1e3 if n in long else 0.0, lambda n: -n % 7, float])
        kills = random.Random(trial) if trial % 2 else None
        ran = simulated(steps, a_step, max_lag, window, lengths, share, kills)
        buffer = ran.buffer
        assert buffer.size == (max_lag + 1) * a_step >= ran.most_open
        assert buffer.bound == max_lag + math.ceil((buffer.reach - 1) / a_step) >= max(ran.lags)
        met |= {(buffer.bound, max(ran.lags))} if buffer.reach > 1 and max_lag else set()
        numbers = sorted(n for step in ran.trained for n in step)
        assert len(numbers) == len(set(numbers)) == steps * a_step
        # Trained once, or passed over, and none begun that the run could not need.
        begun = sorted(set(ran.source.begun)) if kills else ran.source.begun
        assert sorted([*numbers, *ran.passed]) == begun == list(range(steps * a_step + len(ran.passed)))
        assert not buffer.open
        assert all(step == sorted(step) for step in ran.trained)
        if max_lag == 0:
            assert set(ran.lags) == {0}
    assert {bound for bound, lag in met if lag == bound} >= {2, 3, 4, 5, 6}


def test_a_ticket_is_passed_by_those_within_the_window_and_no_others():
    """4 are taken in a step of 12 that are open. The first is endless: 4 numbers are within a window of a third."""
    ran = simulated(4, 4, 2, 1 / 3, lambda number: 100.0 if number == 0 else 1.0)
    assert ran.buffer.reach == 4
    # 1, 2 and 3 may pass it; then the step waits for it, and for nothing else.
    assert ran.trained == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert ran.source.now >= 100
    wide = simulated(4, 4, 2, 1.0, lambda number: 100.0 if number == 0 else 1.0)
    assert wide.trained[:3] == [[1, 2, 3, 4], [5, 6, 7, 8], [0, 9, 10, 11]]
    none = simulated(2, 2, 1, 0.0, lambda number: 9.0 - number)
    assert (none.buffer.reach, none.trained) == (1, [[0, 1], [2, 3]])


def test_short_ones_are_not_preferred():
    """What the first third of a run trains on is as long as what is drawn (Kolmogorov-Smirnov).

    Where whatever has ended first is taken it is not: the same test finds it.
    """

    def geometric(number: int) -> int:
        return math.ceil(math.log(1 - random.Random(f"length {number}").random()) / math.log(1 - 1 / 50))

    def distance(window: float, max_lag: int) -> tuple[float, float]:
        """The largest difference of the two distributions, and what it is below in 99 of 100 cases."""
        ran = simulated(90, 32, max_lag, window, geometric)
        lengths = [geometric(n) for step in ran.trained[:30] for n in step]
        shares = {x: sum(length <= x for length in lengths) / len(lengths) for x in range(1, max(lengths) + 1)}
        return max(abs(share - 1 + (1 - 1 / 50) ** x) for x, share in shares.items()), 1.63 / len(lengths) ** 0.5

    for max_lag in (1, 2, 4):
        found, limit = distance(0.3, max_lag)
        assert found < limit
    found, limit = distance(1.0, 60)
    assert found > limit


def test_short_ones_are_not_preferred_by_the_live_engine():
    """The same of real samples: those of a run's first third against all others, with weights that stay."""

    # About one token in 10 ends a sample.
    ends = SamplingParams(max_new_tokens=60, temperature=3.0, stop_token_ids=tuple(range(2, 10)))
    engine = LiveEngine(model("llama", eos=EOS), tokenizer(), max_slots=512)

    def distance(window: float, max_lag: int) -> tuple[float, float]:
        steps, a_step = 24, 12
        prompts = [Prompt(prompt_id="p", prompt="", token_ids=(5, 6))] * steps * a_step
        source = Sampling(
            engine=engine,
            prompts=prompts,
            params=ends,
            samples_per_prompt=1,
            judge=Judge(rewards=(), weights=()),
            seed=0,
        )
        buffer = Buffer(items_per_step=a_step, max_lag=max_lag, window=window)
        lengths = [
            [len(rollout.completion_ids) for place in buffer.taken for rollout in place.made.rollouts]
            for _ in steps_of(source, GRPO(), buffer, steps)
        ]
        first, rest = (sorted(itertools.chain(*part)) for part in (lengths[:8], lengths[8:]))
        apart = max(abs(bisect(first, x) / len(first) - bisect(rest, x) / len(rest)) for x in first + rest)
        return apart, 1.63 * (1 / len(first) + 1 / len(rest)) ** 0.5

    found, limit = distance(0.3, 2)
    assert found < limit
    found, limit = distance(1.0, 20)
    assert found > limit


@pytest.mark.parametrize(("steps", "begun"), [(1, 4), (2, 8), (3, 12), (9, 36)])
def test_no_more_is_begun_than_the_run_needs(steps, begun):
    ran = simulated(steps, 4, 8, 0.3, float)
    assert len(ran.source.begun) == begun
    assert max(ran.lags) <= steps - 1
