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
from transformers.utils.chat_template_utils import render_jinja_template

from tandem.data.rows import Row
from tandem.errors import UserError, kind_of
from tandem.types import Message

Pieces = list[tuple[str, bool]]
"""A text in consecutive pieces, each with whether it is trained."""
THINKING = ("reasoning_content", "thinking")
"""Keys that templates read a message's thinking from."""
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
        raise UserError(f"column 'chat_template_kwargs' must be an object, not {kind_of(arguments)}")
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
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **arguments, **options)
    for i, message in enumerate(messages):
        if isinstance(content := message.get("content"), list) and content and str(content) in text:
            raise UserError(
                f"the chat template writes the parts of message {i}'s 'content' as Python would, {str(content)[:40]}; "
                "give its text as a string, or a chat_template that reads parts"
            )
    return text


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


def last_answer(messages: list[Message]) -> int:
    """Where the last assistant turn stands. Raises UserError where there is none."""
    return len(until_last_answer(messages)) - 1


def conversation_pieces(
    messages: list[Message], tokenizer: Any, row: Row, *, start: int = 0, whole_answers: bool = True
) -> Pieces:
    """The rendered text as (context, False), (answer, True), …, up to the end of the last answer.

    An answer is what the template adds after the generation prompt for an assistant turn at or after ``start``, with
    the turn's end token and without the white space that separates turns: nothing is trained behind the end of a turn.
    Raises UserError where the template renders the beginning of a conversation differently once it goes on (it drops
    earlier thinking, or moves the system message), or, where ``whole_answers`` are wanted, leaves out something of one.
    """
    messages = until_last_answer(messages, start)
    whole = render(messages, tokenizer, row)
    _require_tools(whole, messages, tokenizer, row)
    spans: list[tuple[int, int]] = []
    for i in range(start, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        opening = render(messages[:i], tokenizer, row, add_generation_prompt=True)
        through = render(messages[: i + 1], tokenizer, row)
        if not whole.startswith(through):
            # Some templates close whatever they render with an end of sequence (Phi-3), or the last turn (OLMo 3).
            through = through.removesuffix(tokenizer.eos_token or "")
        if not (through.startswith(opening) and whole.startswith(through)):
            at = f"message {i} differently once the conversation goes on"
            if whole.startswith(through):
                at = f"the answer in message {i} without the beginning that it gives one to sample"
            raise UserError(
                f"the chat template renders {at}, so its tokens are not those that would be sampled; train on the last "
                "answer alone (train_on last), or give a chat_template with {% generation %} marks"
            )
        end = _turn_end(whole, len(opening), len(through), tokenizer)
        if whole_answers:
            _require_said(messages[i], i, whole[len(opening) : end])
        spans.append((len(opening), end))
    return _pieces(whole, spans)


def marks_answers(tokenizer: Any, row: Row) -> bool:
    """Whether the template marks the assistant's text with ``{% generation %}``."""
    arguments = template_arguments(tokenizer, row)
    template = tokenizer.get_chat_template(arguments.get("chat_template"), arguments["tools"])
    return bool(_GENERATION.search(template))


def marked_pieces(messages: list[Message], tokenizer: Any, row: Row) -> Pieces:
    """As ``conversation_pieces``, where the template itself marks what the assistant says.

    Marks are put right where they are too wide (the generation prompt, which nobody samples) or too narrow (without
    the turn's end token). Raises UserError where they cover nothing, or leave something out that an answer says.
    """
    messages = until_last_answer(messages)
    arguments = template_arguments(tokenizer, row)
    template = tokenizer.get_chat_template(arguments.pop("chat_template", None), arguments["tools"])
    with _refusals():
        (whole,), (marks,) = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **arguments},
        )
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    bare = render(messages[:first], tokenizer, row) if first else ""
    header = render(messages[:first], tokenizer, row, add_generation_prompt=True).removeprefix(bare) if first else ""
    spans = []
    for begin, end in marks:
        # A mark may begin anywhere in the header, so the header is looked for up to its length before the mark.
        places = range(begin, max(begin - len(header), -1), -1)
        inside = next((at for at in places if whole.startswith(header, at)), begin - len(header))
        begin = max(begin, inside + len(header))
        if begin < (end := _turn_end(whole, begin, end, tokenizer)):
            spans.append((begin, end))
    if not spans:
        raise UserError("the chat template's {% generation %} marks cover no token of the assistant's messages")
    _require_tools(whole, messages, tokenizer, row)
    said = "".join(whole[begin:end] for begin, end in spans)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            _require_said(message, i, said)
    return _pieces(whole, spans)


def _pieces(text: str, spans: list[tuple[int, int]]) -> Pieces:
    pieces: Pieces = []
    done = 0
    for begin, end in spans:
        pieces += [(text[done:begin], False), (text[begin:end], True)]
        done = max(begin, end)
    return pieces


def _turn_end(text: str, begin: int, end: int, tokenizer: Any) -> int:
    """Where an answer at ``begin`` to ``end`` ends with its end token and without white space after that.

    Its end token is the one it has, or the special token right after it that another one follows, but for white space,
    or nothing: of the next turn's header alone there would be one and then a name.
    """
    end = begin + len(text[begin:end].rstrip())
    special = sorted({str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}, key=len, reverse=True)
    if not special or text[begin:end].endswith(tuple(special)):
        return end
    either = "|".join(map(re.escape, special))
    found = re.compile(rf"({either})\s*(?:{either}|$)").match(text, end)
    return found.end(1) if found else end


def _require_said(message: Message, number: int, answer: str) -> None:
    """Raises UserError where the answer lacks something that the message says: the template leaves it out."""
    content, calls = message.get("content"), message.get("tool_calls") or []
    said = {key: [message[key]] for key in THINKING if isinstance(message.get(key), str)}
    said["content"] = content.removeprefix("<think>").split("</think>") if isinstance(content, str) else []
    said["tool_calls"] = [str(call.get("function", call).get("name", "")) for call in calls if isinstance(call, dict)]
    for key, texts in said.items():
        if not all(text.strip() in answer for text in texts):
            raise UserError(
                f"the chat template leaves out something of message {number}'s {key!r}, which would not be learned; "
                "take it out of the row, or give a chat_template that renders it"
            )


def _require_tools(text: str, messages: list[Message], tokenizer: Any, row: Row) -> None:
    """Raises UserError where the text would be the same without the row's tools: the template does not tell of them."""
    if row.get("tools") and render(messages, tokenizer, {**row, "tools": None}) == text:
        raise UserError(
            "the chat template leaves out the tools; take the column 'tools' out of the row, or give a chat_template "
            "that renders it"
        )
