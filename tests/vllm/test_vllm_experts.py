"""Experts on vLLM's CPU build: stacked by transformers, one by one in vLLM, packed by its kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.vllm_models import Pusher, covered, reference_logp, save, wrong_tensors
from transformers.core_model_loading import revert_weight_conversion

from tandem.engines.vllm.engine import VLLMEngine
from tandem.engines.vllm.names import Names
from tandem.engines.vllm.setup import VLLMParams
from tandem.errors import UserError
from tandem.models.moe.routers import all_weights, correction_biases
from tandem.models.proof.shrunk import trained_size
from tandem.sync.check import logp_bound

SIZE: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FEW: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZE, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**SIZE, **FEW),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZE, **FEW, head_dim=32),
    "olmoe": lambda: transformers.OlmoeConfig(**SIZE, num_experts=4),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **SIZE, head_dim=32, n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=32, first_k_dense_replace=1
    ),
    "llama": lambda: transformers.LlamaConfig(**SIZE),
}


def make(kind: str, seed: int) -> Any:
    torch.manual_seed(seed)
    module = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    trained_size(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for bias in correction_biases(module).values():
            bias.normal_()
    return module


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_and_numbers_are_those_of_a_folder(kind: str) -> None:
    module = make(kind, 0)
    weights = {name: p.detach() for name, p in all_weights(module).items()}
    expected = revert_weight_conversion(module, weights)
    found = dict(Names(module.config).of(list(weights.items())))
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    # Views: what is pushed is copied once.
    memory = {p.untyped_storage().data_ptr() for p in weights.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in found.values()} <= memory


def test_what_would_have_to_be_computed_is_refused() -> None:
    module = make("mixtral", 0)
    with pytest.raises(UserError, match="is not cut but computed anew"):
        Names(module.config).parts("model.layers.0.mlp.experts.down_proj", torch.zeros(4, 3))


def test_experts_arrive_push_after_push(tmp_path: Path) -> None:
    """Those of GLM 4.5, some of them shared, and the biases by which its routers pick; at last these alone."""
    first, others = make("glm4_moe", 0), [make("glm4_moe", seed) for seed in (1, 2, 2)]
    for bias in correction_biases(others[2]).values():
        bias.neg_()
    engine = VLLMEngine(VLLMParams(model=save(first, tmp_path), dtype="float32", max_slots=2))
    try:
        sequence = [5, 6, 7, 8, 9, 10, 11]
        parameters = all_weights(first)
        pusher = Pusher.connect(engine, parameters)
        for version, module in enumerate(others, start=1):
            with torch.no_grad():
                for mine, new in zip(parameters.values(), all_weights(module).values(), strict=True):
                    mine.copy_(new)
            sums = pusher.push(version)
            expected = reference_logp(module, sequence[:1], sequence[1:])
            assert engine.logprobs([sequence])[0] == pytest.approx(expected, abs=1e-4)
            assert not wrong_tensors(engine, sums)
            # Packed for the kernels, so that the probe alone speaks for them.
            assert {name.rpartition(".")[2] for name in set(sums) - covered(engine)} == {"gate_up_proj", "down_proj"}
        pusher.close()
    finally:
        engine.close()
    assert logp_bound("float32", 2) > 1e-4
