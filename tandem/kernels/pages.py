"""Attention over a paged key-value cache: writing tokens into pages, and one query a sequence against its pages.

A sequence's row of the table names its pages in order. A place is a page times the page's size, plus an offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.kernels.available import on_triton
from tandem.kernels.layers import Norm, Rotation, norm, rotate_

EIGHT_BIT = torch.float8_e4m3fn
"""Of the 8-bit formats the one with more digits; its narrow range is made up for by the scales."""
LARGEST = torch.finfo(EIGHT_BIT).max
LATENT_HEADS = 16
"""Query heads that one program takes where all share a key."""


@dataclass(frozen=True)
class Pages:
    """A layer's cache: keys and values [pages, Hkv, page, D]; their scales [pages, Hkv, page], float32, if 8-bit.

    What is kept in 8 bits is divided by the largest magnitude of its token and head over the format's largest number.
    Values may be the last dimensions of keys (``latent_pages``).
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def size(self) -> int:
        """Tokens a page."""
        return self.keys.shape[2]


def latent_pages(keys: Tensor, scales: Tensor | None = None, *, values: int) -> Pages:
    """Keys [pages, 1, page, D] whose last ``values`` dimensions are the values, in the same memory."""
    return Pages(keys, keys[..., -values:], scales, scales)


@dataclass(frozen=True)
class DecodeRows:
    """The sequences of one decoding step, each with one new token. The same in all layers."""

    table_BP: Tensor
    """int32: the names of each one's pages, in order."""
    length_B: Tensor
    """int64: tokens that each has in the cache."""
    target_B: Tensor
    """int64: the place of each one's new token. 0, of a page that is nobody's, for rows that have ended: others may
    have their pages by now."""
    share: Tensor | None = None
    """int32 [1]: pages that one program should take, for kernels that divide long rows."""
    arrived_BK: Tensor | None = None
    """int32, for such kernels to count in, by key-value heads. They find zeros and leave zeros."""


def decode_rows(table_BP: Tensor, length_B: Tensor, alive_B: Tensor, *, page: int, kv_heads: int) -> DecodeRows:
    """What attention needs to know of rows with these pages and lengths, of which some are ``alive`` (int64)."""
    if on_triton(table_BP):
        from tandem.kernels import pages_triton

        return pages_triton.decode_rows(table_BP, length_B, alive_B, page, kv_heads)
    page_B = table_BP.gather(1, (length_B // page)[:, None]).squeeze(1).long()
    return DecodeRows(table_BP, length_B, torch.where(alive_B > 0, page_B * page + length_B % page, 0))


def store(key_TKD: Tensor, value_TKD: Tensor | None, pages: Pages, target_T: Tensor) -> None:
    """Writes keys and values [T, Hkv, D] of a layer to the places ``target_T``, int64; None: keys have the values."""
    if on_triton(key_TKD):
        from tandem.kernels import pages_triton

        pages_triton.store(key_TKD, value_TKD, pages, target_T)
        return
    page_T, offset_T = target_T // pages.size, target_T % pages.size
    for x_TKD, kept, scales in ((key_TKD, pages.keys, pages.key_scales), (value_TKD, pages.values, pages.value_scales)):
        if x_TKD is None:
            continue
        if scales is not None:
            scale_TK = x_TKD.float().abs().amax(-1).clamp(min=1e-12) / LARGEST
            scales[page_T, :, offset_T] = scale_TK
            x_TKD = x_TKD.float() / scale_TK[..., None]
        kept[page_T, :, offset_T] = x_TKD.to(kept.dtype)


def append_attend(
    query_BHD: Tensor,
    key_BKD: Tensor,
    value_BKD: Tensor | None,
    pages: Pages,
    rows: DecodeRows,
    *,
    scaling: float,
    sliding_window: int | None = None,
    rotation: Rotation | None = None,
    value_norm: Norm | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Attention [B, H, D] of one new token a row over its cached ones and itself, which is stored.

    Heads share keys and values [B, Hkv, D] in equal groups; there are none (Hkv 0) where another layer has stored them.
    No ``value``: all heads share a key, whose last dimensions are its value (``latent_pages``), and nothing else that
    may be asked for below is.
    Softmax is in float32. ``rotation``: query and key come as they were projected, and are turned first.
    ``value_norm``: so do values, of which each head is normed. ``softcap``: scores are bent to
    ``cap * tanh(score / cap)``. ``sink_H``: a score more for each head, without a value.
    """
    if on_triton(query_BHD):
        from tandem.kernels import latent_triton, pages_triton

        if value_BKD is None:
            asked = (sliding_window, rotation, value_norm, softcap, sink_H)
            assert all(x is None for x in asked), "latent attention has none of these"
            return latent_triton.append_attend(query_BHD, key_BKD, pages, rows, scaling=scaling)
        return pages_triton.append_attend(
            query_BHD, key_BKD, value_BKD, pages, rows, scaling=scaling, sliding_window=sliding_window,
            rotation=rotation, value_norm=value_norm, softcap=softcap, sink_H=sink_H,
        )  # fmt: skip
    table_BP, length_B = rows.table_BP, rows.length_B
    if rotation is not None:
        both = torch.cat((query_BHD, key_BKD), dim=1)
        rotate_(both, length_B, rotation, query_BHD.shape[1], key_BKD.shape[1])
        query_BHD, key_BKD = both.split([query_BHD.shape[1], key_BKD.shape[1]], dim=1)
    if value_norm is not None and value_BKD is not None:
        value_BKD = norm(value_BKD.flatten(0, 1), value_norm).view_as(value_BKD)
    if key_BKD.shape[1]:
        store(key_BKD, value_BKD, pages, rows.target_B)
    count, heads, size = query_BHD.shape
    kv_heads = pages.keys.shape[1]
    reach = int(length_B.max()) // pages.size + 1
    wide = torch.promote_types(query_BHD.dtype, torch.float32)

    def cached(kept: Tensor, scales: Tensor | None) -> Tensor:
        x_BPKND = kept[table_BP[:, :reach].long()].to(wide)
        if scales is not None:
            x_BPKND = x_BPKND * scales[table_BP[:, :reach].long()][..., None]
        return x_BPKND.transpose(1, 2).reshape(count, kv_heads, reach * pages.size, kept.shape[-1])

    query = query_BHD.reshape(count, kv_heads, -1, size).to(wide)
    position = torch.arange(reach * pages.size, device=length_B.device)
    hidden = position > length_B[:, None]
    if sliding_window is not None:
        hidden |= position <= length_B[:, None] - sliding_window
    key, value = cached(pages.keys, pages.key_scales), cached(pages.values, pages.value_scales)
    score = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(hidden[:, None, None], float("-inf"))
    if sink_H is not None:
        score = torch.cat((score, sink_H.to(wide).view(kv_heads, -1, 1).expand(count, -1, -1, 1)), dim=-1)
    weight = score.softmax(-1)[..., : len(position)]
    return (weight @ value).reshape(count, heads, -1).to(query_BHD.dtype)
