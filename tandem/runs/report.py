"""What a run leaves for a person to read when it ends: ``summary.md`` and ``curves.png``, from its lines alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from datetime import datetime
from pathlib import Path
from typing import Any

from tandem.runs.curves import Curve, plot_curves
from tandem.runs.folder import CURVES, SUMMARY
from tandem.runs.goals import direction, read_best
from tandem.runs.lines import read_lines, read_metrics
from tandem.runs.progress import format_number, format_seconds, held_out_of, judged, leading
from tandem.whole import partial_of, write_aside

TOLD = ("note", "error", "tracker", "accept_changed", "config")
"""Kinds of events that a summary repeats."""
Records = Seq[Mapping[str, float]]


def write_report(out: Path, *, title: str, leads: Seq[str], ended: str, judge: str = "") -> None:
    """Writes both. ``leads`` are the metrics that say most, ``ended`` is how the run did; ``judge``: of held-out
    samples, where that is another one than in training.

    Raises OSError where they cannot be written, and whatever the drawing raises.
    """
    records, events = read_metrics(out / "metrics.jsonl"), read_lines(out / "events.jsonl")
    write_aside(out / SUMMARY, summary(out, records, events, title=title, leads=leads, ended=ended, judge=judge))
    if panels := panels_of(records, leads, judge):
        aside = partial_of(out / CURVES)
        plot_curves(aside, panels, f"{title}: {out.name}")
        aside.replace(out / CURVES)


def summary(
    out: Path,
    records: Records,
    events: Seq[Mapping[str, Any]],
    *,
    title: str,
    leads: Seq[str],
    ended: str,
    judge: str = "",
) -> str:
    """The summary as Markdown."""
    steps = max((record["step"] for record in records), default=0)
    stopped = [event["stopped"] for event in events if event["event"] == "finish" and "stopped" in event]
    ended += f" early: {stopped[-1]}" if stopped and ended == "finished" else ""
    blocks = [f"# {title}: {steps:.0f} steps, {ended}"]
    if rows := [_first_best_last(records, name, judge) for name in shown_names(records, leads)]:
        blocks.append(_table(("metric", "first", "best", "last"), rows))
    if best := read_best(out):
        blocks.append(f"`best/` is the model of step {best.step}: {best.metric} {format_number(best.value)}.")
    blocks += _times(records)
    if starts := [event for event in events if event["event"] == "start"]:
        counts = {name: value for name, value in starts[-1].items() if isinstance(value, int)}
        blocks.append("Data: " + ", ".join(f"{value} {name}" for name, value in counts.items()) + ".")
        took = datetime.fromisoformat(events[-1]["time"]) - datetime.fromisoformat(starts[-1]["time"])
        again = f", the last of {len(starts)} starts" if len(starts) > 1 else ""
        blocks.append(f"Begun {starts[-1]['time'][:19]} UTC{again}; it took {format_seconds(took.total_seconds())}.")
    if told := [_told(event) for event in events if event["event"] in TOLD]:
        blocks.append("\n".join(f"- {line}" for line in told))
    return "\n\n".join(blocks) + "\n"


def shown_names(records: Records, leads: Seq[str]) -> list[str]:
    """The leading metrics that were written, each with the same of held-out data, and every pass@k."""
    known = dict.fromkeys(name for record in records for name in record)
    return [*leading(leads, known), *(name for name in known if re.search(r"/pass@\d+$", name))]


def panels_of(records: Records, leads: Seq[str], judge: str = "") -> dict[str, list[Curve]]:
    """A panel for each leading metric, with the same of held-out data; one for pass@k; the gradient; the time."""
    known = dict.fromkeys(name for record in records for name in record)
    panels = {
        lead: [
            curve
            for name in (lead, *held_out_of(lead, known))
            for curve in _curve(records, name, _whose(name, lead) + judged(name, judge).removeprefix(name))
        ]
        for lead in (*leads, "grad_norm")
    }
    passed = {name: name.removeprefix("eval/") for name in known if re.search(r"/pass@\d+$", name)}
    panels["pass@k, held out"] = [curve for name, label in passed.items() for curve in _curve(records, name, label)]
    phases = [name for name in known if name.startswith("seconds_")]
    panels["seconds of a step"] = [
        curve for name in ("seconds", *phases) for curve in _curve(records, name, name.removeprefix("seconds_"))
    ]
    return {name: curves for name, curves in panels.items() if curves}


def _curve(records: Records, name: str, label: str) -> list[Curve]:
    """The curve of a metric; none where it has no number."""
    points = [(record["step"], record[name]) for record in records if name in record]
    if not any(math.isfinite(value) for _, value in points):
        return []
    steps, values = zip(*points, strict=True)
    return [(label, steps, values)]


def _whose(name: str, lead: str) -> str:
    """Of which data a metric is, or the same of held-out data."""
    own = name.removesuffix(lead).removesuffix("/").removeprefix("eval/")
    return {"": "training", "eval": "held out"}.get(own, own)


def _first_best_last(records: Records, name: str, judge: str) -> tuple[str, ...]:
    values = [(record[name], record["step"]) for record in records if name in record]
    finite = [pair for pair in values if math.isfinite(pair[0])]
    sign = direction(name.removeprefix("eval/"))
    best = max(finite, key=lambda pair: sign * pair[0]) if sign and finite else None
    return (
        judged(name, judge),
        format_number(values[0][0]),
        f"{format_number(best[0])} (step {best[1]:.0f})" if best else "",
        format_number(values[-1][0]),
    )


def _times(records: Records) -> list[str]:
    """Tokens a second over all steps, and where their seconds went."""
    timed = [record for record in records if "seconds" in record]
    total = sum(record["seconds"] for record in timed)
    if not total:
        return []
    tokens = sum(record["tokens_per_second"] * record["seconds"] for record in timed)
    phases = dict.fromkeys(name for record in timed for name in record if name.startswith("seconds_"))
    spent = {name.removeprefix("seconds_"): sum(record.get(name, 0.0) for record in timed) for name in phases}
    spent["other"] = max(0.0, total - sum(spent.values()))
    rows = [(phase, format_number(seconds), f"{seconds / total:.0%}") for phase, seconds in spent.items()]
    rows.append(("all steps", format_number(total), "100%"))
    return [_table(("phase", "seconds", "share"), rows), f"{tokens / total:.0f} tokens a second, over all steps."]


def _told(event: Mapping[str, Any]) -> str:
    """An event as a line."""
    about = {name: value for name, value in event.items() if name not in ("time", "event", "step", "message")}
    said = event.get("message") or ", ".join(f"{name} {value}" for name, value in about.items())
    where = f"after step {event['step']}, " if "step" in event else ""
    return f"{where}{event['event']}: {said}"


def _table(columns: Seq[str], rows: Seq[Seq[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    lines.insert(1, "|---" + "|---:" * (len(columns) - 1) + "|")
    return "\n".join(lines)
