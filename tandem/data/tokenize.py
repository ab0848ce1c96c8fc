"""Dataset into token ids and masks, one at a time and whole datasets.

Token boundaries are those that sampling has. A prompt is tokenized alone, as it will be before sampling, and what
follows it never changes its tokens; an answer ends in exactly one end-of-sequence token, right after its own last
token. ``tokenizer`` is a Hugging Face tokenizer throughout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal, TypeVar

from tandem.data import formats
from tandem.data.chat import conversation_pieces, last_answer, marked_pieces, marks_answers, render_prompt
from tandem.data.order import content_hash
from tandem.data.room import Room
from tandem.data.rows import Dataset, Row
from tandem.errors import UserError
from tandem.types import LabelledAnswer, PreferencePair, Prompt, Sequence, Solution

TrainOn = Literal["completion", "last", "all"]
OnProgress = Callable[[int, int], None]
"""Called with (rows done, rows in all) after each row."""
ANY_LENGTH = Room()
Item = TypeVar("Item", Prompt, Sequence, PreferencePair, LabelledAnswer, Solution)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of a dataset's rows."""

    rows: int
    """Read."""
    kept: int
    """Truncated ones included."""
    truncated: int = 0
    """Too long, and cut."""
    dropped: int = 0
    """Too long, and left out."""
    untrained: int = 0
    """Left out since none of their tokens would be trained, as where all that was left is the first token."""
    items_of: tuple[int, ...]
    """Items of a run that were made of the kept rows of each source (``Dataset.parts``): one of each row, mostly."""

    def __str__(self) -> str:
        """How many rows are used, and what became of the others."""
        said = {
            "truncated": self.truncated,
            "dropped": self.dropped,
            "left out with nothing to train on": self.untrained,
        }
        rest = ", ".join(f"{count} {what}" for what, count in said.items() if count)
        return f"{self.kept} rows" + (f" ({rest})" if rest else "")


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
    return ended([id for ids in found for id in ids], trainable, tokenizer)


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


def ended(token_ids: list[int], trainable: list[bool], tokenizer: Any) -> Sequence:
    """Appends EOS unless the answer ends in it already; the EOS is trainable either way."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no end-of-sequence token, so an answer cannot end; set its eos_token")
    if token_ids[-1:] != [eos] or not any(trainable):  # an EOS with no answer before it belongs to the prompt
        return Sequence(token_ids=[*token_ids, eos], trainable=[*trainable, True])
    return Sequence(token_ids=token_ids, trainable=[*trainable[:-1], True])


def build_prompts(
    rows: Dataset, tokenizer: Any, room: Room = ANY_LENGTH, *, on_progress: OnProgress | None = None
) -> tuple[list[Prompt], Counts]:
    """Prompts with unique ids: a content hash, and ``#2``, ``#3``, … where the same prompt comes again.

    Raises UserError with the row's file and line: for a malformed row, a token id that a model does not have, and a
    prompt that is too long where the ``room`` refuses such; also where no row is left.
    """

    def cut(prompt: Prompt, excess: int) -> Prompt:
        front = _front(prompt.token_ids, tokenizer)
        return replace(prompt, token_ids=prompt.token_ids[:front] + prompt.token_ids[front + excess :])

    prompts, counts = _build(rows, lambda row: [prompt_of(row, tokenizer)], cut, room, on_progress)
    # Reward functions get the columns of the dataset, whichever rows meet in a step; None where a row has not got one.
    columns = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    seen: Counter[str] = Counter()
    for prompt in prompts:
        prompt.columns = columns | prompt.columns
        seen[prompt.prompt_id] += 1
        if seen[prompt.prompt_id] > 1:
            prompt.prompt_id += f"#{seen[prompt.prompt_id]}"
    return prompts, counts


def build_sequences(
    rows: Dataset,
    tokenizer: Any,
    room: Room = ANY_LENGTH,
    *,
    train_on: TrainOn = "completion",
    on_progress: OnProgress | None = None,
) -> tuple[list[Sequence], Counts]:
    """SFT sequences. Raises UserError as ``build_prompts`` does."""

    def make(row: Row) -> list[Sequence]:
        return [sft_sequence(row, tokenizer, train_on=train_on)]

    return _build(rows, make, lambda sequence, excess: _cut_sequence(sequence, excess, tokenizer), room, on_progress)


def build_pairs(
    rows: Dataset, tokenizer: Any, room: Room = ANY_LENGTH, *, on_progress: OnProgress | None = None
) -> tuple[list[PreferencePair], Counts]:
    """Preference pairs. Raises as above.

    Truncation cuts both prompts alike, so that the two answers are still to the same question; a pair whose answers
    leave no room for any of the prompt is dropped.
    """

    def cut(pair: PreferencePair, excess: int) -> PreferencePair | None:
        chosen, rejected = (_cut_prompt(s, excess, tokenizer) for s in (pair.chosen, pair.rejected))
        return None if chosen is None or rejected is None else replace(pair, chosen=chosen, rejected=rejected)

    return _build(rows, lambda row: [preference_pair(row, tokenizer)], cut, room, on_progress)


def build_unpaired(
    rows: Dataset, tokenizer: Any, room: Room = ANY_LENGTH, *, on_progress: OnProgress | None = None
) -> tuple[list[LabelledAnswer], Counts]:
    """Labelled answers: of a preference two. Raises as above.

    Truncation cuts prompts; a row with an answer that leaves no room for any of its prompt is dropped.
    """

    def cut(labelled: LabelledAnswer, excess: int) -> LabelledAnswer | None:
        answer = _cut_prompt(labelled.answer, excess, tokenizer)
        return None if answer is None else replace(labelled, answer=answer)

    return _build(rows, lambda row: labelled_answers(row, tokenizer), cut, room, on_progress)


def build_solutions(
    rows: Dataset,
    tokenizer: Any,
    room: Room = ANY_LENGTH,
    *,
    separator: str = "\n",
    placeholder: str | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[list[Solution], Counts]:
    """Solutions. Raises as above.

    Truncation cuts prompts; a row whose steps leave no room for any of its prompt is dropped.
    """

    def make(row: Row) -> list[Solution]:
        return [solution(row, tokenizer, separator=separator, placeholder=placeholder)]

    def cut(made: Solution, excess: int) -> Solution | None:
        if excess >= made.prompt_length - _front(made.text.token_ids, tokenizer):
            return None
        text = _cut_sequence(made.text, excess, tokenizer)
        return replace(made, text=text, prompt_length=made.prompt_length - excess)

    return _build(rows, make, cut, room, on_progress)


def _build(
    rows: Dataset,
    make: Callable[[Row], Seq[Item]],
    cut: Callable[[Item, int], Item | None],
    room: Room,
    on_progress: OnProgress | None,
) -> tuple[list[Item], Counts]:
    """The items of a run that the rows become. ``cut`` takes so many tokens off an item, or gives nothing."""
    items: list[Item] = []
    sizes: list[int] = []
    """How many items each row has become."""
    truncated = dropped = untrained = 0
    for index in range(len(rows)):
        with rows.at(index) as row:
            made = list(make(row))
            lengths = [max(len(text.token_ids) for text in _texts(item)) for item in made]
            for text in (text for item in made for text in _texts(item)):
                room.check_ids(text.token_ids)
            if room.limit is not None and max(lengths) > room.limit:
                if room.long_rows == "refuse":
                    raise UserError(room.explain(max(lengths)))
                beyond = [length - room.limit for length in lengths] if room.long_rows == "truncate" else []
                shorter = [cut(item, most) if most > 0 else item for item, most in zip(made, beyond, strict=False)]
                fit = [item for item in shorter if item is not None]
                made = fit if len(fit) == len(shorter) else []
                truncated += bool(made)
                dropped += not made
        if made and not all(_trains(text) for item in made for text in _texts(item)):
            untrained += 1
            made = []
        items += made
        sizes.append(len(made))
        if on_progress is not None:
            on_progress(index + 1, len(rows))
    if not items and not untrained:
        raise UserError(
            f"{rows.source}: all {len(rows)} rows are longer than the limit of {room.limit} tokens; raise it"
        )
    ends = accumulate((part.rows for part in rows.parts), initial=0)
    items_of = tuple(sum(sizes[first:last]) for first, last in pairwise(ends))
    kept = sum(size > 0 for size in sizes)
    counts = Counts(
        rows=len(rows), kept=kept, truncated=truncated, dropped=dropped, untrained=untrained, items_of=items_of
    )
    for part, size in zip(rows.parts, items_of, strict=True):
        if not items or (part.weight is not None and not size):
            raise UserError(f"{part.name if items else rows.source}: no row is left to train on; of all: {counts}")
    return items, counts


def _texts(item: Item) -> Seq[Sequence | Prompt]:
    """What of an item goes through a model."""
    if isinstance(item, PreferencePair):
        return item.chosen, item.rejected
    if isinstance(item, LabelledAnswer):
        return (item.answer,)
    return (item.text,) if isinstance(item, Solution) else (item,)


def _trains(text: Sequence | Prompt) -> bool:
    """Whether a token of it would be trained. The first one never is, as nothing is before it to tell it from."""
    return isinstance(text, Prompt) or any(text.trainable[1:])


def _front(token_ids: Seq[int], tokenizer: Any) -> int:
    """Tokens at the front that truncation keeps: the beginning-of-sequence token, which models lean on."""
    return int(token_ids[0] == tokenizer.bos_token_id)


def _cut_sequence(sequence: Sequence, excess: int, tokenizer: Any) -> Sequence:
    front = _front(sequence.token_ids, tokenizer)
    return Sequence(
        token_ids=sequence.token_ids[:front] + sequence.token_ids[front + excess :],
        trainable=sequence.trainable[:front] + sequence.trainable[front + excess :],
    )


def _cut_prompt(sequence: Sequence, excess: int, tokenizer: Any) -> Sequence | None:
    """Without so many tokens of its prompt; None where it has no more than those."""
    if excess >= sequence.trainable.index(True) - _front(sequence.token_ids, tokenizer):
        return None
    return _cut_sequence(sequence, excess, tokenizer)
