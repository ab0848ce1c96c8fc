"""Whether a change to the code changes what is trained: small runs of every kind, and hashes of their parameters.

    python bench/parameters.py --json before.json
    python bench/parameters.py --against before.json

Method. Each config of ``CONFIGS`` is trained through the command line for a few steps, on a CPU with one thread, from
random models and rows of the letters task (tandem/tasks/letters.py) that depend on nothing but a fixed seed. What is
kept of it: the SHA-256 of all tensors of <out>/model (name, type, shape and bytes, sorted by name); the SHA-256 of its
reward and loss series (every metric with "reward" or "loss" in its name, of a critic too, which no model folder shows);
and every metric but times. Each step begins with the numbers of the one before, so equal hashes mean that no bit of any
step differs. Configs that are the same but for a resume or their processes (``TWINS``) must have the same parameters.

The tandem that this script imports is what runs: ``PYTHONPATH=TREE python bench/parameters.py`` tries another tree with
the same inputs. ``--against`` lists what differs from an earlier --json. The exit code is 1 where anything does, where
a run fails and where twins differ. A new metric is no difference, one that is gone is. Hashes can be compared on the
same machine and with the same packages only, since matrix products round as the CPU has it. Two configs need two cores
for their workers, and one needs vLLM's CPU build (make test-vllm). About 4 minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from common import Row, machine, print_table
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging

import tandem
from tandem.tasks import letters, tiny

TREE = Path(tandem.__file__).parents[1]
"""The tandem that is tried."""
SEED = 12
STEPS = 6
"""Steps of every run; a run that is resumed stops after 3 of them."""
SPREAD = 4.0
"""Random matrices are multiplied by 4, so that a model's distributions are far from uniform and clips act."""
LONGEST_S = 300.0
"""The longest time that one command may take: 300 seconds."""
COMMON = {
    "": "--seed 3 --device cpu --learning-rate 3e-3 --warmup-steps 2 --save-every 0",
    "sft": "--model base --data demos.jsonl --batch-size 8",
    "rm": "--model base --data pairs.jsonl --batch-size 8",
    "grpo": "--model base --data prompts.jsonl --prompts-per-step 6 --samples-per-prompt 4 --max-new-tokens 8",
    "ppo": "--model base --data prompts.jsonl --prompts-per-step 6 --samples-per-prompt 4 --max-new-tokens 8"
    " --critic-learning-rate 1e-2",
    "rloo": "--model base --data prompts.jsonl --prompts-per-step 6 --samples-per-prompt 4 --max-new-tokens 8",
    "online-dpo": "--model base --data prompts.jsonl --prompts-per-step 6 --samples-per-prompt 4 --max-new-tokens 8",
}
"""Flags of every command (under no name) and of each one."""
CLOSE = "--reward judges.py:close"
ADAPTIVE = f"ppo {CLOSE} --kl-target 0.5 --kl-horizon 100 --normalize-rewards --entropy-coef 0.01 --minibatches 2"
CONFIGS = {
    "sft-token": "sft --eval-data demos_heldout.jsonl --eval-every 2",
    "sft-sequence": "sft --aggregation sequence --train-on all --token-budget 48 --lr-schedule cosine"
    " --weight-decay 0.1",
    "sft-bfloat16": "sft --dtype bfloat16 --token-budget 64 --activation-checkpointing",
    "sft-resumed": "sft",
    "sft-worker": "sft --placement.actor 1",
    "sft-2-workers": "sft --placement.actor 2 --token-budget 48",
    "rm": "rm --center-coef 0.01 --token-budget 64 --eval-data pairs_heldout.jsonl --eval-every 2",
    "grpo": f"grpo {CLOSE} --eval-data heldout.jsonl --eval-every 2",
    "grpo-constant": f"grpo {CLOSE} --normalize none --aggregation constant --kl loss --kl-coef 0.1 --kl-estimator k2"
    " --engine.way padded",
    "grpo-old-logp": f"grpo {CLOSE} --kl loss --kl-coef 0.1 --kl-estimator k3 --sample-epochs 2 --minibatches 2"
    " --old-logp trainer --engine.way captured",
    "grpo-truncated": f"grpo {CLOSE} --reference other --kl loss --kl-coef 0.1 --kl-estimator ratio_k3"
    " --temperature 0.9 --top-p 0.8 --stop ej c --engine.way slots --max-slots 5",
    "grpo-two-rewards": f"grpo {CLOSE} judges.py:short --reward-weights 1 0.3 --missing-eos subtract --kl reward"
    f" --kl-coef 0.05 --eval-reward judges.py:short --eval-data heldout.jsonl --eval-every 2",
    "grpo-reward-model": f"grpo {CLOSE} --reward-model judge --reward-weights 0.5 2 --missing-eos replace"
    " --aggregation sequence --minibatches 2 --token-budget 64 --dtype bfloat16",
    "grpo-worker": f"grpo {CLOSE} --placement.actor 1",
    "grpo-2-workers": f"grpo {CLOSE} --kl-coef 0.1 --minibatches 2 --placement.actor 2",
    "grpo-engine-apart": f"grpo {CLOSE} --placement.engine 1",
    "grpo-vllm": f"grpo {CLOSE} --engine.kind vllm --placement.engine 1 --old-logp trainer --max-slots 8"
    " --engine.max-length 64",
    "rloo": f"rloo {CLOSE} --kl-coef 0.1 --minibatches 2",
    "online-dpo": f"online-dpo {CLOSE} --sample-epochs 2",
    "ppo": "ppo --reward-model judge --sample-epochs 2 --minibatches 2 --eval-data heldout.jsonl --eval-every 2",
    "ppo-adaptive": f"{ADAPTIVE} --token-budget 96",
    "ppo-resumed": f"{ADAPTIVE} --token-budget 96",
    "ppo-critic-apart": "ppo --reward-model judge --critic judge --kl loss --value-clip none --placement.critic 1"
    " --placement.reference critic --sample-epochs 2",
}
"""Command lines by name, to which the flags of ``COMMON`` are added."""
RESUMED = {"sft-resumed", "ppo-resumed"}
"""Configs that end halfway and go on with --resume."""
TWINS = {
    "sft-resumed": "sft-token",
    "sft-worker": "sft-token",
    "grpo-worker": "grpo",
    "grpo-engine-apart": "grpo",
    "ppo-resumed": "ppo-adaptive",
}
"""A config whose parameters must be, bit for bit, those of another one."""
TIMES = ("second", "memory")
"""What stands in the names of metrics that no two runs share."""
JUDGES = '''\
from tandem.tasks import letters


def close(prompts, completions, **columns):
    """How near to the right answer, in letters."""
    return [-float(letters.mistakes(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]


def short(prompts, completions, **columns):
    """Nothing for completions of an odd length; the others by their length."""
    return [None if len(text) % 2 else -len(text) / 8 for text in completions]
'''


def write_inputs(folder: Path) -> None:
    """The models (a base, another one, a judge with a scalar head), the rows and the reward functions."""
    logging.disable_progress_bar()
    tokenizer = tiny.build_tokenizer()
    for name, seed in {"base": SEED, "other": SEED + 1}.items():
        model = tiny.build_model(seed, tokenizer=tokenizer, hidden_size=64, layers=2)
        _spread(model).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    torch.manual_seed(SEED)
    config = AutoConfig.from_pretrained(folder / "base", num_labels=1)
    judge = AutoModelForSequenceClassification.from_config(config)
    _spread(judge).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    rows: dict[str, Iterable[Mapping[str, Any]]] = {
        "demos": letters.demonstrations(64, SEED),
        "demos_heldout": letters.demonstrations(16, SEED, split="heldout"),
        "pairs": _pairs(letters.prompts(40, SEED)),
        "pairs_heldout": _pairs(letters.prompts(8, SEED, split="heldout")),
        "prompts": [{"prompt": prompt} for prompt in letters.prompts(40, SEED)],
        "heldout": [{"prompt": prompt} for prompt in letters.prompts(8, SEED, split="heldout")],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "judges.py").write_text(JUDGES)


def _spread(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(SPREAD)
    return model


def _pairs(prompts: list[str]) -> list[Row]:
    """Comparisons of what the writers of the demonstrations wrote; a margin is the difference in mistakes."""
    rng, writers = random.Random(SEED), letters.Writers()
    answers = [[writers.write(prompt, rng) for _ in range(4)] for prompt in prompts]
    pairs = letters.compare(prompts, answers, SEED)
    margins = [
        letters.mistakes(pair["prompt"], pair["rejected"]) - letters.mistakes(pair["prompt"], pair["chosen"])
        for pair in pairs
    ]
    return [pair | {"margin": margin / 4} for pair, margin in zip(pairs, margins, strict=True)]


def commands(name: str) -> list[list[str]]:
    """What is typed for a config: one command, or two where it is resumed."""
    method, *flags = shlex.split(CONFIGS[name])
    given = shlex.split(f"{COMMON['']} {COMMON[method]}")
    words = ["tandem", method, *given, *flags, "--out", f"runs/{name}"]
    if name not in RESUMED:
        return [[*words, "--steps", str(STEPS)]]
    return [[*words, "--steps", str(STEPS // 2)], [*words, "--steps", str(STEPS), "--resume"]]


def train(name: str, folder: Path) -> Row:
    """Trains a config; its hashes, or the last line of its error."""
    row: Row = {"system": name, "commands": [" ".join(words) for words in commands(name)]}
    found_first = [str(TREE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(found_first)}
    start = time.perf_counter()
    for words in commands(name):
        argv = [sys.executable, "-m", *words]
        try:
            done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            return row | {"error": f"not done after {LONGEST_S:g} s"}
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
            return row | {"error": f"exit code {done.returncode}: {last}"}
    out = folder / "runs" / name
    metrics = read_metrics(out / "metrics.jsonl")
    rewards_and_losses = {key: series for key, series in metrics.items() if "reward" in key or "loss" in key}
    return row | {
        "parameters": hash_of_tensors(out / "model"),
        "series": hashlib.sha256(json.dumps(rewards_and_losses, sort_keys=True).encode()).hexdigest(),
        "seconds": round(time.perf_counter() - start, 1),
        "metrics": metrics,
    }


def hash_of_tensors(folder: Path) -> str:
    """SHA-256 over all tensors of a model folder: name, type, shape and bytes of each, sorted by name."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_metrics(path: Path) -> dict[str, str]:
    """Each metric's series but times, as text: "STEP: VALUE" for each line that has it, with every digit."""
    series: dict[str, list[str]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        for name, value in line.items():
            if not any(part in name for part in TIMES):
                series.setdefault(name, []).append(f"{line['step']}: {value!r}")
    return {name: ", ".join(values) for name, values in sorted(series.items())}


def differences(before: Row, now: Row) -> list[str]:
    """What differs between two results of one config, a line each."""
    if "error" in before or "error" in now:
        return [f"failed {when}: {row['error']}" for when, row in (("before", before), ("now", now)) if "error" in row]
    found = ["parameters"] if before["parameters"] != now["parameters"] else []
    for name, old in before["metrics"].items():
        new = now["metrics"].get(name)
        if new is None:
            found.append(f"{name}: is gone")
        elif old != new:
            pairs = zip_longest(old.split(", "), new.split(", "), fillvalue="nothing")
            found.append(f"{name}: " + next(f"step {a} before, {b} now" for a, b in pairs if a != b))
    return found


def compare(earlier: Row, rows: list[Row]) -> list[str]:
    """What differs from an earlier run, a line each."""
    before = {row["system"]: row for row in earlier["rows"]}
    unknown = [f"{row['system']}: was not trained before" for row in rows if row["system"] not in before]
    known = [row for row in rows if row["system"] in before]
    return unknown + [f"{row['system']}: {line}" for row in known for line in differences(before[row["system"]], row)]


def unequal_twins(rows: list[Row]) -> list[str]:
    """Configs whose parameters should be those of another one and are not, a line each."""
    trained = {row["system"]: row["parameters"] for row in rows if "parameters" in row}
    pairs = [(a, b) for a, b in TWINS.items() if a in trained and b in trained]
    return [f"{a}: has not the parameters of {b}" for a, b in pairs if trained[a] != trained[b]]


def main() -> int:
    """The command. Returns its exit code: 1 where a run fails, or differs from its twin or from the earlier one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="the configs to train")
    parser.add_argument("--json", type=Path, help="write the hashes and metrics here")
    parser.add_argument("--against", type=Path, help="the --json of an earlier run to compare with")
    options = parser.parse_args()
    earlier = json.loads(options.against.read_text()) if options.against else None
    describe = ["git", "-C", str(TREE), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name))
        for config in options.only:
            rows.append(train(config, Path(name)))
            print(config, rows[-1].get("error", rows[-1].get("seconds")), file=sys.stderr, flush=True)
    about = {"commit": commit, "when": time.strftime("%Y-%m-%d %H:%M:%S"), "machine": machine()}
    if options.json:
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    columns = {"system": "config", "parameters": "parameters", "series": "rewards and losses", "seconds": "seconds"}
    short = [row | {key: row[key][:16] for key in ("parameters", "series") if key in row} for row in rows]
    print_table(f"SHA-256 of what {commit} trains (first 16 digits)", columns, short)
    found = compare(earlier, rows) if earlier else []
    wrong = unequal_twins(rows) + found
    for line in wrong:
        print(line)
    if earlier:
        if earlier["machine"] != about["machine"]:
            print(f"on another machine or with other packages: {earlier['machine']} before, {about['machine']} now")
        differing = {line.split(":")[0] for line in found}
        print(f"{len(rows) - len(differing)} of {len(rows)} configs at {commit} equal those of {earlier['commit']}")
    return int(bool(wrong) or any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
