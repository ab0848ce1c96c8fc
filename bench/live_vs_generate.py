"""Tokens per second of the live engine against ``model.generate``, on one model, with equal work.

    python bench/live_vs_generate.py --repeats 7 --threads 2 --json bench/results/live_vs_generate.json

Method. A random Qwen2 of about 0.8M parameters samples one completion for each of 256 prompts of 16 to 32 tokens, at
temperature 1 without truncation, in float32. Lengths are given, and end-of-sequence is impossible, so both do the
same work, and how many tokens each sample got is checked. Two cases: ``equal``, every completion 128 tokens;
``skewed``, geometric lengths with a mean of 64, cut at 256, in random order. ``generate`` gets the whole batch at
once, SDPA attention, the faster of its dynamic and static cache (tried first), no log-probs, and stops as soon as
every sample has its length; only tokens up to a sample's length count. The live engine also returns two log-probs a
token and the text. The two alternate, and who goes first alternates too; medians, minima and every time are kept.

With 2 threads the cores must be free: each operation waits for both threads, so a busy neighbour multiplies every
time and buries the ratio. Look at the load average and the spread of the times in the record, or use --threads 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tandem.engines.live import LiveEngine
from tandem.models.attention import IMPLEMENTATION
from tandem.types import Request, SamplingParams

SAMPLES, EQUAL_LENGTH, SKEWED_MAX, SKEWED_MEAN = 256, 128, 256, 64
TARGETS = {"equal": 1.2, "skewed": 2.0}


class EachAtItsLength(StoppingCriteria):
    """Ends row i after ``lengths[i]`` new tokens."""

    def __init__(self, prompt_length: int, lengths: list[int]) -> None:
        self.ends_B = torch.tensor(lengths) + prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends_B


def build(vocabulary: int) -> tuple[Any, Any]:
    """A random model, and a tokenizer without an end-of-sequence token."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=336, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=None,
        bos_token_id=None, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    return Qwen2ForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=words)


def geometric_lengths(rng: random.Random) -> list[int]:
    """Lengths of mean about SKEWED_MEAN after the cut at SKEWED_MAX, the longest being SKEWED_MAX."""
    stop_probability = 1 / (SKEWED_MEAN * 1.02)
    lengths = []
    for _ in range(SAMPLES):
        length = 1
        while length < SKEWED_MAX and rng.random() > stop_probability:
            length += 1
        lengths.append(length)
    lengths[rng.randrange(SAMPLES)] = SKEWED_MAX
    return lengths


def with_generate(module: Any, prompts: list[tuple[int, ...]], lengths: list[int], cache: str) -> Callable[[], int]:
    """One call of ``generate``; returns the useful tokens."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(lengths), pad_token_id=0,
        eos_token_id=None, use_cache=True, cache_implementation=cache,
    )  # fmt: skip

    def run() -> int:
        criteria = StoppingCriteriaList([EachAtItsLength(longest, lengths)])
        out = module.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=criteria)
        assert out.shape == (len(prompts), longest + max(lengths)), out.shape
        return sum(lengths)

    return run


def with_live(engine: LiveEngine, prompts: list[tuple[int, ...]], lengths: list[int]) -> Callable[[], int]:
    """One call of the live engine; returns the useful tokens."""
    requests = [
        Request(prompt_ids=p, seeds=(i,), sampling=SamplingParams(max_new_tokens=n))
        for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
    ]

    def run() -> int:
        completions = [completion for (completion,) in engine.generate(requests)]
        assert [len(c.token_ids) for c in completions] == lengths
        return sum(lengths)

    return run


def seconds(run: Callable[[], int]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(module: Any, engine: LiveEngine, case: str, repeats: int) -> dict[str, Any]:
    """Times one case; every time is in seconds, every rate in useful tokens per second."""
    rng = random.Random(case)
    vocabulary = module.config.vocab_size
    prompts = [tuple(rng.randrange(1, vocabulary) for _ in range(rng.randint(16, 32))) for _ in range(SAMPLES)]
    lengths = [EQUAL_LENGTH] * SAMPLES if case == "equal" else geometric_lengths(rng)
    live = with_live(engine, prompts, lengths)
    caches = {cache: with_generate(module, prompts, lengths, cache) for cache in ("dynamic", "static")}
    tokens = live()
    tried = {cache: seconds(run) for cache, run in caches.items()}
    cache = min(tried, key=lambda name: tried[name])
    runs = {"generate": caches[cache], "live": live}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs) if repeat % 2 else list(runs)[::-1]:
            times[name].append(seconds(runs[name]))
        last = ", ".join(f"{name} {t[-1]:.2f} s" for name, t in times.items())
        print(f"{case} {repeat + 1}/{repeats}: {last}", file=sys.stderr, flush=True)
    median = {name: statistics.median(t) for name, t in times.items()}
    best = {name: min(t) for name, t in times.items()}
    return {
        "case": case,
        "useful_tokens": tokens,
        "mean_length": tokens / SAMPLES,
        "max_length": max(lengths),
        "generate_cache": cache,
        "generate_cache_trial_seconds": tried,
        "seconds": times,
        "tokens_per_second_median": {name: tokens / t for name, t in median.items()},
        "tokens_per_second_best": {name: tokens / t for name, t in best.items()},
        "ratio_of_medians": median["generate"] / median["live"],
        "ratio_of_minima": best["generate"] / best["live"],
        "target": TARGETS[case],
    }


def main() -> None:
    """Runs both cases, prints a table, and writes the raw results where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="write the raw results here")
    arguments = parser.parse_args()
    load_at_start = os.getloadavg()
    torch.set_num_threads(arguments.threads)
    module, tokenizer = build(arguments.vocabulary)
    on_tandem = copy.deepcopy(module)
    on_tandem.set_attn_implementation(IMPLEMENTATION)
    engine = LiveEngine(on_tandem, tokenizer, max_slots=SAMPLES)
    cases = [compare(module, engine, case, arguments.repeats) for case in TARGETS]

    parameters = sum(p.numel() for p in module.parameters())
    table = Table(title=f"{parameters / 1e6:.2f}M parameters, {SAMPLES} samples, {arguments.threads} threads")
    for column in ("case", "useful tokens", "generate tok/s", "live tok/s", "ratio", "ratio of best", "target"):
        table.add_column(column, justify="right")
    for case in cases:
        rate = case["tokens_per_second_median"]
        table.add_row(
            case["case"], f"{case['useful_tokens']:,}", f"{rate['generate']:,.0f} ({case['generate_cache']})",
            f"{rate['live']:,.0f}", f"{case['ratio_of_medians']:.2f}", f"{case['ratio_of_minima']:.2f}",
            f"{case['target']}",
        )  # fmt: skip
    Console().print(table)
    if arguments.json:
        record = {
            "command": f"python bench/live_vs_generate.py --repeats {arguments.repeats} --threads "
            f"{arguments.threads} --vocabulary {arguments.vocabulary}",
            "when": time.strftime("%Y-%m-%d %H:%M:%S"),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                         "python": platform.python_version()},
            "cores": os.cpu_count(),
            "threads": arguments.threads,
            "load_average": {"start": load_at_start, "end": os.getloadavg()},
            "parameters": parameters,
            "vocabulary": arguments.vocabulary,
            "cases": cases,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
