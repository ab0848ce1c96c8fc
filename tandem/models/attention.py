"""One attention function, registered with transformers, through which packed training and the live engine run.

A model loaded by Tandem has the attention implementation ``tandem``. Called as usual it is transformers' own SDPA.
Called with a ``layout=`` keyword (which transformers hands down to every attention layer), the layout computes the
attention instead: ``PackedLayout`` below for packed sequences, the live engine's own for its slot cache.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
    layer = getattr(module, "layer_idx", None)
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

    def __init__(self, bounds: Tensor, device: torch.device | str) -> None:
        lengths = bounds.diff()
        order = torch.argsort(lengths, stable=True).tolist()
        sizes = lengths.tolist()
        groups: list[list[int]] = []
        for segment in order:
            # A group's padding is at most a third of it, plus a little where sequences are short.
            if groups and sizes[segment] <= 1.5 * sizes[groups[-1][0]] + 16:
                groups[-1].append(segment)
            else:
                groups.append([segment])
        self.groups: list[tuple[Tensor, Tensor]] = []
        inverse = torch.empty(int(bounds[-1]), dtype=torch.int64)
        offset = 0
        for group in groups:
            longest = sizes[group[-1]]
            start = bounds[:-1][group]
            column = torch.arange(longest)
            real = column < lengths[group][:, None]
            index = torch.where(real, start[:, None] + column, start[:, None])
            inverse[index[real]] = offset + torch.arange(index.numel()).view_as(index)[real]
            offset += index.numel()
            self.groups.append((index.to(device), column.to(device)))
        self.inverse = inverse.to(device)

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
