"""How long a text a model can read, and which token ids it knows: from its config, without its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import AutoModelForMaskedLM

from tandem.errors import UserError
from tandem.models.folder import readable_errors, with_config
from tandem.models.lora.folder import adapter_folder
from tandem.models.text_config import config_in
from tandem.types import Limits

READS_AHEAD = (
    "what it says of a token depends on the tokens after it, as in BERT and other encoders, so its log-probs are not "
    "those of a text; give a causal language model"
)


def read_limits(source: str | Path, *, head: Literal["lm", "scalar"] = "lm") -> Limits:
    """The limits of the model in a folder or of a hub name.

    Raises UserError where there is none, and where it is to be a language model (``head``) and is a reward model.
    """
    config = model_config(source)
    if head == "lm":
        require_language_model(config, source)
    return limits_of(config, source)


def model_config(source: str | Path) -> Any:
    """A model's config, of one that also sees its text half's. Raises UserError for an encoder's, or where is none."""
    with readable_errors(source, "model"):
        config = config_in(with_config(source))
    # Kinds of which configs make encoders or decoders; those that are both have decoders of their own.
    either = type(config) in AutoModelForMaskedLM._model_mapping and not config.is_encoder_decoder
    if either and getattr(config, "is_decoder", None) is False:
        raise UserError(f"{source}: {READS_AHEAD}")
    return config


def layers_of(config: Any) -> int:
    """Layers, one after another; 1 where the config does not say."""
    return getattr(config.get_text_config(), "num_hidden_layers", None) or 1


def require_language_model(config: Any, source: str | Path) -> None:
    """Raises UserError for a model that has a scalar head where a language model's would be."""
    adapters = adapter_folder(source)
    kinds = [name for name in config.architectures or () if name.endswith("ForSequenceClassification")]
    if kind := next(iter(kinds), "model with one number a token" if adapters is not None and adapters.scalar else None):
        raise UserError(
            f"{source}: a {kind}, which is a reward model or a critic without a language-model head; give the folder "
            "of a causal language model"
        )


def limits_of(config: Any, source: str | Path = "the model") -> Limits:
    """The limits that a transformers config states.

    Positions are ``max_position_embeddings``, which most kinds of scaled rotary embeddings leave scaled already. The
    linear kind leaves it as it was in pretraining, but for Gemma 3, and YaRN's configs exist in both ways. Beyond it
    the dynamic kind turns every token by the longest sequence that transformers has met, which nothing can be held to.
    A model without the key, as those with ALiBi or a state instead of attention, has no limit.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or 0
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        kind, factor = rope.get("rope_type"), rope.get("factor") or 1.0
        if kind == "linear" and not text.model_type.startswith("gemma3"):
            positions = max(positions, int(text.max_position_embeddings * factor))
        elif kind == "yarn":
            positions = max(positions, int((rope.get("original_max_position_embeddings") or 0) * factor))
    return Limits(
        positions=positions if positions > 0 else None,
        vocabulary=getattr(text, "vocab_size", None),
        turning=turning_point(config),
        whose=str(source),
    )


def turning_point(config: Any) -> int | None:
    """Tokens up to which a sequence's numbers do not depend on how long it becomes; None: they never do.

    Behind it all positions, the first as well, are turned by other frequencies (LongRoPE, arXiv:2402.13753).
    """
    text = config.get_text_config()
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        if rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings")
            longest = getattr(text, "max_position_embeddings", None) or 0
            return int(original) if original and original < longest else None
    return None


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of rotary embeddings, of which some models have several, one for each kind of layer."""
    if isinstance(parameters, Mapping):
        if "rope_type" in parameters:
            yield parameters
        else:
            yield from (inner for inner in parameters.values() if isinstance(inner, Mapping))
