"""A model that also sees on vLLM's CPU build: its text half takes the pushes, and no part that sees is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from helpers.engine_models import tokenizer
from helpers.vllm_models import Pusher, covered, reference_logp, wrong_tensors

from tandem.engines.vllm.engine import VLLMEngine
from tandem.models.loading import load_causal

pytest.importorskip("torchvision")  # vLLM's classes of models that see are made with it
TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def test_pushes_reach_the_text_half(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=90, boi_token_index=91,
        eoi_token_index=92,
    )  # fmt: skip
    whole = transformers.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    whole.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    module = load_causal(tmp_path, device="cpu").module
    parameters = dict(module.named_parameters())
    engine = VLLMEngine(str(tmp_path), dtype="float32", max_slots=2, max_length=64)
    try:
        sequence = list(range(5, 45))
        assert engine.logprobs([sequence])[0] == pytest.approx(reference_logp(module, sequence[:1], sequence[1:]), 1e-4)
        pusher = Pusher.connect(engine, parameters)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        sums = pusher.push(1)
        assert engine.logprobs([sequence])[0] == pytest.approx(reference_logp(module, sequence[:1], sequence[1:]), 1e-4)
        assert not wrong_tensors(engine, sums)
        assert covered(engine) == set(sums)
        pusher.close()
    finally:
        engine.close()
