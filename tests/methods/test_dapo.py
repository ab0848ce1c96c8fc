"""DAPO against its paper's equations written as loops."""

import math
import statistics
from dataclasses import replace

import pytest
from helpers.sampled_step import make_step
from test_grpo import group

from tandem.config import with_keys
from tandem.data.packing import stamp_weights
from tandem.errors import UserError
from tandem.methods.dapo import DAPO
from tandem.rewards.function import FunctionReward
from tandem.rewards.shaping import Overlong
from tandem.rollout.judging import Judge


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ((1.0, 0.0), True),
        ((1.0, 1.0, 0.9999999), True),
        ((1.0, 0.0, None, "error"), True),
        ((1.0, 1.0, 1.0), False),
        ((0.0, -0.0), False),
        ((0.1 + 0.2, 0.1 + 0.2), False),
        ((1.0, None), False),
        ((1.0, "error"), False),
        ((None, None), False),
        ((), False),
    ],
)
def test_keeps_groups_that_tell_good_from_bad(rewards, kept):
    assert DAPO().keep(group(*rewards)) is kept


def answer(length, reward, tool=0):
    """A sample of ``length`` tokens, with tokens of a tool in front of the last one."""
    mask = [True] * (length - 1) + [False] * tool + [True]
    zeros = [0.0] * (1 + len(mask))
    return replace(
        group(reward).rollouts[0],
        token_ids=[0] * len(zeros), trainable=[False, *mask], behaviour_logp=zeros, untruncated_logp=zeros,
    )  # fmt: skip


def test_what_is_kept_is_decided_before_length_counts():
    """As in the paper, whose eq. 11 asks for right and wrong answers."""
    groups = []
    for rewards in ([1.0, 1.0], [0.0, 1.0]):
        groups.append(replace(group(), rollouts=[answer(5, None), answer(20, None)]))
        reward = FunctionReward(lambda completions, rewards=rewards: rewards)
        Judge(rewards=(reward,), weights=(1.0,), overlong=Overlong(20, 8, 1.0)).fill(groups[-1:])
    assert [g.rewards for g in groups] == [[1.0, 0.0], [0.0, 0.0]]
    assert [DAPO().keep(g) for g in groups] == [False, True]
    assert DAPO().advantages(groups[1]) == [0.0, 0.0]
    clipped = replace(group(), rollouts=[answer(5, 3.0), answer(5, 20.0)])
    assert [with_keys(DAPO(), reward_clip=limit).keep(clipped) for limit in (None, 5.0, 2.0)] == [True, True, False]


@pytest.mark.parametrize("knobs", [{}, {"dual_clip": 1.1}])
def test_loss_is_the_papers(knobs):
    """Eq. 8 and 9 as loops; a step with groups of ratios beyond both bounds."""
    step, dapo = make_step(3), with_keys(DAPO(), **knobs)
    estimate = dapo.estimate(step.groups, step.batch(), dapo.initial_state())
    batch = stamp_weights(estimate.batch, dapo.aggregation)
    out = step.outputs(batch)
    out = replace(out, logp_T=batch.proximal_logp_T + 3 * (out.logp_T - batch.proximal_logp_T))
    found = (dapo.loss(out, batch).loss_T * batch.weight_T).sum().item()

    tokens, ratios, s = [], [], 0
    for g in step.groups:
        rewards = [r.reward for r in g.rollouts]
        mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
        for r, reward in zip(g.rollouts, rewards, strict=True):
            advantage = (reward - mean) / (std + 1e-4)
            for t, trainable in enumerate(r.trainable):
                if not trainable:
                    continue
                at = batch.bounds[s].item() + t
                ratios.append(math.exp(out.logp_T[at].item() - batch.proximal_logp_T[at].item()))
                surrogate = min(ratios[-1] * advantage, min(max(ratios[-1], 0.8), 1.28) * advantage)
                if "dual_clip" in knobs and advantage < 0:
                    surrogate = max(surrogate, 1.1 * advantage)
                tokens.append(-surrogate)
            s += 1
    assert min(ratios) < 0.8
    assert sum(1.2 < ratio < 1.28 for ratio in ratios) > 0
    assert max(ratios) > 1.28
    # Advantages and weights are float32.
    assert found == pytest.approx(sum(tokens) / len(tokens), abs=1e-6)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"clip_low": 2}, "clip_low: expected from 0 to 1, got 2"),
    ],
)  # fmt: skip
def test_senseless_knobs(knobs, message):
    with pytest.raises(UserError, match=message):
        with_keys(DAPO(), **knobs)


def test_no_model_beside_the_policy():
    assert DAPO().needs() == ()
