"""Several rewards make one number, and an unfinished completion costs what was asked for."""

import math
import re
from dataclasses import dataclass

import pytest

from tandem.errors import UserError
from tandem.rewards.combine import combine
from tandem.rewards.shaping import shape_reward
from tandem.roles import RewardBatch
from tandem.types import Rollout


@dataclass
class Fixed:
    name: str
    scores: list

    def score(self, batch):
        return self.scores


def judge(rewards, weights, batch):
    return combine(rewards, weights, [reward.score(batch) for reward in rewards], batch)


BATCH = RewardBatch(prompts=[""] * 3, completions=[""] * 3, rollouts=[])


def test_weighted_sum_skips_none_and_keeps_the_parts() -> None:
    rewards = [Fixed("a", [1.0, None, None]), Fixed("b", [2.0, 3.0, None])]
    totals, parts = judge(rewards, [0.5, 2.0], BATCH)
    assert totals == [4.5, 6.0, None]
    assert parts == [{"a": 1.0, "b": 2.0}, {"b": 3.0}, {}]


def test_without_rewards_every_total_is_0() -> None:
    assert judge([], [], BATCH) == ([0.0] * 3, [{}] * 3)


def test_rewards_of_one_name_are_both_counted() -> None:
    totals, parts = judge([Fixed("a", [1.0] * 3), Fixed("a", [2.0] * 3)], [1.0, 1.0], BATCH)
    assert totals == [3.0] * 3
    assert parts[0] == {"a": 1.0, "a#2": 2.0}


ROLLOUTS = [
    Rollout(
        prompt_id=f"p{i}", sample_index=0, token_ids=[0], prompt_length=1, trainable=[False], behaviour_logp=[0.0],
        untruncated_logp=[0.0], stop="eos",
    )
    for i in range(2)
]  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "weights", "named"),
    [
        ([[0.0, 1e308], [0.0, 0.0]], [1.0, 1.0], "reward 'a' is 1e+308 for sample 1 (prompt p1): completion 'y'"),
        ([[0.0, 0.0], [math.nan, 0.0]], [1.0, 1.0], "reward 'b' is nan for sample 0 (prompt p0): completion 'x'"),
        ([[1.0, 1e9], [0.0, None]], [1e300, 1.0], "reward 'weighted sum' is 1e+300 for sample 0"),
    ],
)
def test_what_would_overflow_is_refused_by_name(scores, weights, named) -> None:
    batch = RewardBatch(prompts=[""] * 2, completions=["x", "y"], rollouts=ROLLOUTS)
    with pytest.raises(UserError, match=re.escape(named)):
        judge([Fixed("a", scores[0]), Fixed("b", scores[1])], weights, batch)


def test_counts_must_fit() -> None:
    with pytest.raises(ValueError, match="zip"):
        judge([Fixed("a", [1.0] * 3)], [1.0, 1.0], BATCH)
    with pytest.raises(ValueError, match="zip"):
        judge([Fixed("a", [1.0] * 2)], [1.0], BATCH)


@pytest.mark.parametrize(
    ("missing_eos", "stop", "expected"),
    [
        ("none", "length", 2.0),
        ("replace", "length", -1.0),
        ("subtract", "length", 1.0),
        ("replace", "eos", 2.0),
        ("subtract", "stop_string", 2.0),
    ],
)
def test_missing_eos(missing_eos, stop, expected) -> None:
    assert shape_reward(2.0, stop, missing_eos=missing_eos, penalty=1.0) == expected
    assert shape_reward(None, stop, missing_eos=missing_eos, penalty=1.0) is None


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="'ignore'"):
        shape_reward(1.0, "length", missing_eos="ignore", penalty=0.0)  # type: ignore[arg-type]
