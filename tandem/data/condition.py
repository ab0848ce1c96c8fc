"""What ``--condition`` says behind a prompt: a text with columns in braces. Nothing is read here."""

from __future__ import annotations

from string import Formatter

from tandem.errors import UserError


def parse_condition(text: str) -> list[tuple[str, str | None, str]]:
    """The template as (text, column or None, format) one after the other. Raises UserError where it is none."""
    try:
        parts = list(Formatter().parse(text.replace("\\n", "\n").replace("\\t", "\t")))
    except ValueError as error:
        raise UserError(f"condition: {text!r} is no template: {error}") from error
    for _, column, spec, conversion in parts:
        if column is not None and (not column.isidentifier() or conversion or "{" in (spec or "")):
            raise UserError(f"condition: {{{column}}} names no column; give a column of the rows, as in {{reward:.1f}}")
    return [(before, column, spec or "") for before, column, spec, _ in parts]
