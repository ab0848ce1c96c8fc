"""What roles.py says of an engine is all that is asked of it: the code runs on objects that have nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import make_module, make_tokenizer
from helpers.pushes import model_of, nudge, pushing
from helpers.telling import TOKENS, tell, told

from tandem.engines.live.engine import LiveEngine
from tandem.engines.live.replica import ReplicaEngine
from tandem.errors import Cancelled, WorkerDied
from tandem.roles import Engine, FedEngine, SleepingEngine
from tandem.sync.push import WeightPush
from tandem.sync.turns import TakingTurns
from tandem.types import Request, SamplingParams
from tandem.workers.homes import Aside, seat_of

REQUESTS = [Request(prompt_ids=(5, 6, 7), seeds=(1, 2), sampling=SamplingParams(max_new_tokens=4))]


class Only:
    """An object of which nothing can be had but what a protocol names."""

    def __init__(self, inner: Any, promise: Any) -> None:
        self.inner = inner
        self.names = {name for kind in promise.__mro__ for name in vars(kind) if not name.startswith("_")}
        self.used: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name not in self.names:
            raise AttributeError(f"{name} is not promised")
        self.used.add(name)
        return getattr(self.inner, name)


class Sleepy(ReplicaEngine):
    """Turns without a device: the engine forgets its weights as it sleeps."""

    awake = frozenset(("weights", "cache"))

    @torch.no_grad()
    def sleep(self) -> None:
        self.awake = frozenset()
        for parameter in self.parameters.values():
            parameter.zero_()

    def wake(self, stage: str) -> None:
        self.awake |= {stage}

    def memory(self) -> dict[str, float]:
        return {"free": 1.0, "used": 2.0}

    def receive(self, version: int, check: bool = False) -> Any:
        assert self.awake == {"weights"}
        return super().receive(version, check)

    def wait(self, until: Any, at_least: int = 0) -> None:
        assert self.awake == {"weights", "cache"}
        super().wait(until, at_least)


class Parking:
    """A trainer that notes when it was asked to go."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def park(self, what: str) -> None:
        self.said.append("weights leave" if what == "weights" else "optimizer leaves")

    def unpark(self) -> None:
        self.said.append("back")


def linked(engine: ReplicaEngine, promise: Any) -> tuple[WeightPush, Any, Only]:
    """A push to an engine of which it sees the promise alone, and the trainer."""
    push, trainer = pushing(engine)
    home = push.engines.home
    assert isinstance(home, Aside)
    only = Only(engine, promise)
    home.site.roles["engine"] = only
    return push, trainer, only


def test_who_keeps_which():
    live = LiveEngine(make_module("llama"), make_tokenizer())
    assert isinstance(live, Engine)
    assert not isinstance(live, FedEngine)
    replica = ReplicaEngine(model_of(1))
    assert isinstance(replica, FedEngine)
    assert not isinstance(replica, SleepingEngine)
    assert isinstance(Sleepy(model_of(1)), SleepingEngine)


def test_pushes_ask_for_no_more_than_a_fed_engine_promises():
    engine = ReplicaEngine(model_of(1))
    push, trainer, only = linked(engine, FedEngine)
    push(1)
    nudge(trainer)
    push.again()
    assert all(torch.equal(engine.parameters[name], p) for name, p in trainer.parameters.items())
    assert only.used == {"connect", "receive", "held", "logprobs"}
    only.inner.logprobs = lambda sequences: [[0.0] * (len(s) - 1) for s in sequences]
    with pytest.raises(Exception, match="computes something else"):
        push(2)
    assert only.used == {"connect", "receive", "held", "logprobs", "checksums"}


def test_turns_ask_for_no_more_than_a_sleeping_engine_promises():
    engine = Sleepy(model_of(1))
    push, trainer, only = linked(engine, SleepingEngine)
    parked = Parking()
    turns = TakingTurns(only, push.engines, [seat_of(parked)], push, version=lambda: 7)  # type: ignore[arg-type]
    ((first, second),) = turns.generate(REQUESTS)
    assert parked.said == ["optimizer leaves", "weights leave", "back"]
    assert engine.awake == frozenset()
    assert turns.metrics["engine_free"] == 1.0
    assert (first.version_min, second.version_max) == (7, 7)
    plain = LiveEngine(trainer.model.module, make_tokenizer()).generate(REQUESTS)
    assert [c.token_ids for c in plain[0]] == [first.token_ids, second.token_ids]
    turns.recover()
    assert [c.token_ids for c in turns.generate(REQUESTS)[0]] == [first.token_ids, second.token_ids]
    assert only.used == {"connect", "receive", "held", "logprobs", "sleep", "wake", "memory", "submit", "wait"}


def test_what_a_turn_leaves_unfinished_goes_on_in_the_next():
    """Submitted while others train, begun in the turn, unfinished in it, ended in the next with other weights."""
    version = 7
    engine = Sleepy(model_of(1))
    push, trainer = pushing(engine)
    parked = Parking()
    turns = TakingTurns(engine, push.engines, [seat_of(parked)], push, version=lambda: version)
    tell(trainer.model.module, TOKENS[version])
    asked = Request(prompt_ids=(5, 6), seeds=(1, 2), sampling=SamplingParams(max_new_tokens=40))
    (long,) = turns.submit([asked])
    (short,) = turns.submit(REQUESTS)
    assert parked.said == []
    late: list[Any] = []

    def enough() -> bool:
        if short.done() and not late:
            late.extend(turns.submit(REQUESTS))
        return short.done()

    turns.wait(enough)
    assert parked.said == ["optimizer leaves", "weights leave", "back"]
    assert (short.done(), late[0].done(), long.done()) == (True, False, False)
    turns.wait(lambda: True)
    assert len(parked.said) == 3, "nothing is woken for what is there already"
    version = 8
    tell(trainer.model.module, TOKENS[version])
    found = [*long.result(), *late[0].result()]
    assert [c.versions for c in found] == [told(c, TOKENS) for c in found]
    assert [v for v, _ in found[0].versions] == [7, 8]
    (never,) = turns.submit(REQUESTS)
    turns.cancel()
    with pytest.raises(Cancelled):
        never.result()
    turns.wait(lambda: False)
    assert len(turns.generate(REQUESTS)) == 1


@pytest.mark.parametrize("where", ["until", "push", "step"])
def test_an_error_amid_a_turn_leaves_the_engine_asleep_and_the_trainers_back(monkeypatch, where):
    """What is open then goes on in the next turn, unless it was what failed."""
    engine = Sleepy(model_of(1))
    push, _ = pushing(engine)
    parked = Parking()
    turns = TakingTurns(engine, push.engines, [seat_of(parked)], push, version=lambda: 7)
    (open_,) = turns.submit(REQUESTS)
    with monkeypatch.context() as patched:
        if where != "until":
            patched.setattr(*((push.check, "prove") if where == "push" else (engine, "wait")), lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            turns.wait(lambda: bool(1 // 0) if engine.awake else False)
    assert engine.awake == frozenset()
    assert parked.said == ["optimizer leaves", "weights leave", "back"]
    assert len(open_.result()) == 2
    assert parked.said == ["optimizer leaves", "weights leave", "back"] * 2


def test_trainers_come_back_from_a_turn_whose_engine_is_gone(monkeypatch):
    """What ended the turn is what is said, not what cannot be asked of an engine any more."""
    engine = Sleepy(model_of(1))
    push, _ = pushing(engine)
    parked = Parking()
    turns = TakingTurns(engine, push.engines, [seat_of(parked)], push, version=lambda: 7)
    turns.submit(REQUESTS)

    def dies(*_: Any) -> None:
        monkeypatch.setattr(engine, "sleep", lambda: 1 // 0)
        raise WorkerDied("engine rank 0 died")

    monkeypatch.setattr(engine, "wait", dies)
    with pytest.raises(WorkerDied):
        turns.wait(lambda: False)
    assert parked.said == ["optimizer leaves", "weights leave", "back"]
