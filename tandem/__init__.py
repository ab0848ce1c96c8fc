"""Tandem aligns language models with human preferences and verifiable rewards."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tandem.methods.table import METHODS
from tandem.version import __version__ as __version__

if TYPE_CHECKING:
    from pathlib import Path

    from tandem.assembly.configs.methods import RunConfig

_PUBLIC = {
    "UserError": "tandem.errors",
    "SamplingParams": "tandem.types",
    "read_config": "tandem.assembly.configs.methods",
    "Method": "tandem.methods.base",
    **{name: f"tandem.methods.{module}" for module, name in (line.where.split(":") for line in METHODS.values())},
    "load_rows": "tandem.data.rows",
    "build_pairs": "tandem.data.items",
    "build_prompts": "tandem.data.items",
    "build_sequences": "tandem.data.items",
    "pack": "tandem.data.packing",
    "pack_pairs": "tandem.data.packing",
    "stamp_unit_weights": "tandem.data.packing",
    "stamp_weights": "tandem.data.packing",
    "load_causal": "tandem.models.loading",
    "load_scalar": "tandem.models.loading",
    "LiveEngine": "tandem.engines.live.engine",
    "load_reward": "tandem.rewards.function",
    "RewardModel": "tandem.rewards.model",
    "seat_of": "tandem.workers.homes",
    "Judge": "tandem.rollout.judging",
    "judges": "tandem.rewards.calling",
    "sample_groups": "tandem.rollout.sampling",
    "Preparation": "tandem.rollout.prepare",
    "Asks": "tandem.batch",
    "LocalScorer": "tandem.training.scorer",
    "LocalTrainer": "tandem.training.trainer",
    "OptimParams": "tandem.training.optim",
    "Sampler": "tandem.own_loop.sampler",
}
"""Name and home of everything else that ``import tandem`` offers. Each is imported when first asked for."""


def run(config: RunConfig) -> Path | None:
    """Trains as a config says (``read_config`` makes one), and exports to ``<out>/model``, which is returned.

    It is what the command of the config's method does. None after a dry run, and on ranks above 0 of a torchrun, which
    do what rank 0 asks for. Raises UserError, in one line, for whatever a person can put right, and RunFailure where a
    run can go on with ``resume``.
    """
    from tandem.assembly.run import run as run_of

    return run_of(config)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tandem' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
