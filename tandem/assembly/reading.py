"""The rows of a run, read and made to be of the kind that its method reads; and the order in which they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any, TypeVar

from tandem.assembly.configs.evaluation_sections import EvaluationSection
from tandem.assembly.configs.methods import read_kind
from tandem.assembly.configs.sections import DatasetSection
from tandem.data import formats
from tandem.data.columns import NAMES, shape
from tandem.data.items import Counts
from tandem.data.order import Order
from tandem.data.room import Room
from tandem.data.rows import Dataset, load_rows, present
from tandem.errors import UserError, counted
from tandem.methods.table import ROWS
from tandem.runs.progress import Progress, say

Read = TypeVar("Read")
Built = TypeVar("Built")


def load_data(section: DatasetSection, kind: str) -> Dataset:
    """The rows of ``data``, as rows of their kind (``formats.COLUMNS``).

    Read before any model, since a mistake in them shows soonest. Raises UserError for one, naming the commands that
    rows with such columns are for, where they are for others.
    """
    return made_of_kind(read_data(section), without_idle(section, kind), kind)


def read_data(section: DatasetSection) -> Dataset:
    """The rows of ``data``, as they are there."""
    return load_rows(section.data, split=section.split, max_samples=section.max_samples)


def made_of_kind(rows: Dataset, section: DatasetSection, kind: str) -> Dataset:
    """Rows made what the keys of a section say. Raises UserError as ``load_data``."""
    rows = of_kind(shape(rows, section, kind), kind)
    if section.chat_template is not None and not any(map(formats.conversational, rows)):
        raise UserError(
            f"chat_template: no row of {rows.source} has a conversation; leave it out, or add --apply-chat-template"
        )
    return rows


def load_held_out(section: EvaluationSection, data: DatasetSection, kind: str) -> dict[str, Dataset]:
    """The rows of each held-out set, by its name; their columns are made what ``data``'s are made."""
    sets = {
        name: load_rows(source, split=section.eval_split, max_samples=section.max_eval_samples)
        for name, source in section.sets.items()
    }
    keys = without_idle(data, kind)
    return {name: of_kind(shape(rows, keys, kind, strict=False), kind) for name, rows in sets.items()}


def without_idle(section: DatasetSection, kind: str) -> DatasetSection:
    """A run's section without keys of columns that rows of this kind do not have: they were said to have no effect."""
    part = "samples" if kind == "prompts" else kind
    needed = {
        f.name: kinds for f in fields(section) for other, *kinds in f.metadata.get("needs", ()) if other == "part"
    }
    idle: dict[str, Any] = {name: None for name in NAMES if part not in needed.get(name, (part,))}
    return replace(section, **idle)


def of_kind(rows: Dataset, kind: str) -> Dataset:
    """The rows. Raises UserError for the first that is of another kind, naming the commands that it is for."""
    for index in range(len(rows)):
        with rows.at(index) as row:
            try:
                formats.require_kind(row, kind)
            except UserError as error:
                there, first = ({name for name, value in one.items() if value is not None} for one in (row, rows[0]))
                if there < first:
                    lacks = ", ".join(repr(name) for name in rows[0] if name in first - there)
                    raise UserError(
                        f"no column {lacks}, as the first row has; columns present: {present(row)}"
                    ) from error
                fitting = [name for fits in formats.kinds(row) for name in readers_of(fits)]
                if fitting:
                    named = f"such columns are for {', '.join(dict.fromkeys(fitting))}"
                    raise UserError(f"{error}; {named}, unless --input-key and its like name others") from error
                raise
    return rows


def readers_of(kind: str) -> list[str]:
    """The commands that read rows of this kind."""
    return ["methods on samples"] if kind == "prompts" else [name for name in ROWS if read_kind(name) == kind]


def ordered(rows: Dataset, counts: Counts, seed: int) -> Order:
    """The order in which a run goes through what was made of these rows: all of it, or each source by its weight."""
    weights = [part.weight for part in rows.parts if part.weight is not None]
    return Order(counts.items_of, seed, weights) if weights else Order(sum(counts.items_of), seed)


def describe_data(rows: Dataset, counts: Counts, order: Order, items: int, steps: int) -> str:
    """What is kept of the rows, how many times ``items`` go through it, and the share of each of several sources."""
    size, weighted = sum(counts.items_of), len(order.shares) > 1
    said = f"{counts}, " + (f"{steps} steps" if weighted else f"gone through {items / size:.2f} times in {steps} steps")
    if len(rows.parts) == 1:
        return said
    shares = order.shares if weighted else [Fraction(count, size) for count in counts.items_of]
    return f"{said}: " + ", ".join(
        f"{part.name} {float(share):.1%}, {float(share * items / max(count, 1)):.2f} times"
        for part, share, count in zip(rows.parts, shares, counts.items_of, strict=True)
    )


def by_key(rows: Read, held_out: Mapping[str, Read]) -> dict[str, Read]:
    """All that a run reads, each under the key that names it, and its own name where it has one."""
    return {"data": rows} | {f"eval_data {name}".rstrip(): one for name, one in held_out.items()}


def tokenized(build: Callable[..., Built], rows: Dataset, tokenizer: Any, *room: Room) -> Built:
    """The items that rows become (``tandem.data.items``), with a bar where that takes longer than a second."""
    say(f"tokenizing {counted(len(rows), 'row')} of {rows.source}")
    started = time.monotonic()
    with ExitStack() as stack:
        bar: Progress | None = None

        def on_progress(done: int, total: int) -> None:
            nonlocal bar
            if bar is None and time.monotonic() - started > 1:
                bar = stack.enter_context(Progress(f"tokenizing {rows.source}", total=total, start=done))
            if bar is not None:
                bar.update(done)

        return build(rows, tokenizer, *room, on_progress=on_progress)
