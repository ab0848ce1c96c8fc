"""A kill of ``bench/kills.py``, which has the counts of many: the run ends well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_raylet_of_a_run_with_workers():
    """Where its raylet is gone, Ray ends the run's process without a word; workers: test_failures.py."""
    command = [sys.executable, "bench/kills.py", "--runs", "1", "--seed", "54", "--kinds", "live"]
    command += ["--max-lag", "1", "--victims", "raylet", "--signals", "SIGKILL"]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    hit = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [(each["kind"], each["victim"]) for each in hit] == [("live", "raylet")]
    assert "1 of 1 ended well" in ended.stdout
