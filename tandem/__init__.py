"""Tandem aligns language models with human preferences and verifiable rewards."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "UserError": "tandem.errors",
    "SamplingParams": "tandem.types",
    "Algorithm": "tandem.roles",
    "GRPO": "tandem.methods.grpo",
    "PPO": "tandem.methods.ppo",
    "RewardModeling": "tandem.methods.rm",
    "SFT": "tandem.methods.sft",
    "load_rows": "tandem.data.rows",
    "build_pairs": "tandem.data.tokenize",
    "build_prompts": "tandem.data.tokenize",
    "build_sequences": "tandem.data.tokenize",
    "pack": "tandem.data.packing",
    "pack_pairs": "tandem.data.packing",
    "stamp_pair_weights": "tandem.data.packing",
    "stamp_weights": "tandem.data.packing",
    "load_causal": "tandem.models.loading",
    "load_scalar": "tandem.models.loading",
    "LiveEngine": "tandem.engines.live.engine",
    "load_reward": "tandem.rewards.function",
    "RewardModel": "tandem.rewards.model",
    "seat_of": "tandem.workers.homes",
    "Judge": "tandem.rollout.sampling",
    "sample_groups": "tandem.rollout.sampling",
    "Preparation": "tandem.rollout.prepare",
    "LocalScorer": "tandem.training.trainer",
    "LocalTrainer": "tandem.training.trainer",
    "OptimParams": "tandem.training.optim",
    "Sampler": "tandem.own_loop.sampler",
}
"""Name and home of everything else that ``import tandem`` offers. Each is imported when first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tandem' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
