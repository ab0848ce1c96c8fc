"""What the config in a folder of adapters says, as peft writes it. Nothing here imports torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.models.trusted import trusted_as

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUANTIZED = "lora_quantize"
"""The key of the ``config.json`` beside it that says how the base was kept while they were trained (Tandem's)."""


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """A folder with LoRA adapters (arXiv:2106.09685) of a base model."""

    folder: Path
    base: str
    """Folder or hub name of the model that they are adapters of."""
    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names of the layers, or the one regular expression that matches them, and of stacked parameters."""
    dora: bool
    rslora: bool
    scalar: bool
    """Whether they are those of a model with one number a token (a reward model or a critic)."""
    quantized: str
    """How the base was kept while they were trained: ``none``, ``nf4``, ``fp8``. Others' folders do not say it."""


def adapter_folder(source: str | Path) -> AdapterFolder | None:
    """The adapters in a folder; None where it is no folder of adapters (nor any folder).

    Raises UserError where its config is damaged, is of another kind than LoRA, or does not name its base.
    """
    folder = Path(source).expanduser()
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
        kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
        targets = config.get("target_modules") or ()
        stacked = tuple(sorted(config.get("target_parameters") or ()))
        found = AdapterFolder(
            folder=folder,
            base=str(base),
            rank=int(config["r"]) if kind == "LORA" else 0,
            alpha=float(config["lora_alpha"]) if kind == "LORA" else 0.0,
            targets=((targets,) if isinstance(targets, str) else tuple(sorted(targets))) + stacked,
            dora=bool(config.get("use_dora")),
            rslora=bool(config.get("use_rslora")),
            scalar=config.get("task_type") == "SEQ_CLS",
            quantized=_quantized(folder),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the config of LoRA adapters ({type(error).__name__}: {error})") from None
    if kind != "LORA":
        raise UserError(
            f"{path}: adapters of kind {kind}, and Tandem reads LoRA's; merge them into their base with peft"
        )
    if not base:
        raise UserError(f"{path}: does not name its base; write the base's folder as base_model_name_or_path into it")
    return found


def _quantized(folder: Path) -> str:
    path = folder / "config.json"
    return str(json.loads(path.read_bytes()).get(QUANTIZED, "none")) if path.is_file() else "none"


def base_of(source: str | Path) -> str:
    """The model that a source is of: the base of a folder of adapters, else itself."""
    found = adapter_folder(source)
    return trusted_as(source, str(source) if found is None else found.base)


def have_one_base(source: str, other: str) -> bool:
    """Whether two sources are of one model, as they stand or as its adapters."""
    one, two = (Path(base_of(x)).expanduser() for x in (source, other))
    return one == two or (one.is_dir() and two.is_dir() and one.samefile(two))
