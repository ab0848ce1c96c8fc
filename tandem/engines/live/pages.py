"""The paged key-value cache: fixed pages that sequences take as they grow, and share where they begin alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.batch import send
from tandem.kernels import pages as kernels
from tandem.kernels.layers import Norm, Rotation
from tandem.models.attention import Ask, Layout, numbered

PAGE = 64
"""Tokens a page."""


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What one token needs in the cache."""

    kept: tuple[tuple[int, int], ...]
    """Heads and their width, of each set of keys and values."""
    layers: tuple[int, ...]
    """For each layer that attends, which of them it attends to: layers may share one (Gemma 3n and 4)."""
    dtype: torch.dtype
    eight_bit: bool = False
    """Whether they are kept in 8 bits, with a scale for each token and head, and not as they come."""
    flash: bool = True
    """Whether flash kernels compute its attention in 16 bits: not bent scores, nor values narrower than keys, nor heads
    of odd widths or wider than 256."""
    state_bytes: int = 0
    """Of what a sequence has beside its tokens."""
    latent: tuple[int, int] | None = None
    """Query heads that share a key, and how many of its last dimensions are its value, where none is kept by itself."""

    @property
    def copies(self) -> int:
        """Of what is ``kept``: keys and values, or keys alone."""
        return 2 if self.latent is None else 1

    @property
    def page_bytes(self) -> int:
        numbers = sum(heads * size for heads, size in self.kept)
        scales = 4 * sum(heads for heads, _ in self.kept)
        return self.copies * PAGE * (numbers + scales if self.eight_bit else numbers * self.dtype.itemsize)

    @property
    def programs(self) -> int:
        """Most programs that attention kernels have for a row of a layer, before long ones are divided."""
        if self.latent is not None:
            return -(-self.latent[0] // kernels.LATENT_HEADS)
        return max((heads for heads, _ in self.kept), default=1)


class PagePool:
    """All pages of a device, and who holds them. Page 0 belongs to nobody: rows that have ended write there."""

    def __init__(self, shape: CacheShape, pages: int, device: torch.device) -> None:
        self.shape = shape
        self.pages = pages
        self.device = device
        self.stores: list[Tensor] = []
        """[copies, sets, pages, Hkv, PAGE, D] of all sets alike, and scales [copies, sets, pages, Hkv, PAGE] if in 8
        bits."""
        alike = {kind: iter(self._made(kind)) for kind in dict.fromkeys(shape.kept)}
        self.sets = [next(alike[kind]) for kind in shape.kept]
        self.holders = np.zeros(pages, dtype=np.int64)
        self.free = list(range(pages - 1, 0, -1))

    @property
    def available(self) -> int:
        return len(self.free)

    def _made(self, kind: tuple[int, int]) -> list[kernels.Pages]:
        """All sets of so many heads of that width."""
        (heads, size), shape = kind, self.shape
        # Zeros: what is masked gets weight 0, and 0 times a stray NaN would still be NaN.
        lines = (shape.copies, shape.kept.count(kind), self.pages, heads, PAGE)
        dtype = kernels.EIGHT_BIT if shape.eight_bit else shape.dtype
        made = [torch.zeros(*lines, size, dtype=dtype, device=self.device)]
        if shape.eight_bit:
            made.append(torch.zeros(lines, device=self.device))
        self.stores += made
        sets = [[store[:, number] for store in made] for number in range(lines[1])]
        if shape.latent is None:
            return [kernels.Pages(*(x for both in parts for x in both)) for parts in sets]
        return [kernels.latent_pages(*(keys[0] for keys in parts), values=shape.latent[1]) for parts in sets]

    def layer(self, number: int) -> kernels.Pages:
        """The pages of one layer."""
        return self.sets[self.shape.layers[number]]

    def take(self, count: int) -> list[int]:
        """Pages that nobody holds. Ask ``available`` first."""
        assert count <= len(self.free), "more pages asked for than there are"
        taken = [self.free.pop() for _ in range(count)]
        self.holders[taken] = 1
        return taken

    def share(self, pages: list[int]) -> None:
        """One more holder for each."""
        self.holders[pages] += 1

    def give_back(self, pages: list[int]) -> None:
        """One holder less for each; those without any are free again."""
        self.holders[pages] -= 1
        self.free += [page for page in pages if self.holders[page] == 0]

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """The content of some pages into others, in every layer."""
        if sources:
            source, target = (send(torch.tensor(x), self.device) for x in (sources, targets))
            for store in self.stores:
                store[:, :, target] = store[:, :, source]


def send_array(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device. The host does not wait, and may change ``values`` at once."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.clone() if device.type == "cpu" else send(tensor, device)


def as_wide(value: Tensor, key: Tensor) -> Tensor:
    """Values with zeros behind them, as wide as keys (multi-head latent attention, arXiv:2405.04434)."""
    spare = key.shape[-1] - value.shape[-1]
    return F.pad(value, (0, spare)) if spare else value


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


class PagedPrefill:
    """Packed prompts: attention by ``inner``, keys and values into the places ``target_T`` of the pool as they pass."""

    def __init__(self, pool: PagePool, inner: Layout, target_T: Tensor) -> None:
        self.pool = pool
        self.inner = inner
        self.target_T = target_T

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask, latent_T1D: Tensor | None = None) -> Tensor:
        """Query [1, H, T, D], key and value [1, Hkv, T, D] → [1, T, H, D]. ``latent``: what is kept instead of both."""
        pages = self.pool.layer(numbered(ask))
        if latent_T1D is None:
            key_TKD, value_TKD = key[0].transpose(0, 1), as_wide(value, key)[0].transpose(0, 1)
            kernels.store(key_TKD, value_TKD, pages, self.target_T)
        else:
            kernels.store(latent_T1D, None, pages, self.target_T)
        return self.inner.attend(query, key, value, ask)


class PagedDecode:
    """One new token for each row: its pages ``table_BP`` (int32), the tokens it holds, and whether it lives (int64)."""

    def __init__(self, pool: PagePool, table_BP: Tensor, length_B: Tensor, alive_B: Tensor) -> None:
        self.pool = pool
        self.rows = kernels.decode_rows(table_BP, length_B, alive_B, page=PAGE, kv_heads=pool.shape.programs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        """Query [B, H, 1, D], key and value [B, Hkv, 1, D] → [B, 1, H, D]."""
        heads = query.squeeze(2), key.squeeze(2), as_wide(value, key).squeeze(2)
        return self.attend_heads(*heads, ask)[:, None, :, : value.shape[-1]]

    def attend_heads(
        self,
        query_BHD: Tensor,
        key_BKD: Tensor,
        value_BKD: Tensor | None,
        ask: Ask,
        rotation: Rotation | None = None,
        value_norm: Norm | None = None,
    ) -> Tensor:
        """The same as [B, H, D]. ``rotation``, ``value_norm``: what query and key, and value, still have to go through.

        Keys and values have no heads where the pages have the new token's, of another layer. No ``value``: it is the
        last part of the key, as the pages have it.
        """
        return kernels.append_attend(
            query_BHD,
            key_BKD,
            value_BKD,
            self.pool.layer(numbered(ask)),
            self.rows,
            scaling=query_BHD.shape[-1] ** -0.5 if ask.scaling is None else ask.scaling,
            sliding_window=ask.sliding_window,
            rotation=rotation,
            value_norm=value_norm,
            softcap=ask.softcap,
            sink_H=ask.sinks,
        )
