"""Samples that nobody has drawn, of the shapes of those to come: for whoever compiles while these are drawn."""

from __future__ import annotations

import torch

from tandem.batch import Batch
from tandem.data.packing import pack
from tandem.types import Sequence


def made_up(
    *, prompts: int, samples: int, prompt: int, longest: int, vocabulary: int, tokens: int, ranks: int
) -> Batch:
    """About a micro-batch of ``tokens`` for each rank: ``samples`` of each prompt of ``prompt`` tokens, a quarter as
    long as the ``longest`` may get, or so short that there are several prompts, of ``prompts`` of a step at most.

    None is longer than a sample may get whose prompt has so many tokens: the models may take no more.
    Compiled code knows sizes that are 1, or equal to one another, apart from all others: here none are by chance.
    """
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    own = max(2, min(longest // 4, tokens // (3 * samples) - prompt))
    count = max(1, min(prompts, ranks * max(3, tokens // (prompt + samples * own))))
    samples += samples > 1 and count == ranks * samples
    rows = []
    for number in range(count):
        first = ids(max(1, prompt - 1 - number % 2))
        for i in range(samples):
            rest = ids(max(2, own - i))
            rows.append(Sequence(token_ids=first + rest, trainable=[False] * len(first) + [True] * len(rest)))
    return pack(rows)
