"""Law 2 as a user meets it: with the number of threads that torch takes by itself, which rounding depends on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.shared_ray import arguments, cluster_address, inputs, unevaluated

__all__ = ["cluster_address", "inputs"]
PROMPTS = 96
"""Prompts in a step, of 3 samples: enough for torch to divide its work among threads."""


def test_one_worker_is_this_process_to_the_bit(inputs: Path, cluster_address: str) -> None:
    """Ray gives a worker one thread, if nobody tells it otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    argv = [*unevaluated(arguments("grpo", prompts_per_step=PROMPTS)), "--steps", "2"]
    weights = {}
    for home, more in (("here", []), ("1", ["--cluster.address", cluster_address])):
        command = [sys.executable, "-m", "tandem", *argv, "--out", f"threads-{home}", "--placement.actor", home, *more]
        done = subprocess.run(command, cwd=inputs, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        weights[home] = (inputs / f"threads-{home}/model/model.safetensors").read_bytes()
    assert weights["1"] == weights["here"]
