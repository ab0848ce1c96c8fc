"""Adapters reach an engine with weights of its own, apart or folded in; one that did not is found at the first push."""

from __future__ import annotations

import pytest
import torch
from helpers.models import make_module, make_tokenizer

from tandem.assembly.configs.role_sections import SamplingPlacement
from tandem.assembly.configs.sections import ClusterSection, EngineSection, ModelSection, SamplingSection
from tandem.assembly.models import Replicas
from tandem.assembly.placing import Homes
from tandem.assembly.wiring import Wiring
from tandem.batch import TokenLoss
from tandem.data.packing import pack, stamp
from tandem.engines.live.replica import ReplicaEngine
from tandem.engines.vllm.adapters import check_dtype, room_for
from tandem.errors import UserError
from tandem.models.loading import load_causal
from tandem.models.lora.adapters import AdapterParams
from tandem.models.lora.pairs import adapted
from tandem.models.policy import Scaled
from tandem.parallel.world import World
from tandem.sync.check import TruthCheck, WeightMismatch
from tandem.sync.push import FillPush, PushParams, WeightPush
from tandem.sync.source import WeightSource
from tandem.sync.turns import TakingTurns
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.types import Request, SamplingParams, Sequence
from tandem.workers.homes import Aside, Here
from tandem.workers.process import Site

pytest.importorskip("peft")
ROWS = [[5, 9, 13, 2, 7], [8, 3, 22]]
PARAMS = AdapterParams(rank=4)
ENDS = AdapterParams(rank=4, targets=("all-linear", "embed_tokens", "lm_head"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_module("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def loss(out, batch):
    return TokenLoss(loss_T=-out.logp_T * batch.trainable_T, metrics_T={})


def wired(base, fold, fresh=False):
    """A trainer that has taken steps, unless it is ``fresh``, an engine, and the push between them."""
    home = Here(Site(World()))
    model = load_causal(base, adapters=ENDS, device="cpu")
    # After eight steps of 3e-2 weights are so large that a folded copy's rounding is 1e-5 nats.
    trainer = LocalTrainer(model, loss, OptimParams(learning_rate=1e-2, total_steps=9), token_budget=50)
    actor = home.place("actor", lambda site: trainer)
    if not fresh:
        train(trainer)
    engine = ReplicaEngine(load_causal(base, adapters=None if fold else ENDS, device="cpu"), way="slots")
    engines = home.place("engine", lambda site: engine)
    check = TruthCheck(actor, engines, count=1, dtype="float32", vocabulary=60)
    replicas = home.place("replicas", lambda site: Replicas(site, fold=fold))
    return trainer, engine, FillPush(replicas, check, adapters=not fold)


def train(trainer):
    rows = [Sequence(token_ids=ids, trainable=[False] + [True] * (len(ids) - 1)) for ids in ROWS]
    for _ in range(2):
        trainer.forward_backward(stamp(pack(rows), "token"))
        trainer.optim_step()


def gap(trainer, engine):
    pairs = zip(trainer.logprobs(ROWS), engine.logprobs(ROWS), strict=True)
    return max(abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("fold", [False, True])
def test_what_the_engine_holds_is_the_trainers_after_every_push(base, fold):
    trainer, engine, push = wired(base, fold)
    for step in range(3):
        assert gap(trainer, engine) > 0.01
        push(step)
        assert gap(trainer, engine) < 1e-5
        train(trainer)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("side", ["sender", "engine"])
def test_a_stale_adapter_is_caught_at_the_first_push(base, monkeypatch, fold, side):
    _trainer, engine, push = wired(base, fold)
    name = "model.layers.1.mlp.up_proj." + ("weight" if fold else "lora_B.default.weight")
    source = push.replicas.home.site.roles["replicas"].source
    fill, load = source.gatherer.fill, engine.checksums

    def forgetting(wanted):
        fill([(n, t) for n, t in wanted if n != name])

    def stale():
        with torch.no_grad():
            engine.parameters[name].mul_(0.5)
        return load()

    if side == "sender":
        monkeypatch.setattr(source.gatherer, "fill", forgetting)
    else:
        monkeypatch.setattr(engine, "checksums", stale)
    with pytest.raises(WeightMismatch, match=name):
        push(0)


def test_a_folded_copy_ends_where_the_adapters_own_tokenizer_does(base, tmp_path):
    trainer, *_ = wired(base, fold=True)
    trainer.export(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "a"
    tokenizer.save_pretrained(tmp_path)
    homes = Homes(
        ModelSection(model=str(tmp_path), device="cpu"), SamplingPlacement(), ClusterSection(), EngineSection(),
        ["actor", "engine"], adapters=AdapterParams(folder=str(tmp_path)), fold=True,
    )  # fmt: skip
    engine = Wiring(homes=homes, sampling=SamplingSection(), seed=0, vocabulary=0).replica()(Site(World()))
    assert engine.tokenizer.eos_token_id == tokenizer.eos_token_id != make_tokenizer().eos_token_id
    assert not adapted(engine.model.module)


class Dropping(ReplicaEngine):
    """Takes turns without a device: as it sleeps it loses its base."""

    def sleep(self):
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if ".lora_" not in name:
                    parameter.zero_()

    def wake(self, stage):
        """Nothing is given back here."""

    def memory(self):
        return {}


def linked(base, engine, *, drops):
    """A trainer with new adapters, and a push from it to the engine over a link."""
    home, aside = Here(Site(World())), Aside(Site(World()))
    model = load_causal(base, adapters=PARAMS, device="cpu")
    trainer = LocalTrainer(model, loss, OptimParams(learning_rate=3e-2, total_steps=9), token_budget=50)
    actor = home.place("actor", lambda site: trainer)
    moving = trainer.policy.trained
    source = home.place("source", lambda site: WeightSource(trainer.parameters, model.device, moving=moving))
    engines = aside.place("engine", lambda site: engine)
    check = TruthCheck(actor, engines, count=1, dtype="float32", vocabulary=60)
    push = WeightPush(source, engines, PushParams(dtype="float32", timeout_s=20, drops=drops), check)
    push.connect()
    return trainer, push


def test_an_engine_that_takes_turns_gets_the_base_with_every_push(base):
    engine = Dropping(load_causal(base, adapters=PARAMS, device="cpu"), way="slots")
    trainer, push = linked(base, engine, drops=True)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    turns = TakingTurns(engine, push.engines, [push.check.trainer], push, version=lambda: trainer.version)
    asked = [Request(prompt_ids=(5, 6, 7), seeds=(1, 2), sampling=SamplingParams(max_new_tokens=4))]
    for turn in range(3):
        for completion in turns.generate(asked)[0]:
            (whole,) = trainer.logprobs([[5, 6, 7, *completion.token_ids]])
            assert completion.behaviour_logp == pytest.approx(whole[2:], abs=1e-5)
        assert turn or all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())
        train(trainer)
    # One that was tried, and three that were sampled from.
    assert push.check.pushes == 4
    assert {spec.name for spec in push.plan.tensors} == set(trainer.parameters)


def off(engine):
    for layer in adapted(engine.model.module).values():
        layer._disable_adapters = True


def unscaled(engine):
    for layer in adapted(engine.model.module).values():
        layer.scaling["default"] = 1.0


def zeros(engine):
    spoil(engine, lambda b: [x.zero_() for x in b])


def of_the_last_push(engine):
    held = [x.clone() for x in b_of(engine)]
    spoil(engine, lambda b: torch._foreach_copy_(b, held))


def swapped(engine):
    """Those of the two layers."""
    spoil(engine, lambda b: torch._foreach_copy_(b, [x.clone() for x in b[len(b) // 2 :] + b[: len(b) // 2]]))


def b_of(engine):
    return [p for name, p in engine.parameters.items() if "layers" in name and "lora_B" in name]


def spoil(engine, change):
    """After every push, before anybody looks at what it brought."""
    checksums, receive = engine.checksums, engine.receive

    @torch.no_grad()
    def spoilt():
        change(b_of(engine))
        return checksums()

    engine.checksums, engine.receive = spoilt, lambda *given: (receive(*given), spoilt())[1]


@pytest.mark.parametrize(
    ("fault", "apart"),
    [*((fault, False) for fault in (off, unscaled, zeros, of_the_last_push, swapped)), (off, True), (unscaled, True)],
)
def test_new_adapters_are_tried_at_the_first_push(base, fault, apart):
    """They begin at nothing, so that nobody would miss them; what they began with is there again afterwards."""

    def made():
        if not apart:
            return wired(base, fold=False, fresh=True)
        engine = ReplicaEngine(load_causal(base, adapters=PARAMS, device="cpu"), way="slots")
        trainer, push = linked(base, engine, drops=False)
        return trainer, engine, push

    trainer, engine, push = made()
    fault(engine)
    with pytest.raises(WeightMismatch):
        push(0)
    assert not any(p.any() for name, p in trainer.parameters.items() if "layers" in name and "lora_B" in name)
    if fault is off:
        trainer, engine, push = made()
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        push(0)
        assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())
        assert gap(trainer, engine) < 1e-5
        assert not any(x.any() for x in b_of(engine))
        assert push.check.pushes == 1 + (not apart)


def test_an_engine_without_its_new_adapters_is_caught_before_its_first_turn(base):
    engine = Dropping(load_causal(base, adapters=PARAMS, device="cpu"), way="slots")
    trainer, push = linked(base, engine, drops=True)
    off(engine)
    turns = TakingTurns(engine, push.engines, [push.check.trainer], push, version=lambda: 0)
    asked = [Request(prompt_ids=(5,), seeds=(1,), sampling=SamplingParams(max_new_tokens=4))]
    with pytest.raises(WeightMismatch, match="log-probs that differ"):
        turns.generate(asked)
    assert not any(p.any() for name, p in trainer.parameters.items() if "lora_B" in name)


def test_adapters_that_count_for_nothing_cannot_be_tried(base):
    engine = Dropping(load_causal(base, adapters=PARAMS, device="cpu"), way="slots")
    trainer, push = linked(base, engine, drops=False)
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            if "lora_A" in name:
                parameter.zero_()
    with pytest.raises(WeightMismatch, match="whatever the adapters' B is"):
        push(0)


@pytest.mark.parametrize(
    ("adapters", "words"),
    [(AdapterParams(dora=True), "lora.dora: vLLM computes no DoRA; add --lora.fold"), (AdapterParams(rank=513), "512")],
)
def test_adapters_that_vllm_does_not_compute_are_refused_before_anything_starts(base, adapters, words):
    model, engine = ModelSection(model=str(base), device="cpu"), EngineSection(kind="vllm")
    parts = (model, SamplingPlacement(), ClusterSection(), engine, ["actor", "engine"])
    with pytest.raises(UserError, match=words):
        Homes(*parts, adapters=adapters).check()
    Homes(*parts, adapters=adapters, fold=True).check()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_that_vllm_adds_otherwise_are_refused(base, target):
    params = AdapterParams(rank=4, targets=("q_proj", target))
    model = load_causal(base, adapters=params, device="cpu")
    with pytest.raises(
        UserError, match=rf"linear layers below the head, and not on \S*{target}\.weight; leave them out"
    ):
        Scaled(model.module, dict(model.module.named_parameters()))


def test_float32_adapters_are_refused_on_a_gpu():
    check_dtype("float32", "cpu")
    check_dtype("bfloat16", "cuda")
    with pytest.raises(UserError, match="know no float32"):
        check_dtype("float32", "cuda")


def test_vllm_makes_room_for_the_next_rank_that_it_has():
    assert [room_for(rank) for rank in (1, 2, 8, 9, 300, 512)] == [1, 8, 8, 16, 320, 512]


def test_the_base_travels_once(base):
    trainer, _, push = wired(base, fold=False)
    source = push.replicas.home.site.roles["replicas"].source
    moved, fill = [], source.gatherer.fill
    source.gatherer.fill = lambda wanted: (moved.append({n for n, _ in wanted}), fill(wanted))
    push(0)
    assert set.union(*moved) == set(trainer.parameters)
    moved.clear()
    push(1)
    assert set.union(*moved) == set(trainer.policy.trained)
    assert {spec.name for spec in source.moving_plan("float32").tensors} == set(trainer.policy.trained)
