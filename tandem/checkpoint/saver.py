"""When to save: every so many steps, or minutes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tandem.errors import UserError


@dataclass(kw_only=True)
class SaveEvery:
    """Every ``steps`` steps or every ``minutes`` minutes of wall clock; never where both are 0."""

    steps: int = 0
    minutes: int = 0
    clock: Callable[[], float] = time.monotonic
    """Seconds."""
    last: float = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.clock()

    @classmethod
    def parse(cls, text: str, clock: Callable[[], float] = time.monotonic) -> SaveEvery:
        """``"100"`` is steps, ``"10m"`` minutes from now, ``"0"`` never. Raises UserError for anything else."""
        match = re.fullmatch(r"(\d+)(m?)", text.strip())
        if match is None:
            raise UserError(
                f"save_every: expected a number of steps such as 100, or of minutes such as 10m, got {text!r}"
            )
        return cls(clock=clock, **{"minutes" if match[2] else "steps": int(match[1])})

    @property
    def enabled(self) -> bool:
        return self.steps > 0 or self.minutes > 0

    def due(self, step: int) -> bool:
        """Whether to save now that ``step`` is done. A yes in minutes starts the next wait."""
        if self.minutes and self.clock() - self.last >= 60 * self.minutes:
            self.last = self.clock()
            return True
        return self.steps > 0 and step % self.steps == 0
