"""``tandem ppo``: proximal policy optimization with a critic."""

from __future__ import annotations

from pathlib import Path

from tandem.cli.configs import PPOConfig
from tandem.cli.online import Online


def train(config: PPOConfig) -> Path | None:
    """Trains and returns the folder of the trained model; None after a dry run."""
    return Online(config, config.algorithm, config.critic, "PPO").run()


def run(config: PPOConfig) -> int:
    """The command."""
    train(config)
    return 0
