"""Sort the letters: a generated task, its checker, and people who are not very good at it.

A prompt is four to six different letters of ``a`` to ``j`` and a ``>``; the right answer is the same letters in
alphabetical order: ``"hcafi>"`` → ``"acfhi"``.

The demonstrators are imperfect on purpose, so that imitating them leaves room to improve. Three in ten answers come
from careful writers and are right; half come from hurried ones, who leave out the last letter; the rest from careless
ones, who slip once or more: two neighbors swapped, or a letter dropped, doubled or replaced. A model that imitates them
well is right about three times in ten when it samples, and its likeliest answer is often the hurried one.

Preferences compare two answers to one prompt: the one with fewer mistakes is chosen. Prompts are train or held out
by the set of their letters, so that no held-out prompt has its letters, in any order, among the training prompts.

Everything is a pure function of its arguments: rows of one seed are the same on every machine.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal

from tandem.seeds import derive_seed

LETTERS = "abcdefghij"
END_OF_PROMPT = ">"
SHORTEST, LONGEST = 4, 6
MAX_NEW_TOKENS = 10
"""Room for the longest answer, its end-of-sequence token and a few superfluous letters."""
HELD_OUT_SHARE = 0.2

Split = Literal["train", "heldout"]
Row = dict[str, str]


def split_of(prompt: str) -> Split:
    """The split that a prompt's set of letters belongs to."""
    digest = hashlib.blake2b(answer(prompt).encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "little") < HELD_OUT_SHARE * 2**64 else "train"


def prompts(n: int, seed: int, *, split: Split = "train") -> list[str]:
    """``n`` random prompts of a split; the same one may come twice (the train split has about 154 000)."""
    return _prompts(n, _draw(seed, split, "prompts"), split)


def answer(prompt: str) -> str:
    """The right answer."""
    return "".join(sorted(prompt.removesuffix(END_OF_PROMPT)))


def check(prompt: str, completion: str) -> float:
    """1 where the completion is exactly the right answer, else 0."""
    return float(completion == answer(prompt))


def reward(prompts: Seq[str], completions: Seq[str], **columns: Any) -> list[float]:
    """``check`` as a reward function in TRL's form, for runs that train on the checker itself."""
    return [check(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def mistakes(prompt: str, completion: str) -> int:
    """How many letters must be inserted, deleted or replaced to make the completion right (Levenshtein distance)."""
    target = answer(prompt)
    row = list(range(len(target) + 1))
    for i, letter in enumerate(completion, start=1):
        previous, row = row, [i]
        for j, wanted in enumerate(target, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (letter != wanted)))
    return row[-1]


@dataclass(frozen=True)
class Writers:
    """Who writes the answers: shares of careful and of hurried writers; the rest are careless."""

    careful: float = 0.3
    hurried: float = 0.5
    slip_again: float = 0.3
    """Chance of a careless writer's further slip after each one."""

    def write(self, prompt: str, rng: random.Random) -> str:
        """One answer by a writer drawn at random. Only a careful one is right."""
        right, habit = answer(prompt), rng.random()
        if habit < self.careful:
            return right
        if habit < self.careful + self.hurried:
            return right[:-1]
        text = right
        while text == right or (text and rng.random() < self.slip_again):
            text = _slip(text, rng)
        return text


def demonstrations(n: int, seed: int, *, split: Split = "train", writers: Writers | None = None) -> list[Row]:
    """``n`` rows ``{"prompt", "completion"}``, as the writers (default ``Writers()``) wrote them."""
    rng, writers = _draw(seed, split, "demonstrations"), writers or Writers()
    return [{"prompt": prompt, "completion": writers.write(prompt, rng)} for prompt in _prompts(n, rng, split)]


def solutions(n: int, seed: int, *, split: Split = "train") -> list[dict[str, Any]]:
    """``n`` rows ``{"prompt", "completions", "labels"}``: another task, whose answers come in steps of a letter each.

    A right step is a letter of the first half of ``LETTERS``; one in six is of the second half.
    """
    rng, rows = _draw(seed, split, "solutions"), []
    half = len(LETTERS) // 2
    for prompt in _prompts(n, rng, split):
        labels = [rng.randrange(6) > 0 for _ in range(rng.randint(3, 6))]
        steps = [rng.choice(LETTERS[:half] if right else LETTERS[half:]) for right in labels]
        rows.append({"prompt": prompt, "completions": steps, "labels": labels})
    return rows


def compare(prompts: Seq[str], answers: Seq[Seq[str]], seed: int, *, pairs_per_prompt: int = 3) -> list[Row]:
    """Rows ``{"prompt", "chosen", "rejected"}`` between answers that someone else gave, a model for instance.

    ``answers[i]`` are several answers to ``prompts[i]``. The best of them is preferred to up to ``pairs_per_prompt``
    different ones with more mistakes; where all are equally good there is no row. The rows come shuffled.
    """
    rng, rows = random.Random(derive_seed(seed, "letters", "compare")), []
    for prompt, given in zip(prompts, answers, strict=True):
        rows += _pairs(prompt, given, pairs_per_prompt, rng)
    rng.shuffle(rows)
    return rows


def _pairs(prompt: str, answers: Seq[str], most: int, rng: random.Random) -> list[Row]:
    count = {text: mistakes(prompt, text) for text in answers}
    best = min(answers, key=lambda text: count[text])
    worse = [text for text in count if count[text] > count[best]]
    rejected = rng.sample(worse, min(most, len(worse)))
    return [{"prompt": prompt, "chosen": best, "rejected": text} for text in rejected]


def _slip(text: str, rng: random.Random) -> str:
    """Two neighbors swapped, or a letter dropped, doubled or replaced. Now and then nothing happens."""
    i, other = rng.randrange(len(text)), rng.choice(LETTERS)
    before, letter, after = text[:i], text[i], text[i + 1 :]
    return before + rng.choice([after[:1] + letter + after[1:], after, letter + letter + after, other + after])


def _draw(seed: int, split: Split, what: str) -> random.Random:
    return random.Random(derive_seed(seed, "letters", split, what))


def _prompts(n: int, rng: random.Random, split: Split) -> list[str]:
    def candidates() -> Iterator[str]:
        while True:
            yield "".join(rng.sample(LETTERS, rng.randint(SHORTEST, LONGEST))) + END_OF_PROMPT

    wanted = (prompt for prompt in candidates() if split_of(prompt) == split)
    return [next(wanted) for _ in range(n)]
