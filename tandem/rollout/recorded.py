"""Groups that a run has trained on before, as items: read from its record, without an engine and without rewards."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from tandem.errors import UserError
from tandem.futures import Done, Future
from tandem.roles import Clock, Metrics
from tandem.rollout.measure import rollout_metrics
from tandem.rollout.rows import AtOnce
from tandem.types import Group, Ticket


@dataclass(frozen=True, kw_only=True)
class Replayed(AtOnce):
    """A source of recorded groups, and the order in which they were trained on."""

    steps: Seq[Seq[Ticket]]
    """The tickets of each step, from the first one on."""
    read: Callable[[int], list[Group]]
    """The groups of a step, in the order of its tickets."""
    judged: bool
    """Whether anything had judged them."""
    phase: str = field(default="scoring", init=False)

    def tickets(self, positions: Seq[int], per_step: int) -> list[Ticket]:
        """The tickets that the run trained on in a step. Raises UserError where it is asked for others than these.

        That is where the method passes over one of them, which the run did not.
        """
        step, first = divmod(positions[0], per_step)
        if first or len(positions) != per_step:
            raise UserError(
                f"step {step + 1}: the method passes over a group that the run trained on; a replay has no others to "
                "take: leave the keys that decide that as they were"
            )
        return list(self.steps[step])

    def begin(self, tickets: Seq[Ticket], clock: Clock) -> list[Future[Group]]:
        """The groups of a step."""
        with clock("reading"):
            return [Done(group) for group in self.read(self.steps.index(tickets) + 1)]

    def metrics(self, items: Seq[Group]) -> Metrics:
        """See ``rollout_metrics``: of the groups that are trained on alone."""
        return rollout_metrics(items, judged=self.judged)
