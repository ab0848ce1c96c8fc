"""What an asynchronous run gains over its synchronous twin on the same GPUs, where nobody knows how long samples get.

    python bench/async_speed.py --size 0.5b --cases here-equal here-sync here-lag1 --json bench/results/async_0.5b.json
    python bench/async_speed.py --size 1.5b --gpus 2 --cases split-sync split-lag1 shared-sync shared-lag1
    python bench/async_speed.py --size tiny --device cpu --prompts 4 --samples 2 --mean 8 --longest 32 --slots 8

Method. ``tandem grpo`` (--method: or another) trains a random model of Qwen2.5's shape on random prompts of 64 letters.
Its generation config names one token in --mean of the vocabulary as an end: lengths are geometric, at most --longest,
and no part of a run knows them. Cases: where the engine is, and how the run goes.

- here: engine and trainer in one process, on one device. split: half of --gpus train and half sample, in processes of
  their own. shared: all of them do both.
- sync: --max-lag 0. lagN: --max-lag N. equal: synchronous, every sample --mean tokens long: the best that sampling can
  do, since nothing ends before anything else.

Every case is a run of its own. Of its --steps, the first --skip are not counted, nor the last two: nothing more is
sampled for them. "tok/s" are tokens trained on per second of all the counted steps together, "over sync" is that over
the synchronous case of the same place; "sampling tok/s" are the tokens sampled over the seconds in which the run
waited for sampling. Where both work apart, the ideal of a synchronous run's own seconds is (sampling + rest) / the
longer of them: "of ideal" is the gain over it. On one device there is no such ideal: only the waiting for the last
samples can go.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, print_table, resolve_device

PHASES = ("sampling", "scoring", "training", "sync")
CASES = ("here-equal", "here-sync", "here-lag1")
LAST = 2
"""Steps at the end that are not counted."""
REWARD = """
def spread(prompts, completions, completion_ids, **columns):
    return [sum(ids) % 97 / 97 for ids in completion_ids]
"""


def write_inputs(options: argparse.Namespace, folder: Path) -> None:
    """Models that differ in when they end, prompts, and a reward that differs between samples."""
    # It imports transformers: what starts the runs does without.
    from models import write_folder

    rng = random.Random(0)
    equal = any(case.endswith("equal") for case in options.cases)
    for name in ("equal", "geometric") if equal else ("geometric",):
        write_folder(options.size, folder / name, device=options.device, full_tokenizer=True, eos=None)
    config = json.loads((folder / "geometric" / "config.json").read_text())
    vocabulary = config["vocab_size"]
    ends = sorted(rng.sample(range(vocabulary), max(1, vocabulary // options.mean)))
    (folder / "geometric" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    count = options.prompts * options.steps
    rows = [{"prompt": "".join(rng.choices(string.ascii_lowercase, k=64))} for _ in range(count)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)


def command(options: argparse.Namespace, case: str) -> list[str]:
    """The run as a user would type it."""
    place, _, way = case.partition("-")
    on_cpu = options.device == "cpu"
    longest = options.mean if way == "equal" else options.longest
    flags: dict[str, Any] = {
        "model": "equal" if way == "equal" else "geometric", "data": "prompts.jsonl", "reward": "reward.py:spread",
        "out": case, "save-every": "0", "rollouts-logged": 0, "steps": options.steps, "kl-coef": 0,
        "prompts-per-step": options.prompts, "samples-per-prompt": options.samples, "max-new-tokens": longest,
        "max-slots": options.slots, "engine.max-length": 64 + options.longest + 1, "learning-rate": "1e-6",
        "device": options.device, "dtype": "float32" if on_cpu else "bfloat16", "token-budget": options.token_budget,
    }  # fmt: skip
    if options.method == "online-dpo":
        del flags["kl-coef"]
    if place == "split":
        flags |= {"placement.actor": options.gpus // 2, "placement.engine": options.gpus - options.gpus // 2}
    elif place == "shared":
        flags["placement.actor"] = options.gpus
    if way.startswith("lag"):
        flags["max-lag"] = int(way.removeprefix("lag"))
    argv = [sys.executable, "-m", "tandem", options.method, *(x for k, v in flags.items() for x in (f"--{k}", str(v)))]
    return [*argv, *shlex.split(options.tandem_flags)]


def run(options: argparse.Namespace, folder: Path, case: str) -> dict[str, Any]:
    """One run, and what its counted steps come to."""
    argv = command(options, case)
    start = time.perf_counter()
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    row: dict[str, Any] = {"case": case, "command": " ".join(argv[1:]), "wall_seconds": time.perf_counter() - start}
    if done.returncode:
        return row | {"error": (done.stderr or done.stdout)[-3000:]}
    steps = [json.loads(line) for line in (folder / case / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "seconds" in step]
    counted = steps[options.skip : len(steps) - LAST]
    total = {name: sum(step.get(name, 0.0) for step in counted) for name in
             ("seconds", "sampled_tokens", "trained_tokens", *(f"seconds_{phase}" for phase in PHASES))}  # fmt: skip
    row |= {"seconds": total["seconds"] / len(counted), "trained_tokens": total["trained_tokens"] / len(counted)}
    row |= {phase: total[f"seconds_{phase}"] / len(counted) for phase in PHASES}
    row["tokens_per_second"] = total["trained_tokens"] / total["seconds"]
    row["sampling_rate"] = total["sampled_tokens"] / total["seconds_sampling"]
    lags = [step["lag_mean"] for step in counted if "lag_mean" in step]
    row |= {"lag_mean": sum(lags) / len(lags), "lag_max": max(step["lag_max"] for step in counted)} if lags else {}
    events = map(json.loads, (folder / case / "events.jsonl").read_text().splitlines())
    told = [event for event in events if event["event"] in ("start", "ready", "first_step", "finish", "stop")]
    return row | {"said": done.stderr[-1500:], "steps": steps, "events": told}


def compared(rows: list[dict[str, Any]]) -> None:
    """Fills in what follows from several rows: over the synchronous twin, of the ideal, of the equal lengths' rate."""
    found = {row["case"]: row for row in rows if "error" not in row}
    for row in found.values():
        place, _, way = row["case"].partition("-")
        twin, equal = found.get(f"{place}-sync"), found.get(f"{place}-equal")
        if equal and equal is not row:
            row["of_equal"] = row["sampling_rate"] / equal["sampling_rate"]
        if twin is None or not way.startswith("lag"):
            continue
        row["over_sync"] = row["tokens_per_second"] / twin["tokens_per_second"]
        if place == "split":
            rest = twin["seconds"] - twin["sampling"]
            twin["ideal"] = twin["seconds"] / max(twin["sampling"], rest)
            row["of_ideal"] = row["over_sync"] / twin["ideal"]


def main() -> None:
    """Runs every case and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.5b", help="of bench/models.py")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--method", default="grpo")
    parser.add_argument("--gpus", type=int, default=2, help="devices (or CPU workers) of split and shared cases")
    parser.add_argument("--cases", nargs="+", default=CASES, help="PLACE-WAY")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--mean", type=int, default=260, help="tokens of a completion")
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skip", type=int, default=3)
    parser.add_argument("--token-budget", type=int, default=16384)
    parser.add_argument("--tandem-flags", default="", help="more of Tandem's own, as one word")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device = resolve_device(options.device)
    if options.write:
        write_inputs(options, options.write)
        return
    if options.steps <= options.skip + LAST:
        parser.error(f"--steps must be more than --skip and the last {LAST}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In another process, whose memory of the device goes with it.
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--write", name], check=True, stdout=sys.stderr)
        for case in options.cases:
            rows.append(run(options, folder, case))
            compared(rows)
            print(json.dumps({k: v for k, v in rows[-1].items() if k not in ("steps", "said", "events")}), flush=True)
            if options.json:
                record = {"command": " ".join(["python", *sys.argv]), "load_average": os.getloadavg()}
                record |= {"options": {k: str(v) for k, v in vars(options).items()}, "machine": machine()}
                options.json.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    columns = {
        "case": "case", "tokens_per_second": "tok/s", "over_sync": "over sync", "ideal": "ideal",
        "of_ideal": "of ideal", "seconds": "step s", **{phase: phase for phase in PHASES},
        "sampling_rate": "sampling tok/s", "of_equal": "of equal", "lag_mean": "lag", "lag_max": "lag max",
    }  # fmt: skip
    print_table(f"{options.method}, {options.size}", columns, rows)


if __name__ == "__main__":
    main()
