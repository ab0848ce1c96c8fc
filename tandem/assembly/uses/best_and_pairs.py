"""Judged samples made into datasets to train on: the best of each prompt, or its best against its worst."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from tandem.assembly.uses.sampled import OF_A_SAMPLE
from tandem.runs.lines import iterate_lines, json_line
from tandem.whole import write_aside

Row = Mapping[str, Any]


def write_best(samples: Path, out: Path, min_reward: float | None) -> dict[str, int]:
    """Each prompt with its best completion, the first of several; counts of prompts.

    ``unjudged`` are those without any reward, ``below`` those whose best has less than ``min_reward``.
    """

    def best_of(judged: list[Row]) -> tuple[str, Row]:
        if not judged:
            return "unjudged", {}
        best = max(judged, key=lambda row: row["reward"])
        kept = min_reward is None or best["reward"] >= min_reward
        return "kept" if kept else "below", {name: best[name] for name in ("completion", "reward")}

    return _write(samples, out, best_of)


def write_pairs(samples: Path, out: Path) -> dict[str, int]:
    """Each prompt's best completion as ``chosen``, its worst as ``rejected``; counts of prompts.

    ``ties`` are those whose rewards or whose two texts are equal, ``unjudged`` those with fewer than 2 rewards.
    """

    def pair_of(judged: list[Row]) -> tuple[str, Row]:
        if len(judged) < 2:
            return "unjudged", {}
        ends = {"chosen": max, "rejected": min}
        pair: dict[str, Row] = {name: end(judged, key=lambda row: row["reward"]) for name, end in ends.items()}
        alike = any(pair["chosen"][name] == pair["rejected"][name] for name in ("reward", "completion"))
        texts = {name: row["completion"] for name, row in pair.items()}
        return "ties" if alike else "kept", texts | {f"{name}_reward": row["reward"] for name, row in pair.items()}

    return _write(samples, out, pair_of)


def _write(samples: Path, out: Path, choose: Callable[[list[Row]], tuple[str, Row]]) -> dict[str, int]:
    """A row for each prompt that is kept: its columns, and what is chosen of its samples that have a reward."""
    counts = {"kept": 0, "below": 0, "ties": 0, "unjudged": 0}

    def lines() -> Iterator[str]:
        for _, rows in groupby(iterate_lines(samples), key=lambda row: row["row"]):
            judged: list[Row] = [row for row in rows if row["stop"] != "error" and row.get("reward") is not None]
            what, chosen = choose(judged)
            counts[what] += 1
            if what == "kept":
                columns = {name: value for name, value in judged[0].items() if name not in OF_A_SAMPLE}
                yield json_line({**columns, **chosen})

    write_aside(out, lines())
    return counts
