"""Plain text as the items of a run: a corpus that is read as it is needed, in windows of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from tandem.assembly.configs.methods import RowsConfig
from tandem.assembly.digests import digest_corpus, digest_inputs
from tandem.assembly.feeds import Fed, Feed, limits_of_models, load_tokenizers, when_due
from tandem.assembly.reading import by_key
from tandem.data.corpus import Corpus
from tandem.data.order import InTurn, content_hash
from tandem.data.room import Room
from tandem.data.tokenize import encode
from tandem.data.windows import Windows
from tandem.errors import UserError
from tandem.roles import Seat
from tandem.rollout.evaluate import HeldOutRows
from tandem.rollout.prepare import Preparation
from tandem.rollout.rows import InWindows
from tandem.runs.identity import Inputs
from tandem.runs.progress import say

FIRST_DOCUMENTS = 64
"""The first 64 documents are read before anything is loaded, since a mistake in them shows soonest."""


class TextFeed(Feed):
    """The text of a corpus. How many windows it has is only known when it has been read."""

    size = 0

    def __init__(self, config: RowsConfig) -> None:
        data = config.data
        self.config = config
        column = data.input_key or "text"
        self.corpus = Corpus(data.data, split=data.split, column=column)
        self.held_out = {
            name: Corpus(source, split=config.evaluation.eval_split, column=column)
            for name, source in config.evaluation.sets.items()
        }
        self.tokenizer = load_tokenizers(config)
        self.room = Room(data.max_length, limits_of_models(config, self.tokenizer))
        self.length = self.room.limit or data.max_length
        if self.length < 2:
            raise UserError(f"max_length: a window needs 2 tokens to have one that is predicted, got {self.length}")
        for corpus in (self.corpus, *self.held_out.values()):
            for text in islice(corpus.documents(0), FIRST_DOCUMENTS):
                self._encode(text)
        assert config.run.steps is not None
        self.steps = self.planned = config.run.steps
        self.order = InTurn()
        corpora = by_key(self.corpus, self.held_out).items()
        digests = {name: digest for key, one in corpora for name, digest in digest_corpus(key, one).items()}
        self.inputs: Inputs = {**digest_inputs({}, models=config.sources), "data": digests}

    @property
    def bits(self) -> float:
        return float(self.steps * self.config.rows.batch_size * (self.length - 1))

    def uses(self) -> dict[str, str]:
        batch = self.config.rows.batch_size
        size = f"{self.corpus.bytes / 1e6:.3g} MB" if self.corpus.bytes else "a dataset"
        tokens = self.steps * batch * (self.length - 1)
        return {
            "data": f"{size} of text in {self.corpus.shards} shards, read as it is needed",
            "a step": f"{batch} windows of {self.length} tokens; {tokens} tokens in all steps",
            "held out": ", ".join(one.source for one in self.held_out.values()) or "none",
        }

    def check(self) -> None:
        if self.room.of_model:
            say(f"data: windows have {self.length} tokens, as many as the model has positions for")

    def start(self, models: Mapping[str, Seat]) -> Fed:
        seed = self.config.run.seed
        windows = Windows(
            self.corpus,
            self._encode,
            self.length,
            seed,
            notes=Path(self.config.run.out) / "windows.jsonl",
            identity=content_hash([self.inputs, self.length, seed, self.corpus.column]),
        )
        measure = self.measure(models, self.held_out)
        evaluate = when_due(self.config.evaluation, measure, last=self.steps)
        return Fed(source=InWindows(windows), prepare=measure.prepare, evaluate=evaluate)

    def measure(self, models: Mapping[str, Seat], sets: Mapping[str, Corpus]) -> HeldOutRows:
        """What measures the policy on some corpora."""
        return HeldOutRows(
            sets={name: Windows(one, self._encode, self.length, None) for name, one in sets.items()},
            actor=models["actor"],
            prepare=Preparation(method=self.config.method, models=models, seed=self.config.run.seed),
            at_a_time=self.config.rows.batch_size,
        )

    def _encode(self, text: str) -> list[int]:
        """A document's tokens and the end of sequence; none of one that is empty."""
        if not text:
            return []
        ids = [*encode(text, self.tokenizer, special_tokens=True), self.tokenizer.eos_token_id]
        self.room.check_ids(ids)
        return ids
