"""Documents as one endless stream of tokens, cut into windows of one length: a window is a function of its number."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch

from tandem.data.corpus import Corpus
from tandem.errors import UserError
from tandem.seeds import derive_seed
from tandem.types import Sequence

MARK_EVERY = 64
"""A mark is written every 64 windows at most: any other place is found by reading up to 64 windows again."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Where in the corpus a window begins."""

    window: int
    epoch: int = 0
    place: int = 0
    """The place of its shard in the epoch's order."""
    token: int = 0
    """The token of that shard at which it begins."""


class Windows:
    """Windows of ``length`` tokens over a corpus, each shard's documents in order, the shards shuffled each epoch.

    ``encode`` gives a document's tokens, its end included; one without tokens is passed over. A window begins with the
    token that the one before it ended with, so that each token but the very first comes once an epoch as one that is
    predicted. An epoch's last tokens and the next one's first share a window: nothing is dropped.

    Where windows begin depends on what all documents before them have for tokens. That is found out as they are read,
    and kept in ``notes``, a file of marks: without it the same windows come, after all that is before them is read once
    more. Marks of another ``identity`` (other data, another tokenizer) do not count.
    """

    def __init__(
        self,
        corpus: Corpus,
        encode: Callable[[str], Seq[int]],
        length: int,
        seed: int | None,
        *,
        notes: Path | None = None,
        identity: str = "",
    ) -> None:
        """``seed`` None: the shards stay in order."""
        self.corpus, self.encode, self.length, self.seed = corpus, encode, length, seed
        self.notes, self.identity = notes, identity
        self._next = self._noted = 0
        self._go_to(Mark(window=0))

    def take(self, numbers: range) -> list[Sequence]:
        """These windows."""
        if numbers.start != self._next:
            self._go_to(self._nearest(numbers.start))
            for _ in range(numbers.start - self._next):
                self._window()
        found = [Sequence.read(self._window()) for _ in numbers]
        if self.notes is not None and self._next - self._noted >= MARK_EVERY and self.notes.parent.is_dir():
            self._noted = self._next
            epoch, place, token, _ = self._ahead[0]
            mark = Mark(window=self._next, epoch=epoch, place=place, token=token)
            with self.notes.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(mark) | {"of": self.identity}) + "\n")
        return found

    def __iter__(self) -> Iterator[Sequence]:
        """All windows of one epoch, the last one shorter where the tokens end."""
        rest: list[int] = []
        for epoch, _, _, ids in self._read(Mark(window=0)):
            if epoch:
                break
            rest += ids
            while len(rest) >= self.length:
                yield Sequence.read(rest[: self.length])
                rest = rest[self.length - 1 :]
        if len(rest) > 1:
            yield Sequence.read(rest)

    def _go_to(self, mark: Mark) -> None:
        self._next = self._noted = mark.window
        self._documents = self._read(mark)
        self._ahead: deque[tuple[int, int, int, list[int]]] = deque()
        """Documents that are not used up: epoch, place of the shard, first token in it, the tokens from there on."""

    def _window(self) -> list[int]:
        while sum(len(ids) for *_, ids in self._ahead) < self.length:
            self._ahead.append(next(self._documents))
        window = list(islice((id for *_, ids in self._ahead for id in ids), self.length))
        used = self.length - 1
        while used >= len(self._ahead[0][3]):
            used -= len(self._ahead.popleft()[3])
        epoch, place, token, ids = self._ahead[0]
        self._ahead[0] = epoch, place, token + used, ids[used:]
        self._next += 1
        return window

    def _nearest(self, number: int) -> Mark:
        """The last mark at or before a window."""
        best = Mark(window=0)
        if self.notes is None or not self.notes.exists():
            return best
        with self.notes.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    found = json.loads(line)
                    same = found.pop("of") == self.identity
                    mark = Mark(**found)
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # A line that a kill has cut.
                if same and best.window < mark.window <= number:
                    best = mark
        return best

    def _read(self, mark: Mark) -> Iterator[tuple[int, int, int, list[int]]]:
        """Documents from a mark on, for ever. Raises UserError where an epoch has not a single token."""
        epoch, first, skip = mark.epoch, mark.place, mark.token
        while True:
            order, found = self._order(epoch), False
            for place in range(first, self.corpus.shards):
                token = 0
                for text in self.corpus.documents(int(order[place])):
                    ids = list(self.encode(text))
                    if token + len(ids) > skip:
                        ahead = max(skip - token, 0)
                        yield epoch, place, token + ahead, ids[ahead:]
                        found = True
                    token += len(ids)
                skip = 0
            if not found and first == 0:
                raise UserError(f"{self.corpus.source}: no document has a single token")
            epoch, first = epoch + 1, 0

    def _order(self, epoch: int) -> torch.Tensor:
        if self.seed is None:
            return torch.arange(self.corpus.shards)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "shards", epoch))
        return torch.randperm(self.corpus.shards, generator=generator)
