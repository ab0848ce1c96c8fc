"""The quickstart over seeds: gold accuracy before and after PPO, reward-model accuracy, and seconds.

   python bench/quickstart.py --seeds 0 1 2 --json bench/results/quickstart.json

Method. ``tandem quickstart --seed S`` in a process of its own for each seed, one after the other; what is kept is its
``summary.json``. Seconds are those of the three stages with their evaluations, without the start of Python.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import tandem


def run(seed: int) -> dict[str, float]:
    """One quickstart's summary."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quickstart"
        command = [sys.executable, "-m", "tandem", "quickstart", "--seed", str(seed), "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((out / "summary.json").read_text())


def main() -> None:
    """Runs the seeds, prints a table and writes the raw results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="where to write the raw results")
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        load = os.getloadavg()[0]
        runs.append(run(seed) | {"load_average_at_start": round(load, 2)})
        print("  ".join(f"{name} {value:.3g}" for name, value in runs[-1].items()), flush=True)
    result = {
        "command": "python bench/quickstart.py --seeds " + " ".join(map(str, options.seeds)),
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": {
            "tandem": tandem.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "cores": os.cpu_count(),
        "runs": runs,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
