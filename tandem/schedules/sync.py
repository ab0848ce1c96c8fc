"""Sample, judge, train, in turns: the policy that is trained is the policy that sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from tandem.batch import Batch
from tandem.roles import Metrics, Seat, call_all
from tandem.rollout.prepare import Preparation, Prepared, held_out_metrics, rollout_metrics
from tandem.runs.progress import Progress
from tandem.schedules.session import Evaluation, Session, StepClock
from tandem.types import Group, Prompt


@dataclass(frozen=True, kw_only=True)
class OnlineRoles:
    """Who does what in an online run."""

    prompts: Callable[[range], list[Prompt]]
    """Those at some positions of the data."""
    sample: Callable[[list[Prompt], int], list[Group]]
    judge: Callable[[list[Group], int], None]
    prepare: Preparation
    actor: Seat
    critic: Seat | None
    push_weights: Callable[[int], Metrics]
    evaluate: Callable[[int], list[Group]]
    """Judged samples of held-out prompts after a step at which that is due, else none."""
    samples: int
    """Samples in a step."""
    held_out: int
    """Samples in an evaluation."""
    ended: Callable[[], int]
    """How many of those have ended that are being sampled."""
    memory: Callable[[], float | None] = lambda: None
    """Most GB that the actor's process has allocated on its device since the last time of asking; None on a CPU."""


STEPS_ALIKE = 5
"""After 5 steps in a row whose rewards teach nothing, it is said."""


@dataclass(frozen=True, kw_only=True)
class Sync:
    """The synchronous schedule: each step trains on samples of the weights it starts from."""

    steps: int
    prompts_per_step: int

    def run(self, roles: OnlineRoles, session: Session) -> None:
        """Runs from where the session's newest checkpoint stands to ``steps``."""
        done, state = session.resume(roles.prepare.algorithm.initial_state())
        evaluate = partial(_evaluate, roles, session.progress)
        alike = 0
        with session.kept():
            roles.push_weights(done)
            session.record(evaluate)
            for step in range(done + 1, self.steps + 1):
                metrics, groups, state = self._step(roles, session, step, state)
                session.reached(step, state, metrics, groups)
                alike = alike + 1 if rewards_alike(metrics) else 0
                if alike == STEPS_ALIKE:
                    session.note(f"rewards have told no samples apart for {alike} steps (now {metrics['reward']:.4g})")
                session.record(evaluate)
                session.save_if_due(last=step == self.steps)

    def _step(
        self, roles: OnlineRoles, session: Session, step: int, state: dict[str, float]
    ) -> tuple[Metrics, list[Group], dict[str, float]]:
        clock = StepClock(session.progress, roles.memory)
        with clock("sampling", of=roles.samples, done=roles.ended):
            groups = roles.sample(roles.prompts(session.take(self.prompts_per_step)), step)
        with clock("scoring"):
            roles.judge(groups, step)
            prepared = roles.prepare(groups, state, step)
        with clock("training"):
            metrics = train(roles, prepared, step - 1, session.changing)
        with clock("sync"):
            metrics |= roles.push_weights(step)
        metrics |= rollout_metrics(groups) | clock.metrics()
        metrics["tokens_per_second"] = metrics["sampled_tokens"] / metrics["seconds"]
        return metrics, groups, prepared.state


def rewards_alike(metrics: Metrics) -> bool:
    """Whether the samples of each prompt got one reward (``equal_reward_groups``), or all samples of the step did."""
    return metrics.get("equal_reward_groups") == 1 or metrics["reward_min"] == metrics["reward_max"]


def _evaluate(roles: OnlineRoles, progress: Progress, step: int) -> Evaluation:
    with progress.phase("evaluating", of=roles.held_out, done=roles.ended):
        held_out = roles.evaluate(step)
    return held_out_metrics(held_out) if held_out else {}, held_out


def train(roles: OnlineRoles, prepared: Prepared, done: int, changing: Callable[[], None]) -> Metrics:
    """Every minibatch of every epoch through actor and critic; metrics are means over minibatches.

    ``done`` is how many steps of the run are behind; ``changing`` is called before parameters change.
    """
    collected: list[Metrics] = []
    trainers = {"actor": roles.actor} | ({"critic": roles.critic} if roles.critic is not None else {})
    for number, minibatch in enumerate(prepared):
        stepped = _step(trainers, minibatch, done + number / len(prepared), changing)
        of_critic = stepped.get("critic", {})
        metrics = stepped["actor"] | {
            name if name.startswith("value") else f"critic_{name}": v for name, v in of_critic.items()
        }
        collected.append(metrics)
    means = {name: sum(m[name] for m in collected) / len(collected) for name in collected[0]}
    return prepared.metrics | means | {"trained_tokens": float(prepared.batch.tokens)}


def _step(
    trainers: Mapping[str, Seat], minibatch: Batch, done: float, changing: Callable[[], None]
) -> dict[str, Metrics]:
    """Those that share a home go one after another, so that one gradient is alive there at a time."""
    metrics: dict[str, Metrics] = {}
    while waiting := {role: seat for role, seat in trainers.items() if role not in metrics}:
        first_of = {seat.home: role for role, seat in reversed(waiting.items())}
        turn = {role: seat for role, seat in waiting.items() if first_of[seat.home] == role}
        metrics |= call_all(turn, "forward_backward", minibatch)
        changing()
        for role, stepped in call_all(turn, "optim_step", done).items():
            metrics[role] |= stepped
    return metrics
