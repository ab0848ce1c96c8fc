"""What bound a run on samples, what overlapping could win there, and what to change: from its lines alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tandem.errors import UserError
from tandem.runs.identity import CONFIG
from tandem.runs.lines import read_lines, read_metrics
from tandem.runs.progress import format_number

WORTH = 0.05
"""What would win less than 5% of a step is not advised."""
SHOWN = 0.01
"""A phase that takes less than 1% of a step is one of the rest."""
FEWEST = 2
"""Fewer than 2 steps after the warm-up say nothing."""
ALIKE = 1.15
"""Phases of which one takes less than 1.15 times the other's seconds are balanced."""
CERTAIN = 0.1
"""A fitted cost is believed where its standard error is at most 10% of a step's sampling."""
PHASES = ("sampling", "scoring", "training", "sync")
SAID = {"sampling": "sampling", "scoring": "rewards and scoring", "training": "training", "sync": "weight sync"}
SPEED = ("placement.", "reward_processes", "cluster.")
"""Keys that a resumed run may have other values of, and that its seconds depend on, begin with one of these 3."""
Records = Seq[Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run's seconds depend on, of its config."""

    prompts_per_step: int
    samples_per_prompt: int
    sample_epochs: int
    max_slots: int
    max_lag: int
    window: float
    reward: tuple[str, ...]
    reward_processes: int | None
    scorers: tuple[str, ...]
    """Models beside the policy that the config names and that have no devices of their own."""
    engines: int
    """Engines apart from the trainer. 0: sampler and trainer take turns on the same devices."""
    devices_each: int
    """GPUs of one engine."""
    actors: int
    """Processes of the trainer, one a device."""
    pairwise: bool
    """Whether a prompt's samples are trained on as one pair, however many there are."""

    @classmethod
    def of(cls, keys: Mapping[str, Any], *, pairwise: bool) -> Setup:
        """From the keys of a resolved config. Raises UserError where it is no config of a run on samples."""

        def count(key: str) -> int:
            value = str(keys.get(key))
            return int(value) if value.isdigit() else 0

        try:
            return cls(
                prompts_per_step=keys["prompts_per_step"],
                samples_per_prompt=keys["samples_per_prompt"],
                sample_epochs=keys["sample_epochs"],
                max_slots=keys["max_slots"],
                max_lag=keys.get("max_lag", 0),
                window=keys.get("window", 1.0),
                reward=tuple(keys.get("reward", ())),
                reward_processes=keys.get("reward_processes"),
                scorers=tuple(
                    role
                    for role, key in (("reward", "reward_model"), ("teacher", "teacher"), ("reference", "reference"))
                    if keys.get(key) and not count(f"placement.{role}")
                ),
                engines=count("placement.engine"),
                devices_each=keys.get("engine.tensor_parallel", 1),
                actors=max(1, count("placement.actor")),
                pairwise=pairwise,
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"no config of a run on samples ({error} is missing): there is nothing to advise") from None


@dataclass(frozen=True)
class Tail:
    """Seconds of a step's sampling in which samples that end late leave slots empty."""

    seconds: float
    at_most: bool
    """Whether it is a bound: the steps do not tell what an empty slot costs."""


@dataclass(frozen=True)
class Overlap:
    """A step in which sampler and trainer take turns, and one in which neither ever waits but for the other's work."""

    turns: float
    ideal: float
    reached: float
    """Share of what the ideal wins over turns; 1 where there is nothing to win."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of a step, means over the steps that count, and what follows from them for a run that is set up so."""

    setup: Setup
    first: int
    last: int
    """Steps, of which ``steps`` count."""
    steps: int
    step: float
    phases: Mapping[str, float]
    """Seconds of each of ``PHASES``. Sampling is what the trainer waited for samples."""
    busy: float | None
    """How long the sampler was at work, which in an asynchronous run it is beside the trainer. None: not logged."""
    open_groups: float | None
    settling: float = 0.0
    """Of weight sync: what the samples that ran were waited for (``--weights-change between-sequences``)."""
    tail: Tail | None = None
    """What sampling loses with late samples, where sampler and trainer take turns; None also where it is not known."""

    @property
    def waited(self) -> float:
        """For samples."""
        return self.phases["sampling"] + self.settling

    @property
    def trainer(self) -> float:
        """All but that: the trainer's own part of a step, with rewards, weight sync and the rest."""
        return self.step - self.waited

    @property
    def overlap(self) -> Overlap | None:
        """What taking turns costs, the ideal, and how much of it was reached; None where the lines do not tell."""
        if self.setup.engines == 0:
            if self.setup.max_lag == 0 and self.tail is not None:
                return Overlap(self.step, self.step - self.tail.seconds, 0.0 if self.tail.seconds else 1.0)
            return None
        sampler = self.waited if self.setup.max_lag == 0 else self.busy
        if sampler is None:
            return None
        turns, ideal = sampler + self.trainer, max(sampler, self.trainer)
        won = (turns - self.step) / (turns - ideal) if turns > ideal else 1.0
        return Overlap(turns, ideal, min(max(won, 0.0), 1.0))


def advise_run(out: Path, *, pairwise: bool) -> list[str]:
    """``advise`` of the run in a folder. Raises UserError where it is of no run on samples, or unreadable."""
    try:
        keys = yaml.safe_load((out / CONFIG).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"{out}: not the folder of a run: it has no {CONFIG}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{out / CONFIG}: not the config of a run any more") from None
    records = read_metrics(out / "metrics.jsonl")
    if not any("seconds_sampling" in record for record in records):
        steps = sum("seconds" in record for record in records)
        why = "it has done no step yet" if not steps else "none of its steps has sampled, so nothing can overlap"
        raise UserError(f"{out}: there is nothing to advise: {why}")
    try:
        return advise(records, read_lines(out / "events.jsonl"), Setup.of(keys, pairwise=pairwise))
    except UserError as error:
        raise UserError(f"{out}: {error}") from None


def advise(records: Records, events: Seq[Mapping[str, Any]], setup: Setup) -> list[str]:
    """Sentences with the numbers they follow from: where a step's seconds went, the ideal, and what to change.

    Raises UserError where fewer than ``FEWEST`` steps say anything.
    """
    counted = steps_that_count(records, events, max_lag=setup.max_lag)
    if len(counted) < FEWEST:
        warm = (
            f"the first {1 + setup.max_lag} after each start are" if setup.max_lag else "the first after each start is"
        )
        last = f", and in the last {setup.max_lag} no more is sampled" if setup.max_lag else ""
        raise UserError(f"too few steps to advise, {FEWEST} are needed beside the warm-up: {warm} that{last}")
    spent = spent_in(counted, setup)
    shown = {name: value for name, value in spent.phases.items() if value >= SHOWN * spent.step}
    parts = [f"{SAID[name]} {_s(value)}" for name, value in shown.items()]
    rest = max(0.0, spent.step - sum(shown.values()))
    over = f"steps {spent.first} to {spent.last}" + (
        f" ({spent.steps} that count)" if spent.steps <= spent.last - spent.first else ""
    )
    return [
        f"a step takes {_s(spent.step)}, the mean of {over}: {', '.join(parts)}, the rest {_s(rest)}",
        bound_by(spent),
        _ideal(spent),
        *(changes_for(spent) or ["nothing to change follows from these seconds"]),
    ]


def steps_that_count(records: Records, events: Seq[Mapping[str, Any]], *, max_lag: int) -> list[Mapping[str, float]]:
    """The lines of steps whose seconds are known and that are as any other.

    That is none of the first ``1 + max_lag`` after each start, in which libraries warm up and the samples of later
    steps are begun, and none of the last ``max_lag`` of a finished run, for which nothing more is. Only those after the
    newest start that changed what the seconds depend on (``SPEED``).
    """
    starts, since, end = [0], 0, math.inf
    moved = False
    for event in events:
        moved |= event["event"] == "config" and any(key.startswith(SPEED) for key in event.get("changed", ()))
        if event["event"] == "resume":
            starts.append(event["step"])
            since, moved = (event["step"], False) if moved else (since, moved)
        end = event["step"] - max_lag if event["event"] == "finish" else math.inf if event["event"] == "start" else end
    return [
        record
        for record in records
        if since < record["step"] <= end
        and 0 < record.get("seconds", math.nan) < math.inf
        and "seconds_sampling" in record
        and not any(start < record["step"] <= start + 1 + max_lag for start in starts)
    ]


def spent_in(counted: Records, setup: Setup) -> Spent:
    """Means over the steps; a phase that a step lacks took no time in it."""

    def mean(name: str) -> float | None:
        values = [record[name] for record in counted if math.isfinite(record.get(name, math.nan))]
        return math.fsum(values) / len(values) if len(values) == len(counted) else None

    phases = {
        phase: math.fsum(_finite(record.get(f"seconds_{phase}", 0.0)) for record in counted) / len(counted)
        for phase in PHASES
    }
    step = mean("seconds")
    assert step is not None
    steps = [int(record["step"]) for record in counted]
    return Spent(
        setup=setup,
        first=min(steps),
        last=max(steps),
        steps=len(counted),
        step=step,
        phases=phases,
        busy=mean("engine_busy_seconds") or None,  # 0 is of an engine that does not count them
        open_groups=mean("open_groups"),
        settling=math.fsum(_finite(record.get("settling_seconds", 0.0)) for record in counted) / len(counted),
        tail=tail_of(counted, setup) if setup.max_lag == setup.engines == 0 else None,
    )


def bound_by(spent: Spent) -> str:
    """Which phase most of a step goes into, as a sentence."""
    of = {name: spent.phases[name] for name in ("sampling", "scoring", "training")}
    if spent.busy is not None:
        of["sampling"] = max(of["sampling"], spent.busy)
    (first, most), (second, next_most), _ = sorted(of.items(), key=lambda pair: -pair[1])
    named = {"sampling": "sampling", "scoring": "rewards", "training": "training"}
    if most < ALIKE * next_most:
        return f"balanced: {named[first]} {_s(most)}, {named[second]} {_s(next_most)}"
    return f"bound by {named[first]}: {_s(most)}, {most / spent.step:.0%} of a step"


def tail_of(counted: Records, setup: Setup) -> Tail | None:
    """What a step's sampling loses while its last samples are drawn with empty slots; None where lengths are missing.

    Drawing takes ``a`` seconds for each turn of the slots and ``b`` for each token: with n samples of together L
    tokens, the longest m, and M slots, there are m turns where n <= M, else at most L/M + m (1 - 1/M) (Graham's bound
    of list scheduling), and L / min(n, M) of full slots. ``a`` and ``b`` are fitted to the steps by least squares;
    where these do not tell them apart, all is said to be turns' time, which bounds the tail.
    """
    rows: list[tuple[float, float, float, float]] = []
    for record in counted:
        length, longest = (record.get(name, math.nan) for name in ("response_length", "response_length_max"))
        tokens = record.get("sampled_tokens", math.nan)
        if not all(map(math.isfinite, (length, longest, tokens))) or length <= 0:
            return None
        samples = max(1.0, round(tokens / length))
        slots = float(min(setup.max_slots, samples))
        turns = longest if samples <= setup.max_slots else tokens / slots + longest * (1 - 1 / slots)
        rows.append((turns, tokens, tokens / slots, record["seconds_sampling"]))
    turns_s = math.fsum(row[0] for row in rows) / len(rows)
    empty = turns_s - math.fsum(row[2] for row in rows) / len(rows)
    seconds = math.fsum(row[3] for row in rows) / len(rows)
    cost = _cost_of_a_turn(rows)
    if cost is None:
        return Tail(seconds * empty / turns_s, at_most=True)
    return Tail(min(cost, seconds / turns_s) * empty, at_most=False)


def _cost_of_a_turn(rows: Seq[tuple[float, float, float, float]]) -> float | None:
    """``a`` of ``seconds = a turns + b tokens``; None where the steps do not determine it."""
    xx, xy, yy, xs, ys = (
        math.fsum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1), (0, 3), (1, 3))
    )
    determinant = xx * yy - xy * xy
    if len(rows) < 5 or determinant <= 1e-9 * xx * yy:
        return None
    a, b = (yy * xs - xy * ys) / determinant, (xx * ys - xy * xs) / determinant
    variance = math.fsum((row[3] - a * row[0] - b * row[1]) ** 2 for row in rows) / (len(rows) - 2)
    turns, seconds = (math.fsum(row[i] for row in rows) / len(rows) for i in (0, 3))
    error = math.sqrt(variance * yy / determinant) * turns
    if error > CERTAIN * seconds or b < 0:
        return None
    return max(a, 0.0)


def _ideal(spent: Spent) -> str:
    """The ideal as a sentence."""
    setup, tail, overlap = spent.setup, spent.tail, spent.overlap
    shared = "ideal: sampler and trainer share their devices, so only the tail of sampling can be won"
    if setup.engines == 0 and setup.max_lag > 0:
        full = "" if spent.open_groups is None else f"; {spent.open_groups:.0f} groups were open when a step began"
        return (
            f"{shared}, and samples that are not done go on through the next step: that is reached "
            f"(max_lag {setup.max_lag}{full})"
        )
    if overlap is None and setup.engines == 0:
        return f"{shared}; the spread of lengths, which it follows from, is not in metrics.jsonl"
    if overlap is None:
        return (
            f"ideal: not known: how long the sampler was busy is not logged; the trainer waited {_s(spent.waited)} for "
            "it"
        )
    if tail is not None and tail.seconds < WORTH * spent.step:
        return (
            f"{shared}, in which late samples leave slots empty, and it is short: {_s(tail.seconds)} of "
            f"{_s(spent.waited)}"
        )
    faster = f"{overlap.turns / overlap.ideal:.2f} times as fast as taking turns"
    if tail is not None:
        most = "at most " if tail.at_most else ""
        return (
            f"{shared}, in which late samples leave slots empty: {most}{_s(tail.seconds)} of {_s(spent.waited)}, a "
            f"step of {_s(overlap.ideal)}, {faster}; reached: nothing of it, since each step waits for its last sample"
        )
    return (
        f"ideal: the sampler takes {_s(overlap.turns - spent.trainer)}, the trainer {_s(spent.trainer)}; one beside "
        f"the other, a step would take the longer, {_s(overlap.ideal)}, {faster}; reached: {overlap.reached:.0%} of it"
    )


def changes_for(spent: Spent) -> list[str]:
    """What to change, the most that can be won first."""
    found = [*_overlapping(spent), *_rewards(spent), *_slots(spent)]
    if spent.setup.engines > 0 and spent.overlap is not None:
        sampler = spent.overlap.turns - spent.trainer
        found += [*_spare_time(sampler, spent), *_division(sampler, spent)]
    return found


def _overlapping(spent: Spent) -> list[str]:
    setup, tail, overlap = spent.setup, spent.tail, spent.overlap
    if overlap is None:
        return []
    won = spent.step - overlap.ideal
    if won < WORTH * spent.step:
        if setup.max_lag > 1 and spent.waited < WORTH * spent.step:
            return [
                f"--max-lag 1: the trainer waited {_s(spent.waited)} a step for samples, so fresher ones are likely to "
                f"do as well as those of max_lag {setup.max_lag}"
            ]
        return []
    if setup.max_lag == 0:
        what = (
            "samples that are not done go on through the optimizer step"
            if tail is not None
            else "the sampler draws for the next step while the trainer is at this one"
        )
        most = "at most " if tail is not None and tail.at_most else ""
        return [f"--max-lag 1: {what}; that wins {most}{_s(won)} a step, {won / spent.step:.0%}"]
    if spent.settling >= WORTH * spent.step:
        return [
            "--weights-change in-flight: the samples that run end before each push, with none begun meanwhile, and the "
            f"trainer waited {_s(spent.settling)} a step for that"
        ]
    idle = spent.step - (spent.busy or 0.0)
    if spent.waited < WORTH * spent.step or idle < WORTH * spent.step:
        return []
    wider = (
        "" if setup.window >= 1 else f"; or --window {min(1.0, 2 * setup.window):g}, so that fewer wait for the oldest"
    )
    return [
        f"--max-lag {setup.max_lag + 1}: the trainer waited {_s(spent.waited)} and the sampler {_s(idle)} a step, each "
        f"for the other; more open groups win at most {_s(won)}{wider}"
    ]


def _rewards(spent: Spent) -> list[str]:
    setup, scoring = spent.setup, spent.phases["scoring"]
    if scoring < max(spent.phases["training"], spent.phases["sampling"]) or scoring < WORTH * spent.step:
        return []
    if setup.reward:
        processes = "" if setup.reward_processes is None else f" than {setup.reward_processes}"
        return [
            "a reward that judges one sample a call (docs/rewards.md) begins while others are drawn, and in more "
            f"--reward-processes{processes}: rewards and scoring take {_s(scoring)} a step"
        ]
    own = [f"--placement.{role} 1, where there is a device more" for role in setup.scorers]
    return [f"{', or '.join([*own, 'a larger --token-budget'])}: rewards and scoring take {_s(scoring)} a step"]


def _slots(spent: Spent) -> list[str]:
    setup = spent.setup
    samples = setup.prompts_per_step * setup.samples_per_prompt
    slots = setup.max_slots * max(setup.engines, 1)
    others = max(spent.phases["scoring"], spent.phases["training"])
    if slots >= samples or max(spent.waited, spent.busy or 0.0) < others:
        return []
    each = -(-samples // max(setup.engines, 1))
    return [
        f"--max-slots {each}, where memory allows it: a step has {samples} samples, and {slots} are drawn at a time"
    ]


def _division(sampler: float, spent: Spent) -> list[str]:
    """Other numbers of devices for sampler and trainer, were each as many times as fast as it has devices."""
    engines, each, actors = spent.setup.engines, spent.setup.devices_each, spent.setup.actors
    devices = engines * each + actors
    longer = max(sampler, spent.trainer)
    best, seconds = engines, longer
    for count in range(1, (devices - 1) // each + 1):
        found = max(sampler * engines / count, spent.trainer * actors / (devices - count * each))
        if found < seconds:
            best, seconds = count, found
    shared = (sampler * engines * each + spent.trainer * actors) / devices
    if seconds < (1 - 2 * WORTH) * longer:
        return [
            f"--placement.engine {best} --placement.actor {devices - best * each}: were each faster in proportion to "
            f"its devices, the longer of the two would take {_s(seconds)} a step instead of {_s(longer)}"
        ]
    if shared < (1 - 4 * WORTH) * longer:
        return [
            f"--placement.engine actor --placement.actor {devices}: all {devices} devices for both in turns would take "
            f"{_s(shared)} a step and the tail of sampling, were each faster in proportion; apart, the longer takes "
            f"{_s(longer)}"
        ]
    return []


def _spare_time(sampler: float, spent: Spent) -> list[str]:
    """What fills the time of the one that waits: more epochs for the trainer, more samples for the sampler."""
    setup, spare = spent.setup, sampler - spent.trainer
    epoch = spent.phases["training"] / setup.sample_epochs
    if epoch > 0 and spare >= epoch:
        return [
            f"--sample-epochs {setup.sample_epochs + 1}: beside the sampler the trainer has {_s(spare)} a step to "
            f"spare, and an epoch takes {_s(epoch)}; more is learned of a sample, and the policy drifts further"
        ]
    more = int(-spare / (sampler / setup.samples_per_prompt)) if sampler > 0 else 0
    if setup.pairwise and more >= 1:
        return [
            f"--samples-per-prompt {setup.samples_per_prompt + more}: beside the trainer the sampler has {_s(-spare)} "
            "a step to spare, and the best against the worst of more samples teaches more in as long"
        ]
    return []


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _s(seconds: float) -> str:
    return f"{format_number(seconds)} s"
