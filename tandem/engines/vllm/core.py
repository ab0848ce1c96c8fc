"""vLLM's engine as a core: what it runs, and what has come of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from tandem.engines.requests import stamp_version
from tandem.errors import UserError
from tandem.types import Versions


@dataclass(frozen=True)
class VLLMJob:
    """One sequence for vLLM, in its own terms."""

    prompt: Any
    params: Any
    read: Callable[[Any, Versions], Any]
    """Its result, from vLLM's final ``RequestOutput`` and the weights that drew its tokens. Raises UserError where it
    has none."""
    scores: bool = False
    """Whether it only asks what the model says of its prompt: it goes before samples that wait, and is never held."""


class VLLMCore:
    """``tandem.engines.stepper.Core`` over vLLM's ``LLMEngine``, which no two threads may touch at once.

    At most ``slots`` jobs are in vLLM, first come first served, so that a job's first version is that of the weights
    which draw its first token.
    """

    def __init__(
        self, engine: Any, slots: int, adapters: Any | None = None, after_failure: Callable[[], None] = lambda: None
    ) -> None:
        """``adapters``: vLLM's request for those that all jobs are to have. ``after_failure``: what a step that failed
        calls before it says so (``setup.end_with_ranks``)."""
        self.engine, self.slots, self.adapters, self.after_failure = engine, slots, adapters, after_failure
        self.version = 0
        self.unusable: Exception | None = None
        """Why nothing can be sampled now."""
        self.broken: Exception | None = None
        """Why nothing can be sampled any more."""
        self.waiting: deque[tuple[int, VLLMJob]] = deque()
        self.inside: dict[int, tuple[VLLMJob, Versions]] = {}
        """Jobs that vLLM has, and what drew the tokens that they had when the weights last changed."""
        self.held = False
        """Whether no jobs may enter vLLM."""
        self.gone_tokens = 0
        """Drawn by jobs that are not there any more."""

    @property
    def sampled_tokens(self) -> int:
        return self.gone_tokens + sum(self._drawn().values())

    @property
    def running(self) -> int:
        return len(self.inside)

    def _drawn(self) -> dict[int, int]:
        """Tokens that each job in vLLM has so far."""
        states = list(self.engine.output_processor.request_states.values())
        return {int(state.external_req_id): state.detokenizer.num_output_tokens() for state in states}

    def add(self, name: int, job: VLLMJob) -> None:
        if error := self.broken or self.unusable:
            raise error
        if job.scores:
            self.waiting.appendleft((name, job))
        else:
            self.waiting.append((name, job))

    def step(self) -> dict[int, Any]:
        try:
            ended = self._admit()
            for output in self.engine.step():
                name = int(output.request_id)
                if output.finished and name in self.inside:
                    job, versions = self.inside.pop(name)
                    drawn = len(output.outputs[0].token_ids)
                    self.gone_tokens += drawn
                    stamp_version(versions, self.version, drawn)
                    try:
                        ended[name] = job.read(output, versions or [(self.version, 0)])
                    except UserError as error:
                        ended[name] = error
            return ended
        except BaseException as error:
            if isinstance(error, Exception):
                self.after_failure()
            # The step may have lost any of them, and what vLLM is left with is unknown.
            cut_off = RuntimeError(f"a vLLM step was cut off: {error!r}")
            self.broken = error if isinstance(error, Exception) else cut_off
            raise

    def abort(self, names: Collection[int]) -> None:
        gone = set(names)
        self.waiting = deque(entry for entry in self.waiting if entry[0] not in gone)
        there = [name for name in gone if self.inside.pop(name, None)]
        if not self.broken:
            drawn = self._drawn()
            self.gone_tokens += sum(drawn.get(name, 0) for name in there)
            self.engine.abort_request([str(name) for name in there])

    def renew(self, version: int) -> None:
        """For the holder of an empty cache (``forget_cache``), which has none but tokens of the old weights."""
        drawn = self._drawn()
        for name, (_, versions) in self.inside.items():
            stamp_version(versions, self.version, drawn.get(name, 0))
        self.version = version

    def hold(self, held: bool) -> None:
        self.held = held

    def forget_cache(self) -> None:
        """Empties the cache: what running samples have so far is computed anew, and what is enqueued not taken."""
        if not self.engine.reset_prefix_cache(reset_running_requests=True):
            raise UserError("vLLM did not empty its prefix cache; its samples would mix old and new weights")

    def _admit(self) -> dict[int, Any]:
        refused: dict[int, Any] = {}
        while self.waiting and len(self.inside) < self.slots:
            if self.held and not self.waiting[0][1].scores:
                break
            name, job = self.waiting.popleft()
            try:
                self.engine.add_request(str(name), job.prompt, job.params, lora_request=self.adapters)
            except ValueError as error:
                # vLLM refuses this one; the others are none the worse.
                refused[name] = error
            else:
                self.inside[name] = job, []
        return refused
