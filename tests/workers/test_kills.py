"""Two random kills of ``bench/kills.py``, which has the counts of many: each run ends well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_processes_of_runs_with_workers():
    """Ray's raylet beside two workers, then the one worker beside an engine: seed 54 draws them so."""
    command = [sys.executable, "bench/kills.py", "--runs", "2", "--seed", "54", "--kinds", "live", "apart"]
    command += ["--max-lag", "1", "--victims", "worker", "raylet", "--signals", "SIGKILL"]
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
    assert [(each["kind"], each["victim"]) for each in hit] == [("live", "raylet"), ("apart", "worker")]
    assert "2 of 2 ended well" in ended.stdout
