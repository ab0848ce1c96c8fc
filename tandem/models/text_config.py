"""The config of the language model in a folder: its own, or that of the text half of a model that also sees."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from tandem.errors import UserError
from tandem.models.quantized.folder import kind_in_config
from tandem.models.trusted import is_trusted

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "glm4v_text": ("glm4", {"attention_bias": True}),
    "glm4v_moe_text": ("glm4_moe", {}),
    "glm_ocr_text": ("glm4", {"attention_bias": False}),
}
"""Text halves that transformers has no causal class for, and the language model that each is where nothing is seen: its
kind, and what that one's config says of what the half does in any case.

The three axes of a token's rotary position are the same number there.
"""
_AXES = ("mrope_section", "mrope_interleaved", "type")
"""Of rotary parameters those that divide frequencies among axes, and the old name of ``rope_type``."""


def config_in(place: str | Path) -> Any:
    """The config of the language model in a folder or of a hub name; of a model that also sees, its text half's.

    Raises UserError where transformers has no class for that half alone.
    """
    config = AutoConfig.from_pretrained(place, trust_remote_code=is_trusted(place))
    return half_of(config, place) if sees(config, place) else config


def sees(config: Any, place: str | Path) -> bool:
    """Whether a config is of a model that reads more than text. One that scores is taken as it is.

    Raises UserError where it is one whose text half cannot be loaded.
    """
    scores = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    text = getattr(config, "text_config", None) if "text_config" in config.sub_configs else None
    if text is None or getattr(config, "auto_map", None) or scores:
        return False
    if type(text) not in AutoModelForCausalLM._model_mapping and text.model_type not in PLAIN:
        raise UserError(
            f"{place}: a {config.model_type}, and transformers has no causal language model of its text half alone "
            f"({text.model_type}); use a model of text alone"
        )
    kind_in_config(getattr(config, "quantization_config", None), place)
    return True


def half_of(config: Any, place: str | Path) -> Any:
    """The config of the text half of a whole's, with what the whole's says instead of it."""
    half = _plain(config.text_config)
    half.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)  # as transformers has it
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config"):
        if getattr(config, key, None) is not None:
            setattr(half, key, getattr(config, key))
    half._name_or_path = str(place)
    return half


def _plain(text: Any) -> Any:
    """The config of the language model that a text half is; a copy of its own where that has a causal class."""
    if text.model_type not in PLAIN:
        return copy.deepcopy(text)
    kind, always = PLAIN[text.model_type]
    values = {key: value for key, value in text.to_dict().items() if key != "model_type"} | always
    values["rope_parameters"] = {key: v for key, v in text.rope_parameters.items() if key not in _AXES}
    return CONFIG_MAPPING[kind](**values)
