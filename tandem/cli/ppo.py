"""``tandem ppo``: proximal policy optimization with a critic."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tandem.algorithms.ppo import PPO
from tandem.cli.online import CriticSection, Online, OnlineConfig
from tandem.config import load_config


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnlineConfig):
    """Improve a model against a reward with PPO: actor, critic, and a frozen reference for the KL.

    Rows: prompt (a string or a list of messages); other columns go to the reward functions, as in TRL.
    Example: tandem ppo --model runs/sft/model --reward-model runs/rm/model --data prompts.jsonl --out runs/ppo
    --steps 200
    """

    critic: CriticSection = field(default_factory=CriticSection)
    algorithm: PPO = field(default_factory=PPO)


def train(config: PPOConfig) -> Path | None:
    """Trains and returns the folder of the trained model; None after a dry run."""
    return Online(config, config.algorithm, config.critic, "PPO").run()


def run(argv: list[str]) -> int:
    """The command."""
    train(load_config(PPOConfig, argv, prog="tandem ppo"))
    return 0
