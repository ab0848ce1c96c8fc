"""One attention function, registered with transformers, through which packed training and the live engine run.

A model loaded by Tandem has the attention implementation ``tandem``. Called as usual it is transformers' own SDPA.
Called with a ``layout=`` keyword (which transformers hands down to every attention layer), the layout computes the
attention instead: one of those below for packed sequences, the live engine's own for its slot cache.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tandem.types import send

IMPLEMENTATION = "tandem"
NO_MASK = torch.empty(1, 1, 1, 1)
"""Passed as ``attention_mask`` beside a layout: transformers takes any 4-D mask as it is and builds none of its own."""


class UnsupportedAttention(Exception):
    """The model's attention asks for something a layout does not compute (sinks, soft caps, position biases)."""


class Layout(Protocol):
    """How the tokens of one forward lie in memory and what each may attend to."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int | None,
        scaling: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """Query [B, H, Q, D], key and value [B, Hkv, K, D] → [B, Q, H, D]."""
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unsupported or not getattr(module, "is_causal", True):
        raise UnsupportedAttention(", ".join(unsupported) or "attention that is not causal")
    if dropout:
        raise UnsupportedAttention("attention dropout")
    # A compiled layer that reads its own number is a graph of its own: it is read only for those who want it.
    layer = None if getattr(layout, "one_graph", False) else getattr(module, "layer_idx", None)
    return layout.attend(query, key, value, layer=layer, scaling=scaling, sliding_window=sliding_window), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Hkv, K, D] → [B, heads, K, D]: each key-value head once for every query head that shares it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


class PackedLayout:
    """Causal attention inside each segment of a packed [1, H, T, D] forward.

    Segments of similar length are padded side by side just for the attention, [n, H, L, D]; everything else in the
    model runs without padding. ``bounds`` is int64 [S + 1] on the CPU.
    """

    compiled = False
    """Whether compiled layers are to be used with it (``tandem.models.compiled``)."""

    def __init__(self, bounds: Tensor, device: torch.device | str) -> None:
        lengths = bounds.diff()
        sizes = lengths.tolist()
        self.groups: list[tuple[Tensor, Tensor]] = []
        inverse = torch.empty(int(bounds[-1]), dtype=torch.int64)
        offset = 0
        for group in self._grouped(sizes):
            longest = sizes[group[-1]]
            start = bounds[:-1][group]
            column = torch.arange(longest)
            real = column < lengths[group][:, None]
            index = torch.where(real, start[:, None] + column, start[:, None])
            inverse[index[real]] = offset + torch.arange(index.numel()).view_as(index)[real]
            offset += index.numel()
            self.groups.append((send(index, device), send(column, device)))
        self.inverse = send(inverse, device)

    def _grouped(self, sizes: list[int]) -> list[list[int]]:
        """Segments of similar size, each group in ascending order of it."""
        groups: list[list[int]] = []
        for segment in sorted(range(len(sizes)), key=sizes.__getitem__):
            # A group's padding is at most a third of it, plus a little where sequences are short.
            if groups and sizes[segment] <= 1.5 * sizes[groups[-1][0]] + 16:
                groups[-1].append(segment)
            else:
                groups.append([segment])
        return groups

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int | None,
        scaling: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """Query [1, H, T, D], key and value [1, Hkv, T, D] → [1, T, H, D]."""
        heads = query.shape[1]
        query_T, key_T, value_T = (x[0].transpose(0, 1) for x in (query, key, value))
        parts = []
        for index, column in self.groups:
            q, k, v = (x[index].transpose(1, 2) for x in (query_T, key_T, value_T))
            k, v = repeat_heads(k, heads), repeat_heads(v, heads)
            if sliding_window is not None and sliding_window < len(column):
                distance = column[:, None] - column
                mask = (distance >= 0) & (distance < sliding_window)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
            else:
                # Padding is on the right, where a causal mask already hides it.
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
            parts.append(out.transpose(1, 2).flatten(0, 1))
        packed_T = parts[0] if len(parts) == 1 else torch.cat(parts)
        return packed_T[self.inverse][None]


class OneShapeLayout(PackedLayout):
    """``PackedLayout`` with every segment padded to the longest: one shape, so one graph for a compiled layer."""

    one_graph = True
    """Whether layers may run as one compiled graph: it treats them all alike, so none needs its number."""

    def _grouped(self, sizes: list[int]) -> list[list[int]]:
        return [sorted(range(len(sizes)), key=sizes.__getitem__)]


class FlashLayout:
    """Causal attention inside each segment of a packed forward on a GPU, by torch's variable-length flash kernel.

    Nothing is padded, and key-value heads are shared without repeating them. ``bounds`` is int64 [S + 1] on the CPU.
    """

    one_graph = True
    compiled = False

    def __init__(self, bounds: Tensor, device: torch.device | str) -> None:
        self.host_bounds = bounds
        self.device = device
        self.bounds = send(bounds.int(), device)
        self.longest = int(bounds.diff().max())

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int | None,
        scaling: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """Query [1, H, T, D], key and value [1, Hkv, T, D] → [1, T, H, D], in bfloat16 or float16."""
        size = query.shape[-1]
        if size % 8 or size > 256 or value.shape[-1] != size or value.dtype == torch.float32:
            # What the kernel does not take. Padded instead: slower, the same numbers.
            return self._padded.attend(query, key, value, layer=layer, scaling=scaling, sliding_window=sliding_window)
        # Where rotation is in float32, queries and keys come wider than values; the kernel wants one type.
        q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
        window = {} if sliding_window is None else {"window_size_left": sliding_window - 1, "window_size_right": 0}
        out_THD = torch.ops.aten._flash_attention_forward(
            q, k, v, self.bounds, self.bounds, self.longest, self.longest, 0.0, True, False, scale=scaling, **window
        )[0]
        return out_THD[None].to(query.dtype)

    @cached_property
    def _padded(self) -> PackedLayout:
        return PackedLayout(self.host_bounds, self.device)


def packed_layout(
    bounds: Tensor, device: torch.device, dtype: torch.dtype, *, compiled: bool = False
) -> PackedLayout | FlashLayout:
    """The fastest layout for packed sequences computed in ``dtype`` there, or the fastest that suits compiled layers.

    ``bounds`` is int64 [S + 1] on the CPU; nobody waits for the device.
    """
    layout: PackedLayout | FlashLayout
    if device.type == "cuda" and dtype.itemsize == 2 and torch.cuda.get_device_capability(device) >= (8, 0):
        layout = FlashLayout(bounds, device)
    else:
        layout = OneShapeLayout(bounds, device) if compiled else PackedLayout(bounds, device)
    layout.compiled = compiled
    return layout
