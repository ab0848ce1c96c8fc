"""Sampling on the trainer's own weights: nothing is copied, and the next call sees the last optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any

import torch

from tandem.engines.batching import Batching
from tandem.engines.padded import sample_padded
from tandem.engines.probe import why_not_slots
from tandem.engines.sampler import Sampler
from tandem.engines.samples import Sample, StopRule, check_request
from tandem.errors import UserError
from tandem.types import Completion, Request, SamplingParams

log = logging.getLogger("tandem")
OnFinish = Callable[[int, int, Completion], None]


class LiveEngine:
    """Samples from ``module``, a transformers causal LM, in place, with continuous batching over a slot cache.

    - ``max_slots``: sequences that decode at once; the others wait, and one enters as soon as one ends.
    - ``max_length``: most tokens of a prompt and its completion; None leaves the model's own limit.
    - ``prefill_tokens``: most prompt tokens in one forward (a longer prompt goes alone). A prompt goes through the
      model once, whatever the number of its samples.
    - ``version``: optimizer steps that the weights have seen, for ``Completion.version_min`` and ``version_max``.

    The cache is given back at the end of each call. A model whose attention cannot be replaced is sampled in padded
    batches through its own ``generate``: same draws, no continuous batching; ``padded_because`` then says why.
    """

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        *,
        max_slots: int = 256,
        max_length: int | None = None,
        prefill_tokens: int = 8192,
        version: Callable[[], int] = lambda: 0,
    ) -> None:
        if max_slots < 1 or prefill_tokens < 1:
            raise UserError(f"max_slots is {max_slots} and prefill_tokens {prefill_tokens}; both must be at least 1")
        self.module = module
        self.tokenizer = tokenizer
        self.max_slots = max_slots
        self.max_length = max_length
        self.prefill_tokens = prefill_tokens
        self.version = version
        with evaluating(module):
            self.padded_because = why_not_slots(module)
        if self.padded_because:
            log.warning(
                "%s: %s, so it is sampled in padded batches (slower)", type(module).__name__, self.padded_because
            )

    def generate(self, requests: Seq[Request], on_finish: OnFinish | None = None) -> list[list[Completion]]:
        """One list a request, one completion a seed, in the order asked for.

        ``on_finish(request, sample, completion)`` is called as each one ends. Raises UserError, and names the
        request, for an empty or too long prompt, ids outside the vocabulary and logits that are not finite.
        """
        samples = self._samples(requests)
        results: list[dict[int, Completion]] = [{} for _ in requests]

        def finish(sample: Sample) -> None:
            completion = sample.completion(self.version())
            results[sample.request][sample.index] = completion
            if on_finish is not None:
                on_finish(sample.request, sample.index, completion)

        if samples:
            params = [requests[s.request].sampling for s in samples]
            seeds = [seed for request in requests for seed in request.seeds]
            sampler = Sampler(params, seeds, self.module.get_input_embeddings().weight.device)
            with evaluating(self.module):
                if self.padded_because:
                    sample_padded(self.module, samples, sampler, finish, batch_size=self.max_slots)
                else:
                    Batching(
                        self.module,
                        samples,
                        sampler,
                        finish,
                        max_slots=self.max_slots,
                        prefill_tokens=self.prefill_tokens,
                    ).run()
        return [[done[i] for i in range(len(done))] for done in results]

    def _samples(self, requests: Seq[Request]) -> list[Sample]:
        vocabulary = self.module.get_input_embeddings().weight.shape[0]
        positions = getattr(self.module.config.get_text_config(), "max_position_embeddings", None)
        limits = [(positions, "the model's max_position_embeddings"), (self.max_length, "the engine's max_length")]
        limit, limit_name = min(((n, name) for n, name in limits if n), default=(None, ""))
        rules: dict[SamplingParams, StopRule] = {}
        eos_ids = _eos_ids(self.module, self.tokenizer)
        version = self.version()
        samples: list[Sample] = []
        for number, request in enumerate(requests):
            check_request(number, request, vocabulary=vocabulary, limit=limit, limit_name=limit_name)
            if request.sampling not in rules:
                rules[request.sampling] = StopRule(request.sampling, eos_ids, self.tokenizer)
            samples += [
                Sample(
                    number=len(samples) + index,
                    request=number,
                    index=index,
                    prompt_ids=request.prompt_ids,
                    rule=rules[request.sampling],
                    version=version,
                )
                for index in range(len(request.seeds))
            ]
        return samples


def _eos_ids(module: Any, tokenizer: Any) -> list[int]:
    """End-of-sequence ids: the generation config's (the config's, where it has none) and the tokenizer's."""
    configs = (getattr(module, "generation_config", None), module.config.get_text_config())
    found: int | list[int] | None = next((c.eos_token_id for c in configs if c and c.eos_token_id is not None), None)
    ids = [found] if isinstance(found, int) else list(found or ())
    own = tokenizer.eos_token_id
    return ids if own is None or own in ids else [*ids, own]


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Without dropout or gradient; what was in training mode is put back into it."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True
