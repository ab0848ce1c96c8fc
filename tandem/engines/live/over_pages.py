"""The host's side of continuous batching: who decodes where, with which pages, and what has come of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from torch import Tensor

from tandem.engines.live.decoder import STEPS, Decoder, Landing
from tandem.engines.live.draws import Wanted, param_columns, seed_column
from tandem.engines.live.pages import PAGE, pages_for
from tandem.engines.samples import Sample
from tandem.errors import UserError
from tandem.kernels.draw import DRAWN, FIELDS, LENGTH, LIMIT, RULE, SEED
from tandem.types import SamplingParams

QUICK_STEPS = 4
"""Steps between two readings of results while samples wait for the rows of those that end."""
REFILL = 16
"""While rows are busy, free ones are filled once they are one in so many: prompts go through the model side by side."""


@dataclass(eq=False)
class Prefix:
    """Tokens to prefill once for the samples that begin with them."""

    samples: deque[Sample]
    token_ids: list[int]
    pages: list[int] = field(default_factory=list)
    row: int = 0
    """Of the last prefill's logits."""


@dataclass
class Flight:
    """Enqueued steps: the samples of their rows."""

    samples: list[Sample | None]
    steps: int
    landing: Landing


class PagedBatching:
    """One call of ``generate`` on a decoder. A sample decodes in a row; one that ends leaves its row to the next.

    The host runs ahead: one stretch of steps is always enqueued while the results of the one before are read, so a row
    that has ended idles for a few steps before the host knows. Where pages run out, the sample that came last gives
    its pages up and starts again from its own tokens later; what it has drawn stays.
    """

    def __init__(
        self,
        decoder: Decoder,
        samples: list[Sample],
        params: Seq[SamplingParams],
        seeds: Seq[int],
        rules: Seq[int],
        finish: Callable[[Sample], None],
        *,
        prefill_tokens: int,
    ) -> None:
        """``params``, ``seeds`` and ``rules`` (an index of the decoder's stops) are by the number of a sample."""
        self.decoder = decoder
        self.finish = finish
        self.prefill_tokens = prefill_tokens
        self.params_5N, self.seed_N = param_columns(params), seed_column(seeds).numpy()
        self.rules = rules
        self.wanted = Wanted.of(params)
        groups = [list(group) for _, group in groupby(samples, key=lambda s: s.request)]
        # Those that may become longest first: whatever comes last decodes with few beside it.
        groups.sort(key=lambda group: -group[0].rule.max_new_tokens)
        self.waiting = deque(Prefix(deque(group), list(group[0].prompt_ids)) for group in groups)
        self.ready: deque[Prefix] = deque()
        self.logits_PV: Tensor | None = None
        slots = decoder.slots
        self.rows: list[Sample | None] = [None] * slots
        self.row_of: dict[Sample, int] = {}
        self.pages_of: dict[Sample, list[int]] = {}
        self.table_SP = np.zeros((slots, decoder.width), dtype=np.int32)
        self.table_changed = True
        self.ahead_S = np.zeros(slots, dtype=np.int64)
        """Steps enqueued for each row whose results are not read yet."""
        self.flights: deque[Flight] = deque()
        self.to_stop: list[int] = []

    def run(self) -> None:
        """Samples everything."""
        while self.row_of or self.waiting or self.ready or self.flights:
            if self.to_stop:
                # Before anybody else moves into these rows.
                self.decoder.stop(self.to_stop)
                self.to_stop = []
            self._admit()
            launched = self._launch()
            while self.flights and (len(self.flights) > 1 or not launched):
                self._read(self.flights.popleft())

    def _admit(self) -> None:
        """Fills free rows, prefilling where nothing is ready."""
        free = len(self.rows) - len(self.row_of)
        if self.row_of and not self.ready and free * REFILL < len(self.rows):
            return
        while free and (self.ready or self.waiting):
            if not self.ready and not self._prefill(free):
                break
            if not (started := self._start(free)):
                break
            free -= started

    def _prefill(self, free: int) -> bool:
        """Takes prompts through the model, no more than fill the free rows, the token budget and the free pages."""
        prompts: list[Prefix] = []
        tokens = samples = 0
        # Every row that decodes, and every sample that starts, may need one more page soon.
        spare = self.decoder.pool.available - len(self.row_of)
        while self.waiting and samples < free:
            prompt = self.waiting[0]
            tokens += len(prompt.token_ids)
            needed = pages_for(len(prompt.token_ids))
            spare -= needed + 1
            if (prompts and tokens > self.prefill_tokens) or spare < 0:
                break
            prompt.pages = self.decoder.pool.take(needed)
            prompt.row = len(prompts)
            samples += len(prompt.samples)
            prompts.append(self.waiting.popleft())
        if not prompts:
            if not self.row_of and not self.flights:
                raise UserError(
                    f"the key-value cache has room for {self.decoder.pool.pages * PAGE} tokens, too few for a prompt "
                    f"of {len(self.waiting[0].token_ids)}; lower max_length or leave the device more memory"
                )
            return False
        self.logits_PV = self.decoder.prefill([p.token_ids for p in prompts], [p.pages for p in prompts])
        self.ready.extend(prompts)
        return True

    def _start(self, free: int) -> int:
        """Draws the next tokens of samples whose prompts are ready, into free rows. Returns how many."""
        pool = self.decoder.pool
        started: list[tuple[Sample, Prefix]] = []
        copies: list[tuple[int, int]] = []
        while self.ready and len(started) < free:
            prompt = self.ready[0]
            partial = len(prompt.token_ids) % PAGE > 0
            last = len(prompt.samples) == 1
            if not last and partial and not pool.available:
                break
            sample = prompt.samples.popleft()
            if last:
                pages = prompt.pages
                self.ready.popleft()
            else:
                pages = prompt.pages[:-1] if partial else list(prompt.pages)
                pool.share(pages)
                if partial:
                    pages = pages + pool.take(1)
                    copies.append((prompt.pages[-1], pages[-1]))
            self.pages_of[sample] = pages
            started.append((sample, prompt))
        if not started:
            return 0
        pool.copy([a for a, _ in copies], [b for _, b in copies])
        numbers = [sample.number for sample, _ in started]
        slots = self._take_rows([sample for sample, _ in started])
        state_FN = np.zeros((FIELDS, len(started)), dtype=np.int64)
        state_FN[LENGTH] = [len(prompt.token_ids) for _, prompt in started]
        state_FN[DRAWN] = [len(sample.token_ids) for sample, _ in started]
        state_FN[LIMIT] = [sample.rule.max_new_tokens for sample, _ in started]
        state_FN[RULE] = [self.rules[number] for number in numbers]
        state_FN[SEED] = self.seed_N[numbers]
        assert self.logits_PV is not None
        chosen = [prompt.row for _, prompt in started]
        params_5N = self.params_5N[:, numbers]
        landing = self.decoder.start(slots, state_FN, params_5N, self.logits_PV, chosen, self.wanted)
        self.flights.append(Flight([sample for sample, _ in started], 1, landing))
        self.ahead_S[slots] = 1
        if not self.ready:
            self.logits_PV = None
        return len(started)

    def _take_rows(self, samples: list[Sample]) -> list[int]:
        """The lowest free rows, with the samples' pages in the table."""
        free = (row for row, held in enumerate(self.rows) if held is None)
        slots = [row for row, _ in zip(free, samples, strict=False)]
        for row, sample in zip(slots, samples, strict=True):
            self._put(row, sample)
        return slots

    def _put(self, row: int, sample: Sample) -> None:
        self.rows[row] = sample
        self.row_of[sample] = row
        pages = self.pages_of[sample]
        self.table_SP[row] = 0
        self.table_SP[row, : len(pages)] = pages
        self.table_changed = True

    def _launch(self) -> bool:
        """Enqueues the next stretch of steps, if any row may need one."""
        if not self.row_of:
            return False
        steps = min(QUICK_STEPS if self.waiting or self.ready else STEPS, self._needed())
        if steps <= 0 or not self._reserve(steps):
            return False
        if not self.waiting and not self.ready:
            self._compact()
        if self.table_changed:
            self.decoder.set_table(self.table_SP)
            self.table_changed = False
        rows = bucket(max(self.row_of.values()) + 1, len(self.rows))
        landing = self.decoder.steps(rows, steps, self.wanted)
        self.flights.append(Flight(self.rows[:rows], steps, landing))
        self.ahead_S[:rows] += steps
        return True

    def _needed(self) -> int:
        """Steps after which every row will have reached its length at the latest, counted from what is enqueued."""
        return max(
            sample.rule.max_new_tokens - len(sample.token_ids) - int(self.ahead_S[row])
            for sample, row in self.row_of.items()
        )

    def _reserve(self, steps: int) -> bool:
        """Gives every row the pages it may reach. False where results had to be read, or a sample had to go, for it."""
        wanted: list[tuple[Sample, int]] = []
        for sample, row in self.row_of.items():
            reach = sample.prompt_length + len(sample.token_ids) + int(self.ahead_S[row]) + steps
            reach = min(reach, sample.prompt_length + sample.rule.max_new_tokens)
            if (more := pages_for(reach) - len(self.pages_of[sample])) > 0:
                wanted.append((sample, more))
        if sum(more for _, more in wanted) > self.decoder.pool.available:
            if self.flights:
                self._read(self.flights.popleft())
            else:
                self._preempt()
            return False
        for sample, more in wanted:
            self.pages_of[sample] += self.decoder.pool.take(more)
            self._put(self.row_of[sample], sample)
        return True

    def _preempt(self) -> None:
        """Frees pages: of a prompt that waits for a row, else of the sample that has drawn least, drawn tokens kept."""
        if self.ready:
            prompt = self.ready.pop()
            self.decoder.pool.give_back(prompt.pages)
            self.waiting.appendleft(prompt)
            return
        if len(self.row_of) == 1:
            raise UserError(
                f"the key-value cache has room for {self.decoder.pool.pages * PAGE} tokens, too few for one sample; "
                "lower max_new_tokens or leave the device more memory"
            )
        sample = min(reversed(self.row_of), key=lambda s: len(s.token_ids))
        self.to_stop.append(self._leave(sample))
        self.waiting.appendleft(Prefix(deque([sample]), [*sample.prompt_ids, *sample.token_ids]))

    def _leave(self, sample: Sample) -> int:
        """Takes a sample out of its row, which it returns, and frees its pages."""
        row = self.row_of.pop(sample)
        self.rows[row] = None
        self.table_SP[row] = 0
        self.table_changed = True
        self.ahead_S[row] = 0
        self.decoder.pool.give_back(self.pages_of.pop(sample))
        return row

    def _compact(self) -> None:
        """Moves rows down where all would then fit fewer of them."""
        rows = bucket(len(self.row_of), len(self.rows))
        sources = sorted(row for row in self.row_of.values() if row >= rows)
        if not sources:
            return
        targets = [row for row in range(rows) if self.rows[row] is None][: len(sources)]
        self.decoder.move(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            sample = self.rows[source]
            assert sample is not None
            self.rows[source] = None
            self.table_SP[source] = 0
            self._put(target, sample)
            self.ahead_S[target], self.ahead_S[source] = self.ahead_S[source], 0

    def _read(self, flight: Flight) -> None:
        """Hands samples the tokens that a flight drew, and lets those that ended go."""
        for decoding in self.row_of:
            # Samples of one length end all at once: their texts would be waited for then.
            if flight.landing.landed:
                break
            decoding.decode_ahead()
        values = flight.landing.values()
        token_BK, behaviour_BK = values[:, 0].T.astype(np.int64).tolist(), values[:, 1].T.tolist()
        untruncated_BK = values[:, 2].T.tolist()
        drawn_B = (values[:, 0] >= 0).sum(axis=0).tolist()
        finite_B = (~np.isnan(values[:, 2]) | (values[:, 0] < 0)).all(axis=0).tolist()
        for place, sample in enumerate(flight.samples):
            if sample is None or (row := self.row_of.get(sample)) is None:
                continue
            self.ahead_S[row] -= flight.steps
            n = drawn_B[place]
            drawn = token_BK[place][:n], behaviour_BK[place][:n], untruncated_BK[place][:n]
            if not finite_B[place]:
                for one in zip(*drawn, strict=True):
                    sample.add(*one)
            if n and sample.extend(*drawn):
                self._leave(sample)
                if sample.stop == "stop_string":
                    self.to_stop.append(row)
                self.finish(sample)


def bucket(rows: int, slots: int) -> int:
    """The number of rows to decode where ``rows`` are in use: few different ones, each captured once."""
    if rows <= 8:
        padded = 1 << (rows - 1).bit_length()
    else:
        grain = 16 if rows <= 64 else 32 if rows <= 256 else 64 if rows <= 512 else 128
        padded = -(-rows // grain) * grain
    return min(padded, slots)
