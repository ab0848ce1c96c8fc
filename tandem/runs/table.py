"""Tables for a person: framed on a terminal, columns of plain text everywhere else."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from rich.box import ROUNDED
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_WIDEST = 60
_VERDICTS = {True: ("✓ ", "green"), False: ("✗ ", "red")}
"""How an answer that is right is shown, and one that is wrong."""


def print_table(title: str, columns: Seq[str], rows: Seq[Seq[str]], *, console: Console | None = None) -> None:
    """Prints a table; the first column is text, the others are set to the right."""
    console = console or Console()
    if not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (columns, ["-" * width for width in widths], *rows)
        ]
        _print_plain(console, "\n".join(["", title, *(line.rstrip() for line in lines)]))
        return
    table = Table(box=ROUNDED, header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


def print_samples(
    title: str, columns: tuple[str, str, str], samples: Seq[tuple[str, str, str]], right: Seq[tuple[bool, bool]]
) -> None:
    """Prints prompts with the answers before and after training, each on one line, long ones cut in the middle.

    ``columns`` name the prompt, the answers before and those after; ``right`` says which of each pair are right.
    """
    console = Console()
    rows = [
        [
            (mark + _one_line(text), style)
            for text, (mark, style) in zip(sample, [("", ""), *(_VERDICTS[one] for one in pair)], strict=True)
        ]
        for sample, pair in zip(samples, right, strict=True)
    ]
    if not console.is_terminal:
        width = max(map(len, columns))
        lines = [[f"  {name:<{width}}  {text}" for name, (text, _) in zip(columns, row, strict=True)] for row in rows]
        _print_plain(console, "\n".join(["", title, *("\n".join([*block, ""]) for block in lines)]).rstrip())
        return
    table = Table(box=ROUNDED, header_style="dim", show_lines=True)
    for column in columns:
        table.add_column(escape(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(text, style=style) for text, style in row))
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


def _one_line(text: str) -> str:
    """Line breaks and other control characters as they are written in Python; the middle left out of a long text."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if len(shown) <= _WIDEST else f"{shown[: _WIDEST - 20]} … {shown[-17:]}"


def _print_plain(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
