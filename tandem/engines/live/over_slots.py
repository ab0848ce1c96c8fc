"""Continuous batching: rows decode side by side, those that end leave at once, and waiting samples take their slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tandem.engines.live.draws import Sampler
from tandem.engines.live.forwards import OwnForward
from tandem.engines.live.slots import DecodeLayout, PrefillLayout, SlotCache
from tandem.engines.samples import Sample


class Prefilled:
    """Prompts that have been through the model: keys and values for their samples' slots, and the last logits."""

    def __init__(self, model: OwnForward, prompts: Seq[tuple[int, ...]]) -> None:
        self.device = model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        token_T = torch.tensor([token for prompt in prompts for token in prompt]).to(self.device)
        position_T = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(self.device)
        layout = PrefillLayout(self.bounds, self.device)
        last_P = (self.bounds[1:] - 1).to(self.device)
        self.logits_PV = model(token_T[None], position_T[None], layout, keep=last_P)[0]
        self.kept = layout.kept

    def load_into(self, cache: SlotCache, slots: list[int], prompts: list[int]) -> None:
        """Copies the keys and values of prompt ``prompts[i]`` into slot ``slots[i]``."""
        start = self.bounds[prompts]
        length = self.bounds[1:][prompts] - start
        position_N = torch.cat([torch.arange(n) for n in length.tolist()])
        source_N = start.repeat_interleave(length) + position_N
        slot_N = torch.tensor(slots).repeat_interleave(length)
        cache.load(self.kept, *(x.to(self.device) for x in (source_N, slot_N, position_N)))


class SlotBatching:
    """One call of ``generate``. Row i decodes in slot i; samples enter in the order they were asked for."""

    def __init__(
        self,
        module: Any,
        samples: list[Sample],
        sampler: Sampler,
        finish: Callable[[Sample], None],
        *,
        max_slots: int,
        prefill_tokens: int,
    ) -> None:
        self.model = OwnForward(module)
        self.sampler = sampler
        self.finish = finish
        self.prefill_tokens = prefill_tokens
        longest = max(s.prompt_length + s.rule.max_new_tokens for s in samples)
        self.cache = SlotCache(min(max_slots, len(samples)), longest)
        self.waiting = deque(list(group) for _, group in groupby(samples, key=lambda s: s.request))
        self.ready: deque[tuple[Sample, int]] = deque()
        """Samples whose prompts have been through the model, with the prompt's place in ``prefilled``."""
        self.prefilled: Prefilled | None = None
        self.rows: list[Sample] = []
        self.longest = 0

    def run(self) -> None:
        """Samples everything."""
        state_4B = self._admit()
        while self.rows:
            state_4B, ended = self._decode(state_4B)
            if ended:
                self._close(ended)
                state_4B = self._admit()

    def _decode(self, state_4B: Tensor) -> tuple[Tensor, list[int]]:
        """One token for every row; returns the next state, and the rows that ended.

        The state, int64, is each row's sample number, tokens in the cache, tokens drawn, and last token.
        """
        sample_B, length_B, drawn_B, token_B = state_4B
        layout = DecodeLayout(self.cache, length_B, self.longest)
        logits_BV = self.model(token_B[:, None], length_B[:, None], layout)[:, -1]
        drawn_3B = self.sampler.draw(logits_BV, sample_B, drawn_B)
        self.longest += 1
        ended = self._record(self.rows, drawn_3B)
        return torch.stack((sample_B, length_B + 1, drawn_B + 1, drawn_3B[0].long())), ended

    def _record(self, samples: list[Sample], drawn_3B: Tensor) -> list[int]:
        """Hands every sample its token. Returns the places of those that ended."""
        drawn = zip(samples, *drawn_3B.tolist(), strict=True)
        ended = [place for place, (sample, token, b, u) in enumerate(drawn) if sample.add(int(token), b, u)]
        for place in ended:
            self.finish(samples[place])
        return ended

    def _close(self, ended: list[int]) -> None:
        """Takes rows out and moves the last ones into their places, so that the rows in use stay the first ones."""
        kept = len(self.rows) - len(ended)
        targets = [row for row in ended if row < kept]
        sources = sorted(set(range(kept, len(self.rows))) - set(ended))
        for source, target in zip(sources, targets, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[kept:]
        self.longest = max((sample.length for sample in self.rows), default=0)
        if sources:
            self.cache.move(sources, targets, self.longest)

    def _admit(self) -> Tensor:
        """Fills free slots, prefilling where nothing is ready, and returns the state of all rows."""
        while (free := self.cache.slots - len(self.rows)) and (self.ready or self.waiting):
            if not self.ready:
                self._prefill()
            self._start([self.ready.popleft() for _ in range(min(free, len(self.ready)))])
            if not self.ready:
                self.prefilled = None
        state = [(s.number, s.length, len(s.token_ids), s.token_ids[-1]) for s in self.rows]
        return torch.tensor(state, dtype=torch.int64).view(len(state), 4).T.contiguous().to(self.model.device)

    def _prefill(self) -> None:
        """Takes prompts through the model: within the token budget, and no more than could fill all slots."""
        prompts: list[tuple[int, ...]] = []
        tokens = 0
        while self.waiting and len(self.ready) < self.cache.slots:
            group = self.waiting[0]
            tokens += group[0].prompt_length
            if prompts and tokens > self.prefill_tokens:
                break
            self.waiting.popleft()
            self.ready.extend((sample, len(prompts)) for sample in group)
            prompts.append(group[0].prompt_ids)
        self.prefilled = Prefilled(self.model, prompts)

    def _start(self, entries: list[tuple[Sample, int]]) -> None:
        """Draws samples' first tokens from their prompts' logits; those that do not end there get a row."""
        assert self.prefilled is not None
        device = self.model.device
        prompt_B = torch.tensor([prompt for _, prompt in entries]).to(device)
        sample_B = torch.tensor([sample.number for sample, _ in entries]).to(device)
        drawn_3B = self.sampler.draw(self.prefilled.logits_PV[prompt_B], sample_B, torch.zeros_like(sample_B))
        ended = set(self._record([sample for sample, _ in entries], drawn_3B))
        going = [entry for place, entry in enumerate(entries) if place not in ended]
        if not going:
            return
        first = len(self.rows)
        self.rows += [sample for sample, _ in going]
        self.longest = max(self.longest, *(sample.length for sample, _ in going))
        self.cache.reserve(self.longest)
        self.prefilled.load_into(self.cache, list(range(first, len(self.rows))), [prompt for _, prompt in going])
