"""Decoding over pages, the host's side: who decodes in which row, with which pages, and what has come of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import groupby, islice

import numpy as np
from torch import Tensor

from tandem.engines.live.decoder import STEPS, Decoder, Landing
from tandem.engines.live.draws import Kinds
from tandem.engines.live.fitting import Fitting
from tandem.engines.live.pages import PAGE, pages_for
from tandem.engines.live.sample import Sample
from tandem.kernels.draw import DRAWN, FIELDS, LENGTH, LIMIT, RULE, SEED

QUICK_STEPS = 4
"""Steps between two readings of results while samples wait for the rows of those that end."""
REFILL = 32
"""While rows are busy, free ones are filled once they are one in 32: samples start side by side."""
AHEAD = 0.5
"""Prompts go through the model beside one another ahead of their time, for samples of up to half as many rows."""
AWAY, BACK = 96, 32
"""Most steps that are enqueued for the time in which the host scores, packs and launches a training step, and for that
in which it writes the step down and begins the next one: 0.15 and 0.05 s at 0.5B on an H200."""


@dataclass(eq=False)
class Prefix:
    """Tokens to prefill once for the samples that begin with them."""

    samples: deque[Sample]
    token_ids: list[int]
    pages: list[int] = field(default_factory=list)
    row: int = 0
    """The row of the last prefill's logits that follows it."""


@dataclass
class Flight:
    """Enqueued steps: the samples of their rows."""

    samples: list[Sample | None]
    steps: int
    landing: Landing


class PagedBatching:
    """Samples in rows of a decoder; one that ends leaves its row to the next (``live.core.Batching``).

    The host runs ahead: one stretch of steps is always enqueued while the results of the one before are read, so a row
    that has ended idles for a few steps before the host knows. Where pages run out, the sample that came last gives
    its pages up and starts again from its own tokens later; what it has drawn stays.
    """

    def __init__(self, fitting: Fitting, *, max_slots: int, prefill_tokens: int) -> None:
        self.fitting = fitting
        self.max_slots, self.prefill_tokens = max_slots, prefill_tokens
        self.kinds = Kinds()
        self.stops: dict[frozenset[int], int] = {}
        """Sets of stop ids, by their rows in the decoder's table."""
        self.waiting: deque[Prefix] = deque()
        self.ready: deque[Prefix] = deque()
        """Prompts that have been through the model, with their pages."""
        self.logits_PV: Tensor | None = None
        self.running: list[Sample] = []
        """Samples that have a row, in the order in which they came."""
        self.rows: list[Sample | None] = []
        self.table_SP = np.zeros((0, 0), dtype=np.int32)
        """The pages of the samples in rows: what the device has of it, unless ``table_changed``."""
        self.table_changed = True
        self.to_stop: list[int] = []
        """Rows that the device may go on with though their samples are gone."""
        self.flights: deque[Flight] = deque()
        self.ended: list[Sample] = []
        fitting.look()
        self._lay_rows()

    @property
    def decoder(self) -> Decoder:
        assert self.fitting.decoder is not None
        return self.fitting.decoder

    def enter(self, samples: Seq[Sample]) -> None:
        waiting = [sample for prefix in (*self.ready, *self.waiting) for sample in prefix.samples]
        everyone = [*self.running, *waiting, *samples]
        slots = min(self.max_slots, len(everyone))
        if refit := not self.fitting.fits(everyone, slots):
            self._refit(everyone, slots)
        samples = [sample for sample in samples if sample.error is None]
        known = len(self.stops)
        for sample in samples:
            self.stops.setdefault(sample.asked.rule.ids, len(self.stops))
        if self.fitting.decoder is not None and (refit or len(self.stops) > known):
            self.decoder.set_stops(list(self.stops), self.fitting.vocabulary)
        self.kinds.add(samples)
        groups = [list(group) for _, group in groupby(samples, key=lambda sample: sample.asked)]
        # Those that may become longest first: whatever comes last decodes with few beside it.
        groups.sort(key=lambda group: -group[0].asked.rule.max_new_tokens)
        self.waiting.extend(Prefix(deque(group), list(group[0].asked.request.prompt_ids)) for group in groups)

    def round(self) -> list[Sample]:
        """Fills free rows, enqueues a stretch of steps, and reads the results of the one before."""
        self._fill(REFILL)
        launched = self._launch(QUICK_STEPS if self.waiting or self.ready else STEPS)
        while self.flights and (len(self.flights) > 1 or not launched):
            self._read(self.flights.popleft())
        ended, self.ended = self.ended, []
        return ended

    def leave(self, samples: AbstractSet[Sample]) -> None:
        for queue in (self.waiting, self.ready):
            for prefix in list(queue):
                prefix.samples = deque(sample for sample in prefix.samples if sample not in samples)
                if not prefix.samples:
                    queue.remove(prefix)
                    self._give_back(prefix)
        self.to_stop += [self._vacate(sample) for sample in samples if sample.row is not None]
        self.ended = [sample for sample in self.ended if sample not in samples]

    def renew(self, *, recompute: bool) -> None:
        # What is enqueued comes from the old weights.
        self._read_all()
        self.fitting.look()
        while self.ready or (recompute and self.running):
            self._preempt()

    def give_way(self) -> None:
        if self.fitting.share():
            self.clear()
        else:
            self._fill()
            self._work_ahead(AWAY)

    def go_on(self) -> None:
        self._fill()
        self._work_ahead(BACK)

    def clear(self) -> None:
        """Gives the cache back. Those that were in it go on from their own tokens in the next one."""
        self._read_all()
        while self.ready or self.running:
            self._preempt()
        self.fitting.release()
        self._lay_rows()

    def _refit(self, everyone: Seq[Sample], slots: int) -> None:
        """Another decoder, in which all fit. Those that run start again in it, from what they have drawn."""
        self._read_all()
        busy = bool(self.running)
        if busy:
            slots = min(self.max_slots, max(slots, 2 * self.decoder.slots))
        while self.ready or self.running:
            self._preempt()
        refused = self.fitting.make([s for s in everyone if s.stop is None], slots, spare=2 if busy else 1)
        self._lay_rows()
        self.leave(set(refused))
        self.ended += refused

    def _lay_rows(self) -> None:
        """Nobody decodes, on the device neither."""
        decoder = self.fitting.decoder
        slots, width = (0, 0) if decoder is None else (decoder.slots, decoder.width)
        self.rows = [None] * slots
        self.table_SP = np.zeros((slots, width), dtype=np.int32)
        self.table_changed = True
        self.to_stop = list(range(slots))

    def _fill(self, least: int | None = None) -> None:
        """Fills free rows, prefilling where nothing is ready; with ``least`` once one row in ``least`` is free."""
        if self.fitting.decoder is None and (self.running or self.ready or self.waiting):
            self.enter([])
        if self.to_stop:
            # Before anybody else moves into these rows.
            self.decoder.stop(self.to_stop)
            self.to_stop = []
        free = len(self.rows) - len(self.running)
        more = bool(self.waiting) or sum(len(prefix.samples) for prefix in self.ready) > free
        if least and self.running and more and free * least < len(self.rows):
            return
        while free and (self.ready or self.waiting):
            if not self.ready and not self._prefill(free):
                break
            if not (started := self._start(free)):
                break
            free -= started

    def _prefill(self, free: int) -> bool:
        """Takes prompts through the model: as many as fill the free rows, the token budget and the free pages.

        Then those of a few samples more (``AHEAD``), in pages that no row may come to need.
        """
        prompts: list[Prefix] = []
        tokens = samples = 0
        # Every row that decodes, and every sample that starts, may need one more page soon.
        spare = self.decoder.pool.available - len(self.running)
        needed_by_rows = len(self.rows) * self.decoder.width - sum(len(sample.pages) for sample in self.running)
        while self.waiting and samples < max(free, AHEAD * len(self.rows)):
            prompt = self.waiting[0]
            tokens += len(prompt.token_ids)
            needed = pages_for(len(prompt.token_ids))
            spare -= needed + 1
            if (prompts and tokens > self.prefill_tokens) or spare < 0 or (samples >= free and spare < needed_by_rows):
                break
            prompt.pages = self.decoder.pool.take(needed)
            prompt.row = len(prompts)
            samples += len(prompt.samples)
            prompts.append(self.waiting.popleft())
        if not prompts:
            assert self.running or self.flights, "a decoder has room for each of its samples"
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
            sample.pages = pages
            started.append((sample, prompt))
        if not started:
            return 0
        pool.copy([a for a, _ in copies], [b for _, b in copies])
        samples = [sample for sample, _ in started]
        free_rows = (row for row, held in enumerate(self.rows) if held is None)
        slots = list(islice(free_rows, len(samples)))
        for row, sample in zip(slots, samples, strict=True):
            self._put(row, sample)
        self.running += samples
        seed_N, params_5N = self.kinds.columns(samples)
        state_FN = np.zeros((FIELDS, len(started)), dtype=np.int64)
        state_FN[LENGTH] = [len(prefix.token_ids) for _, prefix in started]
        state_FN[DRAWN] = [len(sample.token_ids) for sample in samples]
        state_FN[LIMIT] = [sample.asked.rule.max_new_tokens for sample in samples]
        state_FN[RULE] = [self.stops[sample.asked.rule.ids] for sample in samples]
        state_FN[SEED] = seed_N.numpy()
        assert self.logits_PV is not None
        chosen = [prefix.row for _, prefix in started]
        landing = self.decoder.start(slots, state_FN, params_5N, self.logits_PV, chosen, self.kinds.wanted)
        self._take_off(Flight(list(samples), 1, landing))
        if not self.ready:
            self.logits_PV = None
        return len(started)

    def _put(self, row: int, sample: Sample) -> None:
        self.rows[row] = sample
        sample.row = row
        self.table_SP[row] = 0
        self.table_SP[row, : len(sample.pages)] = sample.pages
        self.table_changed = True

    def _work_ahead(self, most: int) -> None:
        """Enqueues steps, up to ``most``, so that the device has work while the host has other things to do.

        Rows that end meanwhile idle, so there are no more steps than half of the tokens that a sample has by now.
        """
        drawn = sum(len(sample.token_ids) for sample in self.running)
        left = min(most, drawn // (2 * max(1, len(self.running)))) - sum(flight.steps for flight in self.flights)
        while left > 0 and sum(self._missing(min(left, STEPS)).values()) <= self.decoder.pool.available:
            if not self._launch(min(left, STEPS)):
                break
            left -= self.flights[-1].steps

    def _launch(self, most: int) -> bool:
        """Enqueues the next stretch of steps, ``most`` at most, if any row may need one."""
        if not self.running:
            return False
        steps = min(most, self._needed())
        if steps <= 0 or not self._reserve(steps):
            return False
        if not self.waiting and not self.ready:
            self._compact()
        if self.table_changed:
            self.decoder.set_table(self.table_SP)
            self.table_changed = False
        rows = bucket(max(sample.row or 0 for sample in self.running) + 1, len(self.rows))
        self._take_off(Flight(self.rows[:rows], steps, self.decoder.steps(rows, steps, self.kinds.wanted)))
        return True

    def _take_off(self, flight: Flight) -> None:
        self.flights.append(flight)
        for sample in flight.samples:
            if sample is not None:
                sample.ahead += flight.steps

    def _needed(self) -> int:
        """Steps after which every row will have reached its length at the latest, counted from what is enqueued."""
        return max(s.asked.rule.max_new_tokens - len(s.token_ids) - s.ahead for s in self.running)

    def _reserve(self, steps: int) -> bool:
        """Gives every row the pages it may reach. False where results had to be read, or a sample had to go, for it."""
        missing = self._missing(steps)
        if sum(missing.values()) > self.decoder.pool.available:
            if self.flights:
                self._read(self.flights.popleft())
            else:
                self._preempt()
            return False
        for sample, more in missing.items():
            sample.pages += self.decoder.pool.take(more)
            assert sample.row is not None
            self._put(sample.row, sample)
        return True

    def _missing(self, steps: int) -> dict[Sample, int]:
        """Pages that each row lacks for ``steps`` more steps than are enqueued, where it lacks any."""
        missing: dict[Sample, int] = {}
        for sample in self.running:
            reach = min(sample.prompt_length + len(sample.token_ids) + sample.ahead + steps, sample.limit)
            if (more := pages_for(reach) - len(sample.pages)) > 0:
                missing[sample] = more
        return missing

    def _preempt(self) -> None:
        """Frees pages: of a prompt that waits for a row, else of the sample that has drawn least, drawn tokens kept."""
        if self.ready:
            prefix = self.ready.pop()
            self._give_back(prefix)
            self.waiting.appendleft(prefix)
            return
        sample = min(reversed(self.running), key=lambda s: len(s.token_ids))
        self.to_stop.append(self._vacate(sample))
        self.waiting.appendleft(Prefix(deque([sample]), [*sample.asked.request.prompt_ids, *sample.token_ids]))

    def _vacate(self, sample: Sample) -> int:
        """Takes a sample out of its row, which it returns, and frees its pages."""
        row = sample.row
        assert row is not None
        self.running.remove(sample)
        self.rows[row] = None
        self.table_SP[row] = 0
        self.table_changed = True
        sample.row, sample.ahead = None, 0
        self._give_back(sample)
        return row

    def _give_back(self, holder: Sample | Prefix) -> None:
        pages, holder.pages = holder.pages, []
        if pages:
            self.decoder.pool.give_back(pages)

    def _compact(self) -> None:
        """Moves samples to lower rows where a step could then be of fewer rows."""
        rows = bucket(len(self.running), len(self.rows))
        sources = sorted(s.row for s in self.running if s.row is not None and s.row >= rows)
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

    def _read_all(self) -> None:
        while self.flights:
            self._read(self.flights.popleft())

    def _read(self, flight: Flight) -> None:
        """Hands samples the tokens that a flight drew, and lets those that ended go."""
        for decoding in self.running:
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
            if sample is None or sample.row is None:
                continue
            sample.ahead -= flight.steps
            n = drawn_B[place]
            drawn = token_BK[place][:n], behaviour_BK[place][:n], untruncated_BK[place][:n]
            if n and sample.extend(*drawn, finite=finite_B[place]):
                row = self._vacate(sample)
                if sample.stop in ("stop_string", "error"):
                    # The device goes on with it.
                    self.to_stop.append(row)
                self.ended.append(sample)


def bucket(rows: int, slots: int) -> int:
    """The number of rows to decode where ``rows`` are in use: few different ones, each captured once."""
    if rows <= 8:
        padded = 1 << (rows - 1).bit_length()
    else:
        grain = 16 if rows <= 64 else 32 if rows <= 256 else 64 if rows <= 512 else 128
        padded = -(-rows // grain) * grain
    return min(padded, slots)
