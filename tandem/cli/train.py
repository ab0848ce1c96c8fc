"""The commands of all methods, and ``tandem replay``: a run from its config, and how it ended."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path
from typing import Any

from tandem.assembly.configs.methods import RunConfig, SamplesConfig
from tandem.assembly.configs.replay import ReplayConfig
from tandem.assembly.digests import weights_digest
from tandem.assembly.run import run as train
from tandem.cli.advise import tell
from tandem.errors import UserError
from tandem.models.proof.limits import read_limits
from tandem.runs.folder import EMA_MODEL, MODEL, RunFolder
from tandem.runs.goals import BEST_MODEL, read_best
from tandem.runs.lines import read_metrics
from tandem.runs.progress import format_number, judged, leading
from tandem.runs.table import print_table


def run(config: RunConfig) -> int:
    """The command."""
    if model := train(config):
        out = Path(config.run.out)
        if isinstance(config, SamplesConfig):
            with suppress(UserError):  # of a run that has done too few steps
                tell(out)
        tell_end(out, config.leads, *next_commands(config, model), judge=config.held_out_judge)
    return 0


def replay(config: ReplayConfig) -> int:
    """``tandem replay``. Says whether the model is that of the run, where both ended after the same step."""
    if model := train(config):
        replayed, out = Path(config.replay.replayed), Path(config.run.out)
        tell_end(out, config.method.leads)
        if RunFolder.finished(replayed) == RunFolder.finished(out):
            before = replayed / MODEL
            same = weights_digest(str(before)) == weights_digest(str(model))
            print(f"Its weights are {'those' if same else 'not those'} of {before}{', bit for bit' if same else ''}")
    return 0


def next_commands(config: RunConfig, model: Path) -> list[str]:
    """Commands that could follow: what the trained model is of use for."""
    out = Path(config.run.out)
    if "demonstrations" in config.parts:
        return [
            following("rm", out, model=model, data="pairs.jsonl", steps=500),
            following("grpo", out, model=model, reward="check.py:right", data="prompts.jsonl", steps=200),
        ]
    if config.method.head == "scalar":
        return [following("ppo", out, model=_policy(config), reward_model=model, data="prompts.jsonl", steps=200)]
    return []


def _policy(config: RunConfig) -> str:
    """What PPO could improve against this reward model: what it began from, if that has a language-model head."""
    section = config.model
    try:
        read_limits(section.source, head="lm")
    except UserError:
        return str(_beside(Path(config.run.out), "sft") / "model")
    return section.model


def tell_end(out: Path, leads: Seq[str], *commands: str, judge: str = "") -> None:
    """How far a finished run has come, where its model is, and commands that could follow."""
    rows = []
    records = read_metrics(out / "metrics.jsonl")
    known = dict.fromkeys(name for record in records for name in record)
    for name in leading((*leads, "pass@1"), known):
        values = [record[name] for record in records if name in record]
        rows.append((judged(name, judge), format_number(values[0]), format_number(values[-1])))
    print_table(f"{out}: {records[-1]['step']} steps", ("", "first", "last"), rows)
    print(f"\nThe model is in {out / 'model'}")
    if (out / EMA_MODEL).exists():
        print(f"The running average of its weights is in {out / EMA_MODEL}")
    if best := read_best(out):
        print(
            f"The best one, of step {best.step} ({best.metric} {format_number(best.value)}), is in {out / BEST_MODEL}"
        )
    for command in commands:
        print(f"  next: {command}")


def following(name: str, out: Path, **flags: Any) -> str:
    """A command that could follow the run in ``out``, as one would type it. Its own run is beside that, in no other."""
    words = [word for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
    names = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
    own = next(path for path in (_beside(out, name) for name in names) if not path.exists())
    return shlex.join(["tandem", name, *words, "--out", str(own)])


def _beside(out: Path, name: str) -> Path:
    """A folder beside a run's, which may be the one that the command runs in and has no name of its own then."""
    return (out if out.name else out.absolute()).with_name(name)
