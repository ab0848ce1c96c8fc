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
_WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
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


def _config(family: str, size: dict[str, Any]) -> tuple[str, Any]:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    n = size["head_dim"] // 8
    axes = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2 * n, n, n]}}
    match family:
        case "gemma3":
            text = size | layers
            return "Gemma3", transformers.Gemma3Config(
                text_config=text, vision_config=_VISION, mm_tokens_per_image=4, **_GEMMA
            )
        case "gemma4":
            text = size | layers | {"global_head_dim": 8, "hidden_size_per_layer_input": 8}
            text |= {"vocab_size_per_layer_input": VOCABULARY}
            ids = {"image_token_id": IMAGE, "boi_token_id": BEGIN, "eoi_token_id": END, "video_token_id": 93}
            vision = _VISION | {"head_dim": 16, "num_key_value_heads": 2, "position_embedding_size": 64}
            return "Gemma4", transformers.Gemma4Config(text_config=text, vision_config=vision, **ids)
        case "qwen3_5":
            text = size | _STATES
            return "Qwen3_5", transformers.Qwen3_5Config(text_config=text, vision_config=_QWEN_VISION, **_SEEN)
        case "qwen3_5_moe":
            text = size | _STATES | _EXPERTS
            return "Qwen3_5Moe", transformers.Qwen3_5MoeConfig(text_config=text, vision_config=_QWEN_VISION, **_SEEN)
        case "mistral3":
            text, vision = size | {"model_type": "ministral3"}, _VISION | {"model_type": "pixtral"}
            return "Mistral3", transformers.Mistral3Config(
                text_config=text, vision_config=vision, image_token_index=IMAGE, tie_word_embeddings=False
            )
        case "llama4":
            text = size | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8}
            vision = _VISION | {"intermediate_size": 64, "vision_output_dim": 32, "projector_input_dim": 32}
            vision |= {"projector_output_dim": 32}
            return "Llama4", transformers.Llama4Config(
                text_config=text, vision_config=vision, image_token_index=IMAGE, boi_token_index=BEGIN,
                eoi_token_index=END,
            )  # fmt: skip
        case "qwen2_vl" | "qwen2_5_vl":
            text = {key: value for key, value in size.items() if key != "head_dim"} | axes
            vision = _QWEN_VISION | {"fullatt_block_indexes": [0], "window_size": 28}
            if family == "qwen2_vl":
                text |= {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
                vision = {"embed_dim": 32, "hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 14}
                return "Qwen2VL", transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **_SEEN)
            return "Qwen2_5_VL", transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_SEEN)
        case "qwen3_vl":
            text, vision = size | axes | {"attention_bias": True}, _QWEN_VISION | {"deepstack_visual_indexes": [0]}
            return "Qwen3VL", transformers.Qwen3VLConfig(
                text_config=text, vision_config=vision, tie_word_embeddings=True, **_SEEN
            )
        case _:
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
            text = size | axes | experts | {"norm_topk_prob": True}
            vision = _QWEN_VISION | {"deepstack_visual_indexes": [0]}
            return "Qwen3VLMoe", transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_SEEN)


FAMILIES = (
    "gemma3", "gemma4", "qwen3_5", "qwen3_5_moe", "mistral3", "llama4", "qwen2_vl", "qwen3_vl_moe",
)  # fmt: skip


def make_seeing(family: str, seed: int = 0, *, wide: bool = False) -> Any:
    """A random whole of the family, whose every tensor matters; ``wide``: with heads as vLLM takes them."""
    name, config = _config(family, _TEXT | _WIDE if wide else _TEXT)
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
