"""Rows into token ids and masks, one at a time.

Token boundaries are those that sampling has. A prompt is tokenized alone, as it will be before sampling, and what
follows it never changes its tokens; an answer ends in exactly one end-of-sequence token, right after its own last
token. ``tokenizer`` is a Hugging Face tokenizer throughout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from tandem.data import formats
from tandem.data.chat import conversation_pieces, last_answer, marked_pieces, marks_answers, render_prompt
from tandem.data.order import content_hash
from tandem.data.rows import Row
from tandem.errors import UserError
from tandem.types import LabelledAnswer, PreferencePair, Prompt, Sequence, Solution

TrainOn = Literal["completion", "last", "all"]


def prompt_of(row: Row, tokenizer: Any) -> Prompt:
    """The row's ``prompt``, tokenized as it is sampled from; every other column goes into ``columns``.

    ``prompt_id`` is a hash of the prompt's content. Raises UserError for a missing, malformed or empty prompt.
    """
    prompt = formats.content(row, "prompt")
    if isinstance(prompt, str):
        token_ids = encode(prompt, tokenizer, special_tokens=True)
    else:
        token_ids = encode(render_prompt(prompt, tokenizer, row), tokenizer, special_tokens=False)
    if not token_ids:
        raise UserError("column 'prompt' is empty, and the tokenizer adds no token to begin with")
    columns = {name: value for name, value in row.items() if name != "prompt"}
    return Prompt(prompt_id=content_hash(prompt), prompt=prompt, token_ids=tuple(token_ids), columns=columns)


def sft_sequence(row: Row, tokenizer: Any, *, train_on: TrainOn = "completion") -> Sequence:
    """One sequence from ``prompt`` and ``completion``, from ``messages`` or from ``text``, ended with EOS.

    With ``train_on="completion"`` the completion, the assistant's turns, or all of a plain text are trainable; with
    ``"last"`` only the last of several turns is, and with ``"all"`` every token. Where the chat template marks answers
    with ``{% generation %}``, its marks decide which tokens of ``messages`` are answers. What follows the last answer
    is left out. Raises UserError where the row has none of these formats or the chat template cannot render it.
    """
    formats.require_kind(row, "demonstrations")
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = formats.prompt_completion(row)
        if train_on == "last" and isinstance(prompt, list) and isinstance(completion, list):
            answer = last_answer(completion)
            prompt, completion = [*prompt, *completion[:answer]], completion[answer:]
        sequence = _answered(prompt, completion, tokenizer, row)
    elif row.get("messages") is not None:
        messages = formats.messages(row, "messages")
        if train_on == "last":
            pieces = conversation_pieces(messages, tokenizer, row, start=last_answer(messages))
        elif marks_answers(tokenizer, row):
            pieces = marked_pieces(messages, tokenizer, row)
        else:
            pieces = conversation_pieces(messages, tokenizer, row)
        sequence = _joined(pieces, tokenizer, special_tokens=False)
    else:
        text = formats.content(row, "text")
        if not isinstance(text, str):
            raise UserError("column 'text' must be a string; conversations go into a column 'messages'")
        sequence = _joined([(text, True)], tokenizer, special_tokens=True)
    if train_on == "all":
        sequence.trainable = [True] * len(sequence.token_ids)
    return sequence


def judged_sequence(prompt: formats.Content, completion: formats.Content, tokenizer: Any) -> Sequence:
    """A sampled answer as a reward model with this tokenizer reads it: its template may leave out some, as thinking.

    Raises UserError where they are not both text or both messages, or a message is malformed.
    """
    prompt, completion = formats.prompt_completion({"prompt": prompt, "completion": completion})
    return _answered(prompt, completion, tokenizer, {}, whole_answers=False)


def preference_pair(row: Row, tokenizer: Any) -> PreferencePair:
    """Chosen and rejected after the same prompt tokens, both ended with EOS, trainable on the answers.

    An optional column ``margin`` (a number) says by how much chosen is better. Raises UserError as above.
    """
    prompt, chosen, rejected = formats.preference(row)
    return PreferencePair(
        chosen=_answered(prompt, chosen, tokenizer, row),
        rejected=_answered(prompt, rejected, tokenizer, row),
        margin=formats.number(row, "margin", 0.0),
    )


def labelled_answers(row: Row, tokenizer: Any) -> list[LabelledAnswer]:
    """The row's answer or, of a preference, its two, each ended with EOS and trainable. Raises UserError as above."""
    return [
        LabelledAnswer(answer=_answered(prompt, answer, tokenizer, row), desirable=desirable)
        for prompt, answer, desirable in formats.unpaired(row)
    ]


def solution(row: Row, tokenizer: Any, *, separator: str = "\n", placeholder: str | None = None) -> Solution:
    """The prompt and the steps, a ``separator`` behind each, whose last token is where the step is judged.

    No end of sequence comes behind them: an unfinished answer is judged as a finished one is. Raises as above.
    """
    prompt, steps, labels = formats.steps(row, placeholder)
    opening = prompt if isinstance(prompt, str) else render_prompt(prompt, tokenizer, row)
    plain = isinstance(prompt, str)
    pieces = _pieces([opening, *(step + separator for step in steps)], tokenizer, special_tokens=plain)
    trainable = [place == len(ids) - 1 for ids in pieces[1:] for place in range(len(ids))]
    if not all(pieces[1:]):
        raise UserError("a step of 'completions' has no token; leave it out, with its label")
    text = Sequence(token_ids=[id for ids in pieces for id in ids], trainable=[False] * len(pieces[0]) + trainable)
    return Solution(text=text, labels=labels, prompt_length=len(pieces[0]))


def encode(text: str, tokenizer: Any, *, special_tokens: bool) -> list[int]:
    """Token ids of a text. ``special_tokens``: with what the tokenizer puts in front (BOS), once; never with an end.

    Chat templates write their own special tokens, so rendered conversations are encoded without.
    """
    try:
        encoded = tokenizer(text, add_special_tokens=special_tokens, return_special_tokens_mask=True, verbose=False)
    except Exception as error:  # what tokenizers raises has no class of its own
        raise UserError(f"the tokenizer cannot encode {text[:40]!r}: {error}") from error
    if not special_tokens:
        return encoded["input_ids"]
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    own = [id for id, mark in zip(ids, added, strict=True) if not mark]
    if not own:
        return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
    front = ids[: added.index(0)]
    return own if own[: len(front)] == front else front + own


def _answered(
    prompt: formats.Content, answer: formats.Content, tokenizer: Any, row: Row, *, whole_answers: bool = True
) -> Sequence:
    if isinstance(prompt, str) and isinstance(answer, str):
        return _joined([(prompt, False), (answer, True)], tokenizer, special_tokens=True)
    pieces = conversation_pieces([*prompt, *answer], tokenizer, row, start=len(prompt), whole_answers=whole_answers)
    return _joined(pieces, tokenizer, special_tokens=False)


def _joined(pieces: Iterable[tuple[str, bool]], tokenizer: Any, *, special_tokens: bool) -> Sequence:
    """Tokens of consecutive (text, trainable) pieces; no piece changes the tokens of those before it.

    A piece is tokenized in its context where that leaves the tokens before it alone (so that tokenizers which mark
    the beginning of a text do not mark it), else by itself.
    """
    texts, trained = zip(*pieces, strict=True)
    found = _pieces(texts, tokenizer, special_tokens=special_tokens)
    trainable = [train for ids, train in zip(found, trained, strict=True) for _ in ids]
    return with_eos([id for ids in found for id in ids], trainable, tokenizer)


def _pieces(texts: Iterable[str], tokenizer: Any, *, special_tokens: bool) -> list[list[int]]:
    """The tokens of each of some consecutive texts.

    What comes before a special token has no part in what comes after it: a piece is tokenized with the text from the
    last one on, so that a conversation of many turns takes no longer than its length.
    """
    text = ""
    token_ids: list[int] = []
    found: list[list[int]] = []
    borders = {} if special_tokens else _borders(tokenizer)
    char, place = 0, 0  # of the last border
    for piece in texts:
        text += piece
        added = _added(text[char:], token_ids[place:], tokenizer, special_tokens)
        if added is None and place:
            added = _added(text, token_ids, tokenizer, special_tokens)
        found.append(encode(piece, tokenizer, special_tokens=False) if added is None else added)
        before, token_ids = len(token_ids), token_ids + found[-1]
        for at in range(len(token_ids) - 1, before - 1, -1):
            if token_ids[at] in borders:
                char, place = text.rfind(borders[token_ids[at]]), at
                break
    return found


def _added(text: str, known: list[int], tokenizer: Any, special_tokens: bool) -> list[int] | None:
    """The tokens of a text behind those that are known of its beginning; None where it begins with others."""
    ids = encode(text, tokenizer, special_tokens=special_tokens)
    return ids[len(known) :] if ids[: len(known)] == known else None


def _borders(tokenizer: Any) -> dict[int, str]:
    """Special tokens, by id, that a tokenizer cuts a text at before it does anything else."""
    added = tokenizer.added_tokens_decoder
    return {
        id: token.content for id, token in added.items() if token.special and not (token.lstrip or token.single_word)
    }


def with_eos(token_ids: list[int], trainable: list[bool], tokenizer: Any) -> Sequence:
    """Appends EOS unless the answer ends in it already; the EOS is trainable either way."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no end-of-sequence token, so an answer cannot end; set its eos_token")
    if token_ids[-1:] != [eos] or not any(trainable):  # an EOS with no answer before it belongs to the prompt
        return Sequence(token_ids=[*token_ids, eos], trainable=[*trainable, True])
    return Sequence(token_ids=token_ids, trainable=[*trainable[:-1], True])


def same_tokenizer(a: Any, b: Any) -> bool:
    """Whether two tokenizers give the same ids to the same tokens."""
    return a.get_vocab() == b.get_vocab()


def require_same_tokenizer(policy_tokenizer: Any, other_tokenizer: Any, *, policy: str, other: str) -> None:
    """Raises UserError where two models would read the same token ids differently."""
    if same_tokenizer(policy_tokenizer, other_tokenizer):
        return
    mine, theirs = policy_tokenizer.get_vocab(), other_tokenizer.get_vocab()
    differing = next(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    raise UserError(
        f"{other} and {policy} have different tokenizers (token {differing!r} is {theirs.get(differing)} there and "
        f"{mine.get(differing)} here); start both from the same base model"
    )
