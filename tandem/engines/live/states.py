"""Slots of models whose layers keep a state for each sequence: linear attention, state spaces, short convolutions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from tandem.engines.live.slots import DecodeLayout, SlotCache
from tandem.models.attention import IMPLEMENTATION, NO_MASK, Ask, UnsupportedAttention
from tandem.models.states import Held, Name, cache_argument, states_of_layers


class StateSlots:
    """Sequences in slots: their states, each [slots, ...], beside the keys and values of its attention layers.

    It is the ``over_slots.Slots`` of a module that is run by its own forward over transformers' own cache layers.
    Nothing is padded: prompts of one length go through together.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        known = inspect.signature(module.forward).parameters
        self.takes = cache_argument(module)
        self.positions = "position_ids" in known
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.kept = states_of_layers(module)
        self.cache = SlotCache()
        self.states: dict[Name, Tensor] = {}
        self.held: tuple[int, Held] | None = None
        """So many of the first slots, and views of their states."""
        if module.config._attn_implementation == "sdpa":
            # Which is what it is without a layout.
            module.set_attn_implementation(IMPLEMENTATION)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.get_input_embeddings().weight.device
        return device

    @property
    def slots(self) -> int:
        """Sequences that there is room for."""
        return self.cache.slots

    def grow(self, slots: int, limit: int) -> None:
        """Makes it at least so large."""
        self.cache.grow(slots, limit)
        for name, store in self.states.items():
            if len(store) < self.slots:
                self.states[name] = store.new_zeros(self.slots, *store.shape[1:])
                self.states[name][: len(store)] = store
                self.held = None

    def reserve(self, length: int) -> None:
        """Makes room for sequences of ``length`` tokens."""
        self.cache.reserve(length)

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copies what some slots hold, keys and values of ``length`` tokens at most, over others."""
        self.cache.move(sources, targets, length)
        source_N, target_N = (torch.tensor(slots).to(self.device) for slots in (sources, targets))
        for store in self.states.values():
            store.index_copy_(0, target_N, store[source_N])

    def prefill(self, prompts: Seq[tuple[int, ...]]) -> PrefilledStates:
        """Takes prompts through the module, those of one length together."""
        alike: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            alike.setdefault(len(prompt), []).append(place)
        parts: list[Held] = []
        logits = []
        for places in alike.values():
            parts.append(Held(self.kept))
            token_NL = torch.tensor([prompts[place] for place in places]).to(self.device)
            logits.append(self._forward(token_NL, parts[-1], **self.last_only)[:, -1])
        order = [place for places in alike.values() for place in places]
        return PrefilledStates(self, parts, [len(prompts[place]) for place in order], order, torch.cat(logits))

    def decode(self, token_B: Tensor, length_B: Tensor, longest: int) -> Tensor:
        """Logits [B, V] after one more token for each of the first B slots, which hold ``length_B`` tokens."""
        rows = len(token_B)
        if self.held is None or self.held[0] != rows:
            self.held = rows, Held(self.kept, {name: store[:rows] for name, store in self.states.items()})
        held = self.held[1]
        options: dict[str, Any] = {}
        if self.cache.layers:
            if self.module.config._attn_implementation != IMPLEMENTATION:
                raise UnsupportedAttention(f"the implementation {self.module.config._attn_implementation!r}")
            layout = _NumberedByCache(DecodeLayout(self.cache, length_B, longest), held)
            options = {"layout": layout, "attention_mask": NO_MASK}
        return self._forward(token_B[:, None], held, length_B[:, None], **options)[:, -1]

    def load(self, states: dict[Name, Tensor], row_N: Tensor, slot_N: Tensor) -> None:
        """Copies rows of ``states`` into slots."""
        for name, state in states.items():
            if name not in self.states:
                self.states[name] = state.new_zeros(self.slots, *state.shape[1:])
                self.held = None
            self.states[name].index_copy_(0, slot_N, state.index_select(0, row_N))

    def _forward(self, token_NL: Tensor, held: Held, position_NL: Tensor | None = None, **options: Any) -> Tensor:
        if self.positions:
            if position_NL is None:
                position_NL = torch.arange(token_NL.shape[1], device=token_NL.device).expand_as(token_NL)
            options["position_ids"] = position_NL
        logits: Tensor = self.module(input_ids=token_NL, use_cache=True, **{self.takes: held}, **options).logits
        return logits


class PrefilledStates:
    """Prompts that have been through the module: what their samples' slots are to hold, and the last logits.

    ``lengths``, ``order`` and ``logits_NV`` are of all prompts in the order in which they went through, ``order`` being
    their places among those that were asked for.
    """

    def __init__(
        self, slots: StateSlots, parts: list[Held], lengths: list[int], order: list[int], logits_NV: Tensor
    ) -> None:
        self.slots = slots
        self.row_P = torch.tensor(order).argsort()
        self.logits_PV = logits_NV.index_select(0, self.row_P.to(logits_NV.device))
        self.length_N = torch.tensor(lengths)
        self.start_N = self.length_N.cumsum(0) - self.length_N
        self.keys_and_values = {
            layer: (_packed([p.keys_and_values[layer][0] for p in parts]),
                    _packed([p.keys_and_values[layer][1] for p in parts]))
            for layer in parts[0].keys_and_values
        }  # fmt: skip
        found = [part.states for part in parts]
        self.states = {name: torch.cat([states[name] for states in found]) for name in found[0]}

    def load_into(self, slots: list[int], prompts: list[int]) -> None:
        """Copies what is kept of prompt ``prompts[i]`` into slot ``slots[i]``."""
        device = self.slots.device
        row_N, slot_N = self.row_P[prompts], torch.tensor(slots)
        self.slots.load(self.states, row_N.to(device), slot_N.to(device))
        if self.keys_and_values:
            length_N = self.length_N[row_N]
            position = torch.cat([torch.arange(n) for n in length_N.tolist()])
            source = self.start_N[row_N].repeat_interleave(length_N) + position
            slot = slot_N.repeat_interleave(length_N)
            self.slots.cache.load(self.keys_and_values, *(x.to(device) for x in (source, slot, position)))


class _NumberedByCache:
    """A layout whose layers are those that gave the cache their keys and values: several may share one module."""

    def __init__(self, layout: DecodeLayout, held: Held) -> None:
        self.layout, self.held = layout, held

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        return self.layout.attend(query, key, value, ask._replace(layer=self.held.attending))


def _packed(parts: list[Tensor]) -> Tensor:
    """[N, Hkv, L, D] each → [T, Hkv, D]."""
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
