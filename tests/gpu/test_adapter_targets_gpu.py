"""Adapters on embeddings, heads and experts on a GPU: captured sampling, compiled training, a critic on one base."""

from __future__ import annotations

import pytest
import torch
from helpers.adapter_steps import gaps_before_steps, live
from helpers.engine_models import tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

from tandem.batch import TokenLoss
from tandem.models.loading import load_causal
from tandem.models.lora.adapters import AdapterParams
from tandem.models.shared import scalar_beside
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytest.importorskip("peft")
COMMON = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CASES = {
    "ends": (Qwen2Config(**COMMON), ("all-linear", "embed_tokens", "lm_head")),
    "experts": (
        Qwen3MoeConfig(**COMMON, head_dim=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128),
        ("all-linear", "experts"),
    ),
}


def loss(out, batch):
    return TokenLoss(loss_T=-out.logp_T * batch.trainable_T, metrics_T={})


def trainer_of(folder, case):
    config, targets = CASES[case]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    # A rank that grouped products do not take as it is.
    params = AdapterParams(rank=6, targets=targets)
    model = load_causal(folder, adapters=params, device="cuda", dtype="bfloat16")
    optim = OptimParams(learning_rate=1e-2, total_steps=9)
    return LocalTrainer(model, loss, optim, token_budget=4096, compile="on")


@pytest.mark.parametrize("case", CASES)
def test_captured_sampling_gives_the_log_probs_of_compiled_training_after_every_step(case, tmp_path):
    trainer = trainer_of(tmp_path, case)
    engine = live(trainer)
    assert engine.way == "captured"
    assert engine.fitting.own_because == ""
    bases = []
    for own, without in gaps_before_steps(trainer, engine):
        # Rounding gives a token another expert now and then.
        assert own.median() < 0.01
        assert own.mean() < 0.02
        bases.append(without.mean())
    assert trainer.model.blocks.working
    assert bases[-1] > 5 * bases[0]


@pytest.mark.parametrize("case", CASES)
def test_a_critic_on_the_policys_base_takes_no_room_for_it(case, tmp_path):
    trainer = trainer_of(tmp_path, case)
    base = sum(p.numel() * p.element_size() for p in trainer.model.module.parameters() if not p.requires_grad)
    before = torch.cuda.memory_allocated()
    critic = scalar_beside(trainer.model, str(tmp_path), AdapterParams(rank=2, targets=CASES[case][1], beside=True))
    grown = torch.cuda.memory_allocated() - before
    own = sum(p.numel() * p.element_size() for p in critic.module.parameters() if p.requires_grad)
    assert grown < own + 0.1 * base
