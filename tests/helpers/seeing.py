"""Small random models that also see, by their families: transformers' own whole classes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from helpers.engine_models import tokenizer

VOCABULARY = 96
IMAGE, BEGIN, END = 90, 91, 92
"""Token ids of an image's place, and of what is around it."""
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14
}  # fmt: skip
_STATES = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16
}  # fmt: skip
_SEEN = {"image_token_id": IMAGE, "video_token_id": 93, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
_GEMMA = {"image_token_index": IMAGE, "boi_token_index": BEGIN, "eoi_token_index": END}


def _config(family: str) -> tuple[str, Any]:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    match family:
        case "gemma3":
            text = _TEXT | layers
            return "Gemma3", transformers.Gemma3Config(
                text_config=text, vision_config=_VISION, mm_tokens_per_image=4, **_GEMMA
            )
        case "gemma4":
            text = _TEXT | layers | {"global_head_dim": 8, "hidden_size_per_layer_input": 8}
            text |= {"vocab_size_per_layer_input": VOCABULARY}
            ids = {"image_token_id": IMAGE, "boi_token_id": BEGIN, "eoi_token_id": END, "video_token_id": 93}
            vision = _VISION | {"head_dim": 16, "num_key_value_heads": 2, "position_embedding_size": 64}
            return "Gemma4", transformers.Gemma4Config(text_config=text, vision_config=vision, **ids)
        case "qwen3_5":
            text = _TEXT | _STATES
            return "Qwen3_5", transformers.Qwen3_5Config(text_config=text, vision_config=_QWEN_VISION, **_SEEN)
        case "qwen3_5_moe":
            text = _TEXT | _STATES | _EXPERTS
            return "Qwen3_5Moe", transformers.Qwen3_5MoeConfig(text_config=text, vision_config=_QWEN_VISION, **_SEEN)
        case "mistral3":
            text, vision = _TEXT | {"model_type": "ministral3"}, _VISION | {"model_type": "pixtral"}
            return "Mistral3", transformers.Mistral3Config(
                text_config=text, vision_config=vision, image_token_index=IMAGE, tie_word_embeddings=False
            )
        case "llama4":
            text = _TEXT | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8}
            vision = _VISION | {"intermediate_size": 64, "vision_output_dim": 32, "projector_input_dim": 32}
            vision |= {"projector_output_dim": 32}
            return "Llama4", transformers.Llama4Config(
                text_config=text, vision_config=vision, image_token_index=IMAGE, boi_token_index=BEGIN,
                eoi_token_index=END,
            )  # fmt: skip
        case _:
            text = _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
            vision = _QWEN_VISION | {"deepstack_visual_indexes": [0]}
            return "Qwen3VL", transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_SEEN)


FAMILIES = ("gemma3", "gemma4", "qwen3_5", "qwen3_5_moe", "mistral3", "llama4")


def make_seeing(family: str, seed: int = 0) -> Any:
    """A random whole of the family, whose every tensor matters."""
    name, config = _config(family)
    torch.manual_seed(seed)
    whole = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6.0).add_(torch.randn_like(parameter) * 0.05)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return whole


def save_seeing(whole: Any, folder: Any, **options: Any) -> str:
    """As its folder lies on the hub: with a tokenizer, and a file of its processor."""
    whole.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "as it was"}')
    return str(folder)
