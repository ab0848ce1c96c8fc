"""Sampling with vLLM, in this process: on GPUs of its own or shared, or on a CPU, fed by a trainer's pushes."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any, Literal

from tandem.engines.requests import Asked, StopRule, check_request, first_versions, take_requests
from tandem.engines.stepper import SteppedEngine
from tandem.engines.vllm.adapters import adapter_request, split
from tandem.engines.vllm.checksums import Wholes
from tandem.engines.vllm.core import VLLMCore, VLLMJob
from tandem.engines.vllm.setup import VLLMParams, close_vllm, end_with_ranks, ends_of, on_cpu, start_vllm
from tandem.errors import UserError, first_line
from tandem.futures import Future, wait_all
from tandem.sync.links import Link
from tandem.sync.plan import Plan
from tandem.types import Completion, Held, Request, SamplingParams, StopReason, Versions, Watch

TEMPERATURES = (0.01, 2.0)
"""vLLM changes or refuses others but 0."""


class VLLMEngine(SteppedEngine[VLLMCore]):
    """Samples from a model that vLLM loads (``VLLMParams``) and ``receive`` renews.

    Any thread may call any method; samples of all threads run in one batch, and weights change between two steps.
    """

    def __init__(self, params: VLLMParams) -> None:
        adapters = params.adapters
        self.seeded, self.can_sleep, self.tensor_parallel = params.seeded, params.sleep, params.tensor_parallel
        self._llm = start_vllm(params)
        self._after_failure = end_with_ranks(self._llm) if params.own_process else lambda: None
        self._engine = self._llm.llm_engine
        self.tokenizer = self._llm.get_tokenizer()
        self._room: int = self._engine.model_config.max_model_len
        self.max_length = min(params.max_length or self._room, self._room)
        self.vocabulary: int = self._engine.model_config.get_vocab_size()
        self._eos_ids = ends_of(self._llm)
        super().__init__(
            VLLMCore(self._engine, params.max_slots, adapter_request() if adapters else None, self._after_failure)
        )
        self._plan = Plan(())
        self._wholes: Wholes | None = None
        """Which sums of the workers belong together: asked for after the first push over a link."""
        self._pushes = 0
        self._asleep: set[str] = set()
        self._stale: Exception | None = None
        """Why the weights cannot be used before another push."""
        self._base_dropped = False
        """Whether a push of adapters alone would lack what they are on."""
        self._closed = False
        if adapters is not None:
            try:
                self._call("tandem_require_adapters", adapters.layers)
            except UserError:
                self.close()
                raise
            self._stale = UserError("the vLLM engine has no adapters yet; push them first")
            self._mark_usable()

    @property
    def version(self) -> int:
        """Optimizer steps behind the weights, as of the last push."""
        return self.core.version

    def submit(self, requests: Seq[Request], watch: Watch | None = None) -> list[Future[list[Completion]]]:
        """Begins requests, one future each: one completion a seed, in the order asked for.

        With truncation, ``untruncated_logp`` is NaN: vLLM does not report it. Raises UserError, and names the request,
        for one that cannot be sampled; a future raises it for logits of the same call that are not finite, and
        whatever vLLM fails with.
        """
        taken = take_requests(requests, self._check, lambda s: StopRule(s, self._eos_ids, self.tokenizer))
        jobs = [[self._job(asked, i) for i in range(len(asked.request.seeds))] for asked in taken]
        return self.stepper.submit(jobs, watch)

    def logprobs(self, sequences: Seq[Seq[int]]) -> list[list[float]]:
        """Log-prob, in nats at temperature 1, of each token but the first; one list a sequence.

        All from the same weights. vLLM draws one more token, for which a sequence as long as the model's own limit has
        no room.
        """
        from vllm import SamplingParams as Params

        once = SamplingParams(max_new_tokens=1)
        for number, sequence in enumerate(sequences):
            self._check(number, Request(prompt_ids=tuple(sequence), seeds=(), sampling=once), self._room)
        params = Params(max_tokens=1, temperature=0, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        jobs = [VLLMJob(_prompt(sequence), params.clone(), _prompt_logprobs, scores=True) for sequence in sequences]
        found: list[list[float]] = []
        pushes = -1
        while pushes != self._pushes:
            pushes = self._pushes
            (found,) = wait_all(self.stepper.submit([jobs]))
        return found

    def connect(self, links: Seq[Link]) -> None:
        """Connects to a trainer, one link a tensor-parallel rank. Returns when the link's other ends have, too."""
        if len(links) != self.tensor_parallel:
            raise UserError(f"weight sync: {len(links)} links for {self.tensor_parallel} tensor-parallel ranks")
        with self.stepper.exclusive():
            self._call("tandem_connect", list(links))
            self._plan, self._wholes = links[0].plan, None

    def receive(self, version: int, check: bool = False) -> Seq[int | None]:
        """Takes one push, between two steps: the weights, an empty cache, and then ``version``.

        Returns ``checksums`` of it, if asked to ``check``: [] otherwise. The workers sum while the cache is emptied.
        Running samples go on with the new weights; what they have so far is computed anew. Raises UserError and names
        the tensor where the push cannot be loaded; nothing can be sampled then until one succeeds.
        """
        with self.stepper.exclusive():
            if "weights" in self._asleep:
                raise UserError("the vLLM engine is asleep; call wake('weights') first")
            self._pushes += 1
            alone = all(split(spec.name) for spec in self._plan.tensors)
            try:
                if alone and self._base_dropped:
                    raise UserError(
                        "weight sync: sleep() dropped the model that these adapters are on; push it as well"
                    )
                self._call("tandem_receive", check)
                if not self._asleep:
                    self.core.forget_cache()
                self.core.renew(version)
                ranks = self._call("tandem_result") if check else []
            except Exception as error:
                self._stale = _sync_error(error, version)
                self._mark_usable()
                self.stepper.fail(self._stale)
                raise self._stale from error
            self._stale = None
            self._base_dropped &= alone
            self._mark_usable()
            return self._whole_tensors().add_up(ranks) if check else []

    def held(self) -> list[Held]:
        """Its copies of pushed tensors, one that it holds twice (a tied head that a CPU packs) twice.

        Missing are tensors whose bits cannot be compared: quantized, cast or transformed ones. Needs one push before.
        """
        with self.stepper.exclusive():
            return self._whole_tensors().held

    def checksums(self) -> Seq[int | None]:
        """Of each of ``held`` as it is now, taken from what the model computes with. Needs one push before."""
        with self.stepper.exclusive():
            return self._whole_tensors().add_up(self._call("tandem_sums"))

    def sleep(self) -> None:
        """Gives the device's memory back: drops weights and cache. Waking needs ``wake`` and a ``receive``.

        Samples that are unfinished wait, and so do those who wait for them; they go on from their own tokens.
        """
        if not self.can_sleep:
            raise UserError("the vLLM engine was started without sleep; start it with sleep=True")
        with self.stepper.exclusive():
            if self._asleep == {"weights", "cache"}:
                return
            if not self._asleep:
                self.core.forget_cache()
            if not on_cpu():
                self._ask(self._engine.sleep, level=2, mode="keep")
            self._asleep, self._base_dropped = {"weights", "cache"}, True
            self._stale = UserError("the engine's weights were dropped by sleep(); push weights first")
            self._mark_usable()

    def wake(self, stage: Literal["weights", "cache"]) -> None:
        """Takes memory again: for the weights, which the next ``receive`` fills, or for the cache."""
        with self.stepper.exclusive():
            if stage not in self._asleep:
                return
            if not on_cpu():
                self._ask(self._engine.wake_up, ["kv_cache" if stage == "cache" else stage])
            self._asleep.discard(stage)
            if stage == "cache":
                self.core.forget_cache()
            self._mark_usable()

    def memory(self) -> dict[str, float]:
        """``free`` and ``used`` (by any process) of the fullest device, in GB; {} on a CPU."""
        with self.stepper.exclusive():
            ranks = [rank for rank in self._call("tandem_memory") if rank is not None]
        if not ranks:
            return {}
        free, used = min(ranks)
        return {"free": free / 1e9, "used": used / 1e9}

    def close(self) -> None:
        """Ends vLLM and its workers. Calls that wait fail."""
        with self.stepper.exclusive():
            if not self._closed:
                self._closed = True
                closed = UserError("the vLLM engine is closed; start another one")
                self.stepper.fail(closed)
                self.core.broken = closed
                close_vllm(self._llm)

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of every worker; one result a rank."""
        if self._closed:
            raise UserError("the vLLM engine is closed; start another one")
        answers = self._ask(self._engine.collective_rpc, "tandem_call", args=(method, *arguments))
        if error := next((error for _, error in answers if error is not None), None):
            raise error
        return [value for value, _ in answers]

    def _ask(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A call that reaches every rank."""
        try:
            return call(*arguments, **options)
        except Exception:
            self._after_failure()
            raise

    def _whole_tensors(self) -> Wholes:
        if self._wholes is None:
            wholes = Wholes(self._call("tandem_shards"), self._plan)
            seen = {part for part, _ in wholes.held}
            adapters = [spec.name for spec in self._plan.tensors if split(spec.name)]
            if hidden := [name for name in adapters if name not in seen]:
                raise UserError(
                    f"weight sync: vLLM does not hold adapters as they came, so that they cannot be compared: "
                    f"{hidden[0]} is the first of {len(hidden)}; add --lora.fold"
                )
            self._wholes = wholes
        return self._wholes

    def _mark_usable(self) -> None:
        asleep = f"the vLLM engine is asleep; call wake() for {' and '.join(sorted(self._asleep))} first"
        self.core.unusable = UserError(asleep) if self._asleep else self._stale
        self.stepper.paused = self.core.unusable is not None

    def _check(self, number: int, request: Request, limit: int | None = None) -> None:
        limit, name = limit or self.max_length, "the engine's max_length"
        check_request(number, request, vocabulary=self.vocabulary, limit=limit, limit_name=name)
        temperature = request.sampling.temperature
        if temperature != 0 and not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
            raise UserError(
                f"request {number}: temperature is {temperature}; vLLM samples at 0 (greedy) and from "
                f"{TEMPERATURES[0]} to {TEMPERATURES[1]}"
            )

    def _job(self, asked: Asked, index: int) -> VLLMJob:
        request = asked.request
        params = self._params(request.sampling, asked.rule, request.seeds[index])
        return VLLMJob(_prompt(request.prompt_ids), params, partial(_completion, asked, index))

    def _params(self, sampling: SamplingParams, rule: StopRule, seed: int) -> Any:
        """vLLM's parameters of one sample. End-of-sequence ids are among the stop ids, so that one rule holds."""
        from vllm import SamplingParams as Params
        from vllm.sampling_params import RequestOutputKind

        return Params(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=min(sampling.top_k, self.vocabulary),
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=seed % (1 << 63) if self.seeded and sampling.temperature else None,
            stop=list(rule.strings),
            stop_token_ids=sorted(rule.ids),
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(rule.strings),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def _sync_error(error: Exception, version: int) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(
        f"weight sync: the push of version {version} failed: {first_line(error)}; connect again and push anew"
    )


def _prompt(token_ids: Seq[int]) -> Any:
    from vllm.inputs.engine import tokens_input

    return tokens_input(list(token_ids))


def _prompt_logprobs(output: Any, versions: Versions) -> list[float]:
    return _flat(output.prompt_logprobs)


def _flat(logprobs: Any) -> list[float]:
    """The first log-prob of each position that has any: the token's own (vLLM's FlatLogprobs)."""
    spans = zip(logprobs.start_indices, logprobs.end_indices, strict=True)
    return [logprobs.logprobs[start] for start, end in spans if end > start]


def _completion(asked: Asked, index: int, ended: Any, versions: Versions) -> Completion:
    """Raises UserError where the logits were not finite."""
    sampling, rule = asked.request.sampling, asked.rule
    where = f"request {asked.number}, sample {index}"
    output = ended.outputs[0]
    token_ids = list(output.token_ids)
    logp = _flat(output.logprobs) if output.logprobs else []
    if output.finish_reason not in ("stop", "length"):
        stop: StopReason = "error"
    elif output.finish_reason == "length":
        stop = "length"
    else:
        stop = "stop_string" if isinstance(output.stop_reason, str) else "eos"
    if stop == "error":
        token_ids, logp = token_ids[: len(logp)], logp[: len(token_ids)]
        versions = first_versions(versions, len(token_ids))
    elif len(logp) != len(token_ids):
        raise UserError(f"{where}: vLLM gave {len(logp)} log-probs for {len(token_ids)} tokens")
    if not all(map(math.isfinite, logp)):
        bad = next(i for i, value in enumerate(logp) if not math.isfinite(value))
        raise UserError(
            f"{where}: the model's logits are not finite at new token {bad}; its weights are damaged or its number "
            "format overflows"
        )
    greedy = sampling.temperature == 0
    truncated = not greedy and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
    text = rule.decode(token_ids)
    return Completion(
        token_ids=token_ids,
        # The token of the highest probability is certain, as the live engine has it.
        behaviour_logp=[0.0] * len(logp) if greedy else logp,
        untruncated_logp=[math.nan] * len(logp) if truncated else list(logp),
        stop=stop,
        text=rule.cut(text) if stop == "stop_string" else text,
        versions=versions,
        error=f"vLLM ended it: {output.finish_reason}" if stop == "error" else None,
    )
