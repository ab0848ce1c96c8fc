"""Models of a few layers with and without experts, and a trainer of adapters on them."""

from __future__ import annotations

import torch
import transformers

from helpers.models import _COMMON, make_module, make_tokenizer
from tandem.batch import TokenLoss
from tandem.data.packing import pack, stamp
from tandem.models.loading import load_causal
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.types import Sequence

ROWS = [[5, 9, 13, 2, 7, 30], [5, 9, 13, 40, 41], [8, 3, 22]]
TARGETS = [
    ("llama", ("all-linear", "embed_tokens", "lm_head")),
    ("qwen3_moe", ("all-linear", "experts")),
    ("gpt_oss", ("experts",)),
    ("qwen2_moe", ("all-linear", "experts")),
    ("gpt2", ("all-linear",)),
]
"""Kinds of models, and what of them has adapters."""
_EXPERTS = _COMMON | {"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
MIXTURES = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_EXPERTS, num_experts=4, moe_intermediate_size=16),
    # A dense layer, and a shared expert beside the others.
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_EXPERTS, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24, mlp_only_layers=[0]
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**_EXPERTS | {"intermediate_size": 16}, num_local_experts=4),
}
# GPT-2's layers are stored as [in, out].
OTHERS = MIXTURES | {"gpt2": lambda: transformers.GPT2Config(**_COMMON)}


def make_bases(folder):
    """A folder of each kind."""
    found = {}
    for kind in ("llama", *OTHERS):
        if kind == "llama":
            module = make_module(kind)
        else:
            torch.manual_seed(0)
            module = transformers.AutoModelForCausalLM.from_config(OTHERS[kind]())
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.ndim >= 2:
                        parameter.mul_(6.0)
        found[kind] = folder / kind
        module.save_pretrained(found[kind])
        make_tokenizer().save_pretrained(found[kind])
    return found


def batch_of_rows(rows=ROWS):
    batch = pack([Sequence(token_ids=ids, trainable=[False] + [True] * (len(ids) - 1)) for ids in rows])
    return stamp(batch, "token")


def negative_logp(out, batch):
    return TokenLoss(loss_T=-out.logp_T * batch.trainable_T, metrics_T={})


def trainer_of(source, params, *, dtype="float32", loss=negative_logp, load=load_causal, world=None, **options):
    model = load(source, adapters=params, device="cpu", dtype=dtype, **options)
    return LocalTrainer(model, loss, OptimParams(learning_rate=3e-2, total_steps=9), token_budget=40, world=world)


def train(trainer, steps=2):
    for _ in range(steps):
        trainer.forward_backward(batch_of_rows())
        trainer.optim_step()
