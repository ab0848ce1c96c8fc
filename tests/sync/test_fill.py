"""Engines in the processes of a sharded actor: what each is filled with, checked by every push (two real ranks)."""

from __future__ import annotations

from typing import Any

import torch
from helpers.faults import NEVER, Faulty, all_at_once, pushes_until_seen
from helpers.models import VOCABULARY, make_module, make_tokenizer
from helpers.ranks import run_ranks

from tandem.assembly.models import Replicas
from tandem.batch import TokenLoss
from tandem.engines.live.replica import ReplicaEngine
from tandem.models.loading import prepare_module
from tandem.parallel.sharding import local, whole
from tandem.parallel.world import World
from tandem.roles import Seat
from tandem.sync.check import TruthCheck
from tandem.sync.push import FillPush
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.workers.homes import Here
from tandem.workers.process import Site

DTYPES: tuple[Any, ...] = ("float32", "bfloat16")


def no_loss(out: Any, batch: Any) -> TokenLoss:
    raise AssertionError("nothing is trained here")


def spoil_what_is_held(engine: ReplicaEngine, faulty: Faulty) -> None:
    """Spoils the engine's parameters after they were filled."""
    checksums = engine.checksums
    first = {name: parameter.detach().clone() for name, parameter in engine.parameters.items()}

    @torch.no_grad()
    def of_spoiled() -> Any:
        if faulty.fault == NEVER:
            for name, parameter in engine.parameters.items():
                parameter.copy_(first[name])
        faulty.spoil(engine.parameters.items())
        return checksums()

    engine.checksums = of_spoiled  # type: ignore[method-assign]


def seen_by(world: World, end: str, dtype: Any) -> dict[str, tuple[int, str]]:
    """Faults injected on this rank and when its engine's check saw them."""

    def model(seed: int) -> Any:
        return prepare_module(make_module("llama", seed), make_tokenizer(), dtype=dtype)

    home = Here(Site(world))
    trainer = LocalTrainer(
        model(0), no_loss, OptimParams(learning_rate=1e-3, total_steps=9), token_budget=64, world=world
    )
    engine = ReplicaEngine(model(1))
    home.site.roles |= {"actor": trainer, "engine": engine}
    check = TruthCheck(Seat(home, "actor"), Seat(home, "engine"), count=1, dtype=dtype, vocabulary=VOCABULARY)
    push, faulty = FillPush(home.place("replicas", Replicas), check), Faulty()
    if end == "sender":
        faulty.sender(home.site.roles["replicas"].source.gatherer)
    else:
        spoil_what_is_held(engine, faulty)

    def step() -> None:
        with torch.no_grad():
            for weight in trainer.weights.values():
                local(weight).mul_(1.01)
        trainer._changed()
        faulty.record(whole(trainer.weights))
        push(0)

    return pushes_until_seen(step, faulty)


def seen_in_all(world: World) -> dict[tuple[str, str], dict[str, tuple[int, str]]]:
    return {(end, dtype): seen_by(world, end, dtype) for end in ("sender", "engine") for dtype in DTYPES}


def test_every_fault_is_seen_on_every_rank_at_the_first_push_that_has_it():
    for ranks in run_ranks(seen_in_all, 2):
        assert len(ranks) == 4
        for seen in ranks.values():
            assert all_at_once(seen)
