"""A few random kills of ``bench/kills.py``, which has the counts of many: each run ends well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_random_processes_of_runs_with_workers():
    victims = ["driver", "raylet", "gcs", "worker", "agent", "reward"]
    ended = subprocess.run(
        [
            *(
                sys.executable,
                "bench/kills.py",
                "--runs",
                "3",
                "--seed",
                "26",
                "--kinds",
                "live",
                "apart",
                "--max-lag",
                "1",
            ),
            *("--victims", *victims, "--signals", "SIGKILL"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 of 3 ended well" in ended.stdout
