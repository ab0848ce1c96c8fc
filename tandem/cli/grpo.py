"""``tandem grpo``: group relative policy optimization, without a critic."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tandem.algorithms.grpo import GRPO
from tandem.cli.online import Online, OnlineConfig
from tandem.config import load_config


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(OnlineConfig):
    """Improve a model against a reward with GRPO: the other samples of a prompt are the baseline.

    Rows: prompt (a string or a list of messages); other columns go to the reward functions, as in TRL.
    Example: tandem grpo --model runs/sft/model --reward check.py:right --data prompts.jsonl --out runs/grpo
    --steps 200
    """

    algorithm: GRPO = field(default_factory=GRPO)


def train(config: GRPOConfig) -> Path | None:
    """Trains and returns the folder of the trained model; None after a dry run."""
    return Online(config, config.algorithm, None, "GRPO").run()


def run(argv: list[str]) -> int:
    """The command."""
    train(load_config(GRPOConfig, argv, prog="tandem grpo"))
    return 0
