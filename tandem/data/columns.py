"""Rows of other datasets made into rows of TRL's formats: their columns named, their texts framed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tandem.data.rows import Dataset, Row, present
from tandem.data.sources import NAMES, Columns, parse_condition
from tandem.errors import UserError

ANSWERS = ("completion", "chosen", "rejected")
"""Columns of what is said to a prompt."""


@dataclass(frozen=True)
class Shaping:
    """How a row becomes one of its kind (``formats.COLUMNS``)."""

    keys: Columns
    kind: str

    def steps(self) -> Iterator[tuple[str, Callable[[Row], Row], str]]:
        """The keys that ask for something, in this order: each with what it does to a row, which returns the row itself
        where it changes nothing, and with when it changes none at all."""
        keys = self.keys
        if any(getattr(keys, key) for key in NAMES):
            yield "keys", self._rename, ""
        if keys.condition is not None:
            yield "condition", self._condition, "it is empty"
        if keys.input_template is not None:
            yield "input_template", self._frame, "none has a 'prompt' that is text"
        if keys.apply_chat_template:
            yield "apply_chat_template", self._take_turns, "none has a 'prompt' or an answer that is text"
        if keys.system is not None:
            none = "none has a conversation without a system message; for plain prompts add --apply-chat-template"
            yield "system", self._instruct, none

    def _rename(self, row: Row) -> Row:
        """All at once, so that two columns may change places. What had the name before is left out."""
        renamed: Row = {}
        taken = set()
        for key, column in NAMES.items():
            if (name := getattr(self.keys, key)) is None:
                continue
            if row.get(name) is None:
                raise UserError(f"no column {name!r} ({key}); columns present: {present(row)}")
            several = self.kind == "steps" and key in ("output_key", "label_key")
            renamed[column + "s" * several] = row[name]
            taken.add(name)
        row = renamed | {name: value for name, value in row.items() if name not in renamed and name not in taken}
        if self.keys.input_key is not None and self.kind == "demonstrations" and row.get("completion") is None:
            whole = row.pop("prompt")
            row["messages" if isinstance(whole, list) else "text"] = whole
        return row

    def _condition(self, row: Row) -> Row:
        assert self.keys.condition is not None
        said = ""
        for text, column, spec in parse_condition(self.keys.condition):
            said += text
            if column is None:
                continue
            if (value := row.get(column)) is None:
                raise UserError(f"no column {column!r} (condition); columns present: {present(row)}")
            try:
                said += format(value, spec)
            except (ValueError, TypeError) as error:
                raise UserError(f"condition: column {column!r} has {value!r}: {error}") from error
        prompt = row.get("prompt")
        if isinstance(prompt, str):
            return row | {"prompt": prompt + said}
        if not (isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict)):
            raise UserError(f"condition: no column 'prompt' to put it behind; columns present: {present(row)}")
        last = prompt[-1]
        if last.get("role") != "user" or not isinstance(last.get("content"), str):
            raise UserError("condition: the prompt does not end in a text of the user's to put it behind")
        return row | {"prompt": [*prompt[:-1], last | {"content": last["content"] + said}]}

    def _frame(self, row: Row) -> Row:
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            return row
        before, after = (self.keys.input_template or "{}").replace("\\n", "\n").replace("\\t", "\t").split("{}")
        return row | {"prompt": before + prompt + after}

    def _take_turns(self, row: Row) -> Row:
        said = {"prompt": "user"} | dict.fromkeys(ANSWERS, "assistant")
        texts = {column: role for column, role in said.items() if isinstance(row.get(column), str)}
        if texts and row.get("prompt") is None:
            raise UserError(
                f"apply_chat_template: no column 'prompt' to tell from the answer; columns present: {present(row)}"
            )
        turns = {column: [{"role": role, "content": row[column]}] for column, role in texts.items()}
        return row | turns if turns else row

    def _instruct(self, row: Row) -> Row:
        begins = [column for column in ("messages", "prompt") if isinstance(row.get(column), list)]
        columns = begins or [column for column in ANSWERS if isinstance(row.get(column), list)]
        bare = [column for column in columns if not _instructed(row[column])]
        return (
            row | {column: [{"role": "system", "content": self.keys.system}, *row[column]] for column in bare}
            if bare
            else row
        )


def _instructed(messages: list[Any]) -> bool:
    """Whether a conversation begins with a system message of its own."""
    return bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") in ("system", "developer")


def shape(rows: Dataset, columns: Columns, kind: str, *, strict: bool = True) -> Dataset:
    """The dataset with its columns as its ``kind`` names them.

    Raises UserError with a row's place where it lacks a column that a key names, and, where ``strict``, naming the key
    that changes no row.
    """
    for key, step, why in Shaping(columns, kind).steps():
        shaped = rows.mapped(step)
        if strict and all(after is before for after, before in zip(shaped, rows, strict=True)):
            raise UserError(f"{key}: has no effect on any row of {rows.source}: {why}")
        rows = shaped
    return rows
