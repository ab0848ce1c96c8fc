"""An engine beside a sharded actor that does not get the actor's weights, made in a worker like the true one."""

from __future__ import annotations

from typing import Any

from tandem.assembly.models import Replicas


class NeverFilled(Replicas):
    """On rank 1 what is gathered goes nowhere."""

    def push(self, check: bool) -> Any:
        if self.actor.world.rank == 0:
            return super().push(check)
        parameters = self.engine.parameters
        self.engine.parameters = {name: p.detach().clone() for name, p in parameters.items()}
        sums, _ = super().push(check)
        self.engine.parameters = parameters
        return sums, self.engine.checksums() if check else []
