"""A transformers model with every one of its tensors from its folder, and none made up."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tandem.errors import LISTED, UserError, listed
from tandem.kernels.quantized import require_bitsandbytes
from tandem.lazy import extra
from tandem.models.folder import located, readable_errors
from tandem.models.lora.pairs import plain_name
from tandem.models.quantized.folder import kind_in_config
from tandem.models.quantized.layers import QuantizationConfig, adopt_bitsandbytes, quantized_in, require_apart
from tandem.models.seeing import SeeingModel
from tandem.models.text_config import config_in
from tandem.models.trusted import is_trusted

_MASKS = re.compile(r"\.(attn|attention|self_attn)\.(bias|masked_bias)$")
"""Causal masks that old checkpoints carry as if they were weights (GPT-2, GPT-Neo)."""
_LANGUAGE_HEADS = ("lm_head.", "embed_out.", "head.")
"""What checkpoints call the head of a causal LM, which a scalar model on it leaves out."""


def load_whole(
    auto: Any,
    source: str | Path,
    *,
    what: str,
    new: str = "",
    config_changes: dict[str, Any] | None = None,
    quantize: Literal["none", "nf4", "fp8"] = "none",
    device: str = "cpu",
) -> tuple[Any, bool]:
    """The module of class ``auto`` (``AutoModelFor...``) in float32, and whether its part ``new`` is not in the folder.

    ``quantize``: its linear layers below the head are ``Quantized``, each since its weight was read, on ``device``:
    the whole model is nowhere in more bits. Those of a folder in bitsandbytes' 4 bits are so in any case.

    transformers fills what a folder lacks with random numbers that no seed of a run reaches. Here a tensor that is
    missing, unknown or of another shape raises UserError with its name, but for those of the module ``new``, which may
    be missing as a whole, and for a language-model head where ``auto`` has another.
    """
    with readable_errors(source, what):
        config = config_in(located(source))
        seeing = SeeingModel.of(located(source))
        for key, value in (config_changes or {}).items():
            setattr(config, key, value)
        options = _quantising(config, source, quantize, device)
        with torch.device("meta"):
            meant = auto.from_config(config, trust_remote_code=is_trusted(source)) if options else None
        if meant is not None:
            require_apart(meant)
        options |= {
            "dtype": torch.float32,
            "trust_remote_code": is_trusted(source),
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,  # so that they are reported with their names; they are refused below
        }
        module, info = (
            auto.from_pretrained(located(source), config=config, **options)
            if seeing is None
            else seeing.load(auto, config, **options)
        )
    if meant is not None:
        _finish_quantised(module, meant, info)
    part = {name for name in module.state_dict() if new and name.startswith(f"{new}.")}
    lacking = bool(part) and part <= info["missing_keys"]
    _require_its_own(module, info, source, new=part if lacking else set(), headless=auto is not AutoModelForCausalLM)
    return module, lacking


def _require_its_own(module: Any, info: dict[str, Any], source: str | Path, *, new: set[str], headless: bool) -> None:
    """Raises UserError, naming tensors, where a folder's are not the module's. It may lack those that are ``new``.

    ``info`` is transformers' of the load. Where the module is ``headless``, a language-model head is passed over.
    """
    missing = info["missing_keys"] - new
    unknown = {name for name in info["unexpected_keys"] if not _MASKS.search(name)}
    if headless:
        unknown = {name for name in unknown if not name.startswith(_LANGUAGE_HEADS)}
    faults = [f"lacks {_listed(missing)}"] if missing else []
    faults += [f"holds {_listed(unknown)}, which the model has not"] if unknown else []
    faults += [
        f"holds {name} of shape {tuple(found)} where the model has {tuple(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])[:LISTED]
    ]
    if faults:
        raise UserError(
            f"{source}: its weights are not those of a {type(module).__name__} with its config: it "
            f"{' and '.join(faults)}; give a complete folder, with the config that its weights were saved with"
        )


def require_reader(source: str | Path) -> None:
    """Raises UserError where a library is missing that reads a folder in few bits."""
    require_bitsandbytes()
    extra("accelerate", f"{source}: a folder in bitsandbytes' 4 bits is read with the help", "quant")


def _quantising(
    config: Any, source: str | Path, quantize: Literal["none", "nf4", "fp8"], device: str
) -> dict[str, Any]:
    """What ``from_pretrained`` is told where weights are quantised, or to be; nothing elsewhere."""
    kind = kind_in_config(getattr(config, "quantization_config", None), source)
    if kind is not None:
        if quantize not in ("none", kind):
            raise UserError(
                f"lora.quantize: the weights in {source} are {kind} already, got {quantize}; leave it out, or give the "
                "model that they were made of"
            )
        require_reader(source)
        return {"device_map": {"": device}}
    if quantize == "none":
        return {}
    if quantize == "nf4":
        require_bitsandbytes()
    return {"quantization_config": QuantizationConfig(quantize, device)}


def _finish_quantised(module: Any, meant: Any, info: dict[str, Any]) -> None:
    """After a load: layers of ours in bitsandbytes' places, and in ``info`` the shapes that differ from those meant.

    transformers compares none where it quantises.
    """
    if getattr(module, "hf_quantizer", None) is not None:
        adopt_bitsandbytes(module)
    found = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name, layer in quantized_in(module).items():
        found[f"{name}.weight"] = torch.Size(layer.coded.shape if layer.names else layer.weight.shape)
    info["mismatched_keys"] = {
        (name, found[name], tensor.shape)
        for name, tensor in meant.state_dict().items()
        if name in found and found[name] != tensor.shape and name not in info["missing_keys"]
    }


def require_finite(module: nn.Module, source: str | Path) -> None:
    """Raises UserError naming the parameters that hold NaN or infinity."""
    bad = [name for name, p in module.named_parameters() if p.is_floating_point() and p.numel() and not _finite(p)]
    bad += [f"{name}.weight" for name, layer in quantized_in(module).items() if not layer.finite]
    if bad:
        where = _listed(map(plain_name, bad))
        raise UserError(f"{source}: its weights are not finite (NaN or infinity in {where}); take another copy")


@torch.no_grad()
def _finite(parameter: torch.Tensor) -> bool:
    # Nothing as large as the parameter is allocated, and both ends are NaN where any number is.
    low, high = parameter.aminmax()
    return bool((high - low).isfinite())


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return (f"{len(ordered)} tensors: " if len(ordered) > 1 else "") + listed(ordered)
