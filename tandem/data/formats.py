"""TRL's dataset formats, read from one row.

Each comes as plain strings or as conversations (lists of messages):

- language modeling: ``text``, or ``messages``
- prompt-only: ``prompt``
- prompt-completion: ``prompt``, ``completion``
- preference: ``prompt``, ``chosen``, ``rejected``; without ``prompt`` (or with a plain one beside whole
  conversations), it is what ``chosen`` and ``rejected`` begin with in common
"""

from __future__ import annotations

from itertools import takewhile

from tandem.data.rows import Row, require_column
from tandem.errors import UserError
from tandem.types import Message

Content = str | list[Message]


def content(row: Row, column: str) -> Content:
    """The column's text or messages. Raises UserError where it is missing or neither.

    Keys of a message that hold None are left out (parquet fills them in for every message), but ``content``.
    """
    require_column(row, column)
    value = row[column]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f"column {column!r} must be a string or a list of messages, not a {type(value).__name__}")
    if not value:
        raise UserError(f"column {column!r} is an empty list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"column {column!r}: message {i} must be an object with a 'role' and a 'content'")
    return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in value]


def messages(row: Row, column: str) -> list[Message]:
    """The column's messages. Raises UserError where it is missing or holds something else."""
    value = content(row, column)
    if isinstance(value, str):
        raise UserError(f"column {column!r} must be a list of messages, not a string")
    return value


def prompt_completion(row: Row) -> tuple[Content, Content]:
    """``prompt`` and ``completion``, both text or both messages."""
    prompt, completion = content(row, "prompt"), content(row, "completion")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise UserError("columns 'prompt' and 'completion' must both be strings or both be lists of messages")
    return prompt, completion


def preference(row: Row) -> tuple[Content, Content, Content]:
    """Prompt, chosen and rejected, all text or all messages; an implicit prompt is taken out of the answers."""
    chosen, rejected = content(row, "chosen"), content(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError("columns 'chosen' and 'rejected' must both be strings or both be lists of messages")
    if row.get("prompt") is not None:
        prompt = content(row, "prompt")
        if isinstance(prompt, str) == isinstance(chosen, str):
            return prompt, chosen, rejected
        if isinstance(chosen, str):
            raise UserError("column 'prompt' is a list of messages, so 'chosen' and 'rejected' must be too")
    return extract_prompt(chosen, rejected)


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
        while cut and chosen[cut - 1].isalnum() and _inside_word(chosen, rejected, cut):
            cut -= 1
        if cut and chosen[cut - 1] == " ":
            cut -= 1
    elif cut == 0:
        raise UserError("'chosen' and 'rejected' share no first message, so there is no prompt; give a 'prompt' column")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _inside_word(chosen: Content, rejected: Content, cut: int) -> bool:
    return any(str(text[cut : cut + 1]).isalnum() for text in (chosen, rejected))
