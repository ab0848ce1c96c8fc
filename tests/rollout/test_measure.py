"""Numbers of held-out samples: pass@k against every choice of k samples, standard errors against plain statistics."""

import itertools
import math
import statistics
from dataclasses import replace

import pytest

from tandem.rollout.measure import (
    clustered_error,
    held_out_metrics,
    ks,
    lag_metrics,
    pass_at,
    pass_at_k,
    rollout_metrics,
)
from tandem.types import Group, Prompt, Rollout


def group(*rewards: float | None, length: int = 3) -> Group:
    def rollout(i, reward):
        return Rollout(
            prompt_id="p", sample_index=i, token_ids=[1] * (1 + length), prompt_length=1,
            trainable=[False] + [True] * length, behaviour_logp=[0.0] * (1 + length),
            untruncated_logp=[0.0] * (1 + length), stop="eos", reward=reward,
        )  # fmt: skip

    prompt = Prompt(prompt_id="p", prompt="", token_ids=(1,))
    return Group(prompt=prompt, rollouts=[rollout(i, reward) for i, reward in enumerate(rewards)])


@pytest.mark.parametrize(("right", "samples", "k"), [(0, 5, 2), (1, 5, 1), (2, 5, 3), (3, 5, 3), (5, 5, 1), (4, 9, 4)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(right, samples, k):
    choices = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(right, samples, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-15)


def test_pass_at_k_of_many_samples_is_the_product_of_the_paper():
    """1 - prod(1 - k / j for j from n - c + 1 to n), as HumanEval's own code computes it."""
    expected = 1 - math.prod(1 - 100 / j for j in range(4000 - 7 + 1, 4000 + 1))
    assert pass_at_k(7, 4000, 100) == pytest.approx(expected, rel=1e-12)


def test_a_success_is_a_reward_at_the_threshold_or_above():
    found = pass_at([[1.0, 0.5, 0.0, 0.0], [0.4, 0.49, 0.0, 0.1]], 0.5, 4)
    each = {1: (0.5, 0.0), 2: (1 - 1 / 6, 0.0), 4: (1.0, 0.0)}
    for k, values in each.items():
        assert found[f"pass@{k}"] == pytest.approx(statistics.mean(values))
        assert found[f"pass@{k}_se"] == pytest.approx(statistics.stdev(values) / math.sqrt(2))
    assert len(found) == 6


def test_a_prompt_with_too_few_judged_samples_is_left_out_of_pass_at_k_alone():
    found = pass_at([[1.0, 1.0, 0.0], [0.0]], 1.0, 3)
    assert found["pass@1"] == pytest.approx((2 / 3 + 0) / 2)
    assert (found["pass@2"], found["pass@3"]) == (1.0, 1.0)
    assert "pass@2_se" not in found


@pytest.mark.parametrize(("samples", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_the_ks_are_powers_of_two_and_the_number_of_samples(samples, expected):
    assert ks(samples) == expected


def test_the_error_of_equal_clusters_is_that_of_their_means():
    values = [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.5, 1.0], [0.2, 0.1, 0.0]]
    means = [statistics.mean(of_prompt) for of_prompt in values]
    assert clustered_error(values) == pytest.approx(statistics.stdev(means) / 2, abs=1e-15)
    alone = [[x] for of_prompt in values for x in of_prompt]
    assert clustered_error(alone) == pytest.approx(statistics.stdev([x for (x,) in alone]) / math.sqrt(12), abs=1e-15)
    assert clustered_error(values) > clustered_error(alone)


def test_copies_of_a_sample_do_not_make_the_error_smaller():
    once = [[0.3], [1.0], [0.1], [0.9]]
    assert clustered_error([of_prompt * 50 for of_prompt in once]) == pytest.approx(clustered_error(once), rel=1e-12)


def test_held_out_metrics_are_of_all_samples_and_say_how_many_were_left_out():
    found = held_out_metrics([group(1.0, 0.0), group(None, 1.0), group(None, None)], success=1.0)
    assert found["reward"] == pytest.approx(2 / 3)
    assert found["reward_se"] == pytest.approx(clustered_error([[1.0, 0.0], [1.0]]))
    assert (found["left_out"], found["response_length"], found["eos_share"]) == (3, 3, 1)
    assert found["pass@1"] == pytest.approx(0.75)
    assert found["pass@2"] == 1.0
    assert not {"sampled_tokens", "pass@2_se"} & found.keys()


def test_rewards_are_told_of_over_all_usable_samples_of_the_step():
    """Not as means over prompts, and not of samples that are left out; the spread is that of these numbers alone."""
    found = rollout_metrics([group(3.0, 0.0, 1.5), group(None, 1.0)])
    rewards = [3.0, 0.0, 1.5, 1.0]
    assert found["reward"] == pytest.approx(statistics.fmean(rewards))
    assert found["reward_std"] == pytest.approx(statistics.pstdev(rewards))
    assert (found["reward_min"], found["reward_max"], found["left_out"]) == (0.0, 3.0, 1)


def test_a_sample_that_failed_has_not_ended_by_itself():
    found = held_out_metrics([group(1.0, 0.0), Group(prompt=(g := group(None, 1.0)).prompt, rollouts=[
        replace(g.rollouts[0], stop="error"), replace(g.rollouts[1], stop="stop_string")])])  # fmt: skip
    assert (found["left_out"], found["eos_share"]) == (1, 0.75)


def test_of_one_prompt_nothing_is_said_of_how_far_prompts_differ():
    found = held_out_metrics([group(1.0, 0.0)], success=1.0)
    assert not [name for name in found if name.endswith("_se")]


def test_samples_that_nothing_judges_have_no_metric_of_rewards():
    found = held_out_metrics([group(0.0), group(0.0)], judged=False)
    assert {name for name in found if name.startswith(("reward", "pass"))} == set()


def test_lag_is_that_of_each_token_of_usable_samples():
    """A loop over tokens. Of optimizer step 9; a sample of no tokens has no lag, one that failed does not count."""
    versions = [[[(4, 2), (6, 1), (9, 5)], [(8, 3)]], [[(9, 0)], [(1, 4)], [(6, 2), (7, 1)]]]
    groups = [
        replace(made, rollouts=[replace(r, versions=v) for r, v in zip(made.rollouts, of_group, strict=True)])
        for made, of_group in zip([group(1.0, 0.0), group(1.0, None, 0.5)], versions, strict=True)
    ]
    lags = [9 - v for of_group, made in zip(versions, groups, strict=True)
            for of_sample, r in zip(of_group, made.rollouts, strict=True) if r.usable
            for v, tokens in of_sample for _ in range(tokens)]  # fmt: skip
    assert len(lags) == 14
    expected = {"lag_mean": statistics.fmean(lags), "lag_max": 5.0}
    expected |= {f"lag_share_{lag}": lags.count(lag) / 14 for lag in set(lags)}
    assert lag_metrics(groups, 9) == pytest.approx(expected)
    assert lag_metrics([], 9) == {"lag_mean": 0.0, "lag_max": 0.0}
