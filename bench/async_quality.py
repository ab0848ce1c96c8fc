"""What a lag between sampler and trainer costs in quality, and which correction makes up for it.

    python bench/async_quality.py --jobs 16 --minutes 8 --json bench/results/async_quality.json
    python bench/async_quality.py --minutes 0 --json bench/results/async_quality.json --figure docs/async-quality.png

Method. As in arXiv:2410.18252 a policy learns from a learned reward model, and a gold checker that no training sees
measures it. A Llama of 0.12M parameters imitates imperfect people who sort letters (tandem/tasks/letters.py), a reward
model learns from comparisons of its answers, and online methods improve it. These starting models are made once
(--start); seeds are those of the runs. Every run is ``tandem METHOD`` with ``--max-lag`` (its command stands in its
row) on one core, with an engine that has always sampled ahead as far as it may (``sampling_ahead``). Parts (--only):

- lag: PPO, RLOO and Online DPO at lags 0, 1, 4 and 16, PPO and RLOO with and without ratios to the sampler's log-probs
- corrections: GRPO with every correction at lags 0, 1, 2, 4 and 8, two minibatches a step
- pairs: Online DPO at lag 1 with the best of 4 samples against the worst, in as many updates as with 2, and in 0.6
- epochs: Online DPO at lag 1, a step's samples gone through once and twice, in half of the steps

"gold" is the share of right answers, 4 samples each at temperature 1 to 512 held-out prompts by the model at the end;
"KL" that of the model to the start, in nats an answer: over the vocabulary at each sampled token, summed. A run has
collapsed where its gold score at the end is below the start's or below half of the best one on its way, or where the
run has ended early. --jobs runs go on side by side, first seeds first. What --minutes cuts off, the next call with the
same --json goes on with; runs that have ended early are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import Row, machine

from tandem.assembly.configs.methods import read_config
from tandem.assembly.run import run as train
from tandem.cli.quickstart import GOLD, stage, write_rows
from tandem.data.items import build_prompts
from tandem.data.rows import Dataset
from tandem.engines.live.engine import LiveEngine
from tandem.errors import UserError, first_line
from tandem.models.folder import quiet_transformers
from tandem.models.loading import load_causal
from tandem.roles import Clock
from tandem.rollout.sampling import Sampling, sample_groups
from tandem.runs.lines import read_metrics
from tandem.seeds import derive_seed
from tandem.tasks import letters, tiny
from tandem.types import Group, SamplingParams

PARTS = ("lag", "corrections", "pairs", "epochs")
LAGS, CORRECTION_LAGS = (0, 1, 4, 16), (0, 1, 2, 4, 8)
UNCORRECTED, BEHAVIOUR = "none", "behaviour ratio"
CORRECTIONS = (UNCORRECTED, BEHAVIOUR, "token_tis", "sequence_tis", "icepop", "geo", "gap", "decoupled")
LINES = (
    *(("ppo", UNCORRECTED), ("ppo", BEHAVIOUR), ("rloo", UNCORRECTED), ("rloo", BEHAVIOUR)),
    ("online-dpo", UNCORRECTED),
)
"""The lines of the part ``lag``."""
STARTS = {"hidden": 64, "layers": 2, "sft_steps": 150, "comparisons": 3000, "rm_steps": 600}
"""Sizes of the starting models and of their training."""
METHODS: dict[str, dict[str, Any]] = {
    "ppo": {"kl_coef": 0.3, "critic_learning_rate": 2e-3},
    "rloo": {"kl_coef": 0.3},
    "online-dpo": {"beta": 1.0},
    "grpo": {"kl": "reward", "kl_coef": 0.4},
}
"""Each method's own keys: the KL with which the synchronous run keeps its gold score to the end."""
HELD_OUT, SAMPLES = 512, 4
"""Held-out prompts, and how often each is answered by a model at its end."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    part: str
    method: str
    variant: str
    lag: int
    seed: int
    keys: dict[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        return f"{self.part}/{self.method}/{self.variant}/lag {self.lag}/seed {self.seed}"


def plan(parts: Seq[str], seeds: Seq[int], steps: int) -> list[Cell]:
    """All runs, the most important ones first."""
    cells = {part: list(PLANS[part](steps)) for part in PARTS if part in parts}
    return [
        Cell(part, method, variant, lag, seed, keys)
        for seed in seeds
        for part, of_part in cells.items()
        for method, variant, lag, keys in of_part
    ]


Planned = Iterator[tuple[str, str, int, dict[str, Any]]]


def plan_lag(steps: int) -> Planned:
    """Findings 1 and 2 of the paper."""
    for lag in LAGS:
        for method, variant in LINES:
            # Without a lag the two are one: the ratio is 1.
            if lag or variant == UNCORRECTED:
                yield method, variant, lag, {"steps": steps} | correction(method, variant, lag)


def plan_corrections(steps: int) -> Planned:
    """Every correction at every lag. A step has two minibatches, so that there are two optimizer steps in it."""
    for lag in CORRECTION_LAGS:
        for variant in CORRECTIONS:
            shape = {"steps": steps // 2, "prompts_per_step": 64, "samples_per_prompt": 4, "minibatches": 2}
            yield "grpo", variant, lag, shape | correction("grpo", variant, lag)


def plan_pairs(steps: int) -> Planned:
    """Finding 3."""
    for variant, share in PAIRS:
        yield "online-dpo", variant, 1, {"steps": round(share * steps), "samples_per_prompt": int(variant[2])}


PAIRS = (("K=2", 1.0), ("K=4", 1.0), ("K=4, 0.6 of the updates", 0.6))
"""Samples of a prompt, and the share of the updates that the run is."""


def plan_epochs(steps: int) -> Planned:
    """Finding 4."""
    for epochs in (1, 2):
        yield "online-dpo", f"T={epochs}", 1, {"steps": steps // 2, "sample_epochs": epochs}


PLANS: dict[str, Callable[[int], Planned]] = {
    "lag": plan_lag, "corrections": plan_corrections, "pairs": plan_pairs, "epochs": plan_epochs,
}  # fmt: skip


def correction(method: str, variant: str, lag: int) -> dict[str, Any]:
    """The keys of a correction. A loss of pairs takes no ratios."""
    if method == "online-dpo":
        return {}
    if variant == BEHAVIOUR:
        return {"old_logp": "sampler"}
    if variant == UNCORRECTED:
        return {"old_logp": "trainer"} | ({"uncorrected": True} if lag else {})
    return {"old_logp": "trainer", "correction": variant}


def make_starts(folder: Path) -> None:
    """The starting models and the data of all runs, unless the folder has them, made with the same sizes."""
    made = folder / "made.json"
    if made.exists():
        if json.loads(made.read_text()) != STARTS:
            raise UserError(f"{folder}: its starting models are of other sizes; give another --start")
        return
    base, sft = folder / "base", folder / "sft"
    with quiet_transformers():
        tiny.build_model(0, hidden_size=STARTS["hidden"], layers=STARTS["layers"]).save_pretrained(base)
        tiny.build_tokenizer().save_pretrained(base)
    common = {"lr_schedule": "linear", "warmup_steps": 20, "device": "cpu"}
    demonstrations = letters.demonstrations(64 * STARTS["sft_steps"], 0)
    imitating = {"model": base, "data": write_rows(folder / "demonstrations.jsonl", demonstrations), "batch_size": 64}
    model = stage("sft", sft, 0, steps=STARTS["sft_steps"], learning_rate=3e-3, **imitating, **common)
    pairs = {
        split: comparisons(model, STARTS["comparisons"] // n, split) for split, n in (("train", 1), ("heldout", 8))
    }
    files = {split: write_rows(folder / f"comparisons_{split}.jsonl", rows) for split, rows in pairs.items()}
    judging = {"model": model, "data": files["train"], "eval_data": files["heldout"], "batch_size": 32}
    stage("rm", folder / "rm", 0, steps=STARTS["rm_steps"], eval_every=0, learning_rate=1e-3, **judging, **common)
    write_rows(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in letters.prompts(16384, 0)))
    heldout = [{"prompt": prompt} for prompt in letters.prompts(HELD_OUT, 0, split="heldout")]
    write_rows(folder / "heldout.jsonl", heldout)
    made.write_text(json.dumps(STARTS) + "\n")


def comparisons(folder: Path, count: int, split: letters.Split) -> list[Row]:
    """Preferences between four answers of a model and two of people's, to each of ``count`` prompts."""
    prompts = letters.prompts(count, derive_seed(0, "comparisons"), split=split)
    rng, writers = random.Random(derive_seed(0, "writers", split)), letters.Writers()
    of_people = [[writers.write(prompt, rng) for _ in range(2)] for prompt in prompts]
    of_model = [[r.completion for r in group.rollouts] for group in answers(load_causal(folder, device="cpu"), prompts)]
    return letters.compare(prompts, [m + p for m, p in zip(of_model, of_people, strict=True)], 0)


def answers(model: Any, prompts: list[str]) -> list[Group]:
    """``SAMPLES`` answers to each prompt."""
    tokenized, _ = build_prompts(Dataset([{"prompt": prompt} for prompt in prompts]), model.tokenizer)
    engine = LiveEngine(model.module, model.tokenizer, max_slots=512, max_length=32)
    sampling = SamplingParams(max_new_tokens=letters.MAX_NEW_TOKENS)
    return sample_groups(engine, tokenized, sampling, samples_per_prompt=SAMPLES, seed=0, step=0)


def keys_of(cell: Cell, starts: Path, out: Path) -> dict[str, Any]:
    """The keys of a cell's run."""
    keys: dict[str, Any] = {
        "model": starts / "sft" / "model", "reward_model": starts / "rm" / "model", "data": starts / "prompts.jsonl",
        "eval_data": starts / "heldout.jsonl", "eval_reward": GOLD, "out": out, "seed": cell.seed, "device": "cpu",
        "prompts_per_step": 64, "samples_per_prompt": 2, "max_new_tokens": letters.MAX_NEW_TOKENS,
        "missing_eos": "replace", "missing_eos_penalty": 4.0, "learning_rate": 1e-3, "lr_schedule": "linear",
        "save_every": "0", "rollouts_logged": 0, "engine__max_length": 32, "max_lag": cell.lag,
    }  # fmt: skip
    keys |= METHODS[cell.method] | cell.keys
    return keys | {
        "max_slots": (cell.lag + 1) * keys["prompts_per_step"] * keys["samples_per_prompt"],
        "eval_every": max(1, keys["steps"] // 16),
    }


def command(cell: Cell, keys: dict[str, Any]) -> str:
    """Its run as one would type it."""
    flags = " ".join(f"--{key.replace('__', '.').replace('_', '-')} {value}" for key, value in keys.items())
    return f"tandem {cell.method} {flags}"


def run_cell(cell: Cell, starts: Path, out: Path) -> Row:
    """Trains, measures the model at the end, and reads the run's metrics."""
    torch.set_num_threads(1)
    keys = keys_of(cell, starts, out)
    row: Row = {
        "cell": cell.name, "part": cell.part, "method": cell.method, "variant": cell.variant, "max_lag": cell.lag,
        "seed": cell.seed, "command": command(cell, keys),
    }  # fmt: skip
    begun = time.perf_counter()
    try:
        with sampling_ahead():
            model = train(read_config(cell.method, **keys))
    except UserError as error:
        row["ended"] = first_line(error)
    else:
        assert model is not None, "only a dry run has none"
        row |= measured(model, starts)
    row["seconds"] = time.perf_counter() - begun
    return row | of_run(read_metrics(out / "metrics.jsonl"))


@contextmanager
def sampling_ahead() -> Iterator[None]:
    """Runs sample all that is open before each step, as a fast engine of its own does while the trainer trains.

    In one process an engine samples no more than a step waits for: then a lag of k is one of 0 to k in turn. So it is
    exactly k, from step k on, and a run is the same whenever it is made.
    """
    wait = Sampling.wait

    def wait_for_all(self: Sampling, until: Callable[[], bool], clock: Clock, at_least: int = 0) -> None:
        wait(self, lambda: all(drawing.completions.done() for drawing in self.open) and until(), clock, at_least)

    Sampling.wait = wait_for_all  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sampling.wait = wait  # type: ignore[method-assign]


def measured(model: Path, starts: Path) -> Row:
    """``gold``, ``kl`` in nats an answer, and ``length`` in tokens of a model's answers to the held-out prompts."""
    from transformers import AutoModelForCausalLM

    prompts = [json.loads(line)["prompt"] for line in (starts / "heldout.jsonl").read_text().splitlines()]
    groups = answers(load_causal(model, device="cpu"), prompts)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    longest = max(len(rollout.token_ids) for rollout in rollouts)
    # Filled up behind, which no token before it sees.
    ids_RT = torch.tensor([r.token_ids + [0] * (longest - len(r.token_ids)) for r in rollouts])
    sampled_RT = torch.tensor([r.trainable + [False] * (longest - len(r.trainable)) for r in rollouts])
    with torch.inference_mode(), quiet_transformers():
        logp_RTV, start_RTV = (
            AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids_RT).logits[:, :-1].double().log_softmax(-1)
            for folder in (model, starts / "sft" / "model")
        )
    kl_RT = (logp_RTV.exp() * (logp_RTV - start_RTV)).sum(-1)
    right = [letters.check(p, r.completion) for p, group in zip(prompts, groups, strict=True) for r in group.rollouts]
    return {
        "gold": statistics.mean(right),
        "kl": (kl_RT * sampled_RT[:, 1:]).sum(-1).mean().item(),
        "length": sampled_RT.sum().item() / len(rollouts),
    }


SHARES = ("masked_positive", "masked_negative", "clip_fraction", "effective_sample_size", "mismatch_kl")


def of_run(lines: list[Row]) -> Row:
    """What the metrics say: the gold score on the way, means over the steps, and whether the run has held."""
    steps = [line for line in lines if "loss" in line]
    row: Row = {"curve": [(line["step"], line["eval/reward"]) for line in lines if "eval/reward" in line]}
    if steps:
        late = steps[-max(1, len(steps) // 4) :]
        row |= {name: statistics.mean(line[name] for line in steps if name in line)
                for name in ("lag_mean", *SHARES) if any(name in line for line in steps)}  # fmt: skip
        row |= {"steps": len(steps), "grad_norm_max": max(line["grad_norm"] for line in steps),
                "reward": statistics.mean(line["reward"] for line in late),
                "lag_max": max(line.get("lag_max", 0) for line in steps)}  # fmt: skip
    return row


def collapsed(row: Row) -> bool:
    """Whether the model at the end is worse than the start, or half as good as it has been; or there is none."""
    if "gold" not in row:
        return True
    scores = [score for _, score in row["curve"]]
    return bool(row["gold"] < max(scores[0], max(scores) / 2))


@dataclass(frozen=True)
class Scores:
    """The runs of one place in a table, one a seed."""

    rows: list[Row]

    @property
    def gold(self) -> list[float]:
        """The gold scores at the end, of the runs that have one."""
        return [row["gold"] for row in self.rows if "gold" in row]

    @property
    def collapses(self) -> int:
        return sum(map(collapsed, self.rows))

    def mean(self, name: str) -> float:
        """Over the runs that have the number; NaN where none has."""
        found = [row[name] for row in self.rows if name in row]
        return statistics.mean(found) if found else math.nan

    @property
    def error(self) -> float:
        """The standard error of the mean gold score; NaN of fewer than two."""
        return statistics.stdev(self.gold) / len(self.gold) ** 0.5 if len(self.gold) > 1 else math.nan

    def text(self) -> str:
        """Gold score ± standard deviation over the seeds, KL, and how many have collapsed."""
        if not self.rows:
            return ""
        spread = f" ± {statistics.stdev(self.gold):.3f}" if len(self.gold) > 1 else ""
        said = f"{self.mean('gold'):.3f}{spread}, {self.mean('kl'):.2f}" if self.gold else "none ended"
        return said + (f", {self.collapses} of {len(self.rows)} collapsed" if self.collapses else "")


class Results:
    """All rows, by their place in the tables."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = [row for row in rows if "error" not in row]

    def at(self, part: str, method: str, variant: str, lag: int) -> Scores:
        wanted = (part, method, variant, lag)
        return Scores([r for r in self.rows if (r["part"], r["method"], r["variant"], r["max_lag"]) == wanted])

    def lag_mean(self, part: str, lag: int) -> str:
        """The mean lag of all tokens of a column, in optimizer steps."""
        mean = Scores([row for row in self.rows if (row["part"], row["max_lag"]) == (part, lag)]).mean("lag_mean")
        return "" if math.isnan(mean) else f" (mean {mean:.1f})"


def tables(results: Results) -> str:
    """Markdown: gold score ± standard deviation over the seeds, KL to the start in nats an answer, collapses."""
    found: list[str] = []
    for part, lags, lines in (
        ("lag", LAGS, [(f"{method}, {variant}", method, variant) for method, variant in LINES]),
        ("corrections", CORRECTION_LAGS, [(variant, "grpo", variant) for variant in CORRECTIONS]),
    ):
        heads = [f"lag {lag}{results.lag_mean(part, lag)}" for lag in lags]
        found += [_line(part, *heads), _line(*["---"] * (len(lags) + 1))]
        for name, method, variant in lines:
            # At lag 0 nothing tells the two apart.
            scores = [results.at(part, method, UNCORRECTED if part == "lag" and not k else variant, k) for k in lags]
            found.append(_line(name, *(one.text() for one in scores)))
        found.append("")
    found += [_line("Online DPO, lag 1", "updates", "gold, KL"), _line(*["---"] * 3)]
    for part, variant in (*(("pairs", name) for name, _ in PAIRS), ("epochs", "T=1"), ("epochs", "T=2")):
        one = results.at(part, "online-dpo", variant, 1)
        updates = one.mean("steps") * (2 if variant == "T=2" else 1)
        found.append(_line(variant, f"{updates:.0f}" if one.rows else "", one.text()))
    return "\n".join(found)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def findings(results: Results) -> str:
    """The paper's findings in numbers of these runs, a line each."""
    lines: list[tuple[str, Scores, Scores]] = []
    for method, variant in LINES:
        sync = results.at("lag", method, UNCORRECTED, 0)
        for lag in LAGS[1:]:
            lines.append((f"{method}, {variant}: lag {lag}", sync, results.at("lag", method, variant, lag)))
    two, four, early = (results.at("pairs", "online-dpo", name, 1) for name, _ in PAIRS)
    lines += [("pairs: K=4", two, four), ("pairs: K=4 in 0.6 of the updates", two, early)]
    lines.append(("epochs: T=2", *(results.at("epochs", "online-dpo", name, 1) for name in ("T=1", "T=2"))))
    found = [_difference(*line) for line in lines if line[1].gold and line[2].gold]
    if (share := reached_after(two, four)) is not None:
        found.append(f"pairs: K=4 is at K=2's final score after {share:.2f} of the updates (mean curves)")
    return "\n".join(found)


def _difference(name: str, before: Scores, after: Scores) -> str:
    """What has changed from one place to the other, with the standard error of that difference."""
    error = math.hypot(before.error, after.error)
    said = f"{name}: gold {after.mean('gold') - before.mean('gold'):+.3f}"
    said += "" if math.isnan(error) else f" (standard error {error:.3f})"
    return f"{said}, KL {after.mean('kl') - before.mean('kl'):+.2f}"


def reached_after(target: Scores, other: Scores) -> float | None:
    """Share of the updates after which the mean curve of ``other`` is at the last point of that of ``target``."""
    if not target.rows or not other.rows:
        return None
    goal = statistics.mean(row["curve"][-1][1] for row in target.rows)
    for points in zip(*(row["curve"] for row in other.rows), strict=True):
        if statistics.mean(score for _, score in points) >= goal:
            return float(points[0][0] / other.rows[0]["curve"][-1][0])
    return None


def draw(results: Results, path: Path) -> None:
    """Gold score and KL over the lag: of the methods above, of the corrections below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    lines = {
        "lag": [(f"{method}, {variant}", method, variant) for method, variant in LINES],
        "corrections": [(name, "grpo", name) for name in CORRECTIONS],
    }
    for row, (part, lags, title) in enumerate((("lag", LAGS, "methods"), ("corrections", CORRECTION_LAGS, "GRPO"))):
        for column, (number, label) in enumerate((("gold", "gold score"), ("kl", "KL to the start, nats an answer"))):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            for place, (name, method, variant) in enumerate(lines[part]):
                scores = [
                    results.at(part, method, UNCORRECTED if part == "lag" and not k else variant, k) for k in lags
                ]
                # Side by side, so that no bar hides another.
                shift = 0.06 * (place - (len(lines[part]) - 1) / 2)
                values = [[r[number] for r in one.rows if number in r] for one in scores]
                axes.errorbar(
                    [x + shift for x in range(len(lags))],
                    [statistics.mean(v) if v else math.nan for v in values],
                    [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values],
                    label=name, color=COLORS[place], marker="o", markersize=3.5, linewidth=1.6, elinewidth=0.8,
                )  # fmt: skip
            axes.set_xticks(range(len(lags)), [str(lag) for lag in lags])
            axes.set_title(f"{label}: {title}", loc="left", fontsize=10)
            axes.set_xlabel("--max-lag", fontsize=9)
            axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylim(bottom=0)
                axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


COLORS = ("#111827", "#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04")


def run_all(cells: list[Cell], options: argparse.Namespace, kept: Kept) -> None:
    """The cells that have no row yet, ``--jobs`` at a time, each in a process of its own, until the time is over."""
    left = [cell for cell in cells if cell.name not in kept.names]
    print(f"{len(cells) - len(left)} of {len(cells)} runs are there, {len(left)} are left", file=sys.stderr, flush=True)
    limit = time.monotonic() + 60 * options.minutes
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {pool.submit(in_process, cell, options, limit): cell for cell in left}
        for job in as_completed(jobs):
            if (row := job.result()) is not None:
                kept.add(row)


def in_process(cell: Cell, options: argparse.Namespace, limit: float) -> Row | None:
    """One cell's row; None where the time was over before it was done."""
    if (seconds := limit - time.monotonic()) <= 0:
        return None
    folder = Path(tempfile.mkdtemp(prefix="async_quality_"))
    file, log = folder / "row.json", folder / "log"
    argv = [sys.executable, __file__, "--cell", cell.name, "--folder", folder, "--start", options.start]
    argv += ["--json", file, "--steps", options.steps]
    try:
        with log.open("w") as written:
            process = subprocess.Popen(
                [*map(str, argv)], stdout=written, stderr=written, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if file.exists():
            row: Row = json.loads(file.read_text())
            return row
        last = (log.read_text(errors="replace").strip().splitlines() or ["no word"])[-1]
        return {"cell": cell.name, "error": f"ended with {code}: {last}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Kept:
    """The rows of all calls with one ``--json``: those that are there already, and what is added, written at once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path | None = options.json
        about = {"command": " ".join(["python", *sys.argv]), "when": time.strftime("%Y-%m-%d %H:%M:%S")}
        about |= {"commit": options.commit or commit(), "machine": machine()}
        earlier: Row = {"calls": [], "rows": []}
        if self.path is not None and self.path.exists():
            earlier = json.loads(self.path.read_text())
        self.rows: list[Row] = [row for row in earlier["rows"] if "error" not in row]
        self.calls: list[Row] = [*earlier["calls"], about]

    @property
    def names(self) -> set[str]:
        return {row["cell"] for row in self.rows if "error" not in row}

    def add(self, row: Row) -> None:
        """Keeps a row, and says it."""
        self.rows.append(row | {"call": len(self.calls) - 1})
        shown = [f"{name} {row[name]:.3g}" for name in ("gold", "kl", "lag_mean", "seconds") if name in row]
        shown += [row[name] for name in ("ended", "error") if name in row]
        print(row["cell"], *shown, sep="  ", file=sys.stderr, flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps({"calls": self.calls, "rows": self.rows}, indent=1) + "\n")
            part.replace(self.path)


def commit() -> str:
    """The commit that is measured."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Runs what is not there yet, and prints the tables of what is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="read the rows from here, and write them after every run")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=256, help="updates of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after so many; 0: run nothing")
    parser.add_argument("--start", type=Path, default=Path(tempfile.gettempdir()) / "async_quality_start",
                        help="folder of the starting models, made where it is not there")  # fmt: skip
    parser.add_argument("--commit", help="what is measured, where git does not say")
    parser.add_argument("--figure", type=Path, help="draw it here")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cells = plan(options.only, range(options.seeds), options.steps)
    if options.cell is not None:
        seed = int(options.cell.rsplit(maxsplit=1)[1])
        (cell,) = (cell for cell in plan(PARTS, [seed], options.steps) if cell.name == options.cell)
        options.json.write_text(json.dumps(run_cell(cell, options.start, options.folder / "run")))
        return
    kept = Kept(options)
    if options.minutes > 0:
        torch.set_num_threads(1)
        make_starts(options.start)
        run_all(cells, options, kept)
    results = Results(kept.rows)
    print(tables(results), findings(results), sep="\n\n")
    if options.figure is not None:
        draw(results, options.figure)


if __name__ == "__main__":
    main()
