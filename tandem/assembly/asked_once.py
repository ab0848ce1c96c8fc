"""Frozen models that are asked about a run's rows once, before its first step, and then let go."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.assembly.configs.methods import RowsConfig
from tandem.assembly.digests import weights_digest
from tandem.batch import Batch
from tandem.data.order import Order
from tandem.data.packing import pack, pack_examples
from tandem.methods.base import Method
from tandem.roles import Seat
from tandem.rollout.known import Known
from tandem.runs.progress import Progress, say
from tandem.workers.homes import seat_of

KEPT = "reference"
"""Folder in a run's own where what a reference said is kept."""


@dataclass(kw_only=True)
class AskedOnce:
    """What the frozen models of a run on rows say of all that the run shows them."""

    config: RowsConfig
    rows: Seq[Any]
    held_out: Mapping[str, Seq[Any]]
    order: Order
    steps: int
    longest: int | None
    """Most tokens of a sequence."""
    known: dict[str, Known] = field(default_factory=dict, init=False)
    lacking: list[str] = field(default_factory=list, init=False)
    """The roles that must be asked something."""
    asked: int = field(default=0, init=False)
    """Units that the model which is being asked has been shown."""

    @property
    def folder(self) -> Path:
        """Where what they say is kept."""
        return Path(self.config.rows.reference_cache or Path(self.config.run.out) / KEPT)

    def uses(self) -> dict[str, str]:
        """What the run would use of them, for a dry run."""
        said = f"asked once about each row, before the first step; kept in {self.folder}"
        itself = "the model itself, " if all(map(self.config.is_actor, self.config.asked_once)) else ""
        return {f"{role}, once": itself + said for role in self.config.asked_once}

    def recall(self) -> set[str]:
        """Reads what earlier runs have kept, and returns the roles whose models need not be loaded.

        That is those that have said all, and those that are the actor as it is before the first step.
        """
        config = self.config
        for role in config.asked_once:
            about = {"model": weights_digest(config.sources[role]), "dtype": config.model.dtype}
            self.known[role] = known = Known(self.folder, about)
            for line in known.read():
                say(line)
            if any(known.lacking(batch) for batch in self._shown()):
                self.lacking.append(role)
        return {role for role in self.known if role not in self.lacking or config.is_actor(role)}

    def seats(self) -> dict[str, Seat]:
        """The models by role, as they answer from now on: from what is known."""
        return {role: seat_of(known) for role, known in self.known.items()}

    def ask(self, models: Mapping[str, Seat], progress: Progress) -> None:
        """Asks the models what is not known, and lets them go. Before the actor changes, or gets its weights back."""
        actor = models["actor"]
        for role in self.lacking:
            seat, known, started = models.get(role, actor), self.known[role], time.monotonic()
            before, self.asked = len(known.logp), 0
            with progress.phase(f"asking the {role}", of=self._units(), done=lambda: self.asked):
                known.ask(seat, self._counted())
            progress.note(
                f"{role}: asked about {len(known.logp) - before} sequences in {time.monotonic() - started:.1f} s, once "
                "for the whole run" + (f"; {before} were known" if before else "")
            )
            if role not in models:
                continue
            if seat.home is actor.home:
                seat.call("forget")
            else:
                seat.home.close()

    def _shown(self) -> Iterator[Batch]:
        """All that the models see: held-out rows, and of each step the rows that none before it had.

        They are packed as evaluation and the step pack them: a policy that has not moved rounds as its reference did.
        """
        method, per = self.config.method, self.config.rows.batch_size
        for held_out in self.held_out.values():
            yield from self._packed(held_out, held_out)
        gone: set[int] = set()
        for step in range(self.steps):
            numbers = self.order.take(range(step * per, (step + 1) * per))
            new = [self.rows[number] for number in dict.fromkeys(numbers) if number not in gone]
            gone.update(numbers)
            yield from self._packed(new, [self.rows[number] for number in numbers])
            if len(gone) == len(self.rows) and not has_aside(method):
                return

    def _counted(self) -> Iterator[Batch]:
        """All that the models see, each batch counted once the next one is asked for."""
        for batch in self._shown():
            yield batch
            self.asked += batch.units

    def _packed(self, new: Seq[Any], items: Seq[Any]) -> Iterator[Batch]:
        method = self.config.method
        if new:
            yield pack_examples([example for item in new for example in method.examples(item)])
        if aside := method.aside(items, self.longest):
            yield pack(aside)

    def _units(self) -> int:
        held_out, shown = sum(map(len, self.held_out.values())), self.steps * self.config.rows.batch_size
        aside = held_out + shown if has_aside(self.config.method) else 0
        return held_out + min(len(self.rows), shown) + aside


def has_aside(method: Method) -> bool:
    """Whether a method shows its models sequences beside the rows."""
    return type(method).aside is not Method.aside
