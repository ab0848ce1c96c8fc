"""What a replay trains on: a run's record, read and checked, and the models that the run started from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tandem.assembly.configs.replay import ReplayConfig, idle_keys, stored_config
from tandem.assembly.digests import digest_inputs, of_weights
from tandem.assembly.feeds import Fed, Feed, preparation
from tandem.assembly.models import heads, optim_params
from tandem.errors import UserError
from tandem.models.proof.limits import read_limits
from tandem.roles import Seat
from tandem.rollout.recorded import Replayed
from tandem.runs.folder import EVENTS
from tandem.runs.identity import Inputs, read_identity
from tandem.runs.lines import read_lines, read_metrics
from tandem.runs.progress import say
from tandem.runs.record import Record
from tandem.training.optim import learning_rate_at


class ReplayFeed(Feed):
    """The groups of a run's record."""

    order: Replayed

    def __init__(self, config: ReplayConfig) -> None:
        """Raises UserError where the run was not recorded, the record is not whole, or a model is another one."""
        self.config, self.idle = config, idle_keys(type(config))
        run = Path(config.replay.replayed)
        identity = read_identity(run)
        say(f"reading the record of {run}")
        self.record = Record(run, identity["id"], config.replay.last_step)
        self.steps = len(self.record.steps)
        done = max((line["step"] for line in read_metrics(run / "metrics.jsonl")), default=0)
        if config.replay.last_step is None and done > self.steps:
            say(f"  it ends with step {self.steps}: {run} went on to step {done:.0f} without --record")
        self.planned = self._planned()
        self.size = sum(map(len, self.record.tickets))
        head_of = heads(config)
        for role, source in config.sources.items():
            read_limits(source, head=head_of[role])  # says so where there is no such model
        inputs = digest_inputs({}, models=config.sources)
        require_same_models(run, config, identity["inputs"], inputs)
        self.inputs: Inputs = {**inputs, "data": {f"record {run}": identity["id"]}}
        self.order = Replayed(steps=self.record.tickets, read=self.record.groups, judged=bool(config.reward.judges))

    @property
    def bits(self) -> float:
        return float(self.steps * self.config.sampling.samples_per_step)

    def uses(self) -> dict[str, str]:
        record = self.record
        return {"record": f"{record.folder}: {self.size} groups of {self.steps} steps, {record.bytes / 1e6:.1f} MB"}

    def start(self, models: Mapping[str, Seat]) -> Fed:
        # Nothing is held out: there is no engine to sample it.
        return Fed(source=self.order, prepare=preparation(self.config, models))

    def _planned(self) -> int:
        """A length of the run with which each step has the learning rate that it had.

        A run that was resumed with another length had a warmup of its own before, where that is a share of the steps.
        Raises UserError where the two cannot be had by one.
        """
        lengths = self.record.lengths
        params = {length: optim_params(self.config.optim, length) for length in dict.fromkeys(lengths)}
        for length in params:
            if all(
                learning_rate_at(step, params[length]) == learning_rate_at(step, params[then])
                for step, then in enumerate(lengths)
            ):
                return length
        shown = " and ".join(str(length) for length in params)
        raise UserError(
            f"steps: the run was to have {shown} steps, which changed in its warmup or under a falling learning rate: "
            "no one length repeats that; give --warmup-steps a number of steps and --lr-schedule constant"
        )


def require_same_models(run: Path, config: ReplayConfig, then: Inputs, now: Inputs) -> None:
    """Raises UserError where a model is not the one, by its content, that the run started from."""
    changed = [e for e in read_lines(run / EVENTS) if e["event"] == "accept_changed" and e.get("what") == "model"]
    if changed:
        names = ", ".join(name for event in changed for name in event["changed"])
        raise UserError(
            f"{run}: went on with another model than it began with ({names}), so it cannot be trained again"
        )
    sources = stored_config(run, type(config)).sources
    for role, source in config.sources.items():
        if (before := _files_of(then, sources[role])) != (found := _files_of(now, source)):
            files = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
            differing = ", ".join(filter(None, files)) or "its commit on the hub"
            raise UserError(
                f"{role}: {source} is not the model that {run} started from: {differing} differs; put it back, or name "
                f"a copy of it"
            )


def _files_of(inputs: Inputs, source: str) -> dict[str, str]:
    """The digests of a model's files by name, of what its numbers depend on."""
    whole = f"model {source}"
    return of_weights(
        {
            name.removeprefix(whole).removeprefix(": "): digest
            for name, digest in inputs["model"].items()
            if name == whole or name.startswith(f"{whole}: ")
        }
    )
