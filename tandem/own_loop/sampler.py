"""Samples from a model while somebody's own loop trains it: a copy of the weights, on every rank of the loop."""

from __future__ import annotations

import hashlib
import json
import operator
import threading
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tandem.arguments import checked
from tandem.data.tokenize import prompt_of
from tandem.engines.requests import check_request
from tandem.engines.vllm.setup import check_vllm
from tandem.errors import UserError
from tandem.models.folder import located
from tandem.models.loading import load_tokenizer
from tandem.models.proof.limits import layers_of, limits_of
from tandem.models.proof.shrunk import furthest_limit
from tandem.models.trusted import source_of
from tandem.own_loop.engines import SHARE_BESIDE_TRAINER, EngineParams, InChild, InProcess
from tandem.own_loop.peers import Peers, own_device
from tandem.own_loop.their_model import GivenModel, given, require_same
from tandem.parallel.shares import divide
from tandem.seeds import derive_seed
from tandem.sync.check import BEYOND, Probe, WeightMismatch, logp_bound
from tandem.types import Completion, Message, Request, SamplingParams

PromptLike = str | Seq[Message] | Seq[int]


@checked
class Sampler:
    """Samples from the model that your own loop trains: ``update`` copies its weights, ``generate`` samples.

    ``model`` is the folder or hub name that the loop starts from: its config and tokenizer are used. Every rank makes
    the same calls; the work is divided over them, and all get the same result. Without torch.distributed it is one
    rank. Use it as a context, or ``close`` it: that ends its processes. Threads may share it: their calls take turns.

    - ``engine``: ``live`` samples in this process with Tandem's own engine; ``vllm`` in a child of each rank.
    - ``dtype``: the sampler's weights, and what it computes in. ``device``: auto is this rank's GPU, else the CPU.
    - ``max_slots``: sequences that decode at once on one rank; ``max_length``: most tokens of a prompt and its
      completion (None: the model's own limit).
    - ``check_weights``: prove after an update that the sampler computes what the model does (see ``update``).
    - ``seed``: of all draws; each also depends on the step, the prompt's place and the sample's number, nothing else.
    - ``deadline_s``: longest wait for another rank or a child.

    For vLLM only: ``memory_share`` of the GPU (default 0.4, since the loop trains on it, too); ``sleep`` gives that
    memory back after each ``generate`` (default: on a GPU yes); ``arguments``: any others of vLLM's ``LLM``.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        engine: Literal["live", "vllm"] = "live",
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "auto",
        max_slots: int = 64,
        max_length: int | None = None,
        memory_share: float | None = None,
        check_weights: bool = True,
        seed: int = 0,
        sleep: bool | None = None,
        trust_remote_code: bool = False,
        arguments: Mapping[str, Any] | None = None,
        deadline_s: float = 1800.0,
    ) -> None:
        for name, value in (("memory_share", memory_share), ("sleep", sleep), ("arguments", arguments)):
            if engine == "live" and value:
                raise UserError(f"{name} is for engine='vllm'; leave it out with engine='live'")
        self.source = source_of(located(model), trust_remote_code)
        self.seed, self.dtype, self.check = seed, dtype, check_weights
        self.step: int | None = None
        """Of the weights that it holds; None before the first update, and after one that failed."""
        self.updates = 0
        self.vocabulary, self.max_length = 0, max_length
        self.model: nn.Module | None = None
        self.turn = threading.Lock()
        self.device = own_device(device)
        self.tokenizer = load_tokenizer(self.source)
        self.peers = Peers(deadline_s)
        on_gpu = self.device.type == "cuda"
        self.engine = self._start(
            engine,
            EngineParams(
                model=self.source,
                dtype=dtype,
                device=self.device,
                max_slots=max_slots,
                max_length=max_length,
                memory_share=memory_share or (SHARE_BESIDE_TRAINER if on_gpu else None),
                check=check_weights,
                seed=seed,
                sleep=engine == "vllm" and (on_gpu if sleep is None else sleep),
                arguments=dict(arguments or {}),
                deadline_s=deadline_s,
            ),
        )

    def update(self, model: nn.Module, step: int) -> bool:
        """Copies the model's weights. Returns False, having done nothing, where it holds those of ``step`` already.

        ``model``: a transformers causal LM, plain or in DDP, torch.compile or ``fully_shard``; it stays as it is, in
        training mode or not. Each update compares checksums of all parameters on both sides, the first two and every
        256th the log-probs of a fixed probe as well. Raises UserError where the model is not the sampler's, and
        WeightMismatch where the check fails.
        """
        with self.turn:
            with self.peers.agreeing():
                step = _whole(step, "update: step")
            if len(steps := set(self.peers.gather(step))) > 1:
                raise UserError(f"update: the ranks are at different steps: {sorted(steps)}")
            if step == self.step:
                return False
            self._fill(model, step)
        return True

    def generate(
        self,
        prompts: Seq[PromptLike],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.7,
        n: int = 1,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: str | Seq[str] = (),
        stop_token_ids: Seq[int] = (),
    ) -> list[str]:
        """``n`` texts for each prompt (a string, chat messages, or token ids), prompt by prompt.

        ``temperature=0`` is greedy. Within a step the same call gives the same texts. Every rank gives the same
        prompts and gets all texts. Raises UserError before the first update.
        """
        sampling = sampling_params(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            stop=stop,
            stop_token_ids=stop_token_ids,
        )
        return [completion.text for group in self.completions(prompts, sampling, n=n) for completion in group]

    def completions(self, prompts: Seq[PromptLike], sampling: SamplingParams, *, n: int = 1) -> list[list[Completion]]:
        """As ``generate``, with tokens, log-probs and why each ended: ``n`` completions for each prompt."""
        with self.turn:
            return self._completions(prompts, sampling, n)

    @torch.inference_mode(False)
    def _completions(self, prompts: Seq[PromptLike], sampling: SamplingParams, n: int) -> list[list[Completion]]:
        with self.peers.agreeing():
            requests = self._requests(prompts, sampling, n)
        self._require_same_requests(requests)
        if not self.engine.filled:
            assert self.model is not None
            assert self.step is not None
            self._fill(self.model, self.step)
        costs = [len(r.prompt_ids) + n * sampling.max_new_tokens for r in requests]
        shares = divide(costs, self.peers.size)
        with self.peers.agreeing():
            mine = self.engine.generate([requests[i] for i in shares[self.peers.rank]])
        results: list[list[Completion]] = [[] for _ in requests]
        for share, part in zip(shares, self.peers.gather(mine), strict=True):
            for i, completions in zip(share, part, strict=True):
                results[i] = completions
        return results

    def log(
        self,
        prompts: Seq[PromptLike],
        step: int,
        *,
        path: str | Path = "samples.jsonl",
        every: int = 50,
        **sampling: Any,
    ) -> bool:
        """Where ``every`` divides ``step``: samples, and rank 0 appends a line for each to ``path``. Says whether.

        A line has ``step``, ``weights_step`` (that of the last update), ``prompt``, ``completion``, ``stop``,
        ``tokens`` and ``mean_logprob`` (nats a token). ``sampling``: as for ``generate``.
        """
        step = _whole(step, "log: step")
        if step % _whole(every, "log: every", at_least=1):
            return False
        if not isinstance(path, str | Path):
            raise UserError(f"log: path is {path!r}; it must be the name of a file")
        n, prompts = sampling.pop("n", 1), list(prompts) if isinstance(prompts, Iterator) else prompts
        groups = self.completions(prompts, sampling_params(**sampling), n=n)
        with self.peers.agreeing():
            if self.peers.rank == 0:
                self._write(Path(path), step, prompts, groups)
        return True

    def close(self) -> None:
        """Ends the engine and its process. Call it on every rank, or on none."""
        self.engine.close()
        self.peers.close()
        self.model, self.step = None, None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.inference_mode(False)
    def _start(self, kind: str, params: EngineParams) -> InProcess | InChild:
        """The rank's engine. Raises the error of any rank on all of them."""
        engine: InProcess | InChild | None = None
        try:
            with self.peers.agreeing():
                _whole(params.max_slots, "max_slots", at_least=1)
                if params.max_length is not None:
                    _whole(params.max_length, "max_length", at_least=2)
                if kind == "vllm":
                    check_vllm()
                    where = f" of rank {self.peers.rank}" if self.peers.size > 1 else ""
                    engine = InChild(params, f"the vLLM engine{where}")
                else:
                    engine = InProcess(params)
        except UserError:
            if engine is not None:
                engine.close()
            raise
        assert engine is not None
        return engine

    @torch.inference_mode(False)
    def _fill(self, model: nn.Module, step: int) -> None:
        with self.peers.agreeing():
            self.engine.require_alive()
            held = given(model)
            require_same(held.parameters, self.engine.shapes, self.source)
        self.step = None
        # Seen after the last collective of the push: the others can still be told. After any other error they wait in
        # one, and this rank must end.
        with self.peers.agreeing(WeightMismatch):
            self.engine.fill(held, step)
        if self.check:
            self._probe(held, step)
        self.updates += 1
        # Kept for the weights that a sleeping engine drops.
        self.model, self.step, self.vocabulary = model, step, held.vocabulary

    def _probe(self, held: GivenModel, step: int) -> None:
        """Raises WeightMismatch where the model and the sampler give fixed tokens different log-probs, if it is due."""
        config = self.engine.config
        probe = Probe(held.vocabulary, furthest_limit(config, self.max_length, by=BEYOND + 1))
        if not probe.due(self.updates):
            return
        sequences = probe.sequences(self.updates)
        theirs, exact = held.logprobs(sequences, self.device)
        rounding = held.rounding(sequences, self.device, exact)
        with self.peers.agreeing():
            mine = self.engine.logprobs(sequences)
            bound = logp_bound(self.dtype if exact else "bfloat16", layers_of(config))
            if far := probe.too_far(theirs, mine, bound, rounding):
                raise WeightMismatch(
                    f"update: after step {step} the sampler gives a probe log-probs that differ from the model's by "
                    f"{far}: with the same weights {self.source} computes something else; give the "
                    "sampler a folder with the config of the model that you train (rope scaling, attention, dtype)"
                )

    def _requests(self, prompts: Seq[PromptLike], sampling: SamplingParams, n: int) -> list[Request]:
        """What to sample. Raises UserError where that is not possible."""
        if self.step is None:
            raise UserError("generate: the sampler has no weights of yours yet; call update(model, step) first")
        if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0:
            named = "a mapping" if isinstance(prompts, Mapping) else repr(prompts)
            what = "one string" if isinstance(prompts, str) else named
            raise UserError(f"generate: prompts is {what}; give a list of prompts")
        if not isinstance(sampling, SamplingParams):
            raise UserError(f"completions: sampling is {sampling!r}; give tandem.SamplingParams(...)")
        n, requests = _whole(n, "generate: n", at_least=1), []
        for number, prompt in enumerate(prompts):
            try:
                ids = self._encode(prompt)
            except UserError as error:
                raise UserError(f"generate: prompt {number}: {error}") from error
            seeds = tuple(derive_seed(self.seed, "loop", self.step, number, sample) for sample in range(n))
            requests.append(Request(prompt_ids=ids, seeds=seeds, sampling=sampling))
        self.engine.require_alive()
        # Said here, where a request's number is that of its prompt.
        positions = limits_of(self.engine.config).sampling.positions
        limits = [(self.max_length, "the sampler's max_length"), (positions, "the model's positions")]
        limit, name = min(((n, name) for n, name in limits if n), default=(None, ""))
        for number, request in enumerate(requests):
            check_request(number, request, vocabulary=self.vocabulary, limit=limit, limit_name=name)
        return requests

    def _encode(self, prompt: Any) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return prompt_of({"prompt": prompt}, self.tokenizer).token_ids
        try:
            return tuple(map(operator.index, prompt))  # a tensor's or numpy's, too
        except TypeError:
            if not isinstance(prompt, Seq):
                raise UserError(f"{prompt!r}; it must be a string, a list of messages, or of token ids") from None
            messages = list(prompt)
            return prompt_of({"prompt": messages}, self.tokenizer).token_ids

    def _require_same_requests(self, requests: Seq[Request]) -> None:
        digests = self.peers.gather(hashlib.sha256(repr(requests).encode()).digest())
        for rank, digest in enumerate(digests):
            if digest != digests[0]:
                raise UserError(
                    f"generate: rank {rank} has other prompts or settings than rank 0; every rank gives the same list "
                    "and gets all results"
                )

    def _write(self, path: Path, step: int, prompts: Seq[PromptLike], groups: Seq[Seq[Completion]]) -> None:
        lines = []
        for prompt, group in zip(prompts, groups, strict=True):
            for completion in group:
                logp = completion.behaviour_logp
                line = {
                    "step": step,
                    "weights_step": self.step,
                    "prompt": prompt,
                    "completion": completion.text,
                    "stop": completion.stop,
                    "tokens": len(completion.token_ids),
                    "mean_logprob": round(sum(logp) / len(logp), 6) if logp else None,
                }
                lines.append(json.dumps(line, ensure_ascii=False, default=lambda ids: ids.tolist()) + "\n")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            raise UserError(f"log: cannot write {path}: {error.strerror or error}") from error


def _whole(value: Any, name: str, at_least: int | None = None) -> int:
    """A whole number, or a tensor or numpy's of one. Raises UserError for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} is {value!r}; it must be a whole number") from None
    if at_least is not None and number < at_least:
        raise UserError(f"{name} is {number}; it must be at least {at_least}")
    return number


def sampling_params(
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    stop: str | Seq[str] = (),
    stop_token_ids: Seq[int] = (),
    **truncation: Any,
) -> SamplingParams:
    """``SamplingParams`` with a loop's defaults; ``stop`` may be one string."""
    ends = {"stop": [stop] if isinstance(stop, str) else stop, "stop_token_ids": stop_token_ids}
    several: dict[str, Any] = {name: tuple(x) if isinstance(x, Iterable) else x for name, x in ends.items()}
    return SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, **several, **truncation)
