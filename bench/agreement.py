"""Whether the live engine says what the model says: its log-probs and greedy tokens; for ``bench/sampling.py``."""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from common import Record, Row
from models import byte_tokenizer, config_of, random_model
from torch import Tensor
from transformers import GenerationConfig

from tandem.engines.live.engine import CacheDtype, LiveEngine
from tandem.models.loading import prepare_module
from tandem.types import Request, SamplingParams


def check(options: argparse.Namespace, record: Record) -> None:
    """A row for float32 and, on a GPU, one for bfloat16, and one for that with keys and values in 8 bits."""
    vocabulary = config_of(options.size).vocab_size
    rng = random.Random("check")
    length, count = options.prompt_tokens, options.check_samples
    prompts = [[rng.randrange(1, vocabulary) for _ in range(length)] for _ in range(count)]
    kinds: list[tuple[str, CacheDtype]] = [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "fp8")]
    for dtype, kv_cache_dtype in kinds if options.device.startswith("cuda") else kinds[:1]:
        record.add(compare(options, dtype, prompts, kv_cache_dtype))


def compare(options: argparse.Namespace, dtype: Any, prompts: list[list[int]], kv_cache_dtype: CacheDtype) -> Row:
    """Gaps and agreement of one precision. The references hold the same (rounded) weights."""
    tokenizer = byte_tokenizer(config_of(options.size).vocab_size, eos=False)
    start, rounded = options.prompt_tokens, getattr(torch, dtype)

    def model(compute: str) -> Any:
        made = random_model(options.size, options.device, eos=None, layers=options.check_layers, dtype=rounded)
        for parameter in made.parameters():
            parameter.data = parameter.data.to(getattr(torch, compute))
        return made

    plain, exact = model(dtype), model("float32")
    on_tandem = prepare_module(model(dtype), tokenizer, dtype=dtype, device=options.device).module
    longest = start + options.new_tokens
    engine = LiveEngine(on_tandem, tokenizer, max_slots=len(prompts), max_length=longest, kv_cache_dtype=kv_cache_dtype)
    sampled = sample(engine, prompts, SamplingParams(max_new_tokens=options.new_tokens))
    ids_BL = torch.tensor([p + c.token_ids for p, c in zip(prompts, sampled, strict=True)], device=options.device)
    given = torch.tensor([c.behaviour_logp for c in sampled], device=options.device)
    truth, forward = logprobs(exact, ids_BL, start), logprobs(plain, ids_BL, start)
    gap, plain_gap = (given - truth).abs(), (forward - truth).abs()
    return {
        "system": "check", "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "way": engine.way,
        "samples": len(prompts), "tokens": given.numel(),
        "gap_mean": gap.mean().item(), "gap_max": gap.max().item(), "plain_gap_mean": plain_gap.mean().item(),
        "plain_gap_max": plain_gap.max().item(), **greedy(engine, plain, exact, prompts, options.new_tokens),
    }  # fmt: skip


def sample(engine: LiveEngine, prompts: list[list[int]], sampling: SamplingParams) -> list[Any]:
    """One completion a prompt."""
    requests = [Request(prompt_ids=tuple(p), seeds=(i,), sampling=sampling) for i, p in enumerate(prompts)]
    return [completion for (completion,) in engine.generate(requests)]


@torch.no_grad()
def logits(module: Any, ids_BL: Tensor, start: int) -> Tensor:
    """[B, L - start, V] in float32, a sequence at a time: logits at ``t`` are of token ``start + t``."""
    rows = [module(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1].float() for ids in ids_BL]
    return torch.stack(rows)


def logprobs(module: Any, ids_BL: Tensor, start: int) -> Tensor:
    """[B, L - start]: log-prob of every token from ``start`` on."""
    rows = [
        torch.log_softmax(logits(module, ids[None], start)[0], -1).gather(-1, ids[start:, None])[:, 0] for ids in ids_BL
    ]
    return torch.stack(rows)


def greedy(engine: LiveEngine, plain: Any, exact: Any, prompts: list[list[int]], new_tokens: int) -> Row:
    """Share of tokens before the first difference, of samples without one, and how near a tie differences were."""
    ours = sample(engine, prompts, SamplingParams(max_new_tokens=new_tokens, temperature=0.0))
    device = next(plain.parameters()).device
    ids_BL = torch.tensor(prompts, device=device)
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, eos_token_id=None)
    theirs = plain.generate(ids_BL, attention_mask=torch.ones_like(ids_BL), generation_config=config)
    equal, whole, ties = 0, 0, []
    for completion, row in zip(ours, theirs, strict=True):
        prompt, generated = row[: len(prompts[0])].tolist(), row[len(prompts[0]) :].tolist()
        pairs = zip(completion.token_ids, generated, strict=True)
        at = next((i for i, (mine, other) in enumerate(pairs) if mine != other), new_tokens)
        equal += at
        whole += at == new_tokens
        if at < new_tokens:
            context = torch.tensor([prompt + generated[: at + 1]], device=device)
            last_V = logits(exact, context, context.shape[1] - 1)[0, -1]
            ties.append((last_V[completion.token_ids[at]] - last_V[generated[at]]).abs().item())
    share = equal / (len(prompts) * new_tokens)
    return {"greedy_equal": share, "greedy_samples": whole / len(prompts), "tie_max": max(ties, default=0.0)}
