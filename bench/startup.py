"""What a command takes besides its steps: until its first step is done, in all, and of a core.

    python bench/startup.py --repeats 5 --against ../before --json bench/results/startup.json

Commands of this checkout, and of another where one is named, in turns, one at a time: help, a dry run, and one step of
GRPO on a CPU in one process, with an actor and an engine in processes of Ray's, with an actor of two that samples too,
and in one process with a random model of 0.5 billion parameters. "cpu" is of the command's own process and of those
that it has waited for; "end" is from the last step to the exit. Stages of the start are the last run's, of each
process, as its event "ready" has them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine
from models import write_folder

STEP = [
    *("grpo", "--data", "prompts.jsonl", "--reward", "check.py:spread", "--steps", "1", "--overwrite"),
    *("--prompts-per-step", "2", "--samples-per-prompt", "2", "--max-new-tokens", "4", "--save-every", "0"),
]
CASES = {
    "help": ["grpo", "--help"],
    "dry": [*STEP, "--model", "tiny", "--out", "dry", "--dry-run"],
    "here": [*STEP, "--model", "tiny", "--out", "here"],
    "split": [*STEP, "--model", "tiny", "--out", "split", "--placement.actor", "1", "--placement.engine", "1"],
    "shared": [*STEP, "--model", "tiny", "--out", "shared", "--placement.actor", "2"],
    "half": [*STEP, "--model", "0.5b", "--out", "half"],
}


def write_inputs(folder: Path, cases: list[str]) -> None:
    """Prompts, a reward, and the models that the cases need."""
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{i:03}"}}\n' for i in range(64)))
    (folder / "check.py").write_text("def spread(completions):\n    return [float(len(set(c))) for c in completions]\n")
    write_folder("tiny", folder / "tiny")
    if "half" in cases:
        write_folder("0.5b", folder / "0.5b", full_tokenizer=True)


def run(checkout: Path, argv: list[str], folder: Path) -> dict[str, Any]:
    """One command. Seconds until its first step was done (None where it has none), in all, and of a core; the stages of
    its start."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    start, first = time.perf_counter(), None
    command = subprocess.Popen(
        [sys.executable, "-m", "tandem", *argv],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert command.stdout is not None
    for line in command.stdout:
        if line.startswith("GRPO 1/"):
            first = time.perf_counter() - start
    _, status, used = os.wait4(command.pid, 0)
    command.returncode = os.waitstatus_to_exitcode(status)
    if command.returncode:
        raise SystemExit(f"{' '.join(argv)}: exit code {command.returncode} in {checkout}")
    wall = time.perf_counter() - start
    found = {"first_step": first, "wall": wall, "cpu": used.ru_utime + used.ru_stime}
    return found | ({"end": wall - first, "stages": stages(folder / argv[argv.index("--out") + 1])} if first else {})


def stages(out: Path) -> dict[str, dict[str, float]]:
    """Of each process of a run's start; none where the checkout does not count them."""
    events = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    return next((event["stages"] for event in events if event["event"] == "ready"), {})


def main() -> None:
    """Prints medians, and writes every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="the cases to measure")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--json", type=Path, help="write the raw results here, after every case")
    options = parser.parse_args()
    checkouts = {"this": Path(__file__).parents[1]}
    if options.against:
        checkouts = {"other": options.against.absolute(), **checkouts}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, options.only)
        for case in options.only:
            runs: dict[str, list[dict[str, Any]]] = {which: [] for which in checkouts}
            # What the first runs read from the disk, later ones have in memory.
            for repeat in range(-1, options.repeats):
                for which, checkout in checkouts.items():
                    found = run(checkout, CASES[case], folder)
                    if repeat >= 0:
                        runs[which].append(found | {"load": os.getloadavg()[0]})
            for which, found_all in runs.items():
                medians = {
                    key: round(statistics.median(values), 2)
                    for key in ("first_step", "end", "wall", "cpu")
                    if (values := [one[key] for one in found_all if one.get(key) is not None])
                }
                print(
                    f"{case:6} {which:6} " + "  ".join(f"{key} {value:g}" for key, value in medians.items()), flush=True
                )
                for name, of in found_all[-1].get("stages", {}).items():
                    print(f"       {name}: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in of.items()))
                rows.append({"case": case, "checkout": which, "medians": medians, "runs": found_all})
            if options.json:
                about = {"command": " ".join(["python", *sys.argv]), "when": time.strftime("%Y-%m-%d %H:%M:%S")}
                options.json.write_text(json.dumps(about | {"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
