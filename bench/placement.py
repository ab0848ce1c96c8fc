"""Seconds of a step in sampling, scoring, training and sync, for each way of placing engine and trainer.

    python bench/placement.py --size 1.5b --gpus 2 --json bench/results/placement.json
    python bench/placement.py --size tiny --device cpu --gpus 2 --samples 2 --new-tokens 16

Method. ``tandem grpo`` and ``tandem ppo`` train a random model of Qwen2.5's shape for some steps on random prompts of
64 tokens, once for each of shared and split placement and each engine, on the same GPUs, with the same samples a step
and lengths (a random model hardly ever ends a sample early; tokens sampled are in the record). Shared: the trainer is
split over all GPUs and the engine takes turns on them. Split: half the GPUs train and half sample. Phases are medians
over the steps after the first, as the run's own metrics.jsonl has them. Idle is the part of the GPUs' time in which
placement leaves them without work: in split placement, engines while the others score and train, and trainers while
the engines sample; besides what a step spends outside its phases.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine
from models import SIZES, write_folder

PHASES = ("sampling", "scoring", "training", "sync")
CASES = [(engine, placement) for engine in ("live", "vllm") for placement in ("shared", "split")]


def write_inputs(folder: Path, size: str, prompts: int, device: str) -> None:
    """Model, prompts of 64 bytes, and a reward that differs between samples."""
    rng = random.Random(0)
    write_folder(size, folder / "model", device=device)
    rows = [{"prompt": "".join(rng.choices(string.ascii_lowercase, k=64))} for _ in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def spread(prompts, completions, completion_ids):\n    return [sum(ids) % 97 / 97 for ids in completion_ids]\n"
    )


def command(options: argparse.Namespace, algorithm: str, engine: str, placement: str, out: str) -> list[str]:
    """The run as a user would type it."""
    trainers = options.gpus if placement == "shared" else options.gpus // 2
    flags: dict[str, Any] = {
        "model": "model", "data": "prompts.jsonl", "reward": "reward.py:spread", "out": out, "steps": options.steps,
        "prompts-per-step": options.prompts, "samples-per-prompt": options.samples, "save-every": "0",
        "max-new-tokens": options.new_tokens, "max-slots": options.prompts * options.samples,
        "device": options.device, "dtype": "float32" if options.device == "cpu" else "bfloat16",
        "token-budget": options.token_budget, "learning-rate": "1e-6", "old-logp": "trainer",
        "placement.actor": trainers, "engine.kind": engine, "engine.max-length": 64 + options.new_tokens + 1,
        "placement.engine": "actor" if placement == "shared" else options.gpus - trainers,
    }  # fmt: skip
    if options.device != "cpu":
        flags["activation-checkpointing"] = "true"
    if engine == "vllm" and placement == "shared":
        flags["engine.memory-share"] = options.memory_share
    if engine == "vllm" and options.eager:
        flags["engine.arguments"] = '{"enforce_eager": true}'
    return [sys.executable, "-m", "tandem", algorithm, *(x for k, v in flags.items() for x in (f"--{k}", str(v)))]


def run(options: argparse.Namespace, folder: Path, algorithm: str, engine: str, placement: str) -> dict[str, Any]:
    """One run; the medians of its steps."""
    out = f"{algorithm}-{engine}-{placement}"
    argv = command(options, algorithm, engine, placement, out)
    start = time.perf_counter()
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    record: dict[str, Any] = {"case": out, "command": argv[1:], "wall_seconds": time.perf_counter() - start}
    if done.returncode:
        return record | {"error": (done.stderr or done.stdout)[-1500:]}
    steps = [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()][1:]
    record |= {phase: statistics.median(step[f"seconds_{phase}"] for step in steps) for phase in PHASES}
    record["seconds"] = statistics.median(step["seconds"] for step in steps)
    record["sampled_tokens"] = statistics.median(step["sampled_tokens"] for step in steps)
    record["gap_mean"] = max(step["sampler_gap_mean"] for step in steps)
    record["gap_max"] = max(step["sampler_gap_max"] for step in steps)
    record["steps"] = steps
    outside = record["seconds"] - sum(record[phase] for phase in PHASES)
    waiting = 0.0
    if placement == "split":
        trainers = options.gpus // 2
        busy_training = record["scoring"] + record["training"]
        waiting = (trainers * record["sampling"] + (options.gpus - trainers) * busy_training) / options.gpus
    record["idle"] = outside + waiting
    return record


def main() -> None:
    """Runs every case and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.5b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpus", type=int, default=2, help="devices (or CPU workers) in all, an even number")
    parser.add_argument("--algorithms", nargs="+", default=["grpo", "ppo"])
    parser.add_argument("--cases", nargs="+", default=[f"{e}-{p}" for e, p in CASES], help="engine-placement")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--token-budget", type=int, default=16384)
    parser.add_argument("--memory-share", type=float, default=0.4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--eager", action="store_true", help="vLLM without CUDA graphs: starts sooner, samples slower")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, options.size, 4 * options.prompts, "cpu" if options.device == "cpu" else "cuda")
        print(f"{'case':<18}  {'step':>7}  " + "  ".join(f"{p:>8}" for p in (*PHASES, "idle")) + "  gap mean/max")
        for algorithm in options.algorithms:
            for engine, placement in CASES:
                if f"{engine}-{placement}" not in options.cases:
                    continue
                record = run(options, folder, algorithm, engine, placement)
                records.append(record)
                if "error" in record:
                    print(f"{record['case']:<18}  failed: {record['error']}", flush=True)
                    continue
                cells = "  ".join(f"{record[p]:>8.3f}" for p in (*PHASES, "idle"))
                print(f"{record['case']:<18}  {record['seconds']:>7.3f}  {cells}  "
                      f"{record['gap_mean']:.2g}/{record['gap_max']:.2g}", flush=True)  # fmt: skip
                if options.json:
                    options.json.write_text(
                        json.dumps({"options": {k: str(v) for k, v in vars(options).items()},
                                    "machine": machine(), "cases": records}, indent=1) + "\n"
                    )  # fmt: skip


if __name__ == "__main__":
    main()
