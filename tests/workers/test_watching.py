"""Engines in other processes tell of samples as soon as this one has them, also where one had to be started again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tandem.errors import WorkerDied
from tandem.futures import Done
from tandem.types import Completion, Request, SamplingParams
from tandem.workers.engines import BalancedEngine, RestartingOnce


class Group:
    """Two engines of which the one that was asked last answers first; ``dies`` is the call that finds one dead."""

    name, size = "engine", 2

    def __init__(self, dies: int | None = None) -> None:
        self.calls, self.dies = 0, dies

    def submit_one(self, rank: int, role: str, verb: str, requests: list[Request]) -> Any:
        self.calls += 1
        if self.calls == self.dies:
            raise WorkerDied("engine rank 1 died")
        answer = Done([[completion(seed) for seed in request.seeds] for request in requests])
        return Answer(answer, rank)

    def first_of(self, under_way: Any) -> Any:
        return list(under_way)[-1]

    def dead(self) -> list[int]:
        return []


class Answer(SimpleNamespace):
    def __init__(self, answer: Done[Any], rank: int) -> None:
        super().__init__(result=answer.result, first_rank=rank)

    __hash__ = object.__hash__


def completion(seed: int) -> Completion:
    return Completion(token_ids=[seed], behaviour_logp=[0.0], untruncated_logp=[0.0], stop="eos")


REQUESTS = [Request(prompt_ids=(1,), seeds=(10 * i, 10 * i + 1), sampling=SamplingParams()) for i in range(6)]


def test_each_answer_is_told_of_when_it_comes() -> None:
    heard: list[list[tuple[int, int, int]]] = []

    def watch(ended: Any) -> None:
        heard.append([(i, j, c.token_ids[0]) for i, j, c in ended])

    results = BalancedEngine(Group(), "engine", slots=4).generate(REQUESTS, watch)  # type: ignore[arg-type]
    assert [[c.token_ids[0] for c in one] for one in results] == [list(r.seeds) for r in REQUESTS]
    assert len(heard) > 2
    assert heard[0][0][0] > 0, "the first one that came, not the first that was asked for"
    assert sorted(one for some in heard for one in some) == [(i, j, 10 * i + j) for i in range(6) for j in range(2)]


def test_what_was_told_before_a_restart_is_told_again() -> None:
    heard: list[tuple[int, int]] = []
    group: Any = Group(dies=6)
    engine = RestartingOnce(BalancedEngine(group, "engine", slots=1), group, lambda: None)
    for future in engine.submit(REQUESTS, lambda ended: heard.extend((i, j) for i, j, _ in ended)):
        assert len(future.result()) == 2
    assert set(heard) == {(i, j) for i in range(6) for j in range(2)}
