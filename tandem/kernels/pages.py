"""Attention over a paged key-value cache: writing tokens into pages, and one query a sequence against its pages.

A layer's keys, like its values, are [pages, Hkv, page, D]. A sequence's row of the table names its pages in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kernels.available import on_triton


def places(table_BP: Tensor, length_B: Tensor, alive_B: Tensor, page: int) -> Tensor:
    """int64 [B]: where each row's next token goes. Place 0, of a page that is nobody's, for rows that have ended.

    A row that has ended must not write into its pages: others may have them by now.
    """
    if on_triton(table_BP):
        from tandem.kernels import pages_triton

        return pages_triton.places(table_BP, length_B, alive_B, page)
    page_B = table_BP.gather(1, (length_B // page)[:, None]).squeeze(1).long()
    return torch.where(alive_B > 0, page_B * page + length_B % page, 0)


def store(key_TKD: Tensor, value_TKD: Tensor, keys: Tensor, values: Tensor, target_T: Tensor) -> None:
    """Writes keys and values [T, Hkv, D] of a layer to ``target_T``: page times page size plus offset, int64."""
    if on_triton(key_TKD):
        from tandem.kernels import pages_triton

        pages_triton.store(key_TKD, value_TKD, keys, values, target_T)
        return
    page_T, offset_T = target_T // keys.shape[2], target_T % keys.shape[2]
    keys[page_T, :, offset_T] = key_TKD.to(keys.dtype)
    values[page_T, :, offset_T] = value_TKD.to(values.dtype)


def attend(
    query_BHD: Tensor,
    keys: Tensor,
    values: Tensor,
    table_BP: Tensor,
    length_B: Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention [B, H, D] of one query a sequence over its first ``length + 1`` cached tokens (its own is the last).

    ``table_BP`` is int32, ``length_B`` int64. Heads share keys and values in equal groups. Softmax is in float32.
    """
    if on_triton(query_BHD):
        from tandem.kernels import pages_triton

        return pages_triton.attend(
            query_BHD, keys, values, table_BP, length_B, scaling=scaling, sliding_window=sliding_window
        )
    rows, heads, size = query_BHD.shape
    kv_heads, page = keys.shape[1:3]
    reach = (int(length_B.max()) // page + 1) * page
    pages = table_BP[:, : reach // page].long()
    wide = torch.promote_types(keys.dtype, torch.float32)
    key, value = (x[pages].transpose(1, 2).reshape(rows, kv_heads, reach, -1).to(wide) for x in (keys, values))
    query = query_BHD.view(rows, kv_heads, -1, size).to(wide)
    position = torch.arange(reach, device=length_B.device)
    hidden = position > length_B[:, None]
    if sliding_window is not None:
        hidden |= position <= length_B[:, None] - sliding_window
    score = (query @ key.transpose(2, 3) * scaling).masked_fill(hidden[:, None, None], float("-inf"))
    return (score.softmax(-1) @ value).reshape(rows, heads, -1).to(query_BHD.dtype)
