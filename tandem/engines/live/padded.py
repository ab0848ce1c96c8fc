"""Sampling for models that the slot cache cannot serve: padded batches through the model's own ``generate``.

The model brings its own cache there, whatever that is (Mamba's states, Bloom's position biases). The draws are the
live engine's own: every sample draws the same tokens as it would from the slot cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tandem.engines.live.draws import Sampler
from tandem.engines.samples import Sample


def sample_padded(
    module: Any, samples: list[Sample], sampler: Sampler, finish: Callable[[Sample], None], *, batch_size: int
) -> None:
    """Samples everything in batches of ``batch_size``, prompts padded on the left; a batch runs until its last end."""
    device = sampler.seed_N.device
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        longest = max(s.prompt_length for s in batch)
        token_BQ = torch.zeros(len(batch), longest, dtype=torch.int64)
        real_BQ = torch.zeros_like(token_BQ)
        for row, sample in enumerate(batch):
            token_BQ[row, longest - sample.prompt_length :] = torch.tensor(sample.prompt_ids)
            real_BQ[row, longest - sample.prompt_length :] = 1
        draw = _Draw(batch, sampler, finish)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(s.rule.max_new_tokens for s in batch),
            pad_token_id=0,
            use_cache=True,
        )
        with _only(module, config):
            module.generate(
                token_BQ.to(device),
                attention_mask=real_BQ.to(device),
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([_AllEnded(draw)]),
            )


class _Draw(LogitsProcessor):
    """Draws every row's next token, records it, and leaves greedy search no other choice."""

    def __init__(self, batch: list[Sample], sampler: Sampler, finish: Callable[[Sample], None]) -> None:
        self.batch = batch
        self.sampler = sampler
        self.finish = finish
        self.ended = [False] * len(batch)
        self.drawn = 0
        self.sample_B = torch.tensor([s.number for s in batch]).to(sampler.seed_N.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn_3B = self.sampler.draw(scores, self.sample_B, torch.full_like(self.sample_B, self.drawn))
        self.drawn += 1
        for row, (token, behaviour, untruncated) in enumerate(zip(*drawn_3B.tolist(), strict=True)):
            if not self.ended[row] and self.batch[row].add(int(token), behaviour, untruncated):
                self.ended[row] = True
                self.finish(self.batch[row])
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn_3B[0].long()[:, None], 0.0)


class _AllEnded(StoppingCriteria):
    def __init__(self, draw: _Draw) -> None:
        self.draw = draw

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.tensor(self.draw.ended, device=input_ids.device)


@contextmanager
def _only(module: Any, config: GenerationConfig) -> Iterator[None]:
    """Makes ``config`` the module's own: ``generate`` fills gaps from there, with penalties nobody asked for."""
    own = module.generation_config
    module.generation_config = config
    try:
        yield
    finally:
        module.generation_config = own
