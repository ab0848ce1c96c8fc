"""Adapters on their way from a trainer into the live engine that samples with its module."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from helpers.engine_models import tokenizer
from tandem.data.packing import pack, stamp
from tandem.engines.live.engine import LiveEngine
from tandem.training.trainer import LocalTrainer
from tandem.training.views import View
from tandem.types import Request, SamplingParams, Sequence

PROMPTS = [tuple(range(2, n)) for n in (9, 30, 90)]


def gaps_before_steps(trainer: LocalTrainer, engine: LiveEngine, steps: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples, says how far the log-probs of what was drawn are from the trainer's and from the base's, and trains on
    it: absolute differences, [N] each, before every step."""
    base = View(trainer, temperature=1.0)
    params = SamplingParams(max_new_tokens=40)
    asked = [Request(prompt_ids=prompt, seeds=tuple(range(16)), sampling=params) for prompt in PROMPTS]
    for _ in range(steps):
        rows, logp = [], []
        for prompt, completions in zip(PROMPTS, engine.generate(asked), strict=True):
            for completion in completions:
                ids = completion.token_ids
                rows.append(Sequence(token_ids=[*prompt, *ids], trainable=[False] * len(prompt) + [True] * len(ids)))
                logp += completion.untruncated_logp
        batch = stamp(pack(rows), "token")
        own, without = (by.score(batch).logp_T.cpu()[batch.trainable_T] for by in (trainer, base))
        drawn = torch.tensor(logp)
        yield (own - drawn).abs(), (without - drawn).abs()
        trainer.forward_backward(batch)
        trainer.optim_step()


def live(trainer: LocalTrainer) -> LiveEngine:
    """On the trainer's own module."""
    return LiveEngine(trainer.model.module, tokenizer(), version=lambda: trainer.version)
