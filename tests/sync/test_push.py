"""A push over gloo, and the truth check that must notice what went wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, make_module, make_tokenizer
from faults import Faulty, all_at_once, pushes_until_seen

from tandem.batch import TokenLoss
from tandem.engines.live.replica import ReplicaEngine
from tandem.errors import UserError
from tandem.models.loading import prepare_module
from tandem.parallel.world import World
from tandem.sync.check import WeightMismatch
from tandem.sync.push import PushParams, WeightPush
from tandem.sync.source import WeightSource
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.workers.homes import Aside, Here
from tandem.workers.process import Site


def negative_logp(out, batch):
    return TokenLoss(loss_T=-out.logp_T)


class Skipping(ReplicaEngine):
    """Loses a tensor on the way in."""

    lost = "model.layers.1.mlp.up_proj.weight"

    def load(self, bucket):
        super().load([(name, tensor) for name, tensor in bucket if name != self.lost])


class OtherTemperature(ReplicaEngine):
    """Holds the right weights and computes something else with them."""

    def logprobs(self, sequences):
        return [[x / 0.9 for x in row] for row in super().logprobs(sequences)]


def model_of(seed: int, name: str = "llama", dtype: Any = "float32") -> Any:
    return prepare_module(make_module(name, seed), make_tokenizer(), dtype=dtype)


def pushing(engine: ReplicaEngine, dtype: Any = "float32", name: str = "llama") -> tuple[WeightPush, LocalTrainer]:
    """Both ends are in this process, and each waits for the other: the engine has a thread of its own."""
    home, aside = Here(Site(World())), Aside(Site(World()))
    trainer = LocalTrainer(
        model_of(0, name, dtype), negative_logp, OptimParams(learning_rate=1e-3, total_steps=9), token_budget=64
    )
    actor = home.place("actor", lambda site: trainer)
    source = home.place("source", lambda site: WeightSource(trainer.parameters, torch.device("cpu")))
    params = PushParams(dtype=dtype, vocabulary=VOCABULARY, timeout_s=20)
    push = WeightPush(source, actor, aside.place("engine", lambda site: engine), params)
    push.connect()
    return push, trainer


@pytest.fixture
def engine() -> Iterator[ReplicaEngine]:
    made = ReplicaEngine(model_of(1))
    yield made
    made.close()


def nudge(trainer: LocalTrainer) -> None:
    with torch.no_grad():
        for weight in trainer.weights.values():
            weight.mul_(1.01)


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("qwen2", "bfloat16"), ("bloom", "float32")])
def test_every_push_brings_the_weights_of_its_version(name, dtype):
    engine = ReplicaEngine(model_of(1, name, dtype))
    push, trainer = pushing(engine, dtype, name)
    for version in range(4):
        nudge(trainer)
        trainer.masters.publish()
        metrics = push(version)
        assert engine.version == version
        for key, parameter in trainer.parameters.items():
            assert torch.equal(engine.parameters[key], parameter), key
        assert metrics["sync_seconds"] > 0


def test_a_tensor_that_does_not_arrive_is_named_at_the_first_push():
    push, _ = pushing(Skipping(model_of(1)))
    with pytest.raises(WeightMismatch, match=r"engine 0 does not hold the trainer's model\.layers\.1\.mlp\.up_proj"):
        push(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("end", ["sender", "engine"])
def test_every_fault_is_seen_at_the_first_push_that_has_it(end, dtype):
    engine = ReplicaEngine(model_of(1, dtype=dtype))
    push, trainer = pushing(engine, dtype)
    faulty = Faulty()
    if end == "sender":
        faulty.sender(push.source.home.site.roles["source"].gatherer)  # type: ignore[attr-defined]
    else:
        faulty.engine(engine)

    def step() -> None:
        nudge(trainer)
        trainer.masters.publish()
        faulty.record(trainer.weights)
        push(0)

    assert all_at_once(pushes_until_seen(step, faulty))


def test_an_engine_that_computes_something_else_is_noticed_by_the_probe():
    push, _ = pushing(OtherTemperature(model_of(1)))
    with pytest.raises(WeightMismatch, match="computes something else"):
        push(1)


def test_without_the_check_nothing_is_compared():
    push, _ = pushing(Skipping(model_of(1)))
    push.params.check = False
    push(1)
    assert push.check.logp is None
    assert push.check.sums == {}


def test_an_engine_of_another_shape_names_the_tensor():
    push, _ = pushing(ReplicaEngine(model_of(1, "qwen2")), name="bloom")
    with pytest.raises(UserError, match="the engine has no such parameter"):
        push(1)


def test_links_can_be_made_anew(engine):
    push, trainer = pushing(engine)
    push(1)
    nudge(trainer)
    push.again()
    assert all(torch.equal(engine.parameters[k], p) for k, p in trainer.parameters.items())
