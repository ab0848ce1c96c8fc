"""TRL's dataset formats, read from one row: which columns each kind of rows has, and what is in them.

Each kind comes as plain strings or as conversations (lists of messages):

- language modeling: ``text``, or ``messages``
- prompt-only: ``prompt``
- prompt-completion: ``prompt``, ``completion``
- preference: ``prompt``, ``chosen``, ``rejected``; without ``prompt`` (or with a plain one beside whole
  conversations), it is what ``chosen`` and ``rejected`` begin with in common
- unpaired preference: ``prompt``, ``completion``, ``label``; a preference is two of them
- stepwise supervision: ``prompt``, ``completions``, ``labels``, one of each a step; or ``labels`` and a ``prompt``
  whose steps end in a placeholder
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from tandem.data.rows import Row, present, require_column, there
from tandem.errors import UserError, kind_of
from tandem.types import Message

Content = str | list[Message]
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "demonstrations": (("text",), ("messages",), ("prompt", "completion")),
    "preferences": (("chosen", "rejected"),),
    "unpaired": (("prompt", "completion", "label"), ("chosen", "rejected")),
    "steps": (("prompt", "completions", "labels"), ("prompt", "labels")),
    "text": (("text",),),
    "prompts": (("prompt",),),
}
"""The columns of each kind of rows, in each of the ways in which they may be there."""
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that most templates know. Others are left to the template, but for those that are one of these mistyped."""
_INSTEAD = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""What an assistant's message may have instead of a content."""


def kinds(row: Row) -> list[str]:
    """The kinds of rows that the columns of this one make it."""
    return [kind for kind, ways in COLUMNS.items() if any(has(row, way) for way in ways)]


def require_kind(row: Row, kind: str) -> None:
    """Raises UserError where the row lacks the columns of its kind, and names those it has."""
    ways = COLUMNS[kind]
    if any(has(row, way) for way in ways):
        return
    if len(ways) == 1:
        require_column(row, next(column for column in ways[0] if row.get(column) is None))
    *others, last = (" with ".join(map(repr, way)) for way in ways)
    lacking = [column for way in ways for column in way if row.get(column) is None]
    raise UserError(f"no column {', no '.join(others)}, and no {last}; columns {there(row, lacking)}")


def has(row: Row, columns: Iterable[str]) -> bool:
    """Whether the row has something in each of the columns."""
    return all(row.get(column) is not None for column in columns)


def conversational(row: Row) -> bool:
    """Whether a column of any kind of rows holds messages."""
    columns = {column for ways in COLUMNS.values() for way in ways for column in way}
    return any(isinstance(row.get(column), list) for column in columns)


def number(row: Row, column: str, default: float) -> float:
    """The column's number, also where it is written as text (CSV). Raises UserError for anything else."""
    value = row.get(column)
    if value is None:
        return default
    try:
        found = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"column {column!r} must be a finite number, not {value!r}")
    return found


def truth(row: Row, column: str) -> bool:
    """The column's true or false, also as 1 or 0 and as text (CSV). Raises UserError for anything else."""
    require_column(row, column)
    value = row[column]
    found = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    if found is None or isinstance(value, float):
        raise UserError(f"column {column!r} must be true or false, not {value!r}")
    return found


def content(row: Row, column: str) -> Content:
    """The column's text or messages. Raises UserError where it is missing, neither, or holds a malformed message.

    Keys of a message that hold None are left out (parquet fills them in for every message), but ``content``.
    """
    require_column(row, column)
    value = row[column]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f"column {column!r} must be a string or a list of messages, not {kind_of(value)}")
    if not value:
        raise UserError(f"column {column!r} is an empty list of messages")
    for i, message in enumerate(value):
        if fault := _fault(message):
            raise UserError(f"column {column!r}: message {i} {fault}")
    return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in value]


def _fault(message: Any) -> str:
    """What is wrong with a message, or nothing. Without its content it would be rendered as an empty turn."""
    if not isinstance(message, dict):
        return f"must be an object with a 'role' and a 'content', not {kind_of(message)}"
    present = {key: value for key, value in message.items() if value is not None}
    for wanted in ("role", "content"):
        if wanted not in present and not (wanted == "content" and any(key in present for key in _INSTEAD)):
            near = difflib.get_close_matches(wanted, [*present.keys() - {"role", "content"}], n=1)
            hint = f"; did you mean {wanted!r} by {near[0]!r}?" if near else ""
            return f"has no {wanted!r}" + (hint or f" (it has {', '.join(map(repr, present)) or 'nothing'})")
    role, text = present["role"], present.get("content", "")
    if not isinstance(role, str):
        return f"must have text as its 'role', not {kind_of(role)}"
    if role not in ROLES and (near := difflib.get_close_matches(role, ROLES, n=1, cutoff=0.75)):
        return f"has the role {role!r}; did you mean {near[0]!r}?"
    if not isinstance(text, str) and not (isinstance(text, list) and all(isinstance(part, dict) for part in text)):
        return f"must have text (or a list of parts, each an object) as its 'content', not {kind_of(text)}"
    return ""


def messages(row: Row, column: str) -> list[Message]:
    """The column's messages. Raises UserError where it is missing or holds something else."""
    value = content(row, column)
    if isinstance(value, str):
        raise UserError(f"column {column!r} must be a list of messages, not a string")
    return value


def prompt_completion(row: Row) -> tuple[Content, Content]:
    """``prompt`` and ``completion``, both text or both messages."""
    return _alike(row, "prompt", "completion")


def _alike(row: Row, first: str, second: str) -> tuple[Content, Content]:
    one, other = content(row, first), content(row, second)
    if isinstance(one, str) != isinstance(other, str):
        raise UserError(f"columns {first!r} and {second!r} must both be strings or both be lists of messages")
    return one, other


def preference(row: Row) -> tuple[Content, Content, Content]:
    """Prompt, chosen and rejected, all text or all messages; an implicit prompt is taken out of the answers."""
    chosen, rejected = _alike(row, "chosen", "rejected")
    if row.get("prompt") is not None:
        prompt = content(row, "prompt")
        if isinstance(prompt, str) == isinstance(chosen, str):
            return prompt, chosen, rejected
        if isinstance(chosen, str):
            raise UserError("column 'prompt' is a list of messages, so 'chosen' and 'rejected' must be too")
    return extract_prompt(chosen, rejected)


def unpaired(row: Row) -> list[tuple[Content, Content, bool]]:
    """Prompt, answer, and whether it is desirable: one of them, or the two of a preference, the chosen one first."""
    if row.get("completion") is None and row.get("chosen") is not None and row.get("rejected") is not None:
        prompt, chosen, rejected = preference(row)
        return [(prompt, chosen, True), (prompt, rejected, False)]
    prompt, completion = prompt_completion(row)
    return [(prompt, completion, truth(row, "label"))]


def steps(row: Row, placeholder: str | None = None) -> tuple[Content, list[str], list[float]]:
    """The prompt, the steps of its answer, and each step's label: from 0 (wrong) to 1 (right).

    Without ``completions`` the prompt's text is steps alone, each of which a ``placeholder`` ends. Labels are true and
    false, ``+`` and ``-``, or probabilities. Raises UserError for anything else, and for another number of labels.
    """
    require_kind(row, "steps")
    prompt, found = content(row, "prompt"), row.get("completions")
    if found is None:
        if placeholder is None:
            raise UserError(
                "no column 'completions'; where a placeholder in 'prompt' ends each step, name it "
                f"(step_placeholder); columns present: {present(row)}"
            )
        *found, rest = prompt.split(placeholder) if isinstance(prompt, str) else [""]
        found, prompt = [text.strip() for text in found], ""
        if rest.strip():
            raise UserError(
                f"column 'prompt' goes on after the last placeholder {placeholder!r}: {rest.strip()[:40]!r}"
            )
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise UserError("column 'completions' must be a list of the texts of steps, none of them empty")
    labels = row["labels"]
    if not isinstance(labels, list) or len(labels) != len(found) or not found:
        count = f"{len(labels)} of them" if isinstance(labels, list) else f"a {type(labels).__name__}"
        raise UserError(f"column 'labels' must be a list with one label for each of {len(found)} steps, not {count}")
    return prompt, found, [_step_label(label, number) for number, label in enumerate(labels, start=1)]


def _step_label(label: Any, step: int) -> float:
    known = {True: 1.0, False: 0.0, "+": 1.0, "-": 0.0}
    value = known.get(label, label) if isinstance(label, bool | str) else label
    if isinstance(value, str) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(
            f"column 'labels': step {step} has {label!r}; a label is true or false, '+' or '-', or a probability from "
            "0 to 1 that the step is right"
        )
    return float(value)


def extract_prompt(chosen: Content, rejected: Content) -> tuple[Content, Content, Content]:
    """Splits off what both begin with: (prompt, chosen, rejected), as TRL's ``extract_prompt`` does.

    Each answer keeps at least one message or character. A text is never cut inside a word, where TRL would (the
    answer's first token would be a piece that no model samples), and the space before an answer belongs to it.
    Raises UserError for conversations that share no message.
    """
    shortest = min(len(chosen), len(rejected))
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    cut = max(min(shared, shortest - 1), 0)
    if isinstance(chosen, str):
        while cut and chosen[cut - 1].isalnum() and any(str(x[cut : cut + 1]).isalnum() for x in (chosen, rejected)):
            cut -= 1
        if cut and chosen[cut - 1] == " ":
            cut -= 1
    elif cut == 0:
        raise UserError("'chosen' and 'rejected' share no first message, so there is no prompt; give a 'prompt' column")
    return chosen[:cut], chosen[cut:], rejected[cut:]
