"""The engines of several processes as one, and the one restart of those that die."""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial

from tandem.errors import Cancelled, UserError, WorkerDied, WorkerFailure
from tandem.futures import Driven, Future
from tandem.parallel.shares import divide
from tandem.roles import Engine, Generating, Metrics, OverEngine
from tandem.types import Completion, Ended, Request, Watch
from tandem.workers.group import Answer, WorkerGroup
from tandem.workers.process import raise_failure
from tandem.workers.served import Heard, serve

log = logging.getLogger("tandem")
AHEAD = 1.5
"""An engine of several gets at most 1.5 times as many samples as it decodes at once: a slower one gets fewer then."""
ASKED_S = 0.05
"""While nothing is heard of any engine, ``until`` is asked every 0.05 s."""
TAKE_S = 1.0
"""An engine with a process of its own answers after 1 s, though nothing has ended there."""
SLICE_S, LONG_SLICE_S = 0.25, 1.0
"""An engine in a process of others samples for 0.25 s at a time, or for 1 s where nobody can want it to stop sooner."""
CANCEL_S = 10.0
"""An engine that does not answer within 10 s is not waited for any longer, where all is given up."""


@dataclass(eq=False)
class Call:
    """Requests that were submitted together: an error of one is that of all that have not ended."""

    watch: Watch | None
    error: Exception | None = None


@dataclass(eq=False)
class Asked:
    """A request that some engine has, or will have: the future of its completions."""

    engine: EngineGroup
    call: Call
    number: int
    """Its place in its call."""
    request: Request
    results: dict[int, Completion] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)
    """The places of the samples that its engine draws: all, or those that one which died had not told of."""
    rank: int = 0
    """The rank of the engine that has it."""

    @property
    def missing(self) -> list[int]:
        """The places of samples that have not ended."""
        return [place for place in range(len(self.request.seeds)) if place not in self.results]

    @property
    def length(self) -> int:
        """The most tokens of one of its sequences."""
        return len(self.request.prompt_ids) + self.request.sampling.max_new_tokens

    @property
    def load(self) -> int:
        """Tokens that it may still cost."""
        return len(self.request.prompt_ids) + len(self.missing) * self.request.sampling.max_new_tokens

    def done(self) -> bool:
        return self.call.error is not None or not self.missing

    def result(self) -> list[Completion]:
        """Waits for its samples, and raises the call's error."""
        self.engine.finish(self)
        if self.missing and self.call.error is not None:
            raise self.call.error
        return [self.results[place] for place in range(len(self.request.seeds))]


class EngineGroup(Generating):
    """The engines of a group as one (``tandem.roles.Engine``), for one thread.

    A request goes to the engine with the least to do. Those ``alone`` in their processes sample on by themselves,
    whatever this one does; the others while somebody waits here, in slices, since their processes make one call at a
    time. With ``slots``, the number of samples that an engine decodes at once, it gets up to 1.5 times as many while
    somebody waits, and more as these end: what is short is followed by more, and a slow engine gets fewer. Whoever
    stops waiting leaves nothing behind that was not handed out.
    """

    def __init__(self, group: WorkerGroup, *, alone: bool, slots: int | None = None) -> None:
        self.group, self.alone, self.slots = group, alone, slots
        group.place("sampling", partial(serve, alone=alone))
        self.ended = 0
        self._names = itertools.count()
        self._open: dict[int, Asked] = {}
        """Requests that have not ended, by the name that their engine knows them by."""
        self._waiting: deque[Asked] = deque()
        self._begins: dict[Answer, list[int]] = {}
        self._takes: dict[int, Answer] = {}
        """What each engine is going to say, by its rank."""
        self._samples = [0] * group.size
        """Samples that each engine has and has not told of."""
        self._requests_ended = 0
        self._heard_at = [0.0] * group.size
        """When each was last known to get on."""
        self._holding = False
        """Whether they may begin no samples."""
        self._running = [0] * group.size
        """Samples that each has begun, where it may not begin others (``hold``)."""
        self._outdated: set[Answer] = set()
        """What engines are going to say that were asked before they were last held: it may be of before."""
        self._counts = [(0.0, 0)] * group.size
        """Busy seconds and sampled tokens of each engine."""
        self._before = (0.0, 0)
        """Busy seconds and sampled tokens of engines that have died."""

    @property
    def busy_seconds(self) -> float:
        return (self._before[0] + sum(seconds for seconds, _ in self._counts)) / self.group.size

    @property
    def sampled_tokens(self) -> int:
        return self._before[1] + sum(tokens for _, tokens in self._counts)

    def submit(self, requests: Seq[Request], watch: Watch | None = None) -> list[Future[list[Completion]]]:
        """Begins requests. One that cannot be sampled is told of by its future, which raises UserError."""
        if not self._open and not self._waiting:
            self.ended = 0
        call = Call(watch)
        asked = [Asked(self, call, number, request) for number, request in enumerate(requests)]
        missing = [one for one in asked if one.missing]
        if self.slots is not None and not self._open and not self._waiting:
            # A cache that holds the longest need not be made anew for what comes later.
            missing.sort(key=lambda one: -one.length)
        self._waiting.extend(missing)
        self._begin(everything=self.slots is None)
        return list(asked)

    def wait(self, until: Callable[[], bool], at_least: int = 0) -> None:
        """See ``tandem.roles.Engine``. Raises WorkerDied where an engine's process is gone (``forget`` it then)."""
        self._advance(until, at_least)
        if not self._holding:
            self._begin(everything=True)

    def finish(self, asked: Asked) -> None:
        """Waits until a request is done."""
        if not asked.done():
            self._advance(asked.done, 1)

    def look(self) -> None:
        """Hears what engines alone in their processes have to tell. Raises WorkerDied as ``wait`` does."""
        if self.alone and self._open:
            self._listen(1)
            for answer in self.group.ended_of([*self._begins, *self._takes.values()], 0.0):
                self._hear(answer)

    def cancel(self) -> None:
        """Gives up everything, within 10 s whatever the engines do, or 1 s where one is stopped."""
        error = Cancelled("what was being sampled was given up")
        for asked in (*self._open.values(), *self._waiting):
            asked.call.error = asked.call.error or error
        self._open.clear()
        self._waiting.clear()
        self._samples = [0] * self.group.size
        end = time.monotonic() + (1.0 if self.group.unheard else CANCEL_S)
        # Calls at the same time may overtake each other.
        self.group.ended_of(list(self._begins), max(0.0, end - time.monotonic()), all_of_them=True)
        self._begins.clear()
        calls = [self.group.submit_one(rank, "sampling", "cancel") for rank in range(self.group.size)]
        ended = self.group.ended_of(calls, max(0.0, end - time.monotonic()), all_of_them=True)
        if late := [self.group.who(rank) for rank, call in enumerate(calls) if call not in ended]:
            log.warning("%s: no answer, and nobody waits any longer", ", ".join(late))

    def hold(self, held: bool) -> None:
        """Has no engine start a sample, or any again. Those that have died need not be told."""
        self._holding = held
        self._outdated = set(self._takes.values())
        self._running = [0] * self.group.size
        calls = [self.group.submit_one(rank, "sampling", "hold", held) for rank in range(self.group.size)]
        for rank, call in enumerate(calls):
            with suppress(WorkerDied) if not held else nullcontext():
                begun = call.result()
                self._running[rank] = begun if held else 0

    @property
    def running(self) -> int:
        """Samples that have begun, where no others may."""
        return sum(self._running)

    def forget(self, rank: int) -> None:
        """The engine's process is gone: what it had is to be begun again, but for samples that it has told of."""
        self._takes.pop(rank, None)
        self._begins = {answer: names for answer, names in self._begins.items() if answer.first_rank != rank}
        lost = [name for name, asked in self._open.items() if asked.rank == rank]
        self._waiting.extendleft(reversed([self._open.pop(name) for name in lost]))
        self._samples[rank] = 0
        self._before = (self._before[0] + self._counts[rank][0], self._before[1] + self._counts[rank][1])
        self._counts[rank] = (0.0, 0)

    def _advance(self, until: Callable[[], bool], at_least: int) -> None:
        goal = self._requests_ended + at_least
        self._heard_at = [time.monotonic()] * self.group.size
        while (self._open or self._waiting) and not until():
            # One that was started again may have no weights before the push that comes next.
            if not self._holding:
                self._begin(everything=self.slots is None)
            self._listen(goal - self._requests_ended)
            for answer in self.group.ended_of([*self._begins, *self._takes.values()], ASKED_S):
                self._hear(answer)
            self._require_progress()
        while not self.alone and self._takes:
            # Whoever has the processes next is not to wait for a slice.
            self._hear(next(iter(self._takes.values())))
        if not self.alone and self._open:
            for call in [self.group.submit_one(rank, "sampling", "give_way") for rank in range(self.group.size)]:
                call.result()

    def _begin(self, *, everything: bool) -> None:
        """Hands requests to engines: all of them, or what the engines have slots for."""
        if not self._waiting:
            return
        lots: list[list[Asked]] = [[] for _ in self._samples]
        if everything or self.slots is None:
            waiting = list(self._waiting)
            self._waiting.clear()
            loads = [0] * self.group.size
            for asked in self._open.values():
                loads[asked.rank] += asked.load
            shares = divide([asked.load for asked in waiting], self.group.size, loads)
            lots = [[waiting[i] for i in share] for share in shares]
        else:
            samples = list(self._samples)
            while self._waiting and min(samples) < AHEAD * self.slots:
                rank = samples.index(min(samples))
                asked = self._waiting.popleft()
                samples[rank] += len(asked.missing)
                lots[rank].append(asked)
        for rank, lot in enumerate(lots):
            named: dict[Call, list[tuple[int, Request]]] = defaultdict(list)
            for asked in lot:
                asked.rank, asked.left = rank, asked.missing
                self._samples[rank] += len(asked.left)
                seeds = tuple(asked.request.seeds[place] for place in asked.left)
                name = next(self._names)
                named[asked.call].append((name, replace(asked.request, seeds=seeds)))
                self._open[name] = asked
            # Each call's together, and apart from those of others: an error there is theirs alone.
            for requests in named.values():
                answer = self.group.submit_one(rank, "sampling", "begin", requests)
                self._begins[answer] = [name for name, _ in requests]

    def _listen(self, at_least: int) -> None:
        """Asks every engine that has something to do, unless it has been asked."""
        for rank in range(self.group.size):
            # Of samples that run it may be that nobody wants them any more.
            if rank in self._takes or not (self._samples[rank] or self._running[rank]):
                continue
            here = sum(asked.rank == rank for asked in self._open.values())
            # So many must end here even if all end that the others have.
            least = here - (len(self._open) + len(self._waiting) - at_least)
            seconds = TAKE_S if self.alone else LONG_SLICE_S if least > 0 else SLICE_S
            self._takes[rank] = self.group.submit_one(rank, "sampling", "take", max(1, least), seconds)

    def _hear(self, answer: Answer) -> None:
        rank = answer.first_rank
        if (names := self._begins.pop(answer, None)) is not None:
            try:
                answer.result()
            except WorkerDied:
                raise
            except UserError as error:
                self._fail(names, error)
            else:
                self._give_up(rank, [name for name in names if name not in self._open])
            return
        del self._takes[rank]
        heard: Heard = answer.result()
        counts = heard.busy_seconds, heard.sampled_tokens
        if counts[1] != self._counts[rank][1] or heard.ended or heard.failed:
            self._heard_at[rank] = time.monotonic()
        self._counts[rank] = counts
        if answer not in self._outdated:
            self._running[rank] = heard.running
        told: dict[Call, list[Ended]] = defaultdict(list)
        ended: dict[tuple[int, int], Completion] = {}
        for name, sample, completion in heard.ended:
            asked = self._open.get(name)
            if asked is not None and (name, sample) not in ended and asked.left[sample] not in asked.results:
                ended[name, sample] = completion
                told[asked.call].append((asked.number, asked.left[sample], completion))
        failed: dict[Call, Exception] = {}
        for call, samples in told.items():
            # Before anyone has the results.
            try:
                if call.watch is not None:
                    call.watch(samples)
            except Exception as error:
                failed[call] = error
        for (name, sample), completion in ended.items():
            asked = self._open[name]
            asked.results[asked.left[sample]] = completion
            self._samples[rank] -= 1
            self.ended += 1
            if not asked.missing:
                del self._open[name]
                self._requests_ended += 1
        for call, why in failed.items():
            self._fail([name for name, asked in self._open.items() if asked.call is call], why)
        for name, failure in heard.failed:
            try:
                raise_failure(failure, self.group.who(rank))
            except UserError as error:
                self._fail([name], error)

    def _fail(self, names: Seq[int], error: Exception) -> None:
        """Ends the calls of these requests, wherever the others of them are."""
        calls = {self._open[name].call for name in names if name in self._open}
        for call in calls:
            call.error = call.error or error
        begun = [set[int]() for _ in self._samples]
        for name in [name for name, asked in self._open.items() if asked.call in calls]:
            asked = self._open.pop(name)
            begun[asked.rank].add(name)
            self._samples[asked.rank] -= len(asked.missing)
            self._requests_ended += 1
            self.ended += len(asked.missing)
        self._waiting = deque(asked for asked in self._waiting if asked.call not in calls)
        # What an engine has not said that it has begun it is told to give up once it has: calls may overtake others.
        unsaid = {name for names in self._begins.values() for name in names}
        for rank, mine in enumerate(begun):
            self._give_up(rank, sorted(mine - unsaid))

    def _give_up(self, rank: int, names: Seq[int]) -> None:
        if names:
            self.group.submit_one(rank, "sampling", "give_up", names)

    def _require_progress(self) -> None:
        """Raises RunFailure where an engine has samples, and has drawn nothing for as long as a call may take."""
        now = time.monotonic()
        # What waits where no sample may begin is nobody's fault.
        working = self._running if self._holding else self._samples
        late = [
            rank for rank, heard in enumerate(self._heard_at) if working[rank] and now - heard > self.group.deadline_s
        ]
        if late:
            raise self.group.late("sampling", late)


class RestartingOnce(OverEngine):
    """``engine``, of which processes that die are started again, once in a run, and refilled with the current weights.

    ``engines`` are those that ``engine`` samples with. What one that died had begun is begun again, with the weights
    that there are then; what it had told of stays.
    """

    def __init__(self, engine: Engine, engines: EngineGroup, refill: Callable[[], object]) -> None:
        self.engine, self.engines, self.refill = engine, engines, refill
        self.restarted = False

    def submit(self, requests: Seq[Request], watch: Watch | None = None) -> list[Future[list[Completion]]]:
        return [Driven(future, self.wait) for future in self.engine.submit(requests, watch)]

    def wait(self, until: Callable[[], bool], at_least: int = 0) -> None:
        """As the engine's own. Raises RunFailure where a process dies a second time."""
        try:
            self.engine.wait(until, at_least)
        except WorkerDied as error:
            self._restart(error)
            self.refill()
            self.wait(until)

    def look(self) -> None:
        """As the engine's own. A process that has died is started again by who waits or pushes next."""
        with suppress(WorkerDied):
            self.engine.look()

    def cancel(self) -> None:
        self.engine.cancel()

    def guard(self, push: Callable[[int], Metrics], again: Callable[[int], Metrics]) -> Callable[[int], Metrics]:
        """``push``, for engines that may have died since they were last heard of.

        ``again`` refills them with the weights of this push, which may not have come to telling them its step.
        """

        def guarded(step: int) -> Metrics:
            try:
                return push(step)
            except WorkerDied as error:
                self._restart(error)
                # Refilling is this push, made again.
                return again(step)

        return guarded

    def _restart(self, error: WorkerDied) -> None:
        group = self.engines.group
        if not (dead := group.dead()):
            # Not an engine: who sends to them may have died, too.
            raise error
        if self.restarted:
            raise WorkerFailure(f"{error} (it was restarted once already)") from None
        self.restarted = True
        for rank in dead:
            log.warning("%s rank %d is started again: %s", group.name, rank, " ".join(str(error).split()))
            self.engines.forget(rank)
            group.restart(rank)
