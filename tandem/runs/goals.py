"""What a run wants of its held-out metrics: the one whose best model is kept, and when there is no more to wait for.

Everything here follows from the evaluations that ``metrics.jsonl`` holds, so that a resumed run decides as an unbroken
one does.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tandem.errors import UserError

HIGHER = re.compile(r"reward(_min|_max|_margin)?|reward/[^/]+|accuracy|pass@\d+|score_gap")
"""Metrics of which more is better, without ``eval/`` and the name of a set."""
LOWER = re.compile(r"(\w+_)?(loss|kl|kl_per_sequence|perplexity)")
"""Metrics of which less is better."""
BEST_MODEL = "best"
"""The folder of the best model of a run: whole or not there."""
ABOUT = "best.json"
"""In it, of which step it is."""
COMPARED = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
Evaluations = Seq[Mapping[str, float]]
"""The lines of ``metrics.jsonl`` that have a metric of held-out data, oldest first."""


def direction(name: str) -> Literal[1, -1, 0]:
    """Of a metric without ``eval/``: 1 where more is better, -1 where less is, 0 where its name does not say."""
    # The part before the first slash may be the name of a set.
    names = (name, name.partition("/")[2])
    if any(map(LOWER.fullmatch, names)):
        return -1
    return 1 if any(map(HIGHER.fullmatch, names)) else 0


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A held-out metric, and whether more of it is better."""

    metric: str
    sign: Literal[1, -1]

    @classmethod
    def parse(cls, text: str) -> Goal:
        """``eval/reward``, or with a sign ``-eval/entropy``. Raises UserError where it is not known which is better."""
        metric = text.lstrip("+-")
        if text[:1] in "+-":
            return cls(metric=metric, sign=-1 if text.startswith("-") else 1)
        if sign := direction(metric.removeprefix("eval/")):
            return cls(metric=metric, sign=sign)
        raise UserError(
            f"keep_best: whether more or less of {metric} is better is not known; say it, as in "
            f"--keep-best=+{metric} or --keep-best=-{metric}"
        )

    def better(self, value: float | None, than: float | None) -> bool:
        """Whether a value improves on another; any number does on none, and what is no number never does."""
        if value is None or math.isnan(value):
            return False
        return than is None or self.sign * value > self.sign * than

    def best(self, evaluations: Evaluations) -> int:
        """The place of the best evaluation, the first of equal ones; -1 where none has the metric."""
        place = -1
        for i, line in enumerate(evaluations):
            if self.better(line.get(self.metric), evaluations[place][self.metric] if place >= 0 else None):
                place = i
        return place


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """What a held-out metric must reach for the run to be done."""

    metric: str
    sign: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """``eval/accuracy>=0.95``. Raises UserError for anything else."""
        match = re.fullmatch(r"\s*(eval/[^<>=\s]+)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
        try:
            value = float(match[3]) if match else math.nan
        except ValueError:
            value = math.nan
        if match is None or not math.isfinite(value):
            raise UserError(f"stop_when: expected a held-out metric and its bound, as eval/reward>=0.9, got {text!r}")
        return cls(metric=match[1], sign=match[2], value=value)

    def holds(self, line: Mapping[str, float]) -> bool:
        """Whether the metrics of one evaluation reach it."""
        return self.metric in line and COMPARED[self.sign](line[self.metric], self.value)


@dataclass(frozen=True, kw_only=True)
class Goals:
    """What a run keeps, and when it stops before its last step."""

    keep_best: Goal | None = None
    stop_when: Threshold | None = None
    patience: int = 0
    """Evaluations without a better one after which the run stops. 0: it does not."""

    @property
    def metrics(self) -> dict[str, str]:
        """The metrics that it names, by key."""
        goals = {"keep_best": self.keep_best, "stop_when": self.stop_when}
        return {key: goal.metric for key, goal in goals.items() if goal is not None}

    def require(self, names: Iterable[str]) -> None:
        """Raises UserError where a metric is none of ``names``, those of an evaluation."""
        known = sorted({name for name in names if name.startswith("eval/")})
        for key, metric in self.metrics.items():
            if metric not in known:
                raise UserError(f"{key}: no evaluation of this run has {metric}; they have {', '.join(known)}")

    def met(self, evaluations: Evaluations) -> str:
        """Why a run with these evaluations stops; nothing where it goes on."""
        if not evaluations:
            return ""
        stop, keep, newest = self.stop_when, self.keep_best, evaluations[-1]
        if stop is not None and stop.holds(newest):
            return f"{stop.metric} is {newest[stop.metric]:.6g} ({stop.sign} {stop.value:g})"
        if keep is None or not self.patience or (place := keep.best(evaluations)) < 0:
            return ""
        best, since = evaluations[place], len(evaluations) - 1 - place
        if since < self.patience:
            return ""
        return (
            f"{keep.metric} has not got better than {best[keep.metric]:.6g} (step {best['step']:.0f}) in {since} "
            f"evaluation{'s' * (since > 1)}"
        )


def evaluations_of(records: Iterable[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The records of ``metrics.jsonl`` that have a metric of held-out data."""
    return [record for record in records if any(name.startswith("eval/") for name in record)]


@dataclass(frozen=True, kw_only=True)
class Best:
    """The step that a kept model is of, and what it reached."""

    step: int
    metric: str
    value: float


def read_best(out: Path) -> Best | None:
    """What a run's best model is; None where it has none. Raises UserError where that cannot be read."""
    path = out / BEST_MODEL / ABOUT
    if not (out / BEST_MODEL).exists():
        return None
    try:
        return Best(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path}: does not say which step's model this is; remove {out / BEST_MODEL}") from None


def write_about(folder: Path, best: Best) -> None:
    """Into a model's folder, of which step it is."""
    (folder / ABOUT).write_text(json.dumps(asdict(best)) + "\n")
