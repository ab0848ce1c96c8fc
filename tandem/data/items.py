"""Whole datasets into the items of a run: rows tokenized, what is too long cut or left out, and all of it counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar

from tandem.data.room import Room
from tandem.data.rows import Dataset, Row
from tandem.data.tokenize import TrainOn, labelled_answers, preference_pair, prompt_of, sft_sequence, solution
from tandem.errors import UserError
from tandem.types import LabelledAnswer, PreferencePair, Prompt, Sequence, Solution

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


def build_prompts(
    rows: Dataset, tokenizer: Any, room: Room = ANY_LENGTH, *, on_progress: OnProgress | None = None
) -> tuple[list[Prompt], Counts]:
    """Prompts with unique ids: a content hash, and ``#2``, ``#3``, … where the same prompt comes again.

    Raises UserError with the row's file and line: for a malformed row, a token id that a model does not have, and a
    prompt that is too long where the ``room`` refuses such; also where no row is left.
    """
    prompts, counts = _build(rows, lambda row: [prompt_of(row, tokenizer)], tokenizer, room, on_progress)
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

    return _build(rows, make, tokenizer, room, on_progress)


def build_pairs(
    rows: Dataset, tokenizer: Any, room: Room = ANY_LENGTH, *, on_progress: OnProgress | None = None
) -> tuple[list[PreferencePair], Counts]:
    """Preference pairs. Raises as above."""
    return _build(rows, lambda row: [preference_pair(row, tokenizer)], tokenizer, room, on_progress)


def build_unpaired(
    rows: Dataset, tokenizer: Any, room: Room = ANY_LENGTH, *, on_progress: OnProgress | None = None
) -> tuple[list[LabelledAnswer], Counts]:
    """Labelled answers: of a preference two. Raises as above."""
    return _build(rows, lambda row: labelled_answers(row, tokenizer), tokenizer, room, on_progress)


def build_solutions(
    rows: Dataset,
    tokenizer: Any,
    room: Room = ANY_LENGTH,
    *,
    separator: str = "\n",
    placeholder: str | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[list[Solution], Counts]:
    """Solutions. Raises as above."""

    def make(row: Row) -> list[Solution]:
        return [solution(row, tokenizer, separator=separator, placeholder=placeholder)]

    return _build(rows, make, tokenizer, room, on_progress)


def _build(
    rows: Dataset, make: Callable[[Row], Seq[Item]], tokenizer: Any, room: Room, on_progress: OnProgress | None
) -> tuple[list[Item], Counts]:
    """The items of a run that the rows become. Truncation is ``_cut``'s; a row that it cannot shorten is dropped."""
    items: list[Item] = []
    sizes: list[int] = []
    """How many items each row has become."""
    truncated = dropped = untrained = 0
    for index in range(len(rows)):
        with rows.at(index) as row:
            made = list(make(row))
            texts = [_texts(item).values() for item in made]
            lengths = [max(len(text.token_ids) for text in of_item) for of_item in texts]
            for text in (text for of_item in texts for text in of_item):
                room.check_ids(text.token_ids)
            if room.limit is not None and max(lengths) > room.limit:
                if room.long_rows == "refuse":
                    raise UserError(room.explain(max(lengths)))
                beyond = [length - room.limit for length in lengths] if room.long_rows == "truncate" else []
                shorter = [_cut(item, most, tokenizer) for item, most in zip(made, beyond, strict=False)]
                made = [] if None in shorter else shorter
                truncated += bool(made)
                dropped += not made
        if made and not all(_trains(text) for item in made for text in _texts(item).values()):
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


def _texts(item: Any) -> dict[str, Any]:
    """What of an item goes through a model, by its name there; without a name where it is that itself."""
    return {name: value for name, value in vars(item).items() if isinstance(value, Sequence)} or {"": item}


def _trains(text: Sequence | Prompt) -> bool:
    """Whether a token of it would be trained. The first one never is, as nothing is before it to tell it from."""
    return isinstance(text, Prompt) or any(text.trainable[1:])


def _cut(item: Any, excess: int, tokenizer: Any) -> Any:
    """An item without so many tokens at its left end: of its prompt, where it has an answer, which stays whole.

    The item itself where ``excess`` is not above 0; None where nothing of the prompt is left. Both prompts of a pair
    are cut alike, so that its two answers are still to the same question.
    """
    if excess <= 0:
        return item
    if isinstance(item, Prompt | Sequence):
        return _without(item, excess, tokenizer)
    texts = _texts(item)
    for text in texts.values():
        prompt_length = item.prompt_length if isinstance(item, Solution) else text.trainable.index(True)
        if excess >= prompt_length - _front(text.token_ids, tokenizer):
            return None
    left = {"prompt_length": item.prompt_length - excess} if isinstance(item, Solution) else {}
    return replace(item, **{name: _without(text, excess, tokenizer) for name, text in texts.items()}, **left)


def _without(text: Any, excess: int, tokenizer: Any) -> Any:
    """A text without so many tokens at its left end."""
    front = _front(text.token_ids, tokenizer)
    lists = {name: getattr(text, name) for name in ("token_ids", "trainable") if hasattr(text, name)}
    return replace(text, **{name: one[:front] + one[front + excess :] for name, one in lists.items()})


def _front(token_ids: Seq[int], tokenizer: Any) -> int:
    """Tokens at the front that truncation keeps: the beginning-of-sequence token, which models lean on."""
    return int(token_ids[0] == tokenizer.bos_token_id)
