"""Segments of packed tokens for what goes from token to token: each begins anew."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.batch import send
from tandem.kernels.chunks import Chunks

LEAST_CHUNK = 16
"""Tokens of the shortest chunk that is chosen where segments are short."""
TOKEN, CHUNK = 128, 16 * 128
"""What a token costs beside the tokens of its chunk that it meets, in such tokens, and what a chunk costs: so that what
is chosen is about what was fastest on a core, for heads of 64 and 128."""


class Segments:
    """Where S segments of packed tokens begin, [1, T, ...]. One object serves all layers of a forward."""

    def __init__(self, bounds: Tensor, device: torch.device | str) -> None:
        self.size_S, self.device = bounds.diff(), device
        self.tokens = int(bounds[-1])
        self._chunks: dict[int, Chunks] = {}
        self._places: dict[int, Tensor] = {}

    def chunks(self, most: int) -> Chunks:
        """Of at most ``most`` tokens each: shorter where most segments are, since a chunk is one segment's."""
        if most not in self._chunks:
            self._chunks[most] = self._chunked(self._length(most))
        return self._chunks[most]

    def _length(self, most: int) -> int:
        longest = int(self.size_S.max())
        steps = [-(-longest // (most >> halved)) for halved in range(most.bit_length())]
        lengths = [-(-longest // number) for number in steps]

        def cost(length: int) -> int:
            return int((-(-self.size_S // length)).sum()) * (length * (length + TOKEN) + CHUNK)

        return min((length for length in lengths if length >= min(LEAST_CHUNK, lengths[0])), key=cost)

    def _chunked(self, length: int) -> Chunks:
        steps_S = -(-self.size_S // length)
        rank_S = steps_S.argsort(descending=True, stable=True).argsort()
        count_C = (steps_S > torch.arange(int(steps_S.max()))[:, None]).sum(1)
        before_C = count_C.cumsum(0) - count_C
        position_T = torch.arange(int(self.size_S.sum())) - (self.size_S.cumsum(0) - self.size_S)[self._segment_T()]
        chunk_T = before_C[position_T // length] + rank_S[self._segment_T()]
        return Chunks(length, count_C.tolist(), send(chunk_T * length + position_T % length, self.device))

    def apart(self, x: Tensor, gap: int) -> tuple[Tensor, Tensor]:
        """[1, T, ...] → [1, T + S gap, ...] with ``gap`` zeros before each segment, and where the tokens are, [T]."""
        if gap not in self._places:
            segment_T = self._segment_T()
            self._places[gap] = send(torch.arange(len(segment_T)) + gap * (segment_T + 1), self.device)
        empty = x.new_zeros(1, x.shape[1] + gap * len(self.size_S), *x.shape[2:])
        return empty.index_copy_(1, self._places[gap], x), self._places[gap]

    def _segment_T(self) -> Tensor:
        return torch.arange(len(self.size_S)).repeat_interleave(self.size_S)
