"""DAPO against its paper's equations written as loops."""

import math
import statistics
from contextlib import nullcontext
from dataclasses import replace

import pytest
from helpers.sampled_step import make_step
from test_grpo import group

from tandem.assembly.configs import read_config
from tandem.assembly.feeds import check_sampling
from tandem.config import with_keys
from tandem.data.packing import stamp_weights
from tandem.errors import UserError
from tandem.methods.dapo import DAPO

OVERLONG = {"overlong_length": 20, "overlong_buffer": 8}


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


@pytest.mark.parametrize("penalty", [1.0, 0.25])
def test_punishment_is_eq_13(penalty):
    """L_max 20, L_cache 8: 0 up to 12 tokens, then (12 - length) / 8, and -1 above 20."""
    method = with_keys(DAPO(), **OVERLONG, overlong_penalty=penalty)
    for length in range(1, 25):
        wanted = 0.0 if length <= 20 - 8 else (20 - 8 - length) / 8 if length <= 20 else -1.0
        assert method.punishment(answer(length, 1.0)) == -penalty * wanted
        assert method.punishment(answer(length, 1.0, tool=9)) == -penalty * wanted
        assert DAPO().punishment(answer(length, 1.0)) == 0.0


def test_what_is_kept_is_decided_before_length_counts():
    """As in the paper, whose eq. 11 asks for right and wrong answers."""
    alike = replace(group(), rollouts=[answer(5, 1.0), answer(20, 1.0)])
    evened = replace(group(), rollouts=[answer(5, 0.0), answer(20, 1.0)])
    assert [with_keys(DAPO(), **OVERLONG).keep(g) for g in (alike, evened)] == [False, True]
    assert with_keys(DAPO(), **OVERLONG).advantages(evened) == [0.0, 0.0]
    clipped = replace(group(), rollouts=[answer(5, 3.0), answer(5, 20.0)])
    assert [with_keys(DAPO(), reward_clip=limit).keep(clipped) for limit in (None, 5.0, 2.0)] == [True, True, False]


@pytest.mark.parametrize("knobs", [{}, {"overlong_length": 8, "overlong_buffer": 6}, {"dual_clip": 1.1}])
def test_loss_is_the_papers(knobs):
    """Eq. 8, 9 and 13 as loops; a step with groups of ratios beyond both bounds."""
    step, dapo = make_step(3), with_keys(DAPO(), **knobs)
    estimate = dapo.estimate(step.groups, step.batch(), dapo.initial_state())
    batch = stamp_weights(estimate.batch, dapo.aggregation)
    out = step.outputs(batch)
    out = replace(out, logp_T=batch.proximal_logp_T + 3 * (out.logp_T - batch.proximal_logp_T))
    found = (dapo.loss(out, batch).loss_T * batch.weight_T).sum().item()

    tokens, ratios, punished, s = [], [], [], 0
    for g in step.groups:
        rewards = []
        for r in g.rollouts:
            length = sum(r.trainable)
            cost = min(max(length - (8 - 6), 0) / 6, 1.0) if "overlong_length" in knobs else 0.0
            punished.append(cost > 0)
            rewards.append(r.reward - cost)
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
    if "overlong_length" in knobs:
        assert estimate.metrics["overlong_share"] == statistics.fmean(punished)
        assert 0 < estimate.metrics["overlong_share"] < 1


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"overlong_length": 20}, "overlong_buffer: expected from 1 to overlong_length, 20, got None"),
        ({"overlong_length": 20, "overlong_buffer": 21}, "overlong_buffer: expected from 1 to overlong_length, 20"),
        ({"overlong_length": 20, "overlong_buffer": 0}, "overlong_buffer: expected 1 or more, got 0"),
        ({"overlong_length": 0, "overlong_buffer": 1}, "overlong_length: expected 1 or more, got 0"),
        ({**OVERLONG, "overlong_penalty": 0.0}, "overlong_penalty: expected more than 0, got 0.0"),
        ({"clip_low": 2}, "clip_low: expected from 0 to 1, got 2"),
    ],
)  # fmt: skip
def test_senseless_knobs(knobs, message):
    with pytest.raises(UserError, match=message):
        with_keys(DAPO(), **knobs)


@pytest.mark.parametrize(("longest", "refused"), [(12, True), (13, False), (20, False)])
def test_a_punishment_that_no_sample_can_reach_is_refused(longest, refused):
    """Of answers of more than 20 - 8 tokens."""
    keys = {"model": "m", "data": "d.jsonl", "reward": "r.py:f", "out": "o", "steps": 1} | OVERLONG
    config = read_config("dapo", **keys, max_new_tokens=longest)
    with (
        pytest.raises(UserError, match="max_new_tokens: DAPO is set to treat samples longer than 12 tokens apart")
        if refused
        else nullcontext()
    ):
        check_sampling(config)


def test_no_model_beside_the_policy():
    assert DAPO().needs() == ()
