"""Every method of the table trains adapters alone: its losses reach them, and nothing that is frozen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from helpers.method_steps import IDS, Models, estimated, items_of
from helpers.models import make_tokenizer

from tandem.batch import Outputs
from tandem.methods.table import METHODS, method_class
from tandem.models.loading import prepare_module
from tandem.models.lora.adapters import AdapterParams, put_adapters
from tandem.models.lora.pairs import pairs_of
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer

pytest.importorskip("peft")
AUTO = {"lm": transformers.AutoModelForCausalLM, "scalar": transformers.AutoModelForSequenceClassification}


WIDTH = 16
CASES = [
    *((name, ("all-linear",)) for name in METHODS),
    ("ppo", ("embed_tokens", "lm_head")),
    ("distill", ("lm_head",)),
    ("dpo", ("experts",)),
]


@pytest.fixture(scope="module")
def adapted():
    """A model of each head with adapters on each of the targets, whose ids are those of the steps."""
    common = {
        "vocab_size": IDS, "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_labels": 1, "pad_token_id": 0,
    }  # fmt: skip
    dense = transformers.LlamaConfig(**common)
    mixture = transformers.Qwen3MoeConfig(**common, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
    found = {}

    def of(head, targets):
        if (head, targets) not in found:
            torch.manual_seed(0)
            module = AUTO[head].from_config(mixture if "experts" in targets else dense)
            adapters = put_adapters(module, AdapterParams(rank=2, targets=targets, beside=head == "scalar"), "base")
            found[head, targets] = prepare_module(module, make_tokenizer())
            found[head, targets].adapters = adapters
        return found[head, targets]

    return of


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_a_method_trains_adapters_alone(adapted, name, targets):
    method = method_class(name)()
    batch = estimated(method, Models(method), items_of(method)).batch
    head_of = {"actor": method.head} | {need.role: need.head for need in method.needs()}
    for role, loss in method.losses().items():
        model, asks = adapted(head_of[role], targets), method.asks_of(role)
        if asks.divergence is not None:
            generator = torch.Generator().manual_seed(0)
            model.teacher_head = torch.randn(IDS, WIDTH, generator=generator), None
            states = Outputs(state_TD=torch.randn(batch.tokens, WIDTH, generator=generator))
            batch = replace(batch, seen=batch.seen | {asks.divergence.teacher: states})
        before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
        trainer = LocalTrainer(model, loss, OptimParams(learning_rate=1e-2, total_steps=1), token_budget=64, asks=asks)
        trainer.forward_backward(batch)
        trainer.optim_step()
        changed = {n for n, p in model.module.named_parameters() if not torch.equal(p, before[n])}
        assert changed <= {n for n in before if ".lora_" in n or n == "score.weight"}
        # Of each pair what began at 0 has moved.
        zero = {pair.first_at_zero for pair in pairs_of(model.module).values()}
        assert changed >= zero
        with torch.no_grad():
            for n, p in model.module.named_parameters():
                p.copy_(before[n])
