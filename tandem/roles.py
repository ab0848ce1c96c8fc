"""The parts of a run and what each promises. Whatever keeps the promise can take the part, in any process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from tandem.batch import Batch, Outputs, TokenLoss
from tandem.futures import Awaited, Begun, Future, wait_all
from tandem.types import Completion, Held, Judgement, Request, Rollout, Ticket, Watch

MEANWHILE_S = 0.05
"""What is to be done while others work is done every 0.05 s."""
Metrics = dict[str, float]
LossFn = Callable[[Outputs, Batch], TokenLoss]
Device = tuple[str, str | None]
"""The address of a rank's machine, and the UUID of its GPU; None on a CPU."""


class Home(Protocol):
    """Processes in which roles are built and called (``tandem.workers``).

    The ranks of a joined home all see its calls in one order, the one in which they were submitted: calls to several
    of its roles may be under way together, and their collectives still meet. To be used by one thread.
    """

    at_once: bool
    """Whether ``submit`` returns when the call has ended: in this process, there is nobody else to make it."""

    @property
    def devices(self) -> Seq[Device]:
        """One for each rank."""
        ...

    def place(self, role: str, build: Callable[[Any], Any]) -> Seat:
        """Builds a role in every process, from the ``tandem.workers.process.Site`` that it finds there."""
        ...

    def submit(self, role: str, verb: str, arguments: tuple[Any, ...]) -> Future[Any]:
        """A role's method in every process with the same arguments; an attribute of its where the verb is no method.

        The result is what rank 0 returned, or the error of any rank. Raises that error itself where calls are made at
        once.
        """
        ...

    def submit_each(self, role: str, verb: str, arguments: Seq[tuple[Any, ...]]) -> Future[list[Any]]:
        """As ``submit``, each process with its own arguments. The result is what each of them returned."""
        ...

    def close(self) -> None:
        """Ends the roles, and the processes that were started for them."""
        ...


@dataclass(frozen=True)
class Seat:
    """A role where it lives: ``seat.call("score", batch)`` is the role's own ``score(batch)``, in its processes."""

    home: Home
    role: str

    @property
    def devices(self) -> Seq[Device]:
        """One for each rank."""
        return self.home.devices

    def submit(self, verb: str, *arguments: Any) -> Future[Any]:
        """Begins a call of every rank with the same arguments. See ``Home.submit``."""
        return self.home.submit(self.role, verb, arguments)

    def submit_each(self, verb: str, arguments: Seq[tuple[Any, ...]]) -> Future[list[Any]]:
        """Begins a call of every process with its own arguments. See ``Home.submit_each``."""
        return self.home.submit_each(self.role, verb, arguments)

    def call(self, verb: str, *arguments: Any) -> Any:
        """``submit``, and waits."""
        return self.submit(verb, *arguments).result()


def call_all(
    seats: Mapping[str, Seat], verb: str, *arguments: Any, meanwhile: Callable[[], object] | None = None
) -> dict[str, Any]:
    """``call_each`` with the same arguments for each."""
    return call_each(seats, verb, dict.fromkeys(seats, arguments), meanwhile=meanwhile)


def call_each(
    seats: Mapping[str, Seat],
    verb: str,
    arguments: Mapping[str, tuple[Any, ...]],
    *,
    meanwhile: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """One verb of several seats, each with its own arguments.

    At the same time where their homes differ, one after another where they share one. ``meanwhile`` is called every
    0.05 s while other processes are at work, and once when all are done. Raises the error of the first seat, in the
    given order, that failed, once all that were begun have ended; that of a seat in this process, and of ``meanwhile``,
    at once, with the others still at work.
    """
    # What this process does itself comes last: by then the others are at work.
    order = sorted(seats, key=lambda role: seats[role].home.at_once)
    begun = {role: seats[role].submit(verb, *arguments[role]) for role in order}
    if meanwhile is not None:
        for call in begun.values():
            while isinstance(call, Awaited) and not call.done():
                meanwhile()
                call.wait(MEANWHILE_S)
        meanwhile()
    return dict(zip(seats, wait_all([begun[role] for role in seats]), strict=True))


@runtime_checkable
class Engine(Protocol):
    """Samples completions, with weights that are its own business: the trainer's, or see ``FedEngine``.

    Samples that have begun live on until they end or are given up: across calls, across weights that change (each
    token tells which drew it, ``Completion.versions``), and while others compute on the engine's devices.
    """

    @property
    def ended(self) -> int:
        """Samples that have ended since nothing was being sampled, for whoever shows how far it is; those included that
        will not come since their request has failed."""
        ...

    @property
    def busy_seconds(self) -> float:
        """How long at least one sample was being drawn, since the engine was made; the mean over its processes."""
        ...

    @property
    def sampled_tokens(self) -> int:
        """Tokens drawn since the engine was made, those of samples that were given up included."""
        ...

    def submit(self, requests: Seq[Request], watch: Watch | None = None) -> list[Future[list[Completion]]]:
        """Begins requests, and returns at once. One future each: one completion a seed, in the order asked for.

        They are sampled together, beside what was submitted before, and fail together: an error of a sample is that of
        every request that was submitted with it and has not ended. Raises UserError for one that cannot be sampled.
        ``watch`` hears of samples as early as the engine knows of them: one by one, in lots, or not at all; twice of
        one that had to be drawn again.
        """
        ...

    def generate(self, requests: Seq[Request], watch: Watch | None = None) -> list[list[Completion]]:
        """``submit``, and waits for all: one list a request."""
        ...

    def wait(self, until: Callable[[], bool], at_least: int = 0) -> None:
        """Goes on sampling until ``until()`` is true, or nothing is left to sample.

        ``until`` is asked between any two steps, or as often as anything is heard of an engine elsewhere, and at least
        about 20 times a second. It may submit more. ``at_least`` is a hint: it cannot become true before so many more
        requests have ended. Raises an error that has cost all samples; those of single requests are their futures'.
        """
        ...

    def look(self) -> None:
        """Takes what has ended elsewhere, and tells who watches, without waiting: nothing is sampled for it."""
        ...

    def cancel(self) -> None:
        """Gives up all that is being sampled, at the latest after the step that is under way. Futures that have not
        ended raise Cancelled."""
        ...


class Generating:
    """What gives an engine its ``generate``, by what else it does."""

    def generate(self: Engine, requests: Seq[Request], watch: Watch | None = None) -> list[list[Completion]]:
        """See ``Engine.generate``."""
        futures = self.submit(requests, watch)
        self.wait(lambda: all(future.done() for future in futures), len(futures))
        return wait_all(futures)


class OverEngine(Generating):
    """What is common to engines that have another one sample."""

    engine: Engine

    @property
    def ended(self) -> int:
        return self.engine.ended

    @property
    def busy_seconds(self) -> float:
        return self.engine.busy_seconds

    @property
    def sampled_tokens(self) -> int:
        return self.engine.sampled_tokens


@runtime_checkable
class SharingEngine(Engine, Protocol):
    """An engine that works in slices, in a process and on a device of others."""

    def sample(self, until: Callable[[], bool]) -> None:
        """``wait``, for whoever calls it again, or ``give_way``, before others compute on the device."""
        ...

    def give_way(self) -> None:
        """Others are about to compute on the device while samples are open: leaves them the memory that they need."""
        ...


@runtime_checkable
class HoldingEngine(Engine, Protocol):
    """An engine that can be kept from beginning samples."""

    def hold(self, held: bool) -> None:
        """Begins no samples until it is told the opposite. Those that have begun go on, and what is submitted waits."""
        ...

    @property
    def running(self) -> int:
        """Samples that have begun and not ended, while no others may begin."""
        ...


@runtime_checkable
class FedEngine(HoldingEngine, Protocol):
    """An engine with weights of its own, which a trainer's pushes renew (``tandem.sync.push``)."""

    def connect(self, links: Seq[Any]) -> None:
        """Meets the trainer that will push: one ``tandem.sync.links.Link`` for each rank that the engine has.

        Returns when the other ends have come, too. Links that there were before are forgotten.
        """
        ...

    def receive(self, version: int, check: bool = False) -> Seq[int | None]:
        """Takes one push: what is sampled from now on comes from these weights, and carries ``version``.

        Returns ``checksums`` of it, if asked to ``check``; [] otherwise. Raises UserError, naming the tensor, where it
        cannot be loaded.
        """
        ...

    def held(self) -> list[Held]:
        """Its copies of pushed tensors: the same ones, in one order, from the first push over a link to the last."""
        ...

    def checksums(self) -> Seq[int | None]:
        """For each of ``held``, the checksum (``tandem.sync.checksum``) of what it computes with now, as a whole tensor
        in the dtype in which it came; None where it cannot tell."""
        ...

    def logprobs(self, sequences: Seq[Seq[int]]) -> list[list[float]]:
        """Log-prob, in nats at temperature 1, of every token but the first of each sequence."""
        ...

    def close(self) -> None:
        """Ends whatever it has started."""
        ...


@runtime_checkable
class SleepingEngine(FedEngine, Protocol):
    """A fed engine that gives its memory to the trainer on its devices between turns (``tandem.sync.turns``)."""

    def sleep(self) -> None:
        """Gives the devices' memory back, with the weights in it. Nothing can be sampled until both stages are awake
        and a push has come."""
        ...

    def wake(self, stage: Literal["weights", "cache"]) -> None:
        """Takes memory again: for the weights, before a push, or for the cache, after it."""
        ...

    def memory(self) -> Metrics:
        """``free`` and ``used`` GB of its fullest device; {} on a CPU."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Looks at sequences without changing itself: a reference, a reward model, a critic."""

    def score(self, batch: Batch) -> Outputs:
        """Outputs for the whole batch, without gradient."""
        ...


@runtime_checkable
class Trainer(Scorer, Protocol):
    """Owns a model and its optimizer. It does not know the method: it is given a loss."""

    @property
    def version(self) -> int:
        """Optimizer steps taken."""
        ...

    def forward_backward(self, batch: Batch) -> Metrics:
        """Adds the gradient of ``(loss_T * weight_T).sum()``. Raises NonFiniteError and names the segment."""
        ...

    def optim_step(self, done: float | None = None, scale: float = 1.0) -> Metrics:
        """Clips, steps, clears the gradient; returns ``grad_norm`` and ``learning_rate``.

        ``done`` is how many steps of the run are behind, a fraction within a step that takes several optimizer steps:
        the learning rate's schedule goes by it. None: as many as optimizer steps. ``scale`` multiplies the learning
        rate of this step.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def export(self, folder: Path) -> None:
        """Writes a Hugging Face folder: weights, config and tokenizer."""
        ...


Item = TypeVar("Item", covariant=True)


class Clock(Protocol):
    """Measures the phases of a step, and shows which one goes on."""

    def __call__(
        self, phase: str, *, of: int = 0, done: Callable[[], int] | None = None
    ) -> AbstractContextManager[None]:
        """Around a phase; ``done()`` says at any time how many of ``of`` things are done."""
        ...


class Source(Protocol[Item]):
    """Where a run's items come from: a dataset, which has them at once, or an engine with rewards."""

    @property
    def phase(self) -> str:
        """The phase of a step in which its items are prepared for training."""
        ...

    @property
    def busy_seconds(self) -> float:
        """How long its sampler was at work, since it was made (``Engine.busy_seconds``); 0 where nothing samples."""
        ...

    def begin(self, tickets: Seq[Ticket], clock: Clock) -> Seq[Future[Item]]:
        """One future a ticket: its item as far as it can be made by itself. Tickets that are begun together are worked
        on together."""
        ...

    def wait(self, until: Callable[[], bool], clock: Clock, at_least: int = 0) -> None:
        """Works on what has begun until ``until()``, which cannot be before ``at_least`` more items are done.

        Raises the error of any item that cannot come, as soon as it is known.
        """
        ...

    def look(self) -> None:
        """Moves along what others work on, for whoever is busy with something else."""
        ...

    def finish(self, items: Seq[Any], clock: Clock) -> Seq[Item]:
        """The items of some futures, which ``begin`` or ``again`` gave, with all that is only known of them together.
        Waits for those that are not done."""
        ...

    def kept(self, item: Any) -> dict[str, Any] | None:
        """What a checkpoint holds of a future, as plain data; None where it must be begun anew."""
        ...

    def again(self, ticket: Ticket, kept: Mapping[str, Any]) -> Future[Item] | None:
        """The future of what ``kept`` gave; None where the data behind it have changed."""
        ...

    def cancel(self) -> None:
        """Gives up all that was begun and not finished, in bounded time."""
        ...

    def check(self, items: Seq[Any]) -> None:
        """Raises UserError or RunFailure where nothing has come of any item that a step has been given so far."""
        ...

    def metrics(self, items: Seq[Any]) -> Metrics:
        """The metrics of all items of a step, those that are not trained on included."""
        ...


@dataclass(kw_only=True)
class RewardBatch:
    """What a reward sees: parallel lists, one entry a sample. ``columns`` hold the dataset's other fields."""

    prompts: list[Any]
    completions: list[Any]
    """Text, or a list with the assistant's message where the prompt is a list of messages (TRL's convention)."""
    rollouts: list[Rollout]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    seed: int | None = None
    """What the global random generators start from where the batch is judged, so that it is judged the same when a
    run is repeated or resumed. None: they are left alone."""


@runtime_checkable
class Reward(Protocol):
    """Judges samples."""

    name: str

    def score(self, batch: RewardBatch) -> list[float | None]:
        """One number a sample; None leaves the sample out. Raises UserError and names the sample it failed on."""
        ...


@runtime_checkable
class BegunReward(Reward, Protocol):
    """A reward that judges while others do: what it is given is judged elsewhere, and asked for later."""

    @property
    def per(self) -> Literal["sample", "group", "all"]:
        """What it judges in one call."""
        ...

    def begin(self, batch: RewardBatch) -> Begun[Judgement]:
        """As ``score``, of what it judges in one call."""
        ...
