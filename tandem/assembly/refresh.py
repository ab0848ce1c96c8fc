"""A reference that follows the policy: from the processes of one to those of the other, wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from tandem.assembly.configs.methods import RunConfig
from tandem.errors import UserError
from tandem.roles import Seat
from tandem.signals import held
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer
from tandem.workers.process import Site


class Renewal:
    """Beside the policy and its reference, in their processes: each rank renews its part of the reference."""

    def __init__(self, site: Site) -> None:
        self.actor: LocalTrainer = site.roles["actor"]
        self.reference: LocalScorer = site.roles["reference"]

    def follow(self, mix: float, step: int) -> None:
        """See ``LocalScorer.follow``."""
        self.reference.follow(self.actor.weights | self.actor.buffers, mix, step)


def refresh_of(config: RunConfig, models: Mapping[str, Seat]) -> Callable[[int], None] | None:
    """What renews the run's reference from its policy where that is due after a step (TR-DPO, arXiv:2404.09656).

    Raises UserError where the policy has other parameters than the reference.
    """
    section = config.following
    if section is None:
        return None
    actor, reference, mix = models["actor"], models["reference"], section.reference_mix
    if actor.call("shapes") != reference.call("shapes"):
        raise UserError(
            f"reference_every: the model in {config.sources['reference']} has other parameters than that in "
            f"{config.model.model} and cannot become it; leave out --reference, or --reference-every"
        )
    if actor.home is reference.home:
        seat = actor.home.place("following", Renewal)
        return every(section.reference_every, partial(seat.call, "follow", mix))

    def across(step: int) -> None:
        """Through this process, whole, as a checkpoint's weights go."""
        reference.call("follow", actor.call("whole_weights"), mix, step)

    return every(section.reference_every, across)


def every(steps: int, renew: Callable[[int], object]) -> Callable[[int], None]:
    """Calls ``renew`` after every so many steps. Signals wait until all is renewed."""

    def refresh(step: int) -> None:
        if step > 0 and step % steps == 0:
            with held():
                renew(step)

    return refresh
