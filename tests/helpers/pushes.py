"""Both ends of a push in one process."""

from __future__ import annotations

from typing import Any

import torch

from helpers.models import VOCABULARY, make_module, make_tokenizer
from tandem.batch import TokenLoss
from tandem.engines.live.replica import ReplicaEngine
from tandem.models.loading import prepare_module
from tandem.parallel.world import World
from tandem.sync.check import TruthCheck
from tandem.sync.push import PushParams, WeightPush
from tandem.sync.source import WeightSource
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.workers.homes import Aside, Here
from tandem.workers.process import Site


def negative_logp(out, batch):
    return TokenLoss(loss_T=-out.logp_T)


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
    engines = aside.place("engine", lambda site: engine)
    check = TruthCheck(actor, engines, count=1, dtype=dtype, vocabulary=VOCABULARY)
    push = WeightPush(source, engines, PushParams(dtype=dtype, timeout_s=20), check)
    push.connect()
    return push, trainer


def nudge(trainer: LocalTrainer) -> None:
    with torch.no_grad():
        for weight in trainer.weights.values():
            weight.mul_(1.01)
