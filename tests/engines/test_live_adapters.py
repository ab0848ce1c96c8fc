"""The live engine samples with the trainer's adapters, by every way, after every step; at zero they change no bit."""

from __future__ import annotations

import pytest
import torch
from helpers.family_models import made
from helpers.models import make_module, make_tokenizer
from helpers.targets import TARGETS, make_bases

from tandem.batch import TokenLoss
from tandem.data.packing import pack, stamp
from tandem.engines.live.engine import LiveEngine
from tandem.engines.live.forwards import OwnForward
from tandem.engines.live.stacked import Additions
from tandem.models.loading import load_causal
from tandem.models.lora.adapters import AdapterParams
from tandem.models.quantized.layers import quantize_module
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.training.views import View
from tandem.types import Request, SamplingParams, Sequence

peft = pytest.importorskip("peft")
PROMPTS = [(5, 9, 13), (7, 30, 31, 8)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    make_module("qwen2").save_pretrained(folder / "qwen2")
    make_tokenizer().save_pretrained(folder / "qwen2")
    for name in ("qwen3.5", "deepseek-v3"):
        made(name).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return make_bases(folder) | {name: folder / name for name in ("qwen2", "qwen3.5", "deepseek-v3")}


def trainer_of(base, **adapters):
    model = load_causal(base, adapters=AdapterParams(rank=4, **adapters), device="cpu")

    def loss(out, batch):
        return TokenLoss(loss_T=-out.logp_T * batch.trainable_T, metrics_T={})

    return LocalTrainer(model, loss, OptimParams(learning_rate=2e-2, total_steps=9), token_budget=100)


def samples_of(module, way, version=lambda: 0):
    engine = LiveEngine(module, make_tokenizer(), way=way, version=version)
    requests = [Request(prompt_ids=p, seeds=(1, 2), sampling=SamplingParams(max_new_tokens=6)) for p in PROMPTS]
    found = engine.generate(requests)
    return engine, [(p, c) for p, row in zip(PROMPTS, found, strict=True) for c in row]


def batch_of(samples):
    rows = [Sequence(token_ids=[*p, *c.token_ids], trainable=[False] * len(p) + [True] * len(c.token_ids))
            for p, c in samples]  # fmt: skip
    return stamp(pack(rows), "token")


def gap(scorer, samples):
    """Between the sampler's log-probs and a scorer's, in nats."""
    batch = batch_of(samples)
    return (scorer.score(batch).logp_T[batch.trainable_T] - logp(samples)).abs().max()


def logp(samples):
    return torch.tensor([x for _, c in samples for x in c.behaviour_logp])


@pytest.mark.parametrize(
    ("kind", "way", "adapters"),
    [
        ("qwen2", "padded", {}),
        ("qwen2", "slots", {}),
        ("qwen2", "captured", {}),
        ("qwen2", "captured", {"targets": ("k_proj", "down_proj", "up_proj")}),
        ("qwen2", "captured", {"dora": True}),
        ("qwen2", "captured", {"quantize": "nf4"}),
        ("qwen2", "captured", {"quantize": "fp8"}),
        ("qwen3.5", "captured", {"targets": ("all-linear",)}),
        ("deepseek-v3", "captured", {"targets": ("all-linear",)}),
        *(
            (kind, way, {"targets": dict(TARGETS)[kind]})
            for kind, way in (
                ("llama", "slots"),
                ("llama", "captured"),
                ("qwen3_moe", "padded"),
                ("qwen3_moe", "captured"),
                ("gpt2", "captured"),
            )
        ),
    ],
)
def test_after_every_step_the_engine_computes_what_the_trainer_does(bases, tmp_path, kind, way, adapters):
    base = bases[kind]
    trainer = trainer_of(base, **adapters)
    view = View(trainer, temperature=1.0)
    engine, before = samples_of(trainer.model.module, way)
    # generate rounds otherwise where parameters want a gradient.
    bare = load_causal(base, device="cpu").module.requires_grad_(False)
    if "quantize" in adapters:
        quantize_module(bare, adapters["quantize"])
    _, alone = samples_of(bare, way)
    if "dora" not in adapters:
        # s B A x is 0; DoRA divides by a length and multiplies by it again.
        assert [c.token_ids for _, c in before] == [c.token_ids for _, c in alone]
        assert torch.equal(logp(before), logp(alone))
    if way == "captured":
        assert (engine.fitting.lean is None) is ("dora" in adapters)
        assert (engine.fitting.shape.latent is not None) is (kind == "deepseek-v3")
    for _ in range(2):
        trainer.forward_backward(batch_of(before))
        trainer.optim_step()
        requests = [Request(prompt_ids=p, seeds=(1, 2), sampling=SamplingParams(max_new_tokens=6)) for p in PROMPTS]
        found = [(p, c) for p, row in zip(PROMPTS, engine.generate(requests), strict=True) for c in row]
        assert gap(trainer, found) < 2e-5
        assert gap(view, found) > 0.05
    if "targets" in adapters:
        trainer.export(tmp_path)
        _, folded = samples_of(load_causal(tmp_path, device="cpu").module, way)
        assert gap(trainer, folded) < 5e-5


@pytest.mark.parametrize("targets", [("all-linear",), ("lm_head",)])
def test_adapters_that_are_computed_wrongly_are_found_while_they_are_still_at_zero(bases, monkeypatch, targets):
    """On the probe, which leaves no trace in what is trained."""
    trainer = trainer_of(bases["llama"], targets=targets)
    before = {n: p.detach().clone() for n, p in trainer.model.module.named_parameters()}
    monkeypatch.setattr(Additions, "add_", lambda self, out, x: out)
    engine = LiveEngine(trainer.model.module, make_tokenizer(), way="captured")
    assert type(engine.fitting.forward) is OwnForward
    assert "does not reproduce its own forward" in engine.fitting.own_because
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.module.named_parameters())


def test_adapters_of_somebodys_own_name_are_computed_by_the_module(bases):
    module = load_causal(bases["qwen2"], device="cpu").module
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, module, adapter_name="mine")
    engine = LiveEngine(module.eval(), make_tokenizer(), way="captured")
    assert type(engine.fitting.forward) is OwnForward
