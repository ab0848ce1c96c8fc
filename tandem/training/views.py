"""A frozen model that is a view of the trained one: the policy without its adapters, or with those it began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from tandem.batch import Batch, Outputs
from tandem.parallel.sharding import local, placed_like, slice_like, whole
from tandem.training.trainer import LocalTrainer


class View:
    """Scores with the trainer's own weights as they were before the first step (``tandem.roles.Scorer``).

    Adapters that began at nothing are switched off; of others the values of that time are kept, and stand in the
    trained ones' places while it scores. The base, which is nearly all of a model, is in memory once. It can ``follow``
    the policy (``follows``) as a model of its own does.
    """

    def __init__(self, trainer: LocalTrainer, *, temperature: float, follows: bool = False) -> None:
        self.trainer = trainer
        self.temperature = temperature
        adapters = trainer.policy.adapters
        assert adapters is not None, "a view is of a policy with adapters"
        kept = trainer.weights if follows or not adapters.fresh else {}
        self.exact = {name: local(weight).detach().float().clone() for name, weight in kept.items()}
        """What it has of the adapters, in float32: this rank's slices. Empty: it has none."""
        self.followed = 0
        """The step after which it last followed."""

    def score(self, batch: Batch, temperature: float | None = None) -> Outputs:
        """Log-probs at the temperature (None: its own)."""
        with self._shown():
            return self.trainer.score(batch, self.temperature if temperature is None else temperature)

    @torch.no_grad()
    def follow(self, weights: Mapping[str, Tensor], mix: float, step: int) -> None:
        """Becomes ``mix`` times these weights, by name, and the rest its own. Once after a ``step``."""
        if step == self.followed:
            return
        for name, mine in self.exact.items():
            mine.lerp_(slice_like(weights[name], self.trainer.weights[name]).to(mine), mix)
        self.followed = step

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the model that it is a view of."""
        return self.trainer.shapes()

    def state_dict(self) -> dict[str, Any]:
        """What it has of the adapters, whole, on rank 0's CPU."""
        placed = {name: placed_like(mine, self.trainer.weights[name]) for name, mine in self.exact.items()}
        return {"adapters": whole(placed, keep=self.trainer.world.rank == 0), "followed": self.followed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` gave, on any number of ranks."""
        self.exact = {
            name: slice_like(full, self.trainer.weights[name]).to(local(self.trainer.weights[name]).device, copy=True)
            for name, full in state["adapters"].items()
        }
        self.followed = state["followed"]

    def describe(self) -> str:
        """For a person to read."""
        which = "with the adapters that it began with" if self.exact else "without its adapters"
        return f"the policy {which}, on its own weights: no second copy"

    def memory_peak(self) -> float | None:
        """See ``LocalScorer.memory_peak``."""
        return self.trainer.memory_peak()

    def park(self, what: Literal["optimizer", "weights"]) -> None:
        """Nothing: the trainer gives its memory away itself."""

    def unpark(self) -> None:
        """Nothing, likewise."""

    def forget(self) -> None:
        """Lets what it has of the adapters go."""
        self.exact = {}

    @contextmanager
    def _shown(self) -> Iterator[None]:
        policy = self.trainer.policy
        assert policy.adapters is not None
        with policy.with_values(self.exact) if self.exact else policy.adapters.off():
            yield
