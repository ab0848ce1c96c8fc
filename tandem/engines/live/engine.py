"""Sampling on the trainer's own weights: nothing is copied, and the next call sees the last optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any, Literal

import torch

from tandem.arguments import checked
from tandem.engines.live.core import Batching, LiveCore, evaluating
from tandem.engines.live.fitting import Fitting
from tandem.engines.live.layers import Unlike
from tandem.engines.live.over_pages import PagedBatching
from tandem.engines.live.over_slots import SlotBatching, slots_of
from tandem.engines.live.padded import PaddedBatching, Together
from tandem.engines.live.probe import Trial, why_not_layouts, why_not_tried
from tandem.engines.live.sample import Sample
from tandem.engines.requests import StopRule, check_request, eos_ids, take_requests
from tandem.engines.stepper import SteppedEngine
from tandem.errors import UserError
from tandem.futures import Future
from tandem.kernels.available import has_triton
from tandem.models.lora.pairs import showing
from tandem.models.proof.limits import limits_of, turning_point
from tandem.stages import stage
from tandem.types import Completion, Request, Watch

log = logging.getLogger("tandem")
Way = Literal["auto", "captured", "slots", "padded"]
CacheDtype = Literal["auto", "fp8"]
StaleCache = Literal["keep", "recompute"]


@checked
class LiveEngine(SteppedEngine[LiveCore]):
    """Samples from ``module``, a transformers causal LM, in place, with continuous batching.

    - ``max_slots``: sequences that decode at once; the others wait, and one enters as soon as one ends.
    - ``max_length``: most tokens of a prompt and its completion; None leaves the model's own limit.
    - ``prefill_tokens``: most prompt tokens in one forward (a longer prompt goes alone). A prompt goes through the
      model once, whatever the number of its samples.
    - ``way``: how it decodes. ``captured``: captured graphs over a paged cache (on a CPU, its steps one by one);
      ``slots``: step by step over a cache of slots; ``padded``: padded batches through the module's own ``generate``.
      ``auto`` takes the first that is meant for the device (``captured`` for GPUs) and that computes what the module
      computes, and the log says why not another; asking for one that does not raises UserError. All draw the same, up
      to rounding.
    - ``cache_tokens``: most tokens in the paged cache; None plans it from the memory that is free. Samples that do not
      fit wait, or begin again from their own tokens.
    - ``kv_cache_dtype``: ``auto`` keeps keys and values as the model computes them, ``fp8`` in 8 bits (e4m3) with a
      scale for each token and head: room for nearly twice the tokens, log-probs that differ by more from the trainer's.
      Of the paged cache only: raises UserError where another way is taken.
    - ``version``: optimizer steps that the weights have seen, for ``Completion.versions``. It is asked before every
      step: what runs goes on with weights that have changed.
    - ``stale_cache``: what becomes then of the keys and values of samples that run. ``keep``: they go on from those of
      the old weights; ``recompute``: their tokens go through the new ones first, as a prompt does, so that what is
      drawn from then on is what the new weights alone say of it. Of way ``padded`` no sample runs when weights change.

    A large cache is given back when nothing is left to sample, a small one is kept, with the graphs. Any thread may
    call ``submit`` and wait; nothing runs but in threads that wait, and on a GPU what ``give_way`` and ``go_on`` have
    enqueued.
    """

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        *,
        max_slots: int = 256,
        max_length: int | None = None,
        prefill_tokens: int = 8192,
        way: Way = "auto",
        cache_tokens: int | None = None,
        kv_cache_dtype: CacheDtype = "auto",
        stale_cache: StaleCache = "keep",
        version: Callable[[], int] = lambda: 0,
    ) -> None:
        if max_slots < 1 or prefill_tokens < 1:
            raise UserError(f"max_slots is {max_slots} and prefill_tokens {prefill_tokens}; both must be at least 1")
        super().__init__(
            LiveCore(module, begin=self._begin, end=self._end, version=version, recompute=stale_cache == "recompute")
        )
        self.module = module
        self.tokenizer = tokenizer
        self.max_slots = max_slots
        self.max_length = max_length
        self.prefill_tokens = prefill_tokens
        self.fitting: Fitting | None = None
        """Of way ``captured``: its forward, and its cache."""
        self.together: Together = "all"
        """Of way ``padded``: which prompts are batched."""
        # With adapters that begin at 0 a trial would prove nothing of theirs.
        with stage("proof"), evaluating(module.modules()), showing(module):
            self.way, reasons = self._choose(way, cache_tokens, eight_bit=kv_cache_dtype == "fp8")
        if kv_cache_dtype == "fp8" and self.fitting is None:
            raise UserError(
                f"kv_cache_dtype fp8 is of the paged cache, and {type(module).__name__} on {self.device} is sampled by "
                f"way {self.way}"
                + "".join(f": {reason}" for reason in reasons)
                + "; take kv_cache_dtype auto"
                + (" or way captured" if not reasons else "")
            )
        for reason in reasons:
            log.warning("%s: %s", type(module).__name__, reason)
        self.slower_because = "; ".join(reasons) if self.fitting is None else self.fitting.own_because
        """Why a faster way, or the fused forward, was passed over; empty where none was."""

    def _choose(self, way: Way, cache_tokens: int | None, *, eight_bit: bool) -> tuple[Way, list[str]]:
        """The way to decode, and why a faster one was passed over."""
        reasons: list[str] = []
        on_gpu = self.device.type == "cuda"
        if way == "captured" or (way == "auto" and on_gpu):
            try:
                if reason := why_not_layouts(self.module) or (
                    "" if has_triton() or not on_gpu else "Triton is missing"
                ):
                    raise Unlike(reason)
                self.fitting = Fitting(
                    self.module, positions=self._limit()[0], cache_tokens=cache_tokens, eight_bit=eight_bit
                )
            except Unlike as error:
                if way == "captured":
                    raise UserError(f"way captured: {error}") from error
                reasons.append(f"{error}, so its steps are not captured (slower)")
            else:
                return "captured", reasons
        near, far = Trial.both(self.module)
        trials = [near] if far is None else [near, far]
        unproved = why_not_tried(self.module, far)
        if way != "padded":
            reason = unproved or next((why for trial in trials if (why := trial.why_not_slots())), "")
            if not reason:
                return "slots", reasons
            if way == "slots":
                raise UserError(f"way slots: {reason}")
            reasons = [f"{reason}, so it is sampled in padded batches (slower)"]
        for together in ("all", "length", "none") if not unproved else ("length", "none"):
            wrong = next((why for trial in trials if (why := trial.why_not_padded(together))), "")
            if not wrong:
                self.together = together
                if together != "all":
                    one = "prompts of one length" if together == "length" else "one prompt"
                    reasons.append(f"padding would change what it samples, so each batch has {one} (slower)")
                return "padded", reasons
        raise UserError(
            f"{type(self.module).__name__}: it cannot be sampled: its own generate with a cache does not reproduce its "
            f"forward ({wrong})"
        )

    @property
    def device(self) -> torch.device:
        """Where it samples."""
        device: torch.device = self.module.get_input_embeddings().weight.device
        return device

    def submit(self, requests: Seq[Request], watch: Watch | None = None) -> list[Future[list[Completion]]]:
        """Begins requests, one future each: one completion a seed, in the order asked for.

        Samples are drawn while somebody waits for a result, all that were submitted side by side. Raises UserError, and
        names the request, for an empty or too long prompt, ids outside the vocabulary and bad parameters; a future
        raises it for a sample of the same call that no cache has room for, or whose logits are not finite.
        """
        vocabulary = self.module.get_input_embeddings().weight.shape[0]
        limit, limit_name = self._limit()
        configs = (getattr(self.module, "generation_config", None), self.module.config.get_text_config())
        found = next((c.eos_token_id for c in configs if c and c.eos_token_id is not None), None)
        ends = eos_ids(found, self.tokenizer)
        taken = take_requests(
            requests,
            partial(check_request, vocabulary=vocabulary, limit=limit, limit_name=limit_name),
            lambda sampling: StopRule(sampling, ends, self.tokenizer),
        )
        samples = [[Sample(asked, i) for i in range(len(asked.request.seeds))] for asked in taken]
        return self.stepper.submit(samples, watch)

    def wait(self, until: Callable[[], bool], at_least: int = 0) -> None:
        """Goes on sampling until ``until()``, which is asked between any two steps, or until nothing is left.

        Unfinished samples stay where they are, and go on in the next call, whatever becomes of the weights meanwhile.
        """
        self.sample(until)
        self.give_way()

    def sample(self, until: Callable[[], bool]) -> None:
        """``wait``, for whoever calls it again, or ``give_way``, before others compute on the device."""
        self.stepper.wait(until)

    def give_way(self) -> None:
        """Others are about to compute on the device: leaves them the memory that they need, and the device steps to do
        until they begin."""
        self._between_steps(self.core.give_way)

    def go_on(self) -> None:
        """They have: unfinished samples go on, as far as nobody has to wait for it."""
        self._between_steps(self.core.go_on)

    def _between_steps(self, work: Callable[[], None]) -> None:
        if self.stepper.unfinished:
            with self.stepper.exclusive():
                try:
                    work()
                except BaseException as error:
                    # The core has lost its samples: whoever waited for one would wait for ever.
                    self.stepper.fail(error)
                    raise

    def _begin(self) -> Batching:
        if self.fitting is not None:
            return PagedBatching(self.fitting, max_slots=self.max_slots, prefill_tokens=self.prefill_tokens)
        if self.way == "slots":
            return SlotBatching(slots_of(self.module), max_slots=self.max_slots, prefill_tokens=self.prefill_tokens)
        return PaddedBatching(self.module, batch_size=self.max_slots, together=self.together)

    def _end(self, failed: bool) -> None:
        if self.fitting is not None:
            self.fitting.rest(failed)

    def _limit(self) -> tuple[int | None, str]:
        """Most tokens of a sequence, and who says so."""
        limits = [
            (limits_of(self.module.config).positions, "the model's max_position_embeddings"),
            (
                turning_point(self.module.config),
                "the length up to which its longrope turns all tokens alike (original_max_position_embeddings)",
            ),
            (self.max_length, "the engine's max_length"),
        ]
        return min(((n, name) for n, name in limits if n), default=(None, ""))
