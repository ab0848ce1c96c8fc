"""Whether adapters learn by GRPO what the whole model learns: the same base, data, seeds and steps.

    python bench/adapters.py --json bench/results/adapters.json

Method. A Llama of --hidden and --layers with random weights, its head apart from its embedding, learns to sort letters
(tandem/tasks/letters.py): ``tandem sft`` of the whole model on imperfect people's answers, of which three in ten are
right, once a seed. From that model ``tandem grpo`` against the checker, --grpo-steps steps, of the whole model (full)
and of adapters of --rank: on all linear layers but the head (linear), and on the head as well (head).
Each has its learning rates (--full-rates, --lora-rates); the one with the best held-out reward on --sweep-seeds is then
run on --seeds, which are others. Reward is the share of right answers, one sample each at temperature 1 to --held-out
prompts whose letters were in no training prompt. "error" is one standard error of a reward. Runs share the machine, so
no time here is a measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from common import Record, Row, arguments, print_table

from tandem.cli.quickstart import write_rows
from tandem.models.folder import quiet_transformers
from tandem.tasks import letters, tiny

TARGETS = {"linear": ["all-linear"], "head": ["all-linear", "lm_head"]}
SYSTEMS = ("full", *TARGETS)
BATCH, SAMPLES = 64, 8


def write_inputs(options: argparse.Namespace, folder: Path, seed: int) -> None:
    """The base model and the data of one seed."""
    model = tiny.build_model(
        seed, hidden_size=options.hidden, layers=options.layers, tie_word_embeddings=False
    )  # fmt: skip
    with quiet_transformers():
        model.save_pretrained(folder / "base")
        tiny.build_tokenizer().save_pretrained(folder / "base")
    prompts: dict[str, Iterable[Mapping[str, Any]]] = {
        "demos": letters.demonstrations(BATCH * options.sft_steps, seed),
        "prompts": [{"prompt": p} for p in letters.prompts(options.prompts * options.grpo_steps, seed)],
        "heldout": [{"prompt": p} for p in letters.prompts(options.held_out, seed, split="heldout")],
    }
    for name, rows in prompts.items():
        write_rows(folder / f"{name}.jsonl", rows)


def sft(options: argparse.Namespace, folder: Path, seed: int) -> None:
    """The model that everything begins with."""
    write_inputs(options, folder, seed)
    _tandem(
        "sft", {
            "model": folder / "base", "data": folder / "demos.jsonl", "out": folder / "sft", "seed": seed,
            "steps": options.sft_steps, "batch-size": BATCH, "learning-rate": options.sft_learning_rate,
            "warmup-steps": options.sft_steps // 8, "lr-schedule": "linear", "device": options.device,
            "save-every": 0,
        },
    )  # fmt: skip


def grpo(options: argparse.Namespace, folder: Path, system: str, rate: float, seed: int) -> Row:
    """One run from there; its rewards."""
    out = folder / f"{system}_{rate:g}"
    flags: dict[str, Any] = {
        "model": folder / "sft" / "model", "data": folder / "prompts.jsonl", "eval-data": folder / "heldout.jsonl",
        "out": out, "seed": seed, "steps": options.grpo_steps, "eval-every": options.grpo_steps,
        "reward": "tandem.tasks.letters:reward", "kl-coef": 0, "prompts-per-step": options.prompts,
        "samples-per-prompt": SAMPLES, "max-new-tokens": letters.MAX_NEW_TOKENS, "max-slots": SAMPLES * options.prompts,
        "engine.max-length": 32, "warmup-steps": options.grpo_steps // 8, "lr-schedule": "linear",
        "learning-rate": rate, "device": options.device, "save-every": 0,
    }  # fmt: skip
    words = ["--lora.rank", str(options.rank), "--lora.targets", *TARGETS[system]] if system in TARGETS else []
    row: Row = {"system": system, "seed": seed, "learning_rate": rate}
    row["command"] = _tandem("grpo", flags, words)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["eval/reward"] for line in lines if "eval/reward" in line]
    return row | {
        "after_sft": rewards[0], "after_grpo": rewards[-1],
        "error_of_reward": (rewards[-1] * (1 - rewards[-1]) / options.held_out) ** 0.5,
        "train_rewards": [line["reward"] for line in lines if "reward" in line],
    }  # fmt: skip


def _tandem(name: str, flags: Mapping[str, Any], words: Iterable[str] = ()) -> str:
    """Runs a command as a user would type it. Returns that."""
    argv = ["-m", "tandem", name, *(word for key, value in flags.items() for word in (f"--{key}", str(value))), *words]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"tandem {name}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
    return " ".join(argv)


def main() -> None:
    """Sweeps the learning rates, measures the best ones and prints the table."""
    parser = arguments(__doc__, SYSTEMS, ("default",), "default")
    parser.set_defaults(device="cpu")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sweep-seeds", type=int, nargs="*", default=[100])
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--full-rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--lora-rates", type=float, nargs="+", default=[1e-3, 3e-3, 6e-3])
    parser.add_argument("--sft-learning-rate", type=float, default=2e-3)
    for name, value in (("hidden", 256), ("layers", 2), ("sft-steps", 100), ("grpo-steps", 60), ("prompts", 32),
                        ("held-out", 1024)):  # fmt: skip
        parser.add_argument("--" + name, type=int, default=value)
    options = parser.parse_args()
    record = Record(options)
    rates = {s: options.lora_rates if s in TARGETS else options.full_rates for s in SYSTEMS}
    systems = options.only or SYSTEMS
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.parallel) as pool:
        folders = {seed: Path(name) / str(seed) for seed in (*options.sweep_seeds, *options.seeds)}
        list(pool.map(lambda seed: sft(options, folders[seed], seed), folders))
        several = [s for s in systems if len(rates[s]) > 1]
        swept = [(s, r, seed) for s in several for r, seed in product(rates[s], options.sweep_seeds)]
        for row in pool.map(lambda job: grpo(options, folders[job[2]], *job), swept):
            record.add(row | {"swept": True})
        best = {s: max(rates[s], key=lambda rate: _mean(record.rows, s, rate)) for s in several}
        measured = [(s, best.get(s, rates[s][0]), seed) for seed in options.seeds for s in systems]
        for row in pool.map(lambda job: grpo(options, folders[job[2]], *job), measured):
            record.add(row | {"swept": False})
    columns = {
        "system": "trained", "learning_rate": "learning rate", "seed": "seed", "swept": "sweep",
        "after_sft": "after SFT", "after_grpo": "after GRPO", "error_of_reward": "error",
    }  # fmt: skip
    print_table("Held-out reward: share of letters sorted right", columns, record.rows, compared(record))


def _mean(rows: list[Row], system: str, rate: float) -> float:
    return statistics.mean(r["after_grpo"] for r in rows if (r["system"], r["learning_rate"]) == (system, rate))


def compared(record: Record) -> str:
    """For each system its mean over the seeds that were not swept, and how far it is from the whole model's."""
    done = {
        s: {r["seed"]: r["after_grpo"] for r in record.rows if r["system"] == s and not r["swept"]} for s in SYSTEMS
    }
    parts = []
    for system, found in ((s, found) for s, found in done.items() if found):
        apart = [found[seed] - done["full"][seed] for seed in found if seed in done["full"]]
        error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
        more = f" ({statistics.mean(apart):+.3f} +- {error:.3f})" if system in TARGETS and apart else ""
        parts.append(f"{system} {statistics.mean(found.values()):.3f}{more}")
    return f"after GRPO: {', '.join(parts)}"


if __name__ == "__main__":
    main()
