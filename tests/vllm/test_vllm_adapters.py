"""Adapters that travel alone to a real vLLM: what it computes with them, and what goes wrong on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers.vllm_models import VOCABULARY, covered, make_model, save
from torch import Tensor

from tandem.engines.vllm.adapters import PushedAdapters, names_in, room_of
from tandem.engines.vllm.engine import VLLMEngine
from tandem.engines.vllm.setup import VLLMParams
from tandem.errors import UserError
from tandem.models.loading import load_causal
from tandem.models.lora.adapters import AdapterParams
from tandem.models.policy import Scaled
from tandem.parallel.world import World
from tandem.roles import Seat
from tandem.sync.check import TruthCheck, WeightMismatch
from tandem.sync.push import PushParams, WeightPush
from tandem.sync.source import WeightSource
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.types import Request, SamplingParams
from tandem.workers.homes import Aside, Here
from tandem.workers.process import Site

pytest.importorskip("peft")
ROWS = [[5, 9, 13, 2, 7, 40, 8], [8, 3, 22, 61]]
PROMPT = (5, 6, 7, 8)
PARAMS = AdapterParams(rank=4, alpha=6.0, rslora=True)
"""A scale of 3, and a rank that vLLM rounds up."""


@dataclass
class Ends:
    """A trainer with adapters, a vLLM that takes them, and what pushes them."""

    trainer: LocalTrainer
    source: WeightSource
    engine: VLLMEngine
    link: Callable[[], WeightPush]
    engines: Seat
    """The engine in a home of its own."""

    def change(self, seed: int, size: float = 0.3) -> None:
        """Other numbers in all adapters; B of this ``size``."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name in self.trainer.policy.trained:
                drawn = torch.randn(self.trainer.parameters[name].shape, generator=generator)
                self.trainer.parameters[name].copy_(drawn * (size if "lora_B" in name else 0.3))

    def gap(self) -> float:
        """Largest difference of the log-probs of the two, in nats."""
        return largest(self.trainer.logprobs(ROWS), self.engine.logprobs(ROWS))


def manager_of(ends: Ends) -> Any:
    """What keeps adapters in vLLM's worker, which is in this process."""
    (manager,) = ends.engine._engine.collective_rpc(lambda worker: worker.model_runner.model.lora_manager)
    return manager


def largest(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def source_of(folder: str, params: AdapterParams) -> tuple[LocalTrainer, WeightSource]:
    """A trainer of adapters, and what pushes its weights."""
    trainer = LocalTrainer(
        load_causal(folder, adapters=params, device="cpu"),
        lambda out, batch: None,  # type: ignore[arg-type,return-value]
        OptimParams(learning_rate=1e-3, total_steps=9),
        token_budget=64,
    )
    moving = trainer.policy.trained
    return trainer, WeightSource(trainer.policy.scaled(), torch.device("cpu"), moving=moving)


def ends_of(trainer: LocalTrainer, source: WeightSource, engine: VLLMEngine, engines: Seat) -> Ends:
    home = Here(Site(World()))
    actor, sender = (home.place(name, lambda site, it=it: it) for name, it in (("actor", trainer), ("source", source)))

    def link() -> WeightPush:
        # A fault of the scale is one of the truth as well.
        source.truth = None
        check = TruthCheck(actor, engines, count=1, dtype="float32", vocabulary=VOCABULARY, layers=2)
        push = WeightPush(sender, engines, PushParams(dtype="float32", timeout_s=30), check)
        push.connect()
        return push

    return Ends(trainer, source, engine, link, engines)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    folder = save(make_model("llama", seed=0, tied=True), tmp_path_factory.mktemp("base"))
    trainer, source = source_of(folder, PARAMS)
    room = room_of(source.plan("float32"))
    assert (room.rank, len(room.targets)) == (8, 7)
    engine, aside = (
        VLLMEngine(VLLMParams(model=folder, dtype="float32", max_slots=4, max_length=100, sleep=True, adapters=room)),
        Aside(Site(World())),
    )
    yield ends_of(trainer, source, engine, aside.place("engine", lambda site: engine))
    engine.close()
    source.close()
    aside.close()


@pytest.fixture
def plain(ends: Ends) -> Iterator[None]:
    """Leaves adapters at nothing afterwards."""
    yield
    ends.change(0, size=0.0)


def test_nothing_is_sampled_before_adapters_have_come(ends):
    if ends.engine._plan.tensors:
        pytest.skip("for the first test alone")
    with pytest.raises(UserError, match="has no adapters yet"):
        ends.engine.logprobs(ROWS)


def test_after_every_push_it_computes_what_the_trainer_does(ends, plain):
    """The first is of everything, those that follow of adapters alone; B at 0 is the base, bit for bit."""
    ends.change(0, size=0.0)
    base = ends.trainer.logprobs(ROWS)
    push, sent = ends.link(), []
    for step in range(4):
        push(step)
        sent.append({spec.name for spec in push.plan.tensors})
        assert ends.gap() < 1e-4
        assert covered(ends.engine) == sent[-1]
        found = ends.engine.logprobs(ROWS)
        if step == 0:
            ends.engine.core.adapters = (request := ends.engine.core.adapters) and None
            assert ends.engine.logprobs(ROWS) == found
            ends.engine.core.adapters = request
        else:
            assert largest(base, found) > 0.1
        ends.change(step + 1)
        assert ends.gap() > 0.1
    assert sent[1] == sent[3] == set(ends.trainer.policy.trained)
    places = dict(ends.engine.held())
    layer = "model.layers.1.self_attn."
    assert places[f"{layer}k_proj.lora_A.default.weight"] == f"{layer}qkv_proj.lora_a_stacked.1"
    assert places[f"{layer}o_proj.lora_B.default.weight"] == f"{layer}o_proj.lora_b_stacked.0"


def test_a_folded_model_gives_the_same(ends, plain):
    ends.change(5)
    ends.link()(1)
    folded = load_causal(ends.trainer.policy.adapters.base, device="cpu")
    with torch.no_grad():
        for name, tensor in ends.trainer.policy.merged().items():
            folded.module.get_parameter(name).copy_(tensor)
    whole = LocalTrainer(folded, None, OptimParams(learning_rate=1e-3, total_steps=9), token_budget=64)  # type: ignore[arg-type]
    assert largest(whole.logprobs(ROWS), ends.engine.logprobs(ROWS)) < 1e-4


def stale(ends: Ends, patch: pytest.MonkeyPatch) -> None:
    fill = ends.source.gatherer.fill
    name = "model.layers.1.mlp.up_proj.lora_B.default.weight"
    patch.setattr(ends.source.gatherer, "fill", lambda wanted: fill([(n, t) for n, t in wanted if n != name]))


def layer_missing(ends: Ends, patch: pytest.MonkeyPatch) -> None:
    fill = ends.source.gatherer.fill

    def filled(wanted: list[tuple[str, Tensor]]) -> None:
        fill(wanted)
        for name, tensor in wanted:
            if name.startswith("model.layers.1.") and "lora_B" in name:
                tensor.zero_()

    patch.setattr(ends.source.gatherer, "fill", filled)


def unscaled(ends: Ends, patch: pytest.MonkeyPatch) -> None:
    """At both ends: checksums agree."""
    patch.setattr(ends.source.parameters, "scales", {})


def scaled_without_rslora(ends: Ends, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ends.source.parameters, "scales", dict.fromkeys(ends.source.parameters.scales, 6 / 4))


def scaled_again(ends: Ends, patch: pytest.MonkeyPatch) -> None:
    """By the engine, as if B had come as it is."""
    from vllm.lora.lora_weights import LoRALayerWeights

    optimize = LoRALayerWeights.optimize

    def scaled(self: Any) -> Any:
        self.scaling = 3.0
        return optimize(self)

    patch.setattr(LoRALayerWeights, "optimize", scaled)


def layer_not_loaded(ends: Ends, patch: pytest.MonkeyPatch) -> None:
    """One of the engine's keeps what it had, as after a call that was lost."""
    manager = manager_of(ends)
    layer = manager.modules["model.layers.0.self_attn.qkv_proj"]
    patch.setattr(layer, "set_lora", lambda *given: None)


def rank_cut(ends: Ends, patch: pytest.MonkeyPatch) -> None:
    """The engine has room for less than came, and takes what fits."""
    load = PushedAdapters.load

    def cut(self: PushedAdapters) -> None:
        self.taken = {n: t[:2] if "lora_A" in n else t[:, :2].contiguous() for n, t in self.taken.items()}
        load(self)

    patch.setattr(PushedAdapters, "load", cut)


def base_alone(ends: Ends, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ends.engine.core, "adapters", None)


FAULTS = {
    stale: "does not hold the trainer's model.layers.1.mlp.up_proj.lora_B",
    layer_missing: r"does not hold the trainer's model.layers.1.\S+lora_B",
    unscaled: "log-probs that differ",
    scaled_without_rslora: "log-probs that differ",
    scaled_again: r"does not hold the trainer's \S+lora_B",
    layer_not_loaded: r"does not hold (the trainer's|adapters .*:) model.layers.0.self_attn.[qkv]_proj.lora_",
    rank_cut: "weight sync",
    base_alone: "log-probs that differ",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("fresh", [True, False], ids=["new adapters", "trained ones"])
def test_a_fault_is_seen_at_the_first_push(ends, plain, monkeypatch, fault, fresh):
    """New adapters begin at nothing, so that nobody would miss them: the trial before the first push does."""
    ends.change(0, size=0.0 if fresh else 0.3)
    push = ends.link()
    before = {name: p.detach().clone() for name, p in ends.trainer.parameters.items()}
    fault(ends, monkeypatch)
    with pytest.raises((WeightMismatch, UserError), match=FAULTS[fault]):
        push(0)
    assert all(torch.equal(p, before[name]) for name, p in ends.trainer.parameters.items())


@pytest.mark.parametrize("fault", [stale, layer_missing, scaled_again, layer_not_loaded, rank_cut])
def test_a_fault_that_begins_later_is_seen_by_checksums(ends, plain, monkeypatch, fault):
    push = ends.link()
    for step in range(3):
        ends.change(step)
        push(step)
    assert push.check.pushes > 1
    monkeypatch.setattr(push.check.probe, "too_far", lambda *given: "")
    fault(ends, monkeypatch)
    ends.change(9)
    with pytest.raises((WeightMismatch, UserError), match=FAULTS[fault]):
        push(3)


def test_each_token_belongs_to_the_adapters_that_drew_it(ends, plain):
    """Adapters change between two steps of running samples; what is cached of the old ones is not used again."""
    push = ends.link()
    ends.change(1)
    push(1)
    requests = [
        Request(prompt_ids=PROMPT, seeds=(1,), sampling=SamplingParams(max_new_tokens=n, temperature=1.0))
        for n in (10, 60)
    ]
    first, second = ends.engine.submit(requests)
    (short,) = first.result()
    old = row(ends, short.token_ids)
    assert short.behaviour_logp == pytest.approx(old, abs=1e-4)
    ends.change(2)
    push(2)
    (long,) = second.result()
    assert [version for version, _ in long.versions] == [1, 2]
    turn = long.versions[0][1]
    assert long.behaviour_logp[turn:] == pytest.approx(row(ends, long.token_ids)[turn:], abs=1e-4)
    assert long.behaviour_logp[:turn] != pytest.approx(row(ends, long.token_ids)[:turn], abs=1e-2)
    ends.change(1)
    assert long.behaviour_logp[:turn] == pytest.approx(row(ends, long.token_ids)[:turn], abs=1e-4)


def row(ends: Ends, token_ids: list[int]) -> list[float]:
    """The trainer's log-probs of what came after the prompt."""
    return ends.trainer.logprobs([[*PROMPT, *token_ids]])[0][len(PROMPT) - 1 :]


def base_in_full(source: WeightSource, full: LocalTrainer, patch: pytest.MonkeyPatch) -> None:
    """What was never quantised is sent, and summed as well."""
    found = source.parameters.parameters  # type: ignore[attr-defined]
    patch.setattr(found, "layers", {})
    patch.setattr(found, "parameters", {**found.parameters, **dict(full.policy.parameters)})


def base_that_stays(source: WeightSource, full: LocalTrainer, patch: pytest.MonkeyPatch) -> None:
    """The engine has the folder's, and takes no other."""
    fill = source.gatherer.fill

    def filled(wanted: list[tuple[str, Tensor]]) -> None:
        fill(wanted)
        for name, tensor in wanted:
            if "base_layer" in name:
                tensor.copy_(full.policy.parameters[name])

    patch.setattr(source.gatherer, "fill", filled)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_a_base_in_few_bits_is_sent_once_as_what_it_stands_for(ends, plain, kind):
    pytest.importorskip("bitsandbytes")
    trainer, source = source_of(ends.trainer.policy.adapters.base, replace(PARAMS, quantize=kind))
    few = ends_of(trainer, source, ends.engine, ends.engines)
    wrong = {base_in_full: "log-probs that differ", base_that_stays: r"does not hold .* model\.layers\.0\S+base_layer"}
    for fault, said in wrong.items():
        push = few.link()
        with pytest.MonkeyPatch.context() as patch:
            fault(source, ends.trainer, patch)
            with pytest.raises(WeightMismatch, match=said):
                push(0)
    push = few.link()
    for step in range(3):
        push(step)
        assert few.gap() < 1e-4
        assert covered(few.engine) == {spec.name for spec in push.plan.tensors}
        if step == 0:
            assert ends.gap() > 0.01
        few.change(step)
        assert few.gap() > 0.1
    assert {spec.name for spec in push.plan.tensors} == set(trainer.policy.trained)
    source.close()


def test_what_sleep_loses_is_there_again_after_a_push_of_all(ends, plain):
    """A GPU's memory comes back with anything in it: the stacks, padding included, and what the kernels were told."""
    push = ends.link()
    push(0)
    ends.change(4)
    ends.engine.sleep()
    ends.engine.wake("weights")
    manager = manager_of(ends)
    for layer in manager.modules.values():
        for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked):
            stack.fill_(7.0)
    for wrapper in manager.punica_wrapper_mapping.values():
        wrapper._token_lora_indices.fill_(-1)
    ends.engine._plan = push.moving
    with pytest.raises(UserError, match=r"dropped the model that these adapters are on"):
        ends.engine.receive(1)
    whole = ends.link()
    whole.moving = None
    whole.push(1)
    ends.engine.wake("cache")
    whole.check.prove(1)
    assert ends.gap() < 1e-4
    whole(2)
    assert ends.gap() < 1e-4
    assert len(whole.plan.tensors) > len(push.moving.tensors)


def test_layers_that_vllm_has_no_adapters_for_are_named(ends):
    layers = ["model.layers.0.mlp.down_proj", "model.sideways"]
    with pytest.raises(UserError, match=r"takes no adapters on model\.sideways; add --lora\.fold"):
        ends.engine._call("tandem_require_adapters", layers)


def test_names_are_told_of_a_class_that_vllm_runs_as_transformers_has_it(ends, monkeypatch):
    """OLMo 2, StarCoder 2 and GPT-NeoX, which it makes ask for its own config wherever they are made."""
    from transformers import LlamaModel
    from vllm.config import get_current_vllm_config

    own = LlamaModel.__init__

    def asking(self, config):
        get_current_vllm_config()
        own(self, config)

    monkeypatch.setattr(LlamaModel, "__init__", asking)
    (transfer,) = ends.engine._engine.collective_rpc(lambda worker: worker.weight_transfer_engine)
    vars(transfer).pop("names", None)
    ends.engine._call("tandem_require_adapters", ["model.layers.0.mlp.down_proj"])


def test_experts_beside_adapters_are_refused_on_a_cpu():
    """vLLM takes them to kernels that no CPU has, and would end in a traceback at the first step."""

    class MoERunner(torch.nn.Linear):
        pass

    with pytest.raises(UserError, match=r"computes no experts beside adapters; add --lora\.fold"):
        names_in(torch.nn.Sequential(MoERunner(2, 2)), None, [])  # type: ignore[arg-type]


def test_scaled_is_what_the_adapters_add(ends, plain):
    ends.change(3)
    scaled = ends.trainer.policy.scaled()
    assert isinstance(scaled, Scaled)
    name = "model.layers.0.mlp.down_proj.lora_B.default.weight"
    assert torch.equal(scaled[name], ends.trainer.parameters[name].detach() * 3)
    assert scaled[name.replace("_B", "_A")] is ends.trainer.parameters[name.replace("_B", "_A")]
    assert list(scaled) == list(ends.trainer.parameters)
