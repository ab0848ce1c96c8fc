"""Microseconds of a layer of experts as a sampler's captured step has it: by grouped products, and by kernels for few.

    python bench/experts.py --json bench/results/experts_h200.json
    python bench/experts.py --only sweep --cases 0 3     # the same kernels with other tiles

Method. Each of --layers layers has random weights in bfloat16 of its own, more together than a cache holds; tokens pick
experts at random. They are captured in one CUDA graph, which is replayed for --least seconds, --repeats times; the
median counts, over the layers. (On a CPU one call is timed, of --size tiny, to see that all is well.) "floor" is the
experts' bytes over 4.8 TB/s, an H200's memory. Ways:

- grouped: torch's grouped products with what they need around them (``models.moe.experts.grouped_experts``).
- few: ``kernels.experts_triton``, and its parts, each captured alone.
- router, plain: transformers' own of Qwen 3 MoE, in float32. router: its product and ``kernels.choice``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import PEAK_BYTES, Record, arguments, print_table, resolve_device, seconds_of
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter

from tandem.kernels import experts_triton
from tandem.models.moe import experts
from tandem.models.moe.routers import in_float32

CASES = {
    "real": ((256, 8, 2, 896, 2432), (256, 32, 4, 1024, 512), (1024, 32, 4, 1024, 512), (256, 128, 8, 2048, 768),
             (64, 128, 8, 2048, 768)),
    "tiny": ((5, 4, 2, 24, 16),),
}  # fmt: skip
"""Tokens, experts, picks of a token, width, inner width of an expert."""
SWEPT = tuple(itertools.product((16, 32, 64, 128), (64, 128), (3, 4)))
"""Rows and columns of a tile, and loads on their way."""


def microseconds(run: Callable[[int], Any], options: argparse.Namespace) -> float:
    """Of one layer. ``run`` is given its number."""
    run(0)
    if options.device == "cpu":
        return 1e6 * seconds_of(lambda: run(0), options.device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(options.layers):
            run(layer)
    times = []
    for _ in range(1 + options.repeats):
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < options.least:
            for _ in range(5):
                graph.replay()
            torch.cuda.synchronize()
            calls += 5
        times.append((time.perf_counter() - start) / calls)
    return 1e6 * statistics.median(times[1:]) / options.layers


def measure(case: tuple[int, ...], options: argparse.Namespace, record: Record) -> None:
    """All ways of one case."""
    tokens, count, picks, width, inner = case
    config = Qwen3MoeConfig(
        hidden_size=width, num_experts=count, num_experts_per_tok=picks, moe_intermediate_size=inner,
        norm_topk_prob=True,
    )  # fmt: skip
    with torch.device(options.device):
        parts: list[Any] = [Qwen3MoeExperts(config).bfloat16() for _ in range(options.layers)]
        router: Any = Qwen3MoeTopKRouter(config).bfloat16()
    for parameter in itertools.chain(router.parameters(), *(part.parameters() for part in parts)):
        torch.nn.init.normal_(parameter, std=0.02)
    in_float32(router)
    hidden = torch.randn(tokens, width, device=options.device, dtype=torch.bfloat16)
    index = torch.rand(tokens, count, device=options.device).topk(picks).indices
    weight = torch.rand(tokens, picks, device=options.device)
    floor = 1e6 * sum(p.nbytes for p in parts[0].parameters()) / PEAK_BYTES

    def add(way: str, run: Callable[[int], Any]) -> None:
        row = {"case": str(case), "way": way, "floor": floor}
        try:
            record.add(row | {"microseconds": microseconds(run, options)})
        except Exception as error:
            record.add(row | {"error": f"{type(error).__name__}: {error}"[:300]})

    def chosen(system: str) -> bool:
        return system in options.only if options.only else system != "sweep"

    if chosen("grouped"):
        are_few, experts._are_few = experts._are_few, lambda *_: False
        add("grouped", lambda n: experts.grouped_experts(parts[n], hidden, index, weight))
        experts._are_few = are_few
    if chosen("few"):
        add("few", lambda n: experts._few_experts(parts[n], hidden, index, weight))
        places = experts_triton.place(index.reshape(-1), count)
        up = experts_triton.product(hidden, parts[0].gate_up_proj, None, places)
        bent = experts_triton.weighted(up, weight.reshape(-1), "silu")
        out = experts_triton.product(bent, parts[0].down_proj, None, places)
        add("place", lambda n: experts_triton.place(index.reshape(-1), count))
        add("up", lambda n: experts_triton.product(hidden, parts[n].gate_up_proj, None, places))
        add("gate", lambda n: experts_triton.weighted(up, weight.reshape(-1), "silu"))
        add("down", lambda n: experts_triton.product(bent, parts[n].down_proj, None, places))
        add("sum", lambda n: experts_triton.collect(out, index.reshape(-1), count, hidden))
    if chosen("router"):
        add("router", lambda n: router(hidden))
        router.chooser = None
        add("router, plain", lambda n: router(hidden))
    if chosen("sweep"):
        rows_for, columns_for = experts_triton.rows_for, experts_triton.columns_for
        for rows, columns, stages in SWEPT:
            if rows > max(16, 4 * tokens * picks // count) or 4 * rows < tokens * picks // count:
                continue
            experts_triton.rows_for = lambda _, rows=rows: rows  # type: ignore[misc]
            experts_triton.columns_for = lambda *_, both=(columns, stages): both
            add(f"{rows}x{columns}, {stages}", lambda n: experts._few_experts(parts[n], hidden, index, weight))
        experts_triton.rows_for, experts_triton.columns_for = rows_for, columns_for


@torch.no_grad()
def main() -> None:
    """Measures the cases one after the other."""
    parser = arguments(__doc__, ["grouped", "few", "router", "sweep"], list(CASES), "real")
    parser.add_argument("--cases", nargs="+", type=int, help="their numbers, from 0; default all")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--least", type=float, default=0.05, help="seconds of a round")
    options = parser.parse_args()
    options.device = resolve_device(options.device)
    record, cases = Record(options), CASES[options.size]
    for number in range(len(cases)) if options.cases is None else options.cases:
        measure(cases[number], options, record)
    columns = ["case", "way", "microseconds", "floor", "error"]
    print_table("Experts", {name: name for name in columns}, record.rows)


if __name__ == "__main__":
    main()
