"""Judged samples made into datasets to train on: the best of each prompt, or its best against its worst."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from tandem.assembly.sampled import OF_A_SAMPLE
from tandem.runs.lines import iterate_lines, json_line, write_aside

Row = Mapping[str, Any]


def groups_in(path: Path) -> Iterator[list[Row]]:
    """The rows of each prompt in a ``samples.jsonl``, those without a reward left out."""
    for _, rows in groupby(iterate_lines(path), key=lambda row: row["row"]):
        yield [row for row in rows if row["stop"] != "error" and row.get("reward") is not None]


def write_best(samples: Path, out: Path, min_reward: float | None) -> dict[str, int]:
    """Each prompt with its best completion, the first of several; counts of prompts.

    ``unjudged`` are those without any reward, ``below`` those whose best has less than ``min_reward``.
    """
    counts = {"kept": 0, "below": 0, "unjudged": 0}

    def rows() -> Iterator[Row]:
        for group in groups_in(samples):
            best = max(group, key=lambda row: row["reward"], default=None)
            below = best is not None and min_reward is not None and best["reward"] < min_reward
            counts["unjudged" if best is None else "below" if below else "kept"] += 1
            if best is not None and not below:
                yield _columns(best) | {"completion": best["completion"], "reward": best["reward"]}

    _write(out, rows())
    return counts


def write_pairs(samples: Path, out: Path) -> dict[str, int]:
    """Each prompt's best completion as ``chosen``, its worst as ``rejected``; counts of prompts.

    ``ties`` are those whose rewards or whose two texts are equal, ``unjudged`` those with fewer than 2 rewards.
    """
    counts = {"kept": 0, "ties": 0, "unjudged": 0}

    def rows() -> Iterator[Row]:
        for group in groups_in(samples):
            if len(group) < 2:
                counts["unjudged"] += 1
                continue
            best = max(group, key=lambda row: row["reward"])
            worst = min(group, key=lambda row: row["reward"])
            if best["reward"] == worst["reward"] or best["completion"] == worst["completion"]:
                counts["ties"] += 1
                continue
            counts["kept"] += 1
            yield _columns(best) | {
                "chosen": best["completion"],
                "rejected": worst["completion"],
                "chosen_reward": best["reward"],
                "rejected_reward": worst["reward"],
            }

    _write(out, rows())
    return counts


def _columns(row: Row) -> dict[str, Any]:
    """The prompt and the other columns of its row in the dataset that was sampled."""
    return {name: value for name, value in row.items() if name not in OF_A_SAMPLE}


def _write(out: Path, rows: Iterable[Row]) -> None:
    write_aside(out, map(json_line, rows))
