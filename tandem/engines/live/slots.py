"""The key-value cache of the live engine: one slot a sequence, and the two ways a forward works on it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.models.attention import Ask, PackedLayout, numbered, scored_attention

PackedKeyValues = Mapping[int, tuple[Tensor, Tensor]]
"""For each layer, keys and values [T, Hkv, D] of packed tokens."""
GRAIN = 16
"""Attention reaches over a multiple of 16 positions, so that shapes repeat from step to step."""


class SlotCache:
    """Keys and values [slots, Hkv, capacity, D] of every layer, made when a layer is first written to.

    Slots in use are always the first ones: one that ends is overwritten by the last. Capacity (positions a slot)
    grows as sequences do, up to ``limit``.
    """

    def __init__(self, slots: int = 0, limit: int = 0) -> None:
        self.slots, self.limit = slots, _round_up(limit)
        self.capacity = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def grow(self, slots: int, limit: int) -> None:
        """Makes it at least so large."""
        self.limit = max(self.limit, _round_up(limit))
        if slots > self.slots:
            self.slots = slots
            self._copy(self.capacity)

    def reserve(self, length: int) -> None:
        """Makes room for sequences of ``length`` tokens. Doubles, so that copying stays a small part of the work."""
        if length > self.capacity:
            self._copy(min(self.limit, max(_round_up(length), 2 * self.capacity)))

    def _copy(self, capacity: int) -> None:
        old, self.capacity = self.capacity, capacity
        for layer, pair in self.layers.items():
            grown = tuple(self._empty(x) for x in pair)
            for new, x in zip(grown, pair, strict=True):
                new[: len(x), :, :old] = x
            self.layers[layer] = (grown[0], grown[1])

    def load(self, packed: PackedKeyValues, source_N: Tensor, slot_N: Tensor, position_N: Tensor) -> None:
        """Copies packed tokens ``source_N`` to the given slots and positions. All int64 [N]."""
        for layer, pair in packed.items():
            for store, x in zip(self._layer(layer, *pair), pair, strict=True):
                store[slot_N, :, position_N] = x[source_N].to(store.dtype)

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copies the first ``length`` positions of some slots over others."""
        for pair in self.layers.values():
            for store in pair:
                source_N, target_N = (torch.tensor(slots).to(store.device) for slots in (sources, targets))
                used = store[:, :, :length]
                used.index_copy_(0, target_N, used[source_N])

    def append(self, layer: int, key: Tensor, value: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one token a slot, [B, Hkv, D], to rows ``target_R`` (R = B Hkv) of all; returns the whole store."""
        pair = self._layer(layer, key, value)
        for store, x in zip(pair, (key, value), strict=True):
            store.view(-1, x.shape[-1]).index_copy_(0, target_R, x.reshape(-1, x.shape[-1]).to(store.dtype))
        return pair

    def _layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            # Where rotation is in float32, keys come wider than values; attention computes in the values' type.
            self.layers[layer] = (self._empty(key.to(value.dtype)), self._empty(value))
        return self.layers[layer]

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros: what is masked gets weight 0, and 0 times a stray NaN would still be NaN.
        return like.new_zeros(self.slots, like.shape[1], self.capacity, like.shape[-1])


class PrefillLayout(PackedLayout):
    """Packed prompts whose keys and values are kept as they pass."""

    def __init__(self, bounds: Tensor, device: torch.device) -> None:
        super().__init__(bounds, device)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        """Query [1, H, T, D], key and value [1, Hkv, T, D] → [1, T, H, D]."""
        self.kept[numbered(ask)] = (key[0].transpose(0, 1), value[0].transpose(0, 1))
        return super().attend(query, key, value, ask)


class DecodeLayout:
    """One new token for each of the first B slots, which hold ``length_B`` tokens (int64), at most ``longest``."""

    def __init__(self, cache: SlotCache, length_B: Tensor, longest: int) -> None:
        cache.reserve(longest + 1)
        self.cache = cache
        self.length_B = length_B
        self.reach = min(_round_up(longest + 1), cache.capacity)
        self.targets: dict[int, Tensor] = {}
        self.masks: dict[int | None, Tensor] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        """Query [B, H, 1, D], key and value [B, Hkv, 1, D] → [B, 1, H, D]."""
        rows, heads, _, size = query.shape
        stores = self.cache.append(numbered(ask), key.squeeze(2), value.squeeze(2), self._target(key.shape[1]))
        keys, values = (store[:rows, :, : self.reach] for store in stores)
        # Heads that share keys and values stand side by side as query positions, so that those are never repeated.
        shared = query.reshape(rows, keys.shape[1], -1, size).to(keys.dtype)
        mask = self._mask(ask.sliding_window, shared.dtype)
        out = _attention(shared, keys, values, mask, ask)
        return out.reshape(rows, 1, heads, -1).to(query.dtype)

    def _target(self, heads: int) -> Tensor:
        """Rows [B Hkv] of a store of ``heads`` heads where this step's tokens go; the same in every layer."""
        if heads not in self.targets:
            slot_B = torch.arange(len(self.length_B), device=self.length_B.device)
            head_H = torch.arange(heads, device=self.length_B.device)
            row_BH = (slot_B[:, None] * heads + head_H) * self.cache.capacity + self.length_B[:, None]
            self.targets[heads] = row_BH.view(-1)
        return self.targets[heads]

    def _mask(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        """What each row may not see, as [B, 1, 1, reach] to be added; the same in every layer of a kind."""
        if sliding_window not in self.masks:
            position = torch.arange(self.reach, device=self.length_B.device)
            hidden = position > self.length_B[:, None]
            if sliding_window is not None:
                hidden |= position <= self.length_B[:, None] - sliding_window
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.masks[sliding_window] = zeros.masked_fill_(hidden, float("-inf"))[:, None, None]
        return self.masks[sliding_window]


def _attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, ask: Ask) -> Tensor:
    """Query [B, Hkv, Q, D] of few Q, keys and values [B, Hkv, K, D] → [B, Hkv, Q, D]."""
    if not ask.plain:
        if ask.sinks is not None:
            # A sink a query head, which are query positions here.
            ask = ask._replace(sinks=ask.sinks.view(keys.shape[1], -1))
        return scored_attention(query, keys, values, mask, ask)
    if keys.device.type != "cpu" or keys.dtype != torch.float32:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=ask.scaling)
    # torch's CPU kernel works by tiles of many queries, and takes four times as long for one or two.
    scaling = query.shape[-1] ** -0.5 if ask.scaling is None else ask.scaling
    score = torch.matmul(query * scaling, keys.transpose(2, 3)).add_(mask)
    return torch.matmul(torch.softmax(score, dim=-1), values)


def _round_up(length: int) -> int:
    return -(-length // GRAIN) * GRAIN
