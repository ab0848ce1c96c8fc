"""A dataset as a model will see it: some rows with what is trained of them, and the lengths of all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from itertools import accumulate, groupby, pairwise
from typing import Any

from rich.console import Console
from rich.text import Text

from tandem.assembly.configs.methods import read_kind
from tandem.assembly.feeds import builders
from tandem.assembly.reading import made_of_kind, ordered, read_data, readers_of, tokenized, without_idle
from tandem.cli.configs import DataConfig
from tandem.data import formats
from tandem.data.chat import set_template
from tandem.data.columns import shape
from tandem.data.items import Counts, build_prompts
from tandem.data.room import Room
from tandem.data.rows import Dataset, present
from tandem.errors import UserError
from tandem.models.loading import load_tokenizer
from tandem.models.proof.limits import read_limits
from tandem.models.trusted import source_of
from tandem.runs.table import print_table
from tandem.types import Prompt, Sequence

LONGEST_RUN = 160
"""160 tokens in a row that are all trained, or all not, are shown in full; of more, the first and last 60."""
WIDTH = 40
"""40 characters are the longest bar."""


@dataclass(frozen=True)
class Said:
    """A text that goes through a model: its token ids and which of them are trained, under a name in its item."""

    name: str
    token_ids: Seq[int]
    trainable: Seq[bool]


def run(config: DataConfig) -> int:
    """The command."""
    console = Console(soft_wrap=True, highlight=False)
    rows = read_data(config.data)
    kind = _kind(rows, config)
    # With a method, keys of a file that its rows do not have were said to have no effect.
    rows = made_of_kind(rows, without_idle(config.data, kind) if config.shown.method else config.data, kind)
    readers = " and ".join([config.shown.method] if config.shown.method else readers_of(kind))
    if config.tokenizer.model is None:
        _show_plain(console, rows, kind, config.shown.rows)
        print(f"\nThese are rows for {readers}; add --model to see their tokens and what of them is trained.")
        return 0
    source = source_of(config.tokenizer.model, config.tokenizer.trust_remote_code)
    tokenizer = load_tokenizer(source)
    set_template(tokenizer, config.data.chat_template)
    room = Room(config.data.max_length, [read_limits(source)], long_rows=config.data.long_rows)
    build = build_prompts if kind == "prompts" else builders(config.data)[kind]
    items, counts = tokenized(build, rows, tokenizer)
    whole = [said for item in items for said in says(item)]
    long = sum(any(len(said.token_ids) > (room.limit or 0) for said in says(item)) for item in items)
    if long and config.data.long_rows != "refuse":
        items, counts = build(rows, tokenizer, room)
    _show_items(console, items[: config.shown.rows], tokenizer)
    kept = [said for item in items for said in says(item)]
    _show_lengths(console, f"{rows.source}: {counts}, as for {readers}", kept)
    _show_sources(console, rows, counts, items)
    lost = sum(len(said.token_ids) for said in whole) - sum(len(said.token_ids) for said in kept)
    longest = max(len(said.token_ids) for said in whole)
    if long:
        print(f"\n{long} of {len(rows)} rows are longer than {room.limit} tokens, the longest has {longest}: ", end="")
        if config.data.long_rows == "refuse":
            print("a run refuses them; see --long-rows and --max-length")
        else:
            print(f"{counts.truncated} are cut and {counts.dropped} left out, {lost:,} tokens in all")
    return 0


def says(item: Any) -> list[Said]:
    """The texts of an item, by the names of its fields."""
    if isinstance(item, Prompt):
        return [Said("prompt", item.token_ids, [False] * len(item.token_ids))]
    if isinstance(item, Sequence):
        return [Said("", item.token_ids, item.trainable)]
    values = {f.name: getattr(item, f.name) for f in fields(item)}
    return [Said(name, one.token_ids, one.trainable) for name, one in values.items() if isinstance(one, Sequence)]


def notes(item: Any) -> str:
    """What an item has beside its texts: a margin, where there is one, a label."""
    if isinstance(item, Prompt | Sequence):
        return ""
    values = {f.name: getattr(item, f.name) for f in fields(item)}
    beside = {name: value for name, value in values.items() if not isinstance(value, Sequence)}
    return "".join(f", {name} {value}" for name, value in beside.items() if (name, value) != ("margin", 0.0))


def stretches(said: Said, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The text in stretches that are trained or not, the middle of a long one left out.

    Each is what it adds to the text before it, so that words keep the spaces in front of them.
    """
    begin, before = 0, ""
    for trained, tokens in groupby(said.trainable):
        end = begin + len(list(tokens))
        through = tokenizer.decode(said.token_ids[:end], clean_up_tokenization_spaces=False)
        text = through[len(before) :]
        if end - begin > LONGEST_RUN:
            first, last = (
                tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                for ids in (said.token_ids[begin : begin + 60], said.token_ids[end - 60 : end])
            )
            text = f"{first} … {end - begin - 120} tokens … {last}"
        yield text, trained
        begin, before = end, through


def _kind(rows: Dataset, config: DataConfig) -> str:
    """The method's kind of rows, or of those that the first row is of the one that most of its columns are for."""
    if config.shown.method is not None:
        return read_kind(config.shown.method)
    first = rows.head(1)
    found: dict[str, int] = {}
    for kind, ways in formats.COLUMNS.items():
        (row,) = shape(first, config.data, kind, strict=False)
        found[kind] = max((len(way) for way in ways if formats.has(row, way)), default=0)
    kind = max(found, key=found.__getitem__)
    if not found[kind]:
        raise UserError(
            f"{rows.where(0)}: no method reads rows with the columns {present(rows[0])}; "
            "--input-key and its like name the columns that are meant"
        )
    return kind


def _show_items(console: Console, items: Seq[Any], tokenizer: Any) -> None:
    """Trained stretches in colour on a terminal, and between marks elsewhere."""
    for number, item in enumerate(items, start=1):
        for said in says(item):
            trained = sum(said.trainable[1:])
            head = f"row {number}{f', {said.name}' if said.name else ''}: {len(said.token_ids)} tokens"
            head += "" if isinstance(item, Prompt) else f", {trained} trained"
            console.print(Text(f"\n{head}{notes(item)}", style="bold"))
            shown = Text()
            for text, train in stretches(said, tokenizer):
                if console.is_terminal:
                    shown.append(text, style="black on green" if train else "")
                else:
                    shown.append(f"⟦{text}⟧" if train else text)
            console.print(shown)


def _show_plain(console: Console, rows: Dataset, kind: str, count: int) -> None:
    """Rows as they are read, and their lengths in characters."""
    for index in range(min(count, len(rows))):
        console.print(Text(f"\n{rows.where(index)}", style="bold"))
        for name, value in rows[index].items():
            console.print(Text(f"  {name}: {_text(value)}"))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lengths = {name: [len(_text(row[name])) for row in rows if row.get(name) is not None] for name in columns}
    _print_lengths(console, f"{rows.source}: {len(rows)} rows ({kind}), columns in characters", lengths)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _show_lengths(console: Console, title: str, said: Seq[Said]) -> None:
    lengths: dict[str, list[int]] = {}
    for one in said:
        lengths.setdefault(one.name or "tokens", []).append(len(one.token_ids))
        if one.name != "prompt":
            lengths.setdefault(f"{one.name} trained".strip(), []).append(sum(one.trainable[1:]))
    _print_lengths(console, title, lengths)
    totals = [len(one.token_ids) for one in said]
    bar = "█" if console.is_terminal else "#"
    bins: dict[int, int] = {}
    for total in totals:
        bins[total.bit_length()] = bins.get(total.bit_length(), 0) + 1
    print()
    for power in range(min(bins), max(bins) + 1):
        count = bins.get(power, 0)
        low, high = 1 << (power - 1), (1 << power) - 1
        print(f"  {f'{low} to {high}':>16} tokens  {bar * round(WIDTH * count / max(bins.values()))} {count}".rstrip())


def _print_lengths(console: Console, title: str, lengths: dict[str, list[int]]) -> None:
    rows = []
    for name, values in lengths.items():
        rising = sorted(values)
        at = [rising[int(share * (len(rising) - 1))] for share in (0, 0.5, 0.95, 1)]
        rows.append((name, *(f"{value:,}" for value in (len(values), *at, sum(values)))))
    print_table(title, ("", "texts", "min", "median", "p95", "max", "sum"), rows, console=console)


def _show_sources(console: Console, rows: Dataset, counts: Counts, items: Seq[Any]) -> None:
    """Of several sources: how much is in each, and what share of a run's items and tokens it has."""
    if len(rows.parts) == 1:
        return
    order = ordered(rows, counts, 0)
    sizes = counts.items_of
    weighted = len(order.shares) > 1
    shares = [float(share) for share in order.shares] if weighted else [size / max(sum(sizes), 1) for size in sizes]
    bounds = list(accumulate(sizes, initial=0))
    mean = [
        sum(len(said.token_ids) for item in items[first:last] for said in says(item)) / max(last - first, 1)
        for first, last in pairwise(bounds)
    ]
    all_tokens = sum(share * tokens for share, tokens in zip(shares, mean, strict=True))
    table = [
        (part.name, f"{part.rows:,}", f"{size:,}", f"{share:.1%}", f"{share * tokens / all_tokens:.1%}")
        for part, size, share, tokens in zip(rows.parts, sizes, shares, mean, strict=True)
    ]
    print_table("sources", ("", "rows", "kept", "share of a run", "of its tokens"), table, console=console)
