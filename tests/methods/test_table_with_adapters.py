"""Every method of the table trains adapters alone: its losses reach them, and nothing that is frozen."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers.method_steps import IDS, Models, estimated, items_of
from helpers.models import make_tokenizer

from tandem.methods.table import METHODS, method_class
from tandem.models.adapters import AdapterParams, put_adapters
from tandem.models.loading import prepare_module
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer

pytest.importorskip("peft")
AUTO = {"lm": transformers.AutoModelForCausalLM, "scalar": transformers.AutoModelForSequenceClassification}


@pytest.fixture(scope="module")
def adapted():
    """A model of each head with adapters on it, whose ids are those of the steps."""
    config = transformers.LlamaConfig(
        vocab_size=IDS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    found = {}
    for head, auto in AUTO.items():
        torch.manual_seed(0)
        module = auto.from_config(config)
        adapters = put_adapters(module, AdapterParams(rank=2), "base")
        found[head] = prepare_module(module, make_tokenizer())
        found[head].adapters = adapters
    return found


@pytest.mark.parametrize("name", [name for name in METHODS if method_class(name)().asks.divergence is None])
def test_a_method_trains_adapters_alone(adapted, name):
    method = method_class(name)()
    batch = estimated(method, Models(method), items_of(method)).batch
    head_of = {"actor": method.head} | {need.role: need.head for need in method.needs()}
    for role, loss in method.losses().items():
        model, asks = adapted[head_of[role]], method.asks_of(role)
        before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
        trainer = LocalTrainer(
            model, loss, OptimParams(learning_rate=1e-2, total_steps=1), token_budget=64,
            entropy=asks.entropy, entropy_gradient=asks.entropy_gradient,
        )  # fmt: skip
        trainer.forward_backward(batch)
        trainer.optim_step()
        changed = {n for n, p in model.module.named_parameters() if not torch.equal(p, before[n])}
        assert changed
        assert changed <= {n for n in before if ".lora_" in n or n == "score.weight"}
        with torch.no_grad():
            for n, p in model.module.named_parameters():
                p.copy_(before[n])
