"""Conversations through the tokenizer's chat template: rendered text, and which parts of it are answers."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from tandem.data.rows import Row
from tandem.errors import UserError
from tandem.types import Message

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def set_template(tokenizer: Any, template: str | None) -> None:
    """Gives the tokenizer a chat template: that of a file, or one of its own by its name. None: it keeps what it has.

    Raises UserError where there is neither, or the file cannot be read or is no template.
    """
    if template is None:
        return
    named, path = tokenizer.chat_template, Path(template)
    if isinstance(named, dict) and template in named:
        tokenizer.chat_template = named[template]
        return
    if not path.is_file():
        names = f" ({', '.join(named)})" if isinstance(named, dict) else ""
        raise UserError(f"chat_template: {template} is no file, and none of the tokenizer's templates{names}")
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=text, tokenize=False)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except TemplateSyntaxError as error:
        raise UserError(f"chat_template: {path}:{error.lineno}: no chat template: {error.message}") from error
    except Exception:
        pass  # it may want more of a conversation than this one; the rows will tell
    tokenizer.chat_template = text


def template_arguments(tokenizer: Any, row: Row) -> dict[str, Any]:
    """What a row adds to the template's call: ``tools`` (a list, or its JSON) and ``chat_template_kwargs`` (TRL).

    Raises UserError where the tokenizer has no chat template, the tools are malformed, or an argument is one that
    Tandem gives. A template is a program, which may run without end, so a row may only name one that the tokenizer has.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the row holds messages but the tokenizer has no chat template; put a chat_template.jinja into the model "
            "folder (an instruct model brings one) or give plain strings"
        )
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"column 'tools' is malformed JSON: {error}") from error
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError("column 'tools' must be a list of objects, or that as JSON")
    arguments = row.get("chat_template_kwargs") or {}
    if not (isinstance(arguments, dict) and all(isinstance(name, str) for name in arguments)):
        raise UserError(f"column 'chat_template_kwargs' must be an object, not a {type(arguments).__name__}")
    ours = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} - {"documents", "chat_template"}
    if taken := sorted(ours & arguments.keys()):
        raise UserError(f"column 'chat_template_kwargs': {taken[0]!r} is given by Tandem, not by a row; leave it out")
    template, known = arguments.get("chat_template"), tokenizer.chat_template
    if template is not None and not (isinstance(known, dict) and template in known):
        raise UserError(
            "column 'chat_template_kwargs': 'chat_template' may only name one of the tokenizer's templates "
            f"({', '.join(known) if isinstance(known, dict) else 'it has one without a name'}); put a template of your "
            "own into the model folder, as chat_template.jinja"
        )
    return {"tools": tools or None, **arguments}


@contextmanager
def _refusals() -> Iterator[None]:
    """The template's own words where it refuses messages, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a template is a program of the model's, and may raise anything
        kind = "" if isinstance(error, TemplateError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"the chat template refuses the messages: {kind}{' '.join(str(error).split())}") from error


def render(messages: list[Message], tokenizer: Any, row: Row, **options: bool) -> str:
    """The chat template's text. Raises UserError with the template's own words where it refuses the messages."""
    arguments = template_arguments(tokenizer, row)
    with _refusals():
        return tokenizer.apply_chat_template(messages, tokenize=False, **arguments, **options)


def render_prompt(messages: list[Message], tokenizer: Any, row: Row) -> str:
    """The text to sample from: a new assistant turn is opened, or the last one continued where it is the assistant's.

    Raises UserError where the last message is from neither user, tool nor assistant (TRL's rule).
    """
    role = messages[-1]["role"]
    if role == "assistant":
        return render(messages, tokenizer, row, continue_final_message=True)
    if role not in ("user", "tool"):
        raise UserError(f"a prompt must end with a message from user, tool or assistant, not from {role!r}")
    return render(messages, tokenizer, row, add_generation_prompt=True)


def until_last_answer(messages: list[Message], start: int = 0) -> list[Message]:
    """The messages up to the last assistant turn. Raises UserError where there is none at or after ``start``."""
    answers = [i for i in range(start, len(messages)) if messages[i]["role"] == "assistant"]
    if not answers:
        raise UserError(f"no assistant message to train on (roles: {', '.join(m['role'] for m in messages[start:])})")
    return messages[: answers[-1] + 1]


def conversation_pieces(messages: list[Message], tokenizer: Any, row: Row, *, start: int = 0) -> list[tuple[str, bool]]:
    """The rendered text as (context, False), (answer, True), …, up to the end of the last answer.

    An answer is what the template adds after the generation prompt for an assistant turn at or after ``start``,
    without the white space that separates turns: nothing is trained behind the end of a turn. Raises UserError
    where the template renders the beginning of a conversation differently once it goes on.
    """
    messages = until_last_answer(messages, start)
    whole = render(messages, tokenizer, row)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for i in range(start, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        opening = render(messages[:i], tokenizer, row, add_generation_prompt=True)
        through = render(messages[: i + 1], tokenizer, row)
        if not whole.startswith(through):
            # Some templates close whatever they render with an end of sequence (Phi-3).
            through = through.removesuffix(tokenizer.eos_token or "")
        if not (through.startswith(opening) and whole.startswith(through)):
            raise UserError(
                f"the chat template renders message {i} differently once the conversation goes on, so its tokens are "
                "not those that would be sampled; use a template with {% generation %} marks, or plain strings"
            )
        end = len(through.rstrip())
        pieces += [(whole[done : len(opening)], False), (whole[len(opening) : end], True)]
        done = max(end, len(opening))
    return pieces


def marks_answers(tokenizer: Any, row: Row) -> bool:
    """Whether the template marks the assistant's text with ``{% generation %}`` and the tokenizer can follow it."""
    arguments = template_arguments(tokenizer, row)
    template = tokenizer.get_chat_template(arguments.get("chat_template"), arguments["tools"])
    return bool(_GENERATION.search(template)) and tokenizer.is_fast


def marked_answers(messages: list[Message], tokenizer: Any, row: Row) -> tuple[list[int], list[bool]]:
    """Token ids and the template's own mask of the answers, up to the end of the last answer."""
    messages = until_last_answer(messages)
    arguments = template_arguments(tokenizer, row)
    with _refusals():
        encoded = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, **arguments
        )
    marks = [bool(mark) for mark in encoded["assistant_masks"]]
    if not any(marks):
        raise UserError("the chat template's {% generation %} marks cover no token of the assistant's messages")
    text = render(messages, tokenizer, row).rstrip()
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids, (marks + marks[-1:] * len(ids))[: len(ids)]
