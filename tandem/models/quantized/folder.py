"""How the weights in a model's folder are quantised, as its config says. Nothing here imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.models.lora.folder import base_of


def quantized_kind(source: str | Path) -> str | None:
    """``nf4`` or ``fp4`` of a folder in bitsandbytes' 4 bits, or of adapters on one; None of any other, or a hub name.

    Raises UserError where they are quantised in another way.
    """
    path = Path(base_of(str(source))).expanduser() / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None  # what is wrong with it is said by whoever loads it
    return kind_in_config(config.get("quantization_config") if isinstance(config, dict) else None, source)


def kind_in_config(found: Any, source: str | Path) -> str | None:
    """``quantized_kind`` of a folder with this ``quantization_config``, if any, in its config."""
    if found is None:
        return None
    about = found if isinstance(found, dict) else found.to_dict()
    if about.get("quant_method") == "bitsandbytes" and about.get("load_in_4bit"):
        return str(about.get("bnb_4bit_quant_type") or "fp4")
    method = about.get("quant_method") or "an unknown method"
    eight = " in 8 bits" if about.get("load_in_8bit") else ""
    raise UserError(
        f"{source}: its weights are quantised by {getattr(method, 'value', method)}{eight}, and of folders like that "
        "Tandem reads bitsandbytes' 4 bits; give the model that it was made of, and --lora.quantize nf4 or fp8"
    )
