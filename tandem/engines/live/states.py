"""What models keep of a sequence whose layers carry a state: linear attention, state spaces, short convolutions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tandem.engines.live.forwards import LeanForward
from tandem.engines.live.slots import DecodeLayout, SlotCache
from tandem.models.attention import IMPLEMENTATION, Ask, Layout, UnsupportedAttention, no_mask
from tandem.models.recurrent.states import Held, Name, cache_argument, kept_in_modules, states_of_layers, takes_list


class StateForward:
    """A module over a cache of ours: states in place, attention by layouts.

    Nothing is padded: prompts of one length go through together, by the module's own forward. ``lean`` decodes instead
    of it.
    """

    def __init__(self, module: Any, lean: LeanForward | None = None) -> None:
        self.module, self.lean = module, lean
        known = inspect.signature(module.forward).parameters
        self.takes = cache_argument(module)
        self.by_list = takes_list(module)
        self.places = kept_in_modules(module)
        """Where it looks for its states, if not in its cache."""
        self.positions = "position_ids" in known
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.kept = states_of_layers(module)
        if module.config._attn_implementation == "sdpa":
            # Which is what it is without a layout.
            module.set_attn_implementation(IMPLEMENTATION)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.get_input_embeddings().weight.device
        return device

    def prefill(self, prompts: Seq[Seq[int]]) -> PrefilledStates:
        """Takes prompts through the module."""
        alike: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            alike.setdefault(len(prompt), []).append(place)
        logits: list[Tensor] = []
        passed: list[dict[int, tuple[Tensor, Tensor]]] = []
        states: dict[Name, Tensor] = {}
        for length, places in alike.items():
            token_NL = torch.tensor([list(prompts[place]) for place in places]).to(self.device)
            position_NL = torch.arange(length, device=self.device).expand_as(token_NL)
            held = Held(self.kept)
            logits.append(self._forward(token_NL, position_NL, held, **self.last_only)[:, -1])
            passed.append(held.passed)
            # At once, since they may be large: those of a group are not kept beside those of the next.
            place_N = torch.tensor(places).to(self.device)
            for name, state in held.states.items():
                states.setdefault(name, state.new_empty(len(prompts), *state.shape[1:])).index_copy_(0, place_N, state)
        row_P = torch.tensor([place for places in alike.values() for place in places]).argsort()
        length_N = torch.tensor([length for length, places in alike.items() for _ in places])
        return PrefilledStates(
            logits_PV=torch.cat(logits).index_select(0, row_P.to(self.device)),
            states=states,
            keys_and_values={
                number: (
                    _packed([pairs[number][0] for pairs in passed]),
                    _packed([pairs[number][1] for pairs in passed]),
                )
                for number in passed[0]
            },
            length_P=length_N[row_P],
            start_P=(length_N.cumsum(0) - length_N)[row_P],
        )

    def decode(self, token_B: Tensor, length_B: Tensor, layout: Layout | None, held: Held) -> Tensor:
        """Logits [B, V] after one more token for sequences of ``length_B`` tokens, whose states change in place.

        ``layout``: of the attention layers, if there are any.
        """
        if self.lean is not None:
            return self.lean(token_B[:, None], length_B[:, None], layout, held=held)[:, -1]
        options: dict[str, Any] = {}
        if layout is not None:
            if self.module.config._attn_implementation != IMPLEMENTATION:
                raise UnsupportedAttention(f"the implementation {self.module.config._attn_implementation!r}")
            options = {"layout": _NumberedByCache(layout, held), "attention_mask": no_mask(token_B.device)}
        return self._forward(token_B[:, None], length_B[:, None], held, **options)[:, -1]

    def _forward(self, token_NL: Tensor, position_NL: Tensor, held: Held, **options: Any) -> Tensor:
        if self.by_list:
            return self._by_list(token_NL, held, **options)
        if self.positions:
            options["position_ids"] = position_NL
        with held.lent(self.places):
            logits: Tensor = self.module(input_ids=token_NL, use_cache=True, **{self.takes: held}, **options).logits
        return logits

    def _by_list(self, token_NL: Tensor, held: Held, **options: Any) -> Tensor:
        """Of a module that is given a list of states, in which it changes them."""
        if states := list(held.states.values()):
            given = [*map(_Shifted, states[:2]), *states[2:]]
            logits: Tensor = self.module(input_ids=token_NL, state=given, use_cache=True, **options).logits
            return logits
        # By their last tokens' states those of one token would be mixed up.
        parts = token_NL.split(1) if token_NL.shape[1] == 1 else [token_NL]
        found = [self.module(input_ids=part, use_cache=True, **options) for part in parts]
        for number, alike in enumerate(zip(*(out.state for out in found), strict=True)):
            held.keep(number, torch.cat(alike))
        return torch.cat([out.logits for out in found])


@dataclass(frozen=True, kw_only=True)
class PrefilledStates:
    """Prompts that have been through a module: what it keeps of them, and the logits of what follows."""

    logits_PV: Tensor
    states: Mapping[Name, Tensor]
    """[P, ...] each."""
    keys_and_values: Mapping[int, tuple[Tensor, Tensor]]
    """[T, Hkv, D] of each attention layer, by its number among them: those of prompt p from ``start_P[p]`` on."""
    length_P: Tensor
    """Tokens; int64 on the CPU, as ``start_P``."""
    start_P: Tensor

    def places(self, prompts: Seq[int]) -> tuple[Tensor, Tensor]:
        """Where keys and values of all tokens of some prompts are, and their positions. int64 [N], on the CPU."""
        prompts = list(prompts)
        length = self.length_P[prompts]
        position_N = torch.cat([torch.arange(n) for n in length.tolist()])
        return self.start_P[prompts].repeat_interleave(length) + position_N, position_N


class StateStore:
    """States of sequences, [slots, ...] each, made when they are first written to."""

    def __init__(self, kept: list[int], slots: int = 0) -> None:
        self.kept, self.slots = kept, slots
        self.states: dict[Name, Tensor] = {}
        self._held: tuple[int, Held] | None = None

    def grow(self, slots: int) -> None:
        """Makes room for the states of so many slots."""
        if slots <= self.slots:
            return
        self.slots = slots
        for name, store in self.states.items():
            self.states[name] = store.new_zeros(slots, *store.shape[1:])
            self.states[name][: len(store)] = store
        self._held = None

    def load(self, states: Mapping[Name, Tensor], row_N: Tensor, slot_N: Tensor) -> None:
        """Copies rows of ``states`` into slots."""
        for name, state in states.items():
            if name not in self.states:
                self.states[name] = state.new_zeros(self.slots, *state.shape[1:])
                self._held = None
            self.states[name].index_copy_(0, slot_N, state.index_select(0, row_N))

    def move(self, source_N: Tensor, target_N: Tensor) -> None:
        """Copies what some slots hold over others."""
        for store in self.states.values():
            store.index_copy_(0, target_N, store.index_select(0, source_N))

    def held(self, rows: int) -> Held:
        """A cache over the first slots, in which a module changes their states."""
        if self._held is None or self._held[0] != rows:
            self._held = rows, Held(self.kept, {name: store[:rows] for name, store in self.states.items()})
        return self._held[1]


class StateSlots:
    """``over_slots.Slots`` of a module whose layers keep states."""

    def __init__(self, module: Any) -> None:
        self.forward = StateForward(module)
        self.cache = SlotCache()
        self.states = StateStore(self.forward.kept)

    @property
    def device(self) -> torch.device:
        return self.forward.device

    @property
    def slots(self) -> int:
        return self.cache.slots

    def grow(self, slots: int, limit: int) -> None:
        self.cache.grow(slots, limit)
        self.states.grow(slots)

    def reserve(self, length: int) -> None:
        self.cache.reserve(length)

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        self.cache.move(sources, targets, length)
        self.states.move(torch.tensor(sources).to(self.device), torch.tensor(targets).to(self.device))

    def prefill(self, prompts: Seq[tuple[int, ...]]) -> PrefilledSlots:
        return PrefilledSlots(self, self.forward.prefill(prompts))

    def decode(self, token_B: Tensor, length_B: Tensor, longest: int) -> Tensor:
        layout = DecodeLayout(self.cache, length_B, longest) if self.cache.layers else None
        return self.forward.decode(token_B, length_B, layout, self.states.held(len(token_B)))


class PrefilledSlots:
    """``over_slots.Prefilled`` of ``StateSlots``."""

    def __init__(self, slots: StateSlots, found: PrefilledStates) -> None:
        self.slots, self.found = slots, found
        self.logits_PV = found.logits_PV

    def load_into(self, slots: list[int], prompts: list[int]) -> None:
        device, slot = self.slots.device, torch.tensor(slots)
        self.slots.states.load(self.found.states, torch.tensor(prompts).to(device), slot.to(device))
        source_N, position_N = self.found.places(prompts)
        slot_N = slot.repeat_interleave(self.found.length_P[prompts])
        self.slots.cache.load(self.found.keys_and_values, *(x.to(device) for x in (source_N, slot_N, position_N)))


class _Shifted:
    """The last tokens' states [N, D, layers] as RWKV takes a layer's for a single token: [N, D] would be [1, N, D]."""

    def __init__(self, state_NDL: Tensor) -> None:
        self.state_NDL = state_NDL

    def __getitem__(self, place: Any) -> Tensor:
        return self.state_NDL[place][:, None]

    def __setitem__(self, place: Any, state_ND: Tensor) -> None:
        self.state_NDL[place] = state_ND


class _NumberedByCache:
    """A layout whose layers are those that gave the cache their keys and values: several may share one module."""

    def __init__(self, layout: Layout, held: Held) -> None:
        self.layout, self.held = layout, held

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        kept = self.held.passed.get(-1 if self.held.attending is None else self.held.attending)
        if kept is None or (kept[0].shape, kept[1].shape) != (key.shape, value.shape):
            raise UnsupportedAttention("keys and values that are not what its cache keeps")
        return self.layout.attend(query, key, value, ask._replace(layer=self.held.attending))


def _packed(parts: list[Tensor]) -> Tensor:
    """[N, Hkv, L, D] each → [T, Hkv, D]."""
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
