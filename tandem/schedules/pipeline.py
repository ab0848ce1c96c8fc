"""The one schedule: items from a source, prepared, trained on, and the new weights given to the sampler."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from tandem.errors import UserError
from tandem.roles import Metrics
from tandem.schedules.crew import Crew
from tandem.schedules.session import Session
from tandem.types import Group

STEPS_ALIKE = 5
"""After 5 steps in a row whose rewards teach nothing, it is said."""
TRIES = 10
"""A step ends the run where the items of 10 steps do not give it those of one that its method keeps."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Step by step: SFT over a dataset, or samples of the very weights that a step starts from."""

    steps: int
    items_per_step: int

    def run(self, crew: Crew, session: Session) -> None:
        """Runs from where the session's newest checkpoint stands to ``steps``, or until its goals are met."""
        session.resume(crew.method.initial_state())
        clock, alike = session.clock, 0
        with session.kept():
            crew.publish(clock)
            session.record(crew.evaluate)
            while session.step < self.steps and not session.stop:
                clock.start()
                if crew.refresh is not None:
                    crew.refresh.once_after(session.step)
                items, passed = self._take(crew, session)
                with clock(crew.source.phase):
                    prepared = crew.prepare(items, session.state, session.step + 1)
                with clock("training"):
                    roles = crew.method.trains(session.state)
                    metrics = crew.train(prepared, roles=roles, done=session.step, changing=session.changing)
                metrics |= crew.publish(clock)
                metrics |= crew.source.metrics([*items, *passed]) | clock.metrics()
                metrics |= rates(metrics, passed)
                session.reached(prepared.state, metrics, [item for item in items if isinstance(item, Group)])
                alike = alike + 1 if rewards_alike(metrics) else 0
                if alike == STEPS_ALIKE:
                    session.note(f"rewards have told no samples apart for {alike} steps (now {metrics['reward']:.4g})")
                session.record(crew.evaluate)
                session.save_if_due(last=session.step == self.steps or bool(session.stop))

    def _take(self, crew: Crew, session: Session) -> tuple[list[Any], list[Any]]:
        """A step's items, and those that the method passed over: the source's next ones came in their places."""
        kept: list[Any] = []
        passed: list[Any] = []
        while (missing := self.items_per_step - len(kept)) > 0:
            if len(passed) >= TRIES * self.items_per_step:
                raise UserError(
                    f"{crew.method.title} keeps {len(kept)} of the {len(kept) + len(passed)} items of this step, and "
                    f"needs {self.items_per_step}: nothing is left to learn from such data, or nothing yet; see what "
                    "rollouts.jsonl says of earlier steps"
                )
            for item in crew.source.begin(crew.tickets(session.take(missing)), session.clock).result():
                (kept if crew.method.keep(item) else passed).append(item)
            crew.source.check([*kept, *passed])
        return kept, passed


def rates(metrics: Metrics, passed: Seq[Any]) -> Metrics:
    """Tokens a second, sampled or else trained, and how many items were passed over, where any were."""
    tokens = metrics.get("sampled_tokens", metrics["trained_tokens"])
    found = {"tokens_per_second": tokens / metrics["seconds"]}
    return found | ({"passed_over": float(len(passed))} if passed else {})


def rewards_alike(metrics: Metrics) -> bool:
    """Whether the samples of each prompt got one reward (``equal_reward_groups``), or all samples of the step did."""
    if "reward_min" not in metrics:
        return False
    return metrics.get("equal_reward_groups") == 1 or metrics["reward_min"] == metrics["reward_max"]
