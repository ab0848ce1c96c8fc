"""``tandem ppo``: proximal policy optimization with a critic."""

from __future__ import annotations

from pathlib import Path

from tandem.assembly.configs import PPOConfig
from tandem.assembly.online import run_online
from tandem.assembly.wiring import tell_end


def train(config: PPOConfig) -> Path | None:
    """Trains and returns the folder of the trained model; None after a dry run."""
    return run_online(config, config.algorithm, config.critic, "PPO")


def run(config: PPOConfig) -> int:
    """The command."""
    if train(config):
        tell_end(Path(config.run.out), config.algorithm.leads)
    return 0
