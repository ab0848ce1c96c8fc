"""The live engine samples with the trainer's adapters, by every way, after every step; at zero they change no bit."""

from __future__ import annotations

import pytest
import torch
from helpers.models import make_module, make_tokenizer

from tandem.batch import TokenLoss
from tandem.data.packing import pack, stamp
from tandem.engines.live.engine import LiveEngine
from tandem.engines.live.forwards import LeanForward, OwnForward
from tandem.models.adapters import AdapterParams
from tandem.models.loading import load_causal
from tandem.models.quantized import quantize_module
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.training.views import View
from tandem.types import Request, SamplingParams, Sequence

pytest.importorskip("peft")
PROMPTS = [(5, 9, 13), (7, 30, 31, 8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_module("qwen2").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


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
    ("way", "adapters"),
    [("padded", {}), ("slots", {}), ("captured", {}), ("captured", {"targets": ("k_proj", "down_proj", "up_proj")}),
     ("captured", {"dora": True}), ("captured", {"quantize": "nf4"}), ("captured", {"quantize": "fp8"}),
     ("padded", {"quantize": "nf4"})],
)  # fmt: skip
def test_after_every_step_the_engine_computes_what_the_trainer_does(base, way, adapters):
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
        assert type(engine.fitting.forward) is (OwnForward if "dora" in adapters else LeanForward)
    for _ in range(2):
        trainer.forward_backward(batch_of(before))
        trainer.optim_step()
        requests = [Request(prompt_ids=p, seeds=(1, 2), sampling=SamplingParams(max_new_tokens=6)) for p in PROMPTS]
        found = [(p, c) for p, row in zip(PROMPTS, engine.generate(requests), strict=True) for c in row]
        assert gap(trainer, found) < 2e-5
        assert gap(view, found) > 0.05
