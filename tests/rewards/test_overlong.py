"""Length costs what DAPO's equation 13 says, for every method on samples, and is kept apart from what was judged."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from tandem.assembly.configs.methods import read_config
from tandem.assembly.feeds import check_sampling
from tandem.errors import UserError
from tandem.methods.table import SAMPLES
from tandem.rewards.function import FunctionReward
from tandem.rewards.shaping import Overlong
from tandem.rollout.judging import Judge
from tandem.rollout.measure import rollout_metrics
from tandem.rollout.sampling import groups_of
from tandem.types import Completion, Prompt

KEYS = {"model": "m", "data": "d.jsonl", "reward": "r.py:f", "out": "o", "steps": 1}


@pytest.mark.parametrize("penalty", [1.0, 0.25])
def test_the_cost_is_eq_13(penalty):
    """L_max 20, L_cache 8: 0 up to 12 tokens, then (12 - length) / 8, and -1 above 20."""
    overlong = Overlong(length=20, buffer=8, penalty=penalty)
    for length in range(1, 25):
        wanted = 0.0 if length <= 20 - 8 else (20 - 8 - length) / 8 if length <= 20 else -1.0
        assert overlong.cost(length) == -penalty * wanted


def completion(tokens: int, stop: str = "eos") -> Completion:
    ids, zeros = [5] * tokens, [0.0] * tokens
    return Completion(token_ids=ids, behaviour_logp=zeros, untruncated_logp=zeros, stop=stop, text="x" * tokens)


def test_what_it_takes_off_is_kept_apart():
    def overlong(completions):
        return [None if len(c) == 3 else 2.0 for c in completions]

    prompt = Prompt(prompt_id="p", prompt="q", token_ids=(1, 2))
    groups = groups_of([prompt], [[completion(2), completion(6), completion(3), completion(8, "length")]])
    judge = Judge(
        rewards=(FunctionReward(overlong),),
        weights=(3.0,),
        missing_eos="replace",
        missing_eos_penalty=1.0,
        overlong=Overlong(length=8, buffer=4, penalty=0.5),
    )
    judge(groups)
    rollouts = groups[0].rollouts
    assert [r.reward for r in rollouts] == [6.0, 5.75, None, -1.5]
    assert [r.judged for r in rollouts] == [6.0, 6.0, None, -1.0]
    # A function of that name has another one.
    assert rollouts[1].reward_parts == {"overlong#2": 2.0, "overlong": -0.25}
    metrics = rollout_metrics(groups)
    assert metrics["overlong_share"] == 0.5
    assert metrics["reward/overlong"] == pytest.approx(-0.25)


@pytest.mark.parametrize("method", SAMPLES)
def test_every_method_on_samples_has_it(method):
    keys = KEYS | ({"teacher": "t"} if method == "opd" else {})
    section = read_config(method, **keys, overlong_buffer=8, max_new_tokens=20).reward
    assert section.overlong(20) == Overlong(20, 8, 1.0)
    section = read_config(method, **keys, overlong_buffer=8, overlong_length=16, overlong_penalty=0.5).reward
    assert section.overlong(20) == Overlong(16, 8, 0.5)


@pytest.mark.parametrize(("longest", "refused"), [(12, True), (13, False), (20, False)])
def test_a_punishment_that_no_sample_can_get_is_refused(longest, refused):
    """Of answers of more than 20 - 8 tokens."""
    config = read_config("grpo", **KEYS, overlong_length=20, overlong_buffer=8, max_new_tokens=longest)
    with (
        pytest.raises(UserError, match="max_new_tokens: samples longer than 12 tokens are to be punished")
        if refused
        else nullcontext()
    ):
        check_sampling(config)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"overlong_length": 20}, "overlong-length: has no effect without --overlong-buffer"),
        ({"overlong_penalty": 2.0}, "overlong-penalty: has no effect without --overlong-buffer"),
        ({"overlong_buffer": 0}, "overlong-buffer: expected 1 or more"),
        ({"overlong_buffer": 8, "overlong_penalty": 0.0}, "overlong-penalty: expected more than 0"),
    ],
)
def test_senseless_keys(keys, message):
    with pytest.raises(UserError, match=message):
        read_config("dapo", **KEYS, **keys)
    config = read_config("dapo", **KEYS, overlong_length=20, overlong_buffer=21)
    with pytest.raises(UserError, match="overlong_buffer: expected at most overlong_length, 20, got 21"):
        check_sampling(config)
