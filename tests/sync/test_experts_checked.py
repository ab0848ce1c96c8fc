"""The probe of models with experts in 16 bits: rounding swaps experts in a right engine too, and faults are seen."""

from __future__ import annotations

import pytest
import torch
from helpers.engine_models import tokenizer
from helpers.family_models import made

from tandem.assembly.models import Replicas
from tandem.batch import TokenLoss
from tandem.engines.live.replica import ReplicaEngine
from tandem.models.loading import load_causal
from tandem.models.lora.adapters import AdapterParams
from tandem.parallel.world import World
from tandem.sync.check import TruthCheck, WeightMismatch, mean_gap
from tandem.sync.push import FillPush
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.workers.homes import Here
from tandem.workers.process import Site

pytest.importorskip("peft")
ADAPTERS = AdapterParams(rank=4, targets=("all-linear", "experts"))
SIZE = 2.0**-3
"""Of the numbers in the adapters' B."""


def loss(out, batch):
    return TokenLoss(loss_T=-out.logp_T)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """A trainer with adapters on all that can have them, an engine with them folded in, and the push between them."""
    folder = tmp_path_factory.mktemp("experts")
    made("deepseek-v3").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    home = Here(Site(World()))
    model = load_causal(folder, adapters=ADAPTERS, device="cpu", dtype="bfloat16")
    trainer = LocalTrainer(model, loss, OptimParams(learning_rate=1e-3, total_steps=9), token_budget=64)
    trainer.stir(SIZE)
    engine = ReplicaEngine(load_causal(folder, device="cpu", dtype="bfloat16"), way="slots")
    actor, engines = home.place("actor", lambda site: trainer), home.place("engine", lambda site: engine)
    replicas = home.place("replicas", lambda site: Replicas(site, fold=True))
    check = TruthCheck(actor, engines, count=1, dtype="bfloat16", vocabulary=96, layers=2)
    # The probe alone is to speak.
    engine.checksums = lambda: [None] * len(engine.held())  # type: ignore[method-assign]
    return trainer, engine, FillPush(replicas, check)


@pytest.fixture(scope="module")
def truth(ends):
    """What the engine is compared with: the trainer's log-probs, and how far rounding may move them."""
    trainer, _, push = ends
    probe = push.check.probe.sequences(0)
    return probe, trainer.logprobs(probe), trainer.rounding(probe)


def test_experts_that_rounding_swaps_end_no_right_run(ends, truth):
    """They did: the mean of all differences is beyond the bound."""
    _, engine, push = ends
    probe, logp, rounding = truth
    push(0)
    found = engine.logprobs(probe)
    assert mean_gap(logp, found, [[0.0] * len(row) for row in logp]) > push.check.bound
    assert mean_gap(logp, found, rounding) < push.check.bound / 10


def permuted(name):
    def change(trainer, parameters):
        parameter = parameters[f"model.layers.1.{name}"]
        parameter.copy_(parameter.roll(1, 0).clone())

    return change


def missing(trainer, parameters):
    for name in ("self_attn.o_proj.weight", "mlp.experts.down_proj"):
        parameters[f"model.layers.1.{name}"].zero_()


def scaled(times):
    """Adapters of another size: as they were at a push before."""

    def change(trainer, parameters):
        trainer.stir(SIZE * times)
        for name, tensor in trainer.policy.merged().items():
            parameters[name].copy_(tensor)
        trainer.stir(SIZE)

    return change


FAULTS = {
    "experts permuted": permuted("mlp.experts.down_proj"),
    "router permuted": permuted("mlp.gate.weight"),
    "layer missing": missing,
    "adapters at 0": scaled(0.0),
    "adapters halved": scaled(0.5),
    "adapters doubled": scaled(2.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_seen_by_the_probe_alone(ends, truth, fault):
    trainer, engine, push = ends
    probe, logp, rounding = truth
    held = {name: parameter.clone() for name, parameter in engine.parameters.items()}
    with torch.no_grad():
        FAULTS[fault](trainer, engine.parameters)
        found = engine.logprobs(probe)
        for name, parameter in engine.parameters.items():
            parameter.copy_(held[name])
    assert mean_gap(logp, found, rounding) > 1.5 * push.check.bound
    assert "nats on average" in push.check.probe.too_far(logp, found, push.check.bound, rounding)


def test_a_push_that_left_the_engine_stale_ends_the_run(ends):
    trainer, engine, push = ends
    held = {name: parameter.clone() for name, parameter in engine.parameters.items()}
    own = engine.checksums

    @torch.no_grad()
    def stale():
        for name, parameter in engine.parameters.items():
            parameter.copy_(held[name])
        return own()

    engine.checksums = stale
    trainer.stir(2 * SIZE)
    push.check.pushes = 0
    with pytest.raises(WeightMismatch, match="log-probs that differ"):
        push(1)


def test_in_float32_nothing_is_left_out(ends, truth):
    trainer = ends[0]
    assert any(map(any, truth[2]))
    trainer.model.dtype = "float32"
    assert trainer.rounding([[5, 6, 7], [8, 9]]) == [[0.0, 0.0], [0.0]]
