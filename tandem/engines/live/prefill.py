"""Prompts through the model into their pages: as they come, or as captured graphs where they are short, on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tandem.engines.live.graphs import Capturing
from tandem.engines.live.pages import PAGE, PagedPrefill, PagePool, as_wide, send_array
from tandem.engines.live.states import StateForward
from tandem.kernels import pages as kernels
from tandem.models.attention import FlashLayout, Layout, packed_layout
from tandem.models.recurrent.states import Name

TOKENS = (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Sizes that graphs are captured for. Above the last, launching takes no longer than computing."""
TOKENS_A_PROMPT = 16
"""A graph has room for one prompt for each so many tokens."""


class Forward(Protocol):
    """From tokens to logits on a layout (``tandem.engines.live.forwards``)."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, token_BQ: Tensor, position_BQ: Tensor, layout: Layout, keep: Tensor | None = None) -> Tensor: ...


class Prefill:
    """Takes prompts through ``forward``, their keys and values into pages of ``pool``."""

    def __init__(self, forward: Forward, pool: PagePool, capturing: Capturing | None) -> None:
        self.forward, self.pool = forward, pool
        self.graphs: PrefillGraphs | None = None
        if capturing is not None and _flash_takes(pool, forward.device):
            self.graphs = PrefillGraphs(forward, pool, capturing)

    def __call__(self, prompts: list[list[int]], pages: list[list[int]]) -> Tensor:
        """The logits [P, V] of what follows each prompt; its ``pages`` hold it from then on."""
        lengths = [len(prompt) for prompt in prompts]
        position_T = np.concatenate([np.arange(n) for n in lengths])
        page_T = np.concatenate([np.asarray(p)[np.arange(n) // PAGE] for n, p in zip(lengths, pages, strict=True)])
        token_T = np.concatenate([np.asarray(prompt) for prompt in prompts])
        bounds = np.concatenate(([0], np.cumsum(lengths)))
        device = self.forward.device
        sent_3T = send_array(np.stack((token_T, position_T, page_T * PAGE + position_T % PAGE)), device)
        sent_S = send_array(bounds, device)
        if self.graphs is not None and (size := self.graphs.size(lengths)) is not None:
            return self.graphs.run(sent_3T, sent_S, size, max(lengths))
        inner = packed_layout(torch.from_numpy(bounds), device, self.pool.shape.dtype)
        layout = PagedPrefill(self.pool, inner, sent_3T[2])
        return self.forward(sent_3T[0][None], sent_3T[1][None], layout, keep=sent_S[1:] - 1)[0]


class StatePrefill:
    """The same of a forward with states, which are kept until the next prompts: prompts of one length go together."""

    def __init__(self, forward: StateForward, pool: PagePool) -> None:
        self.forward, self.pool = forward, pool
        self.states: Mapping[Name, Tensor] = {}
        """[P, ...] each."""

    def __call__(self, prompts: list[list[int]], pages: list[list[int]]) -> Tensor:
        """The logits [P, V] of what follows each prompt; its ``pages`` hold its keys and values from then on."""
        # Those of the last prompts go before these are made: they may be large.
        self.states = {}
        found = self.forward.prefill(prompts)
        self.states = found.states
        source_T, position_T = (x.numpy() for x in found.places(range(len(prompts))))
        page_T = np.concatenate([np.asarray(p)[np.arange(len(n)) // PAGE] for n, p in zip(prompts, pages, strict=True)])
        target_T = np.empty_like(page_T)
        target_T[source_T] = page_T * PAGE + position_T % PAGE
        sent_T = send_array(target_T, self.forward.device)
        for number, (key_TKD, value_TKD) in found.keys_and_values.items():
            kernels.store(key_TKD, as_wide(value_TKD, key_TKD), self.pool.layer(number), sent_T)
        return found.logits_PV


class PrefillGraphs:
    """A graph for each number of tokens and longest prompt, both rounded up; what is padded belongs to no prompt."""

    def __init__(self, forward: Forward, pool: PagePool, capturing: Capturing) -> None:
        self.forward, self.pool, self.capturing = forward, pool, capturing
        device = forward.device
        self.sent_3T = torch.zeros(3, TOKENS[-1], dtype=torch.int64, device=device)
        self.bounds_S = torch.zeros(TOKENS[-1] // TOKENS_A_PROMPT + 1, dtype=torch.int32, device=device)
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def size(self, lengths: list[int]) -> int | None:
        """The graph's number of tokens, or None where the prompts are too long for any."""
        needed = max(sum(lengths), len(lengths) * TOKENS_A_PROMPT)
        return next((size for size in TOKENS if size >= needed), None)

    def run(self, sent_3T: Tensor, bounds_S: Tensor, size: int, longest: int) -> Tensor:
        """The last logits [P, V] of prompts packed as ``Prefill`` packs them."""
        tokens, prompts = sent_3T.shape[1], len(bounds_S) - 1
        # What is padded goes to place 0, which is nobody's; prompts that are not there are empty.
        self.sent_3T[:, :tokens] = sent_3T
        self.sent_3T[:, tokens:size] = 0
        self.bounds_S.copy_(bounds_S[-1:].expand_as(self.bounds_S))
        self.bounds_S[: prompts + 1] = bounds_S
        longest = max(64, 1 << (longest - 1).bit_length())
        if (size, longest) not in self.graphs:
            self.graphs[size, longest] = self.capturing(lambda: self._forward(size, longest))
        graph, logits_PV = self.graphs[size, longest]
        graph.replay()
        # The next graph's work may overwrite this one's results.
        return logits_PV[:prompts].clone()

    def _forward(self, size: int, longest: int) -> Tensor:
        bounds_S = self.bounds_S[: size // TOKENS_A_PROMPT + 1]
        token_1T, position_1T, target_1T = self.sent_3T[:, None, :size]
        layout = PagedPrefill(self.pool, _FixedFlash(bounds_S, longest), target_1T[0])
        return self.forward(token_1T, position_1T, layout, keep=(bounds_S[1:] - 1).clamp(min=0))[0]


class _FixedFlash(FlashLayout):
    """``FlashLayout`` over bounds that are on the device already, and may change between replays."""

    def __init__(self, bounds_S: Tensor, longest: int) -> None:
        self.bounds = self.own_bounds = bounds_S
        self.longest = longest
        self.sharing = None


def _flash_takes(pool: PagePool, device: torch.device) -> bool:
    shape = pool.shape
    fits = shape.flash and shape.dtype.itemsize == 2
    return fits and torch.cuda.get_device_capability(device) >= (8, 0)
