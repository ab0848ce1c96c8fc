"""Whether a model learns on the fast path what it learns on the plain one: SFT, then GRPO, from random weights.

    python bench/learning.py --json bench/results/learning.json
    python bench/learning.py --device cpu

Method. A Llama of --hidden and --layers (13M parameters on a GPU) with random weights learns to sort letters
(tandem/tasks/letters.py): ``tandem sft`` on imperfect people's answers, of which three in ten are right, then ``tandem
grpo`` against the checker. Reward is the share of right answers, one sample each at temperature 1 to --held-out prompts
whose letters were in no training prompt: before SFT, after it, after GRPO. For each seed both paths start from the same
weights and see the same rows: fast, as runs are on this device (on a GPU bfloat16 with float32 masters, captured
sampling, compiled layers), and plain (float32, nothing compiled or captured). "error" is one standard error of a
reward. Runs go on side by side (--parallel), so no time here is a measurement.
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
from pathlib import Path
from typing import Any

from common import Record, Row, arguments, print_table, resolve_device

from tandem.cli.quickstart import write_rows
from tandem.data.items import build_prompts
from tandem.data.rows import Dataset
from tandem.engines.live.engine import LiveEngine
from tandem.models.folder import quiet_transformers
from tandem.models.loading import load_causal
from tandem.rollout.sampling import sample_groups
from tandem.tasks import letters, tiny
from tandem.types import SamplingParams

PATHS = ("fast", "plain")
FULL = {"hidden": 384, "layers": 6, "sft_steps": 150, "grpo_steps": 40, "prompts": 64, "held_out": 1024,
        "sft_learning_rate": 7e-4, "grpo_learning_rate": 1.5e-4}  # fmt: skip
SMALL = {"hidden": 64, "layers": 2, "sft_steps": 80, "grpo_steps": 40, "prompts": 32, "held_out": 256,
         "sft_learning_rate": 3e-3, "grpo_learning_rate": 1e-3}  # fmt: skip


def write_inputs(options: argparse.Namespace, folder: Path, seed: int) -> None:
    """The base model and the data of one seed."""
    heads = 2 * max(1, options.hidden // 128)
    model = tiny.build_model(
        seed, hidden_size=options.hidden, layers=options.layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2,
    )  # fmt: skip
    with quiet_transformers():
        model.save_pretrained(folder / "base")
        tiny.build_tokenizer().save_pretrained(folder / "base")
    prompts: dict[str, Iterable[Mapping[str, Any]]] = {
        "demos": letters.demonstrations(64 * options.sft_steps, seed),
        "demos_heldout": letters.demonstrations(256, seed, split="heldout"),
        "prompts": [{"prompt": p} for p in letters.prompts(options.prompts * options.grpo_steps, seed)],
        "heldout": [{"prompt": p} for p in letters.prompts(options.held_out, seed, split="heldout")],
    }
    for name, rows in prompts.items():
        write_rows(folder / f"{name}.jsonl", rows)


def commands(options: argparse.Namespace, folder: Path, path: str, seed: int) -> list[list[str]]:
    """SFT and GRPO as a user would type them."""
    dtype = "bfloat16" if path == "fast" and options.device.startswith("cuda") else "float32"
    common = {"seed": seed, "device": options.device, "dtype": dtype, "save-every": 0, "lr-schedule": "linear"}
    sft: dict[str, Any] = {
        "model": folder / "base", "data": folder / "demos.jsonl", "eval-data": folder / "demos_heldout.jsonl",
        "out": folder / path / "sft", "steps": options.sft_steps, "eval-every": options.sft_steps, "batch-size": 64,
        "learning-rate": options.sft_learning_rate, "warmup-steps": options.sft_steps // 8, **common,
    }  # fmt: skip
    grpo: dict[str, Any] = {
        "model": folder / path / "sft" / "model", "data": folder / "prompts.jsonl",
        "eval-data": folder / "heldout.jsonl", "out": folder / path / "grpo", "steps": options.grpo_steps,
        "eval-every": options.grpo_steps, "reward": "tandem.tasks.letters:reward", "kl-coef": 0,
        "prompts-per-step": options.prompts, "samples-per-prompt": 8, "max-new-tokens": letters.MAX_NEW_TOKENS,
        "max-slots": 8 * options.prompts, "engine.max-length": 32, "warmup-steps": options.grpo_steps // 8,
        "learning-rate": options.grpo_learning_rate, **common,
    }  # fmt: skip
    argvs = [[sys.executable, "-m", "tandem", name] for name in ("sft", "grpo")]
    for argv, flags in zip(argvs, (sft, grpo), strict=True):
        argv += [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        if path == "plain":
            argv += ["--compile", "off"] + (["--engine.way", "slots"] if argv[3] == "grpo" else [])
    return argvs


def learn(options: argparse.Namespace, folder: Path, path: str, seed: int) -> Row:
    """Both stages of one path; its rewards."""
    argvs = commands(options, folder, path, seed)
    row: Row = {"system": path, "seed": seed, "commands": [" ".join(argv[1:]) for argv in argvs]}
    for argv in argvs:
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
            return row | {"error": f"tandem {argv[3]}: {last}"}
    sft, grpo = ([json.loads(line) for line in (folder / path / stage / "metrics.jsonl").read_text().splitlines()]
                 for stage in ("sft", "grpo"))  # fmt: skip
    losses = [line["eval/loss"] for line in sft if "eval/loss" in line]
    rewards = [line["eval/reward"] for line in grpo if "eval/reward" in line]
    after = rewards[-1]
    return row | {
        "sft_loss": losses[-1], "after_sft": rewards[0], "after_grpo": after,
        "error_of_reward": (after * (1 - after) / options.held_out) ** 0.5,
        "train_rewards": [line["reward"] for line in grpo if "reward" in line],
    }  # fmt: skip


def reward_of(folder: Path, options: argparse.Namespace, seed: int) -> float:
    """Share of right answers of a model, sampled here on the CPU."""
    model = load_causal(folder, device="cpu")
    rows = [{"prompt": prompt} for prompt in letters.prompts(options.held_out, seed, split="heldout")]
    prompts, _ = build_prompts(Dataset(rows), model.tokenizer)
    engine = LiveEngine(model.module, model.tokenizer, max_slots=256, max_length=32)
    sampling = SamplingParams(max_new_tokens=letters.MAX_NEW_TOKENS)
    groups = sample_groups(engine, prompts, sampling, samples_per_prompt=1, seed=seed, step=0)
    right = [
        letters.check(row["prompt"], group.rollouts[0].completion) for row, group in zip(rows, groups, strict=True)
    ]
    return statistics.mean(right)


def main() -> None:
    """Learns on every path and seed and prints the table."""
    parser = arguments(__doc__, PATHS, ("default",), "default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--parallel", type=int, help="runs at a time; default 4 on a GPU, 1 on a CPU")
    for name, value in FULL.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value))
    options = parser.parse_args()
    options.device = resolve_device(options.device)
    on_gpu = options.device.startswith("cuda")
    for name, value in (FULL if on_gpu else SMALL).items():
        setattr(options, name, getattr(options, name) or value)
    record = Record(options)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.parallel or (4 if on_gpu else 1)) as pool:
        before: dict[int, float] = {}
        jobs = []
        for seed in options.seeds:
            write_inputs(options, Path(name) / str(seed), seed)
            jobs += [pool.submit(learn, options, Path(name) / str(seed), path, seed) for path in options.only or PATHS]
        for seed in options.seeds:
            before[seed] = reward_of(Path(name) / str(seed) / "base", options, seed)
        for job in jobs:
            record.add((row := job.result()) | {"before": before[row["seed"]]})
    columns = {
        "system": "path", "seed": "seed", "before": "before", "sft_loss": "SFT loss, held out",
        "after_sft": "after SFT", "after_grpo": "after GRPO", "error_of_reward": "error",
    }  # fmt: skip
    print_table("Held-out reward: share of letters sorted right", columns, record.rows, compared(record))


def compared(record: Record) -> str:
    """One line: both paths' means over the seeds, and their difference in standard errors."""
    done = {path: [r for r in record.rows if r["system"] == path and "after_grpo" in r] for path in PATHS}
    if not all(done.values()):
        return ""
    mean = {path: statistics.mean(row["after_grpo"] for row in rows) for path, rows in done.items()}
    variances = [statistics.mean(r["error_of_reward"] ** 2 for r in rows) / len(rows) for rows in done.values()]
    error = sum(variances) ** 0.5
    difference = mean["fast"] - mean["plain"]
    means = ", ".join(f"{path} {value:.3f}" for path, value in mean.items())
    return f"after GRPO: {means}; difference {difference:+.3f}, standard error {error:.3f}"


if __name__ == "__main__":
    main()
