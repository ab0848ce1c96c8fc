"""Sampling for models that the slot cache cannot serve: padded batches through the model's own ``generate``.

The model brings its own cache there, whatever that is (Mamba's states, Bloom's position biases). The draws are the
live engine's own: every sample draws the same tokens as it would from the slot cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tandem.engines.live.draws import Kinds, draw
from tandem.engines.live.sample import Sample

Together = Literal["all", "length", "none"]
"""Which prompts a batch may have: all, which are padded on the left; those of one length; one."""


class PaddedBatching:
    """A round is a batch of ``batch_size``, padded on the left, up to its last end (``live.core.Batching``).

    ``together``: which prompts may be in a batch.
    """

    def __init__(self, module: Any, *, batch_size: int, together: Together = "all") -> None:
        self.module = module
        self.together = together
        self.batch_size = 1 if together == "none" else batch_size
        self.kinds = Kinds()
        self.waiting: list[Sample] = []

    def enter(self, samples: Seq[Sample]) -> None:
        self.kinds.add(samples)
        self.waiting += samples

    def round(self) -> list[Sample]:
        batch = self._next()
        device = self.module.get_input_embeddings().weight.device
        generate(
            self.module,
            [sample.asked.request.prompt_ids for sample in batch],
            _Draw(batch, self.kinds, device),
            _AllEnded(batch),
            max_new_tokens=max(s.asked.rule.max_new_tokens for s in batch),
        )
        return batch

    def _next(self) -> list[Sample]:
        """Takes those that go next from among the waiting."""
        first = self.waiting[0].prompt_length
        fit = [s for s in self.waiting if self.together == "all" or s.prompt_length == first][: self.batch_size]
        taken = set(fit)
        self.waiting = [sample for sample in self.waiting if sample not in taken]
        return fit

    def leave(self, samples: AbstractSet[Sample]) -> None:
        self.waiting = [sample for sample in self.waiting if sample not in samples]

    def renew(self, *, recompute: bool) -> None:
        """Nothing that waits has started: a batch runs to its end in one step, and weights change between two."""

    def give_way(self) -> None:
        """Nothing: its cache is as large as what it holds, and gone between two batches."""

    def go_on(self) -> None:
        """The host makes each step itself."""


def generate(
    module: Any,
    prompts: Seq[Seq[int]],
    process: LogitsProcessor,
    ended: StoppingCriteria | None = None,
    *,
    max_new_tokens: int,
) -> None:
    """The module's own ``generate`` on prompts padded on the left; ``process`` sees all logits and chooses tokens."""
    device = module.get_input_embeddings().weight.device
    longest = max(map(len, prompts))
    token_BQ = torch.zeros(len(prompts), longest, dtype=torch.int64)
    real_BQ = torch.zeros_like(token_BQ)
    for row, prompt in enumerate(prompts):
        token_BQ[row, longest - len(prompt) :] = torch.tensor(prompt)
        real_BQ[row, longest - len(prompt) :] = 1
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0, use_cache=True)
    with _only(module, config):
        module.generate(
            token_BQ.to(device),
            attention_mask=real_BQ.to(device),
            logits_processor=LogitsProcessorList([process]),
            stopping_criteria=StoppingCriteriaList([] if ended is None else [ended]),
        )


class _Draw(LogitsProcessor):
    """Draws every row's next token, records it, and leaves greedy search no other choice."""

    def __init__(self, batch: list[Sample], kinds: Kinds, device: torch.device) -> None:
        self.batch, self.wanted = batch, kinds.wanted
        self.seed_B, self.params_5B = (x.to(device) for x in kinds.columns(batch))
        self.drawn = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn_B = torch.full_like(self.seed_B, self.drawn)
        drawn_3B = draw(scores, self.seed_B, self.params_5B, drawn_B, self.wanted)
        self.drawn += 1
        for sample, token, behaviour, untruncated in zip(self.batch, *drawn_3B.tolist(), strict=True):
            if sample.stop is None:
                sample.add(int(token), behaviour, untruncated)
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn_3B[0].long()[:, None], 0.0)


class _AllEnded(StoppingCriteria):
    def __init__(self, batch: list[Sample]) -> None:
        self.batch = batch

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.tensor([sample.stop is not None for sample in self.batch], device=input_ids.device)


@contextmanager
def _only(module: Any, config: GenerationConfig) -> Iterator[None]:
    """Makes ``config`` the module's own: ``generate`` fills gaps from there, with penalties nobody asked for."""
    own = module.generation_config
    module.generation_config = config
    try:
        yield
    finally:
        module.generation_config = own
