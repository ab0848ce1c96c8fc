"""Ways to draw a token from logits: how long a draw takes, and how many draws flip where logits are rounded otherwise.

    python bench/draws.py --device cpu --json bench/results/draws_cpu.json
    python bench/draws.py --device cuda --rows 512 --vocabulary 151936 --json bench/results/draws_h200.json

Method. Random logits of standard deviation --spread, bfloat16 on a GPU and float32 on a CPU; the best of --repeats
rounds counts. Flips: the same draws once more from logits that are off by --noise each, normally distributed, as
another order of a product's sums makes them. "moved" is how much probability that moved (half the sum of differences),
over all draws: any way to draw must flip so many at least. Ways:

- race: the live engine's (``tandem.engines.live.draws.draw``, a Triton kernel on a GPU): blocks, then tokens, race.
- lookup: a uniform number among cumulative sums of blocks, then of tokens, as it was before; plain torch.
- lookup-triton: the same as a kernel, on a GPU.
- gumbel: Gumbel-max over the whole vocabulary, with a number for each of its tokens; plain torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from common import Record, arguments, print_table, resolve_device
from torch import Tensor

from tandem.engines.live.draws import Wanted, draw, param_columns, stream, waiting
from tandem.types import SamplingParams

WANTED = Wanted.of([SamplingParams()])
Way = Callable[[Tensor, Tensor], Tensor]
"""Logits [B, V] and seeds [B] to tokens [B], with their log-probs."""


def race(logits_BV: Tensor, seed_B: Tensor) -> Tensor:
    """The product's."""
    return draw(logits_BV, seed_B, _columns(len(seed_B), seed_B.device), seed_B, WANTED)


@cache
def _columns(rows: int, device: torch.device) -> Tensor:
    return param_columns([SamplingParams()] * rows).to(device)


def lookup(logits_BV: Tensor, seed_B: Tensor) -> Tensor:
    """By the inverse of the distribution function, in two levels of 128."""
    prob_BV = torch.softmax(logits_BV.float(), dim=-1)
    rows, vocabulary = prob_BV.shape
    prob_BNK = F.pad(prob_BV, (0, -vocabulary % 128)).view(rows, -1, 128)
    cdf_BN = prob_BNK.sum(dim=-1).double().cumsum(dim=-1)
    target_B = _uniform(seed_B) * cdf_BN[:, -1]
    block_B = torch.searchsorted(cdf_BN, target_B[:, None], right=True).squeeze(1).clamp(max=cdf_BN.shape[1] - 1)
    before_B = torch.where(block_B > 0, cdf_BN.gather(1, (block_B - 1).clamp(min=0)[:, None]).squeeze(1), 0.0)
    inside_BK = prob_BNK[torch.arange(rows, device=seed_B.device), block_B].double().cumsum(dim=-1)
    inside_B = torch.searchsorted(inside_BK, (target_B - before_B)[:, None], right=True).squeeze(1)
    return _with_logp(prob_BV, (block_B * 128 + inside_B).clamp(max=vocabulary - 1))


def lookup_triton(logits_BV: Tensor, seed_B: Tensor) -> Tensor:
    """The kernel of ``lookup``."""
    from draws_lookup import lookup_triton as kernel

    return kernel(logits_BV, _uniform(seed_B))


def gumbel(logits_BV: Tensor, seed_B: Tensor) -> Tensor:
    """The shortest of one waiting time for each token."""
    prob_BV = torch.softmax(logits_BV.float(), dim=-1)
    numbers_V = torch.arange(logits_BV.shape[1], device=seed_B.device)
    return _with_logp(prob_BV, (prob_BV / waiting(stream(seed_B, seed_B), numbers_V)).argmax(dim=-1))


def _uniform(seed_B: Tensor) -> Tensor:
    """From an exponential number, so that it is of the same stream."""
    return torch.exp(-waiting(stream(seed_B, seed_B), torch.zeros(1, dtype=torch.int64, device=seed_B.device)))[:, 0]


def _with_logp(prob_BV: Tensor, token_B: Tensor) -> Tensor:
    return torch.stack((token_B.double(), prob_BV.gather(1, token_B[:, None]).squeeze(1).double().log()))


WAYS: dict[str, Way] = {"race": race, "lookup": lookup, "lookup-triton": lookup_triton, "gumbel": gumbel}


def seconds_of(way: Way, logits_BV: Tensor, options: argparse.Namespace) -> float:
    """Of one call, the best of some rounds."""
    seeds, on_gpu = torch.arange(len(logits_BV), device=logits_BV.device), logits_BV.is_cuda
    best, calls = float("inf"), 1
    while True:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            way(logits_BV, seeds)
        if on_gpu:
            torch.cuda.synchronize()
        spent = time.perf_counter() - start
        if spent > options.least:
            break
        calls *= 2
    for _ in range(options.repeats):
        start = time.perf_counter()
        for _ in range(calls):
            way(logits_BV, seeds)
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def flips_of(way: Way, options: argparse.Namespace, vocabulary: int) -> tuple[int, float]:
    """Draws that flip, and how much probability moved, over ``--draws``."""
    flips, moved, rows = 0, 0.0, 32
    generator = torch.Generator().manual_seed(0)
    for start in range(0, options.draws, rows):
        logits = options.spread * torch.randn(rows, vocabulary, generator=generator)
        off = logits + options.noise * torch.randn(rows, vocabulary, generator=generator)
        seeds = torch.arange(start, start + rows)
        one, two = (way(x.to(options.device), seeds.to(options.device))[0] for x in (logits, off))
        flips += int((one != two).sum())
        moved += float((logits.double().softmax(-1) - off.double().softmax(-1)).abs().sum()) / 2
    return flips, moved


def main() -> None:
    """Measures the ways one after the other, all in this process."""
    parser = arguments(__doc__, list(WAYS), ["any"], "any")
    parser.add_argument("--vocabulary", nargs="+", type=int, default=[512, 32000, 151936])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--spread", type=float, default=2.0, help="of the logits, in nats")
    parser.add_argument("--noise", type=float, default=1e-3, help="of their rounding, in nats")
    parser.add_argument("--draws", type=int, default=4000, help="that may flip")
    parser.add_argument("--least", type=float, default=0.2, help="seconds of a round")
    options = parser.parse_args()
    options.device = resolve_device(options.device)
    record = Record(options)
    for vocabulary in options.vocabulary:
        for name in options.only or [name for name in WAYS if "triton" not in name or options.device != "cpu"]:
            # A number for each token of a large vocabulary is dear: it is counted where that takes seconds.
            dear = name == "gumbel" and options.device == "cpu"
            draws = min(options.draws, 10**7 // vocabulary) if dear else options.draws
            counted = argparse.Namespace(**vars(options) | {"draws": draws})
            flips, moved = flips_of(WAYS[name], counted, vocabulary)
            for rows in options.rows:
                logits = options.spread * torch.randn(rows, vocabulary, device=options.device)
                logits = logits if options.device == "cpu" else logits.bfloat16()
                seconds = seconds_of(WAYS[name], logits, options)
                record.add(
                    {"way": name, "vocabulary": vocabulary, "rows": rows, "microseconds": 1e6 * seconds,
                     "draws": draws, "flips": flips, "moved": moved}
                )  # fmt: skip
    columns = ["way", "vocabulary", "rows", "microseconds", "draws", "flips", "moved"]
    print_table("Draws", {name: name for name in columns}, record.rows)


if __name__ == "__main__":
    main()
