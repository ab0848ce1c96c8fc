"""Which engine of several gets what, and when this process hears of it: against engines that do as they are told."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest

from tandem.errors import UserError, WorkerDied
from tandem.parallel.shares import divide
from tandem.types import Completion, Request, SamplingParams
from tandem.workers.engines import EngineGroup, RestartingOnce
from tandem.workers.process import Failure
from tandem.workers.served import LINGER_S, Heard


class Group:
    """Engines of which a test says what they say."""

    name, deadline_s = "engine", 100.0

    def __init__(self, size: int) -> None:
        self.size = size
        self.begun: list[list[list[tuple[int, Request]]]] = [[] for _ in range(size)]
        """The requests of each call to begin some, by rank."""
        self.given: dict[int, Heard] = {}
        self.died: list[int] = []

    def place(self, role: str, build: Any) -> None: ...

    def submit_one(self, rank: int, role: str, verb: str, *arguments: Any) -> Answer:
        if verb == "begin":
            self.begun[rank].append(arguments[0])
        return Answer(self, rank, verb)

    def ended_of(self, answers: list[Answer], seconds: float, *, all_of_them: bool = False) -> list[Answer]:
        return [a for a in answers if a.verb != "take" or a.first_rank in self.given or a.first_rank in self.died]

    def who(self, rank: int) -> str:
        return f"engine rank {rank}"

    def dead(self) -> list[int]:
        return self.died

    def restart(self, rank: int) -> None:
        self.died = []

    def says(self, rank: int, *samples: tuple[int, int], failed: tuple[int, ...] = ()) -> None:
        """That these samples of requests, by their names, have ended, and these requests failed."""
        self.given[rank] = Heard(
            ended=[(name, place, completion(100 * name + place)) for name, place in samples],
            failed=[(name, Failure("UserError", "no room")) for name in failed],
            running=0,
            busy_seconds=2.0,
            sampled_tokens=5,
        )


class Answer:
    def __init__(self, group: Group, rank: int, verb: str) -> None:
        self.group, self.first_rank, self.verb = group, rank, verb

    def result(self) -> Any:
        if self.verb == "take" and self.first_rank in self.group.died:
            raise WorkerDied("engine rank 0 died")
        return self.group.given.pop(self.first_rank) if self.verb == "take" else None


def completion(token: int) -> Completion:
    return Completion(token_ids=[token], behaviour_logp=[0.0], untruncated_logp=[0.0], stop="eos")


def asks(*lengths: int, seeds: tuple[int, ...] = (1, 2)) -> list[Request]:
    return [Request(prompt_ids=(1,), seeds=seeds, sampling=SamplingParams(max_new_tokens=n)) for n in lengths]


def times(count: int) -> Any:
    """An ``until`` that is true from the time on that it has been asked so often."""
    asked = iter(range(count))
    return lambda: next(asked, None) is None


def names(group: Group) -> list[list[int]]:
    return [[name for lot in lots for name, _ in lot] for lots in group.begun]


def test_requests_go_to_the_engine_with_the_least_to_do() -> None:
    group: Any = Group(2)
    engine = EngineGroup(group, alone=True)
    engine.submit(asks(50, 10, 10, 10))
    assert names(group) == [[0], [1, 2, 3]], "2 * 50 tokens there, 3 * 2 * 10 here"
    engine.submit(asks(10, 10))
    assert names(group) == [[0], [1, 2, 3, 4, 5]]
    group.says(0, (0, 0), (0, 1))
    engine.wait(times(1))
    engine.submit(asks(10))
    assert names(group) == [[0, 6], [1, 2, 3, 4, 5]]
    assert divide([3, 3], 2, [7, 0]) == [[], [0, 1]]
    assert (engine.busy_seconds, engine.sampled_tokens) == (1.0, 5)


def test_engines_of_few_slots_are_fed_as_they_have_room_and_left_with_everything() -> None:
    group: Any = Group(2)
    engine = EngineGroup(group, alone=True, slots=2)
    engine.submit(asks(*[10] * 9))
    assert names(group) == [[0, 1], [2, 3]], "1.5 times as many samples as slots"
    group.says(1, (2, 0), (2, 1))
    seen: list[list[list[int]]] = []

    def until() -> bool:
        seen.append(names(group))
        return len(seen) == 3

    engine.wait(until)
    assert seen == [[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3, 4]]]
    assert names(group) == [[0, 1, 5, 6], [2, 3, 4, 7, 8]]


class Clocked:
    """Engines of so many slots, whose steps take so long, on a clock that goes from answer to answer."""

    name, deadline_s = "engine", 1e9

    def __init__(self, steps_s: list[float], slots: int, lengths: list[int]) -> None:
        self.size, self.steps_s, self.lengths, self.now = len(steps_s), steps_s, lengths, 0.0
        self.free_at = [[0.0] * slots for _ in steps_s]
        self.ends: list[list[tuple[float, int, int, int]]] = [[] for _ in steps_s]
        """When which sample ends on each: the time, its seed, its request's name, its place there."""
        self.drawn_by: dict[int, list[int]] = {}

    def place(self, role: str, build: Any) -> None: ...

    def submit_one(self, rank: int, role: str, verb: str, *arguments: Any) -> Due:
        for name, request in arguments[0] if verb == "begin" else ():
            for place, seed in enumerate(request.seeds):
                begins = max(self.now, heapq.heappop(self.free_at[rank]))
                end = begins + self.lengths[seed] * self.steps_s[rank]
                heapq.heappush(self.free_at[rank], end)
                heapq.heappush(self.ends[rank], (end, seed, name, place))
                self.drawn_by.setdefault(seed, []).append(rank)
        return Due(self, rank, verb, self.now)

    def ended_of(self, answers: list[Due], seconds: float) -> list[Due]:
        if answers:
            self.now = max(self.now, min(answer.at for answer in answers))
        return [answer for answer in answers if answer.at <= self.now]


@dataclass(eq=False)
class Due:
    group: Clocked
    first_rank: int
    verb: str
    asked: float

    @property
    def at(self) -> float:
        """When it comes: 0.1 s after it was asked for, or when a sample ends."""
        if self.verb != "take":
            return self.asked
        ends = self.group.ends[self.first_rank]
        return max(self.asked + LINGER_S, ends[0][0]) if ends else math.inf

    def result(self) -> Any:
        ends, ended = self.group.ends[self.first_rank], []
        while self.verb == "take" and ends and ends[0][0] <= self.group.now:
            _, seed, name, place = heapq.heappop(ends)
            ended.append((name, place, completion(seed)))
        return Heard(ended=ended, failed=[], running=0, busy_seconds=0.0, sampled_tokens=0)


def test_a_slow_engine_of_several_gets_fewer_samples_and_equal_ones_lose_nothing() -> None:
    """8 engines, a step each 10 ms, 340 prompts of 8 samples, geometric lengths of 260 at most 1,024 in the mean."""
    rng, slots = random.Random(0), 16
    lengths = [min(1024, 1 + int(rng.expovariate(1 / 260))) for _ in range(340 * 8)]

    def seconds(slowest: float, held: bool) -> float:
        group: Any = Clocked([0.01] * 7 + [slowest], slots, lengths)
        engine = EngineGroup(group, alone=True, slots=slots if held else None)
        # The longest prompts go first, and results are in the order of requests.
        prompts = [(1,) * (1 + number % 3) for number in range(340)]
        asked = [
            Request(prompt_ids=prompt, seeds=tuple(range(8 * n, 8 * n + 8)), sampling=SamplingParams())
            for n, prompt in enumerate(prompts)
        ]
        futures = engine.submit(asked)
        engine.wait(lambda: all(future.done() for future in futures))
        assert [c.token_ids[0] for future in futures for c in future.result()] == list(range(340 * 8))
        assert all(len(ranks) == 1 for ranks in group.drawn_by.values())
        assert all(len({group.drawn_by[8 * n + i][0] for i in range(8)}) == 1 for n in range(340))
        return float(group.now)

    ideal = sum(lengths) / slots / (7 / 0.01 + 1 / 0.04)
    assert seconds(0.04, held=False) > 3.3 * ideal
    assert seconds(0.04, held=True) < 1.5 * ideal
    assert seconds(0.01, held=True) < 1.02 * seconds(0.01, held=False)


def test_samples_are_told_of_once_and_before_anyone_has_them() -> None:
    group: Any = Group(2)
    engine = RestartingOnce(several := EngineGroup(group, alone=True), several, lambda: None)
    heard: list[tuple[int, int, int]] = []

    def watch(ended: Any) -> None:
        assert not futures[0].done()
        heard.extend((i, j, c.token_ids[0]) for i, j, c in ended)

    futures = engine.submit(asks(10, 10, seeds=(7, 8, 9)), watch)
    group.says(0, (0, 1))
    engine.wait(times(1))
    assert (heard, engine.ended, futures[0].done()) == ([(0, 1, 1)], 1, False)
    # It dies: what it had not told of is begun anew, under another name and in other places.
    group.died = [0]
    engine.wait(times(1))
    assert [request.seeds for _, request in group.begun[0][-1]] == [(7, 9)]
    group.says(0, (0, 0), (2, 0), (2, 1), (2, 1))
    engine.wait(futures[0].done)
    assert heard == [(0, 1, 1), (0, 0, 200), (0, 2, 201)]
    assert [c.token_ids for c in futures[0].result()] == [[200], [1], [201]]
    assert not futures[1].done()


def test_an_error_is_that_of_its_call_alone() -> None:
    group: Any = Group(2)
    engine = EngineGroup(group, alone=True)
    ((bad, beside), (good,)) = engine.submit(asks(10, 10)), engine.submit(asks(10))
    group.says(0, failed=(0,))
    engine.wait(bad.done)
    for future in (bad, beside):
        with pytest.raises(UserError, match="engine rank 0: no room"):
            future.result()
    assert not good.done()

    def watch(ended: Any) -> None:
        raise UserError("seen enough")

    (watched,) = engine.submit(asks(10), watch)
    group.says(1, (3, 0))
    engine.wait(watched.done)
    with pytest.raises(UserError, match="seen enough"):
        watched.result()
    group.says(0, (2, 0), (2, 1))
    engine.wait(lambda: False)
    assert len(good.result()) == 2
