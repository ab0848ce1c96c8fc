"""The class of a model with one number a token, for every kind of model that transformers has a causal one of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GenericForSequenceClassification

from tandem.errors import UserError
from tandem.models.folder import located
from tandem.models.lora.folder import adapter_folder, base_of
from tandem.types import ScoreScale

NO_HEAD = "no trained 'score' head in it; give a reward model (make one with tandem rm)"


def scalar_keys(config: Any, tokenizer: Any) -> dict[str, Any]:
    """What the config of a model with one number a token says otherwise than that of its language model.

    Its padding is the tokenizer's, or the end of sequence where the embedding has no row for that.
    """
    rows, pad = getattr(config.get_text_config(), "vocab_size", None), tokenizer.pad_token_id
    return {"num_labels": 1, "pad_token_id": pad if rows is None or pad < rows else tokenizer.eos_token_id}


def auto_class(config: Any, source: str, *, scalar: bool) -> Any:
    """What loads the model of a config: a causal language model, or one with one number a token."""
    return scalar_class(config, source) if scalar else AutoModelForCausalLM


def forget_scale(config: Any) -> None:
    """Takes what a config says of its model's scores (``ScoreScale``) out of it: of other scores it is not true."""
    for name in ScoreScale._fields:
        vars(config).pop(name, None)


def scalar_class(config: Any, source: str) -> Any:
    """What loads such a model: transformers' own class for sequence classification, or one made of its base model.

    That has a linear ``score`` on the base model's last hidden states, as transformers' own have. Its folder holds the
    base model's tensors under the names that a causal model's has, and ``score.weight``. Raises UserError where there
    is no base model by itself.
    """
    if type(config) in AutoModelForSequenceClassification._model_mapping or getattr(config, "auto_map", None):
        return AutoModelForSequenceClassification
    base = AutoModel._model_mapping.get(type(config), None)
    if config.get_text_config() is not config:
        raise UserError(
            f"{source}: {config.model_type} has more than text, and no class with a score; use another model"
        )
    parents: list[Any] = list(base.__mro__[1:]) if isinstance(base, type) else []
    # What the models of one kind have in common.
    parent = next((kind for kind in parents if issubclass(kind, PreTrainedModel) and kind is not PreTrainedModel), None)
    if parent is None:
        raise UserError(
            f"{source}: transformers has no model without a head for {config.model_type}; use another model"
        )
    name = f"{base.__name__.removesuffix('Model')}ForSequenceClassification"
    body = {
        "base_model_prefix": parent.base_model_prefix or "model",  # Llama 4 has none
        "__module__": __name__,
        "from_config": classmethod(_from_config),
    }
    return type(name, (GenericForSequenceClassification, parent), body)


def _from_config(kind: Any, config: Any, trust_remote_code: bool = False) -> Any:
    """As transformers' ``AutoModel...`` have it."""
    return kind._from_config(config)


def require_head(source: str) -> None:
    """Raises UserError where a folder of safetensors, whose headers alone are read, holds no trained score head.

    Adapters may bring one along. What cannot be read, or lies on the hub, is found wanting when it is loaded.
    """
    adapters = adapter_folder(source)
    files = sorted(Path(located(base_of(source))).glob("model*.safetensors"))
    if not files or (adapters is not None and adapters.scalar):
        return
    try:
        stored = {name for path in files for name in safe_open(path, "pt").keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return
    if not any(f".{name}".endswith(".score.weight") for name in stored):
        raise UserError(f"{source}: {NO_HEAD}")


def with_own_buffers(module: Any) -> None:
    """Gives a module of a class made here the buffers that transformers' own class has.

    What is computed from the config and not stored (a vector of scales) transformers makes for its own classes only.
    Parameters stay as they are: they may be in few bits already.
    """
    if type(module).__module__ == __name__:
        with no_init_weights():
            base = AutoModel.from_config(module.config, dtype=torch.float32)
        stored = base.state_dict()
        for name, buffer in base.named_buffers():
            if name not in stored:
                place, _, own = name.rpartition(".")
                module.base_model.get_submodule(place)._buffers[own] = buffer
