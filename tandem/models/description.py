"""What a model is, from its config: for a plan that loads no weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from tandem.errors import UserError
from tandem.models.folder import located, readable_errors
from tandem.models.lora.adapters import AdapterParams
from tandem.models.lora.targets import targets_of
from tandem.models.proof.limits import model_config
from tandem.models.scalar import auto_class
from tandem.models.trusted import is_trusted
from tandem.types import ScoreScale


def read_score_scale(source: str) -> ScoreScale:
    """Mean and standard deviation of a reward model's scores, as its config has them.

    Raises UserError where it has none, or they are no finite numbers, the deviation above 0.
    """
    config = model_config(source)
    found = [getattr(config, name, None) for name in ScoreScale._fields]
    if found == [None, None]:
        raise UserError(
            f"{source}: its config.json has no {' and no '.join(ScoreScale._fields)}, as 'tandem rm' writes them, so "
            "its scores cannot be normalized; leave --normalize-scores out, or train it again"
        )
    scale = ScoreScale(*(float(x) if isinstance(x, int | float) else math.nan for x in found))
    if not (math.isfinite(scale.score_mean) and 0 < scale.score_std < math.inf):
        raise UserError(f"{source}: config.json: score_mean and score_std must be numbers, the second above 0: {found}")
    return scale


def check_targets(source: str, params: AdapterParams, *, scalar: bool = False) -> None:
    """Raises UserError for targets of adapters that the model in a folder or on the hub has not."""
    module = _outline(source, scalar)
    targets_of(module, params.targets, params.rank, beside=params.beside, dora=params.dora)


def _outline(source: str, scalar: bool) -> Any:
    """The module without memory for its weights."""
    config = model_config(source)
    if scalar:
        config.num_labels = 1
    with readable_errors(source, "model"), torch.device("meta"):
        return auto_class(config, source, scalar=scalar).from_config(config, trust_remote_code=is_trusted(source))


def describe_source(source: str, *, scalar: bool = False) -> str:
    """Class and size of the causal LM (``scalar``: of the model with one number a token) in a folder or on the hub.

    Raises UserError where there is none, and where a folder holds no weights.
    """
    module = _outline(source, scalar)
    folder = Path(located(source))
    if folder.is_dir() and not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        raise UserError(f"{source}: holds a config and no weights (*.safetensors, *.bin); give a complete folder")
    return f"{type(module).__name__}, {sum(p.numel() for p in module.parameters()) / 1e6:.2f}M parameters"
