"""Samples through the rewards: judged one by one, a prompt's together, or a whole step's, each as early as can be."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from tandem.errors import RunFailure, UserError
from tandem.futures import Future
from tandem.rewards.combine import OVERLONG, combine, part_names
from tandem.rewards.shaping import MissingEos, Overlong, shape_reward
from tandem.roles import BegunReward, Reward, RewardBatch
from tandem.seeds import derive_seed
from tandem.types import Completion, Ended, Group, Prompt, Rollout

Scores = list[float | None]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The rewards of a run: functions and models, their weights, and what a missing end, and length, cost.

    Without any reward every sample gets 0, which says nothing of it.
    """

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    missing_eos: MissingEos = "none"
    missing_eos_penalty: float = 0.0
    overlong: Overlong | None = None
    """What length costs, after all that."""

    def __call__(self, groups: Seq[Group], seed: int | None = None) -> None:
        """``fill`` and ``check``."""
        self.fill(groups, seed)
        self.check(groups)

    def begin(
        self, prompts: Seq[Prompt], samples_per_prompt: int, seed: int | None = None, columns: Iterable[str] = ()
    ) -> Judging:
        """The judging of samples that are still to be drawn. ``columns``: see ``reward_batch``."""
        return Judging(self, prompts, samples_per_prompt, seed, frozenset(columns))

    def fill(self, groups: Seq[Group], seed: int | None = None) -> dict[str, int]:
        """Fills ``reward`` and ``reward_parts`` of every rollout that ended without an error.

        ``seed`` is for rewards that draw from the global random generators (``RewardBatch.seed``). Returns what the
        rewards have counted.
        """
        columns = {name for group in groups for name in group.prompt.columns}
        return self.begin([group.prompt for group in groups], 0, seed, columns).finish(groups)

    def check(self, groups: Seq[Group]) -> None:
        """Raises UserError where no sample of filled groups has got a reward, RunFailure where each of them failed."""
        rollouts = [r for group in groups for r in group.rollouts]
        drawn = [r for r in rollouts if r.stop != "error"]
        if not drawn:
            error = next((r.error for r in rollouts if r.error), "the engine does not say why")
            raise RunFailure(f"no sample could be drawn: {error}")
        if not any(r.usable for r in drawn):
            names = " and ".join(repr(reward.name) for reward in self.rewards)
            raise UserError(
                f"reward {names} left out (None) every one of {len(drawn)} samples, so nothing can be learned; "
                "None is for a sample that cannot be judged"
            )


class Judging:
    """Some prompts' samples on their way through the rewards.

    Of what the engine tells (``watch``), rewards that judge a sample or a group at a time get each as soon as it is
    there; what they were not told of, and the rewards that judge all at once, follow in ``finish``. What a sample gets
    does not depend on when it ended: its call carries a seed of its own name.
    """

    def __init__(
        self, judge: Judge, prompts: Seq[Prompt], samples_per_prompt: int, seed: int | None, columns: frozenset[str]
    ) -> None:
        self.judge, self.prompts, self.samples_per_prompt = judge, prompts, samples_per_prompt
        self.seed, self.columns = seed, columns
        self._ended: list[dict[int, Rollout]] = [{} for _ in prompts]
        """By prompt, the samples that were told of, by their number."""
        self._calls: dict[tuple[int, int, int | None], Future[Scores]] = {}
        """By the reward's number, the prompt's, and the sample's (None: all of the prompt)."""
        self._early = {
            number: reward
            for number, reward in enumerate(judge.rewards)
            if isinstance(reward, BegunReward) and reward.per != "all"
        }

    def watch(self, ended: Seq[Ended]) -> None:
        """Samples have ended, or time has passed (``tandem.types.Watch``)."""
        if not self._early:
            return
        for group, sample, completion in ended:
            rollouts = self._ended[group]
            if sample in rollouts:
                continue  # drawn again by an engine that was restarted, from the same seed
            rollouts[sample] = rollout_of(self.prompts[group], sample, completion)
            self._begin(group, sample, rollouts[sample])
            if len(rollouts) == self.samples_per_prompt:
                self._begin_group(group, [rollouts[i] for i in sorted(rollouts)])
        if self._calls:
            # Answers are taken, and what waits to be sent goes out, when one of the calls is asked.
            next(reversed(self._calls.values())).done()

    def finish(self, groups: Seq[Group]) -> dict[str, int]:
        """Fills ``reward`` and ``reward_parts`` of the groups' rollouts. Returns what the rewards have counted."""
        found = [(i, j, r) for i, group in enumerate(groups) for j, r in enumerate(group.rollouts) if r.stop != "error"]
        if not found:
            return {}
        for i, group in enumerate(groups):
            for j, rollout in enumerate(group.rollouts):
                self._begin(i, j, rollout)
            self._begin_group(i, group.rollouts)
        batch = replace(reward_batch([(self.prompts[i], r) for i, _, r in found], self.columns), seed=self.seed)
        rewards = self.judge.rewards
        # Those that judge elsewhere begin before one that keeps this process busy.
        begun = {
            number: reward.begin(batch)
            for number, reward in enumerate(rewards)
            if isinstance(reward, BegunReward) and number not in self._early
        }
        here = {number: rewards[number].score(batch) for number in range(len(rewards)) if not self._elsewhere(number)}
        scores = [
            here[number]
            if number in here
            else begun[number].result()
            if number in begun
            else self._collect(number, [(i, j) for i, j, _ in found])
            for number in range(len(rewards))
        ]
        totals, parts = combine(rewards, self.judge.weights, scores, batch)
        for (_, _, rollout), total, part in zip(found, totals, parts, strict=True):
            rollout.reward_parts = part
            rollout.reward = shape_reward(
                total, rollout.stop, missing_eos=self.judge.missing_eos, penalty=self.judge.missing_eos_penalty
            )
            self._shorten(rollout)
        return {
            f"{name}/{what}": count
            for name, reward in zip(part_names(rewards), rewards, strict=True)
            if isinstance(reward, BegunReward)
            for what, count in reward.counted().items()
        }

    def _shorten(self, rollout: Rollout) -> None:
        """Takes off its reward what its length costs, and keeps that among the parts."""
        if self.judge.overlong is None or rollout.reward is None:
            return
        cost = self.judge.overlong.cost(sum(rollout.trainable))
        rollout.judged, rollout.reward = rollout.reward, rollout.reward - cost
        rollout.reward_parts[OVERLONG] = -cost

    def _elsewhere(self, number: int) -> bool:
        return isinstance(self.judge.rewards[number], BegunReward)

    def _begin(self, group: int, sample: int, rollout: Rollout) -> None:
        for number, reward in self._early.items():
            if reward.per == "sample" and rollout.stop != "error" and (number, group, sample) not in self._calls:
                self._calls[number, group, sample] = reward.begin(self._batch(group, [rollout], sample))

    def _begin_group(self, group: int, rollouts: Seq[Rollout]) -> None:
        judged = [rollout for rollout in rollouts if rollout.stop != "error"]
        for number, reward in self._early.items():
            if reward.per == "group" and judged and (number, group, None) not in self._calls:
                self._calls[number, group, None] = reward.begin(self._batch(group, judged))

    def _batch(self, group: int, rollouts: Seq[Rollout], *sample: int) -> RewardBatch:
        batch = reward_batch([(self.prompts[group], rollout) for rollout in rollouts], self.columns)
        return batch if self.seed is None else replace(batch, seed=derive_seed(self.seed, group, *sample))

    def _collect(self, number: int, samples: Seq[tuple[int, int]]) -> Scores:
        """A reward's scores in the order of the samples."""
        if self._early[number].per == "sample":
            return [self._calls[number, group, sample].result()[0] for group, sample in samples]
        groups = dict.fromkeys(group for group, _ in samples)
        return [score for group in groups for score in self._calls[number, group, None].result()]


def rollout_of(prompt: Prompt, sample_index: int, completion: Completion) -> Rollout:
    """A prompt and what was sampled after it, not judged yet."""
    start = len(prompt.token_ids)
    padding = [0.0] * start
    return Rollout(
        prompt_id=prompt.prompt_id,
        sample_index=sample_index,
        token_ids=[*prompt.token_ids, *completion.token_ids],
        prompt_length=start,
        trainable=[False] * start + [True] * len(completion.token_ids),
        behaviour_logp=padding + completion.behaviour_logp,
        untruncated_logp=padding + completion.untruncated_logp,
        stop=completion.stop,
        completion=completion.text,
        versions=completion.versions,
        error=completion.error,
    )


def reward_batch(pairs: Seq[tuple[Prompt, Rollout]], columns: Iterable[str] = ()) -> RewardBatch:
    """Prompts and completions as reward functions expect them: chat prompts get chat completions (TRL).

    ``columns`` are names that it has beside those of the prompts' own columns: None where a prompt lacks one.
    """
    names = {*columns, *(name for prompt, _ in pairs for name in prompt.columns)}
    return RewardBatch(
        prompts=[prompt.prompt for prompt, _ in pairs],
        completions=[
            r.completion if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": r.completion}]
            for prompt, r in pairs
        ],
        rollouts=[r for _, r in pairs],
        columns={name: [prompt.columns.get(name) for prompt, _ in pairs] for name in sorted(names)},
    )
