"""Samples through the rewards: judged one by one, a prompt's together, or a whole step's, each as early as can be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property

from tandem.errors import RunFailure, UserError
from tandem.futures import Begun, Done
from tandem.rewards.calling import Per
from tandem.rewards.combine import OVERLONG, combine, part_names
from tandem.rewards.function import added_up
from tandem.rewards.shaping import MissingEos, Overlong, shape_reward
from tandem.roles import BegunReward, Reward, RewardBatch
from tandem.seeds import derive_seed
from tandem.types import Completion, Group, Judgement, Prompt, Rollout

Called = tuple[int, int]
"""A call: the number of the reward among the rewards, and that of the sample that it judges, or ``GROUP``."""
GROUP = -1
"""The sample's number, -1, of a call that judges all samples of a prompt."""


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

    @cached_property
    def early(self) -> dict[int, BegunReward]:
        """The rewards that judge a sample or a group at a time, by their number."""
        return {
            number: reward
            for number, reward in enumerate(self.rewards)
            if isinstance(reward, BegunReward) and reward.per != "all"
        }

    def fill(self, groups: Seq[Group], seed: int | None = None) -> dict[str, int]:
        """Fills ``reward`` and ``reward_parts`` of every rollout that ended without an error.

        ``seed`` is for rewards that draw from the global random generators (``RewardBatch.seed``). Returns what the
        rewards have counted.
        """
        columns = frozenset(name for group in groups for name in group.prompt.columns)
        judgings = [
            Judging(self, group.prompt, len(group.rollouts), seeded=(seed, place), columns=columns)
            for place, group in enumerate(groups)
        ]
        return self.finish(groups, judgings, seed, columns)

    def finish(
        self, groups: Seq[Group], judgings: Seq[Judging], seed: int | None = None, columns: Iterable[str] = ()
    ) -> dict[str, int]:
        """``fill`` of groups that are being judged one by one: what judges all of them at once does so now."""
        for group, judging in zip(groups, judgings, strict=True):
            judging.finish(group.rollouts)
        found = [(group.prompt, r) for group in groups for r in group.rollouts if r.stop != "error"]
        if not found:
            return {}
        batch = replace(reward_batch(found, columns), seed=seed)
        # Those that judge elsewhere begin before one that keeps this process busy.
        late = {number: reward for number, reward in enumerate(self.rewards) if number not in self.early}
        begun = {number: reward.begin(batch) for number, reward in late.items() if isinstance(reward, BegunReward)}
        given = {n: [Judgement(reward.score(batch), {})] for n, reward in late.items() if n not in begun}
        given |= {number: [call.result()] for number, call in begun.items()}
        given |= {number: [one for judging in judgings for one in judging.judged(number)] for number in self.early}
        scores = [[score for one in given[number] for score in one.scores] for number in range(len(self.rewards))]
        totals, parts = combine(self.rewards, self.weights, scores, batch)
        for (_, rollout), total, part in zip(found, totals, parts, strict=True):
            rollout.reward_parts = part
            rollout.reward = shape_reward(
                total, rollout.stop, missing_eos=self.missing_eos, penalty=self.missing_eos_penalty
            )
            self._shorten(rollout)
        return {
            f"{name}/{what}": count
            for number, name in enumerate(part_names(self.rewards))
            for what, count in added_up(one.counts for one in given[number]).items()
        }

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

    def _shorten(self, rollout: Rollout) -> None:
        """Takes off its reward what its length costs, and keeps that among the parts."""
        if self.overlong is None or rollout.reward is None:
            return
        cost = self.overlong.cost(sum(rollout.trainable))
        rollout.judged, rollout.reward = rollout.reward, rollout.reward - cost
        rollout.reward_parts[OVERLONG] = -cost


class Judging:
    """A prompt's samples on their way through the rewards that judge a sample or a group at a time.

    Each of them is called as soon as what it judges has ended: when the samples are heard of, or in ``finish``. What a
    sample gets does not depend on when it ended: its call carries a seed of its own name.
    """

    def __init__(
        self,
        judge: Judge,
        prompt: Prompt,
        samples: int,
        *,
        seeded: tuple[int | None, int],
        columns: frozenset[str] = frozenset(),
        calls: list[Begun[Judgement]] | None = None,
        known: Mapping[Called, Judgement] | None = None,
    ) -> None:
        """``seeded``: what its calls' seeds are named after, a seed (None: they have none) and a place under it.

        ``columns``: see ``reward_batch``. Every call is added to ``calls``, where given. ``known`` were made before.
        """
        self.judge, self.prompt, self.samples, self.seeded, self.columns = judge, prompt, samples, seeded, columns
        self.calls: list[Begun[Judgement]] = [] if calls is None else calls
        self._ended: dict[int, Rollout] = {}
        """The samples that were heard of, by their number."""
        self._called: dict[Called, Begun[Judgement]] = {call: Done(given) for call, given in (known or {}).items()}

    def hear(self, sample: int, completion: Completion) -> None:
        """A sample has ended."""
        # It may have been drawn again, from the same seed, by an engine that was restarted.
        if not self.judge.early or sample in self._ended:
            return
        self._ended[sample] = rollout_of(self.prompt, sample, completion)
        self._begin("sample", sample, [self._ended[sample]])
        if len(self._ended) == self.samples:
            self._begin("group", GROUP, [self._ended[i] for i in sorted(self._ended)])

    def finish(self, rollouts: Seq[Rollout]) -> None:
        """All samples have ended: what was not heard of is judged from now on."""
        for sample, rollout in enumerate(rollouts):
            self._begin("sample", sample, [rollout])
        self._begin("group", GROUP, rollouts)

    @property
    def settled(self) -> bool:
        """Whether all calls made so far had been answered when somebody last looked."""
        return all(call.settled for call in self._called.values())

    @property
    def known(self) -> dict[Called, Judgement]:
        """The answers to the calls that have been answered. Raises what one of them raises."""
        return {called: call.result() for called, call in self._called.items() if call.settled}

    def judged(self, number: int) -> list[Judgement]:
        """What a reward gives the samples that ended without an error, in their order."""
        samples = sorted(sample for reward, sample in self._called if reward == number)
        return [self._called[number, sample].result() for sample in samples]

    def _begin(self, per: Per, sample: int, rollouts: Seq[Rollout]) -> None:
        """Calls the rewards that judge a sample, or a group, in one call, unless they have been called."""
        judged = [(self.prompt, rollout) for rollout in rollouts if rollout.stop != "error"]
        for number, reward in self.judge.early.items():
            if reward.per != per or not judged or (number, sample) in self._called:
                continue
            seed, place = self.seeded
            if seed is not None:
                seed = derive_seed(seed, place, *(() if sample == GROUP else (sample,)))
            batch = replace(reward_batch(judged, self.columns), seed=seed)
            self._called[number, sample] = reward.begin(batch)
            self.calls.append(self._called[number, sample])


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
    """Prompts and completions as reward functions expect them.

    ``columns`` are names that it has beside those of the prompts' own columns: None where a prompt lacks one.
    """
    names = {*columns, *(name for prompt, _ in pairs for name in prompt.columns)}
    return RewardBatch(
        prompts=[prompt.prompt for prompt, _ in pairs],
        completions=[prompt.answered(r.completion) for prompt, r in pairs],
        rollouts=[r for _, r in pairs],
        columns={name: [prompt.columns.get(name) for prompt, _ in pairs] for name in sorted(names)},
    )
