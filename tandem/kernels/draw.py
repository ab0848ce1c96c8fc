"""What follows a step's draws: results into the ring, and every row's next state, without asking the host."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kernels.available import on_triton

TOKEN, LENGTH, DRAWN, LIMIT, RULE, ALIVE, SEED = range(7)
"""Fields of a row's state: last token, tokens in the cache, tokens drawn, most that may be, stop rule, whether it
goes on (1 or 0), and the seed of its stream."""
FIELDS = 7


def block_size(vocabulary: int) -> int:
    """How many tokens a draw takes together: about as many as there are blocks, and 64 at least."""
    return max(64, 1 << ((vocabulary - 1).bit_length() + 1) // 2)


def advance(state_FS: Tensor, drawn_3B: Tensor, stops_RV: Tensor, ring_K3S: Tensor, cursor: Tensor, rows: int) -> None:
    """Takes one draw for each of the first ``rows`` rows. In place, int64 state [FIELDS, S].

    ``drawn_3B`` (token and two log-probs, float64) goes to ``ring_K3S[cursor]``, with token -1 for rows that had
    ended; ``cursor`` [1] moves on. A row ends at a token that ``stops_RV`` (uint8) marks for its rule and at its limit.
    """
    if on_triton(state_FS):
        from tandem.kernels import draw_triton

        draw_triton.advance(state_FS, drawn_3B, stops_RV, ring_K3S, cursor, rows)
        return
    state_FB = state_FS[:, :rows]
    lives_B = state_FB[ALIVE] > 0
    token_B = drawn_3B[0].long()
    ring_K3S[cursor, :, :rows] = drawn_3B
    ring_K3S[cursor, 0, :rows] = torch.where(lives_B, drawn_3B[0], -1.0)
    count_B = state_FB[DRAWN] + 1
    goes_on_B = lives_B & (stops_RV[state_FB[RULE], token_B] == 0) & (count_B < state_FB[LIMIT])
    state_FB[TOKEN] = torch.where(lives_B, token_B, state_FB[TOKEN])
    state_FB[LENGTH] = torch.where(goes_on_B, state_FB[LENGTH] + 1, 0)
    state_FB[DRAWN] = torch.where(lives_B, count_B, state_FB[DRAWN])
    state_FB[ALIVE] = goes_on_B.long()
    cursor += 1
