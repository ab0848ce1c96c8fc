"""Decoding over a cache of slots: those that end leave at once, and waiting samples take their slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from collections.abc import Set as AbstractSet
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tandem.engines.live.draws import Kinds, draw
from tandem.engines.live.forwards import OwnForward
from tandem.engines.live.sample import Sample
from tandem.engines.live.slots import DecodeLayout, PrefillLayout, SlotCache
from tandem.engines.live.states import StateSlots
from tandem.models.recurrent.states import states_of_layers


class Prefilled(Protocol):
    """Prompts that have been through the model."""

    logits_PV: Tensor
    """Logits of the tokens that follow them."""

    def load_into(self, slots: list[int], prompts: list[int]) -> None:
        """Copies what is kept of prompt ``prompts[i]`` into slot ``slots[i]``."""
        ...


class Slots(Protocol):
    """What a model keeps of sequences, one in each slot, and its forward over it. Those in use are the first ones."""

    @property
    def device(self) -> torch.device: ...

    @property
    def slots(self) -> int:
        """Sequences that there is room for."""
        ...

    def grow(self, slots: int, limit: int) -> None:
        """Makes it at least so large: ``limit`` is the most tokens of a sequence."""
        ...

    def reserve(self, length: int) -> None:
        """Makes room for sequences of ``length`` tokens."""
        ...

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copies what some slots hold of at most ``length`` tokens over others."""
        ...

    def prefill(self, prompts: Seq[tuple[int, ...]]) -> Prefilled:
        """Takes prompts through the model."""
        ...

    def decode(self, token_B: Tensor, length_B: Tensor, longest: int) -> Tensor:
        """Logits [B, V] after one more token for each of the first B slots.

        They hold ``length_B`` tokens, at most ``longest``.
        """
        ...


def slots_of(module: Any) -> Slots:
    """Slots for what the module keeps of a sequence."""
    return StateSlots(module) if states_of_layers(module) else KeyValueSlots(module)


class KeyValueSlots:
    """``Slots`` of a model all of whose layers are attention, computed by layouts."""

    def __init__(self, module: Any) -> None:
        self.model = OwnForward(module)
        self.cache = SlotCache()
        self.grow, self.reserve, self.move = self.cache.grow, self.cache.reserve, self.cache.move

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def slots(self) -> int:
        return self.cache.slots

    def prefill(self, prompts: Seq[tuple[int, ...]]) -> PrefilledKeyValues:
        return PrefilledKeyValues(self.model, self.cache, prompts)

    def decode(self, token_B: Tensor, length_B: Tensor, longest: int) -> Tensor:
        layout = DecodeLayout(self.cache, length_B, longest)
        return self.model(token_B[:, None], length_B[:, None], layout)[:, -1]


class PrefilledKeyValues:
    """Prompts that have been through the model: keys and values for their samples' slots, and the last logits."""

    def __init__(self, model: OwnForward, cache: SlotCache, prompts: Seq[tuple[int, ...]]) -> None:
        self.device, self.cache = model.device, cache
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        token_T = torch.tensor([token for prompt in prompts for token in prompt]).to(self.device)
        position_T = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(self.device)
        layout = PrefillLayout(self.bounds, self.device)
        last_P = (self.bounds[1:] - 1).to(self.device)
        self.logits_PV = model(token_T[None], position_T[None], layout, keep=last_P)[0]
        self.kept = layout.kept

    def load_into(self, slots: list[int], prompts: list[int]) -> None:
        """Copies the keys and values of prompt ``prompts[i]`` into slot ``slots[i]``."""
        start = self.bounds[prompts]
        length = self.bounds[1:][prompts] - start
        position_N = torch.cat([torch.arange(n) for n in length.tolist()])
        source_N = start.repeat_interleave(length) + position_N
        slot_N = torch.tensor(slots).repeat_interleave(length)
        self.cache.load(self.kept, *(x.to(self.device) for x in (source_N, slot_N, position_N)))


class SlotBatching:
    """Row i decodes in slot i; samples enter as they were asked for (``tandem.engines.live.core.Batching``)."""

    def __init__(self, slots: Slots, *, max_slots: int, prefill_tokens: int) -> None:
        self.slots = slots
        self.max_slots, self.prefill_tokens = max_slots, prefill_tokens
        self.kinds = Kinds()
        self.waiting: deque[list[Sample]] = deque()
        """Samples of one prompt each, of which none has started."""
        self.ready: deque[tuple[Sample, int]] = deque()
        """Samples whose prompts have been through the model, with the prompt's place in ``prefilled``."""
        self.prefilled: Prefilled | None = None
        self.rows: list[Sample] = []
        self.longest = 0
        self.state: State | None = None
        self.ended: list[Sample] = []

    def enter(self, samples: Seq[Sample]) -> None:
        self.kinds.add(samples)
        self.waiting.extend(_by_request(samples))
        unfinished = len(self.rows) + len(self.ready) + sum(map(len, self.waiting))
        self.slots.grow(min(self.max_slots, unfinished), max(sample.limit for sample in samples))
        self.state = None

    def round(self) -> list[Sample]:
        """One token for every row, after samples have taken the rows of those that ended."""
        if self.state is None:
            self.state = self._admit()
        if self.rows:
            self._decode(self.state)
        ended, self.ended = self.ended, []
        return ended

    def leave(self, samples: AbstractSet[Sample]) -> None:
        groups = ([sample for sample in group if sample not in samples] for group in self.waiting)
        self.waiting = deque(group for group in groups if group)
        self.ready = deque(entry for entry in self.ready if entry[0] not in samples)
        self._close([row for row, sample in enumerate(self.rows) if sample in samples])

    def renew(self, *, recompute: bool) -> None:
        self.waiting.extendleft(reversed(_by_request([sample for sample, _ in self.ready])))
        self.ready.clear()
        if recompute:
            self._recompute()

    def give_way(self) -> None:
        """Nothing: its cache is as large as what it holds."""

    def go_on(self) -> None:
        """The host makes each step itself."""

    def _recompute(self) -> None:
        """Keys and values anew for every row, from its own tokens: the last one is not in the cache yet."""
        held = deque((row, (*s.asked.request.prompt_ids, *s.token_ids[:-1])) for row, s in enumerate(self.rows))
        while held:
            rows: list[int] = []
            prompts: list[tuple[int, ...]] = []
            tokens = 0
            while held and not (prompts and tokens + len(held[0][1]) > self.prefill_tokens):
                row, prompt = held.popleft()
                rows.append(row)
                prompts.append(prompt)
                tokens += len(prompt)
            self.slots.prefill(prompts).load_into(rows, list(range(len(rows))))

    def _decode(self, state: State) -> None:
        logits_BV = self.slots.decode(state.token_B, state.length_B, self.longest)
        drawn_3B = draw(logits_BV, state.seed_B, state.params_5B, state.drawn_B, self.kinds.wanted)
        self.longest += 1
        if ended := self._record(self.rows, drawn_3B):
            self._close(ended)
        else:
            self.state = State(state.seed_B, state.params_5B, state.length_B + 1, state.drawn_B + 1, drawn_3B[0].long())

    def _record(self, samples: list[Sample], drawn_3B: Tensor) -> list[int]:
        """Hands every sample its token. Returns the places of those that ended."""
        drawn = zip(samples, *drawn_3B.tolist(), strict=True)
        ended = [place for place, (sample, token, b, u) in enumerate(drawn) if sample.add(int(token), b, u)]
        self.ended += [samples[place] for place in ended]
        return ended

    def _close(self, ended: list[int]) -> None:
        """Takes rows out and moves the last ones into their places, so that the rows in use stay the first ones."""
        self.state = None
        kept = len(self.rows) - len(ended)
        targets = [row for row in ended if row < kept]
        sources = sorted(set(range(kept, len(self.rows))) - set(ended))
        for source, target in zip(sources, targets, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[kept:]
        self.longest = max((sample.length for sample in self.rows), default=0)
        if sources:
            self.slots.move(sources, targets, self.longest)

    def _admit(self) -> State:
        """Fills free slots, prefilling where nothing is ready, and returns the state of all rows."""
        while (free := self.slots.slots - len(self.rows)) and (self.ready or self.waiting):
            if not self.ready:
                self._prefill()
            self._start([self.ready.popleft() for _ in range(min(free, len(self.ready)))])
            if not self.ready:
                self.prefilled = None
        counts = [(s.length, len(s.token_ids), s.token_ids[-1]) for s in self.rows]
        length_B, drawn_B, token_B = torch.tensor(counts, dtype=torch.int64).view(-1, 3).T.contiguous().to(self.device)
        return State(*self._columns(self.rows), length_B, drawn_B, token_B)

    def _prefill(self) -> None:
        """Takes prompts through the model: within the token budget, and no more than could fill all slots."""
        prompts: list[tuple[int, ...]] = []
        tokens = 0
        while self.waiting and len(self.ready) < self.slots.slots:
            group = self.waiting[0]
            tokens += group[0].prompt_length
            if prompts and tokens > self.prefill_tokens:
                break
            self.waiting.popleft()
            self.ready.extend((sample, len(prompts)) for sample in group)
            prompts.append(group[0].asked.request.prompt_ids)
        self.prefilled = self.slots.prefill(prompts)

    def _start(self, entries: list[tuple[Sample, int]]) -> None:
        """Draws samples' first tokens from their prompts' logits; those that do not end there get a row."""
        assert self.prefilled is not None
        prompt_B = torch.tensor([prompt for _, prompt in entries]).to(self.device)
        samples = [sample for sample, _ in entries]
        seed_B, params_5B = self._columns(samples)
        logits_BV = self.prefilled.logits_PV[prompt_B]
        drawn_3B = draw(logits_BV, seed_B, params_5B, torch.zeros_like(seed_B), self.kinds.wanted)
        ended = set(self._record(samples, drawn_3B))
        going = [entry for place, entry in enumerate(entries) if place not in ended]
        if not going:
            return
        first = len(self.rows)
        self.rows += [sample for sample, _ in going]
        self.longest = max(self.longest, *(sample.length for sample, _ in going))
        self.slots.reserve(self.longest)
        self.prefilled.load_into(list(range(first, len(self.rows))), [prompt for _, prompt in going])

    @property
    def device(self) -> torch.device:
        return self.slots.device

    def _columns(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        seed_B, params_5B = self.kinds.columns(samples)
        return seed_B.to(self.device), params_5B.to(self.device)


class State(NamedTuple):
    """What a step needs of every row: its stream and parameters, tokens in the cache and drawn so far, last token."""

    seed_B: Tensor
    params_5B: Tensor
    length_B: Tensor
    drawn_B: Tensor
    token_B: Tensor


def _by_request(samples: Seq[Sample]) -> list[list[Sample]]:
    return [list(group) for _, group in groupby(samples, key=lambda sample: sample.asked)]
