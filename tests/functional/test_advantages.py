"""GAE, whitening and group baselines against OpenRLHF's functions, TRL's and the definitions."""

import math
import random

import pytest
import torch

from tandem.functional.advantages import centred, gae, group_normalised, length_adaptive_lambda, whiten
from tandem.functional.rounding import rounding_of


def packed(*lists, dtype=torch.float64):
    bounds = torch.tensor([0] + [len(x) for x in lists]).cumsum(0)
    return torch.tensor([x for xs in lists for x in xs], dtype=dtype), bounds


@pytest.mark.parametrize(
    ("gamma", "lam", "advantage", "return_"),
    [
        (1.0, 0.95, [0.345225, 1.2055, 0.69, 0.2], [0.845225, 1.0055, 0.99, 1.0]),
        (0.9, 0.8, [-0.1132224, 0.92608, 0.564, 0.2], [0.3867776, 0.72608, 0.864, 1.0]),
        (1.0, 1.0, [0.45, 1.25, 0.7, 0.2], [0.95, 1.05, 1.0, 1.0]),
    ],
)
def test_gae_golden_from_openrlhf(gamma, lam, advantage, return_):
    # OpenRLHF 0.11.2 experience_maker.get_advantages_and_returns in float64 on these values and rewards.
    value, bounds = packed([0.5, -0.2, 0.3, 0.8])
    reward, _ = packed([-0.1, 0.05, 0.0, 1.0])
    a, r = gae(reward, value, torch.ones(4, dtype=torch.bool), bounds, gamma, lam)
    assert a.tolist() == pytest.approx(advantage, abs=1e-12)
    assert r.tolist() == pytest.approx(return_, abs=1e-12)


def defined_gae(reward, value, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, straight from arXiv:1506.02438, eq. 16."""
    n = len(reward)
    delta = [reward[t] + gamma * (value[t + 1] if t + 1 < n else 0.0) - value[t] for t in range(n)]
    return [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)]


def random_segments(seed, segments=7):
    rng = random.Random(seed)
    out = []
    for _ in range(segments):
        n = rng.randint(1, 9)
        row = [(rng.gauss(0, 1), rng.gauss(0, 1), rng.random() < 0.6) for _ in range(n)]
        out.append(tuple(map(list, zip(*row, strict=True))))
    return out


@pytest.mark.parametrize("seed", range(5))
def test_gae_follows_its_definition_over_trainable_tokens_only(seed):
    segments = random_segments(seed)
    reward, bounds = packed(*(s[0] for s in segments))
    value, _ = packed(*(s[1] for s in segments))
    trainable = torch.tensor([m for s in segments for m in s[2]])
    a, r = gae(reward, value, trainable, bounds, 0.97, 0.9)
    expected = []
    for rewards, values, mask in segments:
        advantage = iter(
            defined_gae(
                [x for x, m in zip(rewards, mask, strict=True) if m],
                [v for v, m in zip(values, mask, strict=True) if m],
                0.97,
                0.9,
            )
        )
        expected += [next(advantage) if m else 0.0 for m in mask]
    assert a.tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(r, (a + value) * trainable)


def test_gae_over_tool_tokens_neither_decays_nor_bootstraps_from_zero():
    value, bounds = packed([0.5, 9.0, 9.0, -0.2, 0.3, 9.0, 0.8, 9.0])
    reward, _ = packed([-0.1, 5.0, 5.0, 0.05, 0.0, 5.0, 1.0, 5.0])
    trainable = torch.tensor([True, False, False, True, True, False, True, False])
    a, r = gae(reward, value, trainable, bounds, 0.9, 0.8)
    # The same numbers as without the tool tokens (OpenRLHF's golden above).
    assert a[trainable].tolist() == pytest.approx([-0.1132224, 0.92608, 0.564, 0.2], abs=1e-12)
    assert a[~trainable].tolist() == r[~trainable].tolist() == [0.0] * 4


def test_gae_does_not_depend_on_packing_bit_for_bit():
    segments = random_segments(3)

    def run(order):
        chosen = [segments[i] for i in order]
        reward, bounds = packed(*(s[0] for s in chosen), dtype=torch.float32)
        value, _ = packed(*(s[1] for s in chosen), dtype=torch.float32)
        trainable = torch.tensor([m for s in chosen for m in s[2]])
        a, _ = gae(reward, value, trainable, bounds, 0.97, 0.9)
        return dict(zip(order, a.split(bounds.diff().tolist()), strict=True))

    forwards, backwards = run(list(range(7))), run(list(reversed(range(7))))
    for i in range(7):
        assert torch.equal(forwards[i], backwards[i])
        assert torch.equal(forwards[i], run([i])[i])


def test_gae_with_nothing_trainable():
    value, bounds = packed([1.0, 2.0])
    a, r = gae(value, value, torch.zeros(2, dtype=torch.bool), bounds, 1.0, 1.0)
    assert a.tolist() == r.tolist() == [0.0, 0.0]


def test_whiten_golden_from_openrlhf():
    # OpenRLHF 0.11.2 models/utils.masked_normalize(x, mask, dim=1) in float64.
    x = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True])
    expected = [0.3905667329424717, -1.171700198827415, 0.0, 1.4320780207890627, -0.6509445549041194]
    assert whiten(x, mask, 0.0).tolist() == pytest.approx(expected, abs=1e-12)


def test_whiten_of_equal_numbers_one_number_and_none_is_zero():
    x = torch.tensor([3.0, 3.0, 7.0])
    assert whiten(x, torch.tensor([True, True, False]), 0.0).tolist() == [0.0, 0.0, 0.0]
    assert whiten(x, torch.tensor([True, False, False]), 0.0).tolist() == [0.0, 0.0, 0.0]
    assert whiten(x, torch.tensor([False, False, False]), 0.1).tolist() == [0.0, 0.0, 0.0]


def test_numbers_whose_squares_are_beyond_float32_are_whitened():
    """With a KL coefficient of 1e19, say: divided by an infinite spread they would be 0, and nothing would learn."""
    x, mask = torch.tensor([1e25, -1e25, 3e25, -3e25]), torch.ones(4, dtype=torch.bool)
    expected = (x.double() / 5**0.5 / 1e25).tolist()
    assert whiten(x, mask, rounding_of(x)).tolist() == pytest.approx(expected, rel=1e-6)


def test_whiten_leaves_what_is_below_the_floor_small():
    x, mask = torch.tensor([1e-3, -1e-3, 1e-3, -1e-3], dtype=torch.float64), torch.ones(4, dtype=torch.bool)
    assert whiten(x, mask, 1e-2).tolist() == pytest.approx([0.1, -0.1, 0.1, -0.1], abs=1e-12)
    assert whiten(x, mask, 1e-4).tolist() == pytest.approx([1.0, -1.0, 1.0, -1.0], abs=1e-12)


REWARDS = [1.0, 0.0, 0.0, 0.5, 2.0]


def test_group_goldens():
    # TRL 1.16 grpo_trainer: (r - mean) / (std + 1e-4), unbiased in float64.
    grpo = [0.35852573077925715, -0.8365600384849332, -0.8365600384849332, -0.239017153852838, 1.5536115000434474]
    assert group_normalised(REWARDS) == pytest.approx(grpo, abs=1e-12)
    assert centred(REWARDS) == pytest.approx([0.3, -0.7, -0.7, -0.2, 1.3], abs=1e-12)


@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_rewards_whose_squares_are_beyond_float64_are_normalised(scale):
    found = group_normalised([scale * reward for reward in REWARDS], eps=0.0)
    assert found == pytest.approx(group_normalised(REWARDS, eps=0.0), rel=1e-14)


@pytest.mark.parametrize("baseline", [centred, group_normalised])
@pytest.mark.parametrize("rewards", [[], [0.1], [0.1] * 3, [1 / 3] * 7])
def test_a_tied_group_teaches_nothing(baseline, rewards):
    # Exactly: 0.1 + 0.1 + 0.1 is not 0.3, and a std of 1e-17 must not blow that up.
    assert baseline(rewards) == [0.0] * len(rewards)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 2.0])
def test_length_adaptive_lambda_of_each_segment(alpha):
    """Against a loop in float64: lambda = 1 - 1 / (alpha l) (VAPO), over trainable tokens, none below 0."""
    segments = random_segments(1)
    reward, bounds = packed(*(s[0] for s in segments))
    value, _ = packed(*(s[1] for s in segments))
    trainable = torch.tensor([m for s in segments for m in s[2]])
    lam_S = length_adaptive_lambda(trainable, bounds, alpha)
    a, r = gae(reward, value, trainable, bounds, 1.0, lam_S)
    expected = []
    for (rewards, values, mask), lam in zip(segments, lam_S.tolist(), strict=True):
        length = sum(mask)
        if length:
            assert lam == pytest.approx(max(0.0, 1 - 1 / (alpha * length)), abs=1e-15)
        own = [[x for x, m in zip(xs, mask, strict=True) if m] for xs in (rewards, values)]
        advantage = iter(defined_gae(*own, 1.0, lam))
        expected += [next(advantage) if m else 0.0 for m in mask]
    assert a.tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(r, (a + value) * trainable)


def test_length_adaptive_coefficients_sum_to_the_length():
    """What the formula is made for: an answer's TD errors have weights that sum to nearly alpha l."""
    bounds = torch.tensor([0, 4000, 12000])
    lam_S = length_adaptive_lambda(torch.ones(12000, dtype=torch.bool), bounds, 0.05)
    for lam, length in zip(lam_S.tolist(), (4000, 8000), strict=True):
        assert sum(lam**i for i in range(length)) == pytest.approx(0.05 * length, rel=1e-6)


def test_what_rounding_can_make_is_of_one_token_however_many_there_are():
    """2^-8 of the root mean square of what is added up: 3 and 4 of sizes 1 + 2 and 1 + 3."""
    ones, others = torch.tensor([1.0, -1.0]), torch.tensor([-2.0, 3.0])
    expected = 2**-8 * math.sqrt((3**2 + 4**2) / 2)
    for times in (1, 5):
        assert rounding_of(ones.repeat(times), others.repeat(times)) == pytest.approx(expected, rel=1e-12)
    assert rounding_of(torch.zeros(0)) == 0.0
