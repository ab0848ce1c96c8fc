"""``tandem grpo``: group relative policy optimization, without a critic."""

from __future__ import annotations

from pathlib import Path

from tandem.cli.configs import GRPOConfig
from tandem.cli.online import Online
from tandem.cli.wiring import finished_model, tell_end


def train(config: GRPOConfig) -> Path | None:
    """Trains and returns the folder of the trained model; None after a dry run."""
    return finished_model(config, config.run) or Online(config, config.algorithm, None, "GRPO").run()


def run(config: GRPOConfig) -> int:
    """The command."""
    if train(config):
        tell_end(Path(config.run.out), config.algorithm.leads)
    return 0
