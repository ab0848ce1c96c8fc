"""``tandem quickstart``: RLHF in miniature, a recipe made of the pieces that every other run is made of.

A model of 0.74M parameters learns to sort letters from people who are not very good at it (``tandem.tasks.letters``),
a reward model learns from comparisons of its answers, and PPO improves it against that reward model. The checker that
knows the right answer is used for the figures only.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tandem.assembly.configs.methods import read_config
from tandem.assembly.run import run as train
from tandem.cli.configs import QuickstartConfig
from tandem.data.items import build_prompts
from tandem.data.rows import Dataset
from tandem.engines.live.engine import LiveEngine
from tandem.errors import UserError
from tandem.models.folder import quiet_transformers
from tandem.models.loading import load_causal
from tandem.rollout.sampling import sample_groups
from tandem.runs.curves import plot_curves
from tandem.runs.lines import read_metrics
from tandem.runs.table import print_samples, print_table
from tandem.seeds import derive_seed
from tandem.stages import Stages
from tandem.tasks import letters, tiny
from tandem.types import SamplingParams
from tandem.whole import writing

MARK = ".tandem-quickstart"
"""A file that says of a folder that a quickstart made it, and may replace what is in it."""
CONTENTS = {MARK, "base", "data", "sft", "reward_model", "ppo", "summary.json", "curves.png"}
GOLD = "tandem.tasks.letters:reward"


def run(config: QuickstartConfig) -> int:
    """The command."""
    quickstart(Path(config.quickstart.out), config.quickstart.seed)
    return 0


def quickstart(out: Path, seed: int) -> dict[str, Any]:
    """The whole path from random weights to a model that PPO has improved; returns what ``summary.json`` holds."""
    started = time.perf_counter()
    _clear(out)
    if "OMP_NUM_THREADS" not in os.environ:
        # The matrices are so small that a second thread gains a quarter where a core is free, and where none is, each
        # of some hundred thousand operations waits for it: measured, up to forty times slower.
        torch.set_num_threads(1)
    make_base(out / "base", seed)
    sft_model = imitate_people(out, seed)
    reward_model = learn_preferences(out, seed, sft_model)
    ppo_model = improve(out, seed, sft_model, reward_model)
    summary = summarize(out, seed, seconds=time.perf_counter() - started)
    prompts = letters.prompts(8, seed, split="heldout")
    show(out, summary, prompts, answers(sft_model, prompts, 1, seed), answers(ppo_model, prompts, 1, seed))
    return summary


def imitate_people(out: Path, seed: int) -> Path:
    """Stage 1, SFT: imitate imperfect people, for so long that there is room to improve."""
    data = write_rows(out / "data" / "demonstrations.jsonl", letters.demonstrations(4096, seed))
    knobs = {"learning_rate": 2e-3, "lr_schedule": "linear", "warmup_steps": 20, "batch_size": 64}
    return stage("sft", out / "sft", seed, steps=100, model=out / "base", data=data, **knobs)


def learn_preferences(out: Path, seed: int, sft_model: Path) -> Path:
    """Stage 2, a reward model: which of two answers people prefer, most of them that model's own."""
    train = comparisons(sft_model, 1400, seed, split="train")
    heldout = comparisons(sft_model, 300, seed, split="heldout")
    return stage(
        "rm",
        out / "reward_model",
        seed,
        steps=500,
        model=sft_model,
        data=write_rows(out / "data" / "preferences.jsonl", train),
        eval_data=write_rows(out / "data" / "heldout_preferences.jsonl", heldout),
        eval_every=100,
        learning_rate=1e-3,
        lr_schedule="linear",
        warmup_steps=10,
        batch_size=32,
    )


def improve(out: Path, seed: int, sft_model: Path, reward_model: Path) -> Path:
    """Stage 3, PPO: sample, let the reward model judge, improve. The checker only measures, on held-out prompts."""
    train = ({"prompt": prompt} for prompt in letters.prompts(4096, seed))
    heldout = ({"prompt": prompt} for prompt in letters.prompts(512, seed, split="heldout"))
    return stage(
        "ppo",
        out / "ppo",
        seed,
        steps=40,
        model=sft_model,
        data=write_rows(out / "data" / "prompts.jsonl", train),
        eval_data=write_rows(out / "data" / "heldout_prompts.jsonl", heldout),
        eval_every=5,
        learning_rate=5e-4,
        lr_schedule="linear",
        warmup_steps=10,
        prompts_per_step=64,
        samples_per_prompt=4,
        max_new_tokens=letters.MAX_NEW_TOKENS,
        max_slots=512,
        reward_model=reward_model,
        missing_eos="replace",
        missing_eos_penalty=4.0,
        minibatches=2,
        eval_reward=GOLD,
        critic_learning_rate=1e-3,
        kl_coef=0.3,
        value_clip=None,
    )


def stage(method: str, out: Path, seed: int, **keys: Any) -> Path:
    """A run in a folder of its own. Returns the folder of its model."""
    config = read_config(method, out=out, seed=seed, overwrite=out.exists(), save_every="0", **keys)
    with Stages().counted():  # what the command and earlier runs took is not of this one's start
        model = train(config)
    assert model is not None, "only a dry run has none"
    return model


def make_base(folder: Path, seed: int) -> None:
    """A model with random weights and its tokenizer, as a Hugging Face folder."""
    with quiet_transformers(), writing(folder):
        tiny.build_model(seed).save_pretrained(folder)
        tiny.build_tokenizer().save_pretrained(folder)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Writes rows as JSON lines and returns where."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(folder: Path, prompts: list[str], samples: int, seed: int) -> list[list[str]]:
    """``samples`` answers of a model to each prompt."""
    model = load_causal(folder)
    tokenized, _ = build_prompts(Dataset([{"prompt": prompt} for prompt in prompts]), model.tokenizer)
    groups = sample_groups(
        LiveEngine(model.module, model.tokenizer, max_slots=512),
        tokenized,
        SamplingParams(max_new_tokens=letters.MAX_NEW_TOKENS),
        samples_per_prompt=samples,
        seed=seed,
        step=0,
    )
    return [[rollout.completion for rollout in group.rollouts] for group in groups]


def comparisons(folder: Path, count: int, seed: int, *, split: letters.Split) -> list[dict[str, str]]:
    """Preferences between four answers of a model and two of people's, to each of ``count`` prompts."""
    prompts = letters.prompts(count, derive_seed(seed, "comparisons"), split=split)
    rng, writers = random.Random(derive_seed(seed, "writers", split)), letters.Writers()
    of_people = [[writers.write(prompt, rng) for _ in range(2)] for prompt in prompts]
    of_model = answers(folder, prompts, 4, seed)
    return letters.compare(prompts, [m + p for m, p in zip(of_model, of_people, strict=True)], seed)


def summarize(out: Path, seed: int, *, seconds: float) -> dict[str, Any]:
    """Writes ``summary.json`` and ``curves.png`` from the metrics of the stages."""
    rm_run, ppo_run = (read_metrics(out / name / "metrics.jsonl") for name in ("reward_model", "ppo"))
    gold = [(line["step"], line["eval/reward"]) for line in ppo_run if "eval/reward" in line]
    summary = {
        "seed": seed,
        "gold_sft": gold[0][1],
        "gold_ppo": gold[-1][1],
        "reward_model_accuracy": rm_run[-1]["eval/accuracy"],
        "seconds": round(seconds, 1),
    }
    with writing(out / "summary.json"):
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    def curve(name: str) -> list[tuple[str, list[float], list[float]]]:
        lines = [line for line in ppo_run if name in line]
        return [("", [line["step"] for line in lines], [line[name] for line in lines])]

    plot_curves(
        out / "curves.png",
        {
            "reward (reward model)": curve("reward"),
            "gold accuracy, held out": curve("eval/reward"),
            "KL to the SFT model (nats/sequence)": curve("kl_per_sequence"),
            "response length (tokens)": curve("response_length"),
        },
        "PPO on sorted letters",
    )
    return summary


def show(
    out: Path, summary: Mapping[str, Any], prompts: list[str], before: list[list[str]], after: list[list[str]]
) -> None:
    """Samples before and after PPO, the figures, and where everything is."""
    samples = [(p, b, a) for p, [b], [a] in zip(prompts, before, after, strict=True)]
    right = [(bool(letters.check(p, b)), bool(letters.check(p, a))) for p, b, a in samples]
    print_samples("Held-out prompts, one sample each", ("prompt", "after SFT", "after PPO"), samples, right)
    print_table(
        "What was learned",
        ("", "value"),
        [
            ("gold accuracy after SFT", f"{summary['gold_sft']:.1%}"),
            ("gold accuracy after PPO", f"{summary['gold_ppo']:.1%}"),
            ("reward model accuracy, held-out pairs", f"{summary['reward_model_accuracy']:.1%}"),
            ("seconds", f"{summary['seconds']:.0f}"),
        ],
    )
    print(f"\nCurves: {out / 'curves.png'}   Models: {out}/sft/model, {out}/reward_model/model, {out}/ppo/model")


def _clear(out: Path) -> None:
    """Makes room for a new quickstart. Raises UserError where the folder holds anything else."""
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if strangers := sorted(found - CONTENTS if MARK in found else found):
        raise UserError(f"{out}: holds {strangers[0]!r}, which no quickstart made; give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).touch()
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; give another --out") from None
    for name in ("summary.json", "curves.png"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "data", ignore_errors=True)
