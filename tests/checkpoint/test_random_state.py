from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy
import torch

from tandem.checkpoint.random_state import capture_random_state, restore_random_state
from tandem.checkpoint.store import CheckpointStore

DRAW = "[random.random(), random.gauss(0, 1), *numpy.random.randn(3).tolist(), *torch.randn(3).tolist()]"


def test_the_draws_go_on_in_another_process(tmp_path: Path) -> None:
    """After an odd number of normal draws, so that the second half of a Gaussian pair is part of the state."""
    random.gauss(0, 1)
    numpy.random.randn(3)
    torch.randn(17)
    CheckpointStore(tmp_path / "checkpoints", keep=1).save(1, {"random": capture_random_state()}, {})
    expected = eval(DRAW)
    script = f"""
import random, sys, numpy, torch
from pathlib import Path
from tandem.checkpoint.random_state import restore_random_state
from tandem.checkpoint.store import CheckpointStore
restore_random_state(CheckpointStore(Path(sys.argv[1]), keep=1).latest().load("random"))
print({DRAW})
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "checkpoints")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == repr(expected)


def test_restoring_takes_back_what_was_drawn_since() -> None:
    state = capture_random_state()
    first = eval(DRAW)
    assert eval(DRAW) != first
    restore_random_state(state)
    assert eval(DRAW) == first
