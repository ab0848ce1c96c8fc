"""The draws: their distribution, their truncation against transformers' warpers, their independence."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tandem.engines.live.draws import Wanted, draw, inverse_cdf, param_columns, uniform
from tandem.types import SamplingParams


def drawn(logits_BV: torch.Tensor, params: list[SamplingParams], seeds: list[int], counts: list[int]) -> torch.Tensor:
    """[3, B]: draw number ``counts[i]`` of the stream of ``seeds[i]``."""
    seed_B, drawn_B = torch.tensor(seeds), torch.tensor(counts)
    return draw(logits_BV, seed_B, param_columns(params), drawn_B, Wanted.of(params))


def draw_many(logits_V: torch.Tensor, params: SamplingParams, count: int) -> torch.Tensor:
    """[3, count]: half over seeds, half over positions of one stream each."""
    half = count // 2
    logits, same = logits_V.expand(half, -1), [params] * half
    first = drawn(logits, same, list(range(half)), [0] * half)
    return torch.cat([first, drawn(logits, same, [0] * half, list(range(1, half + 1)))], dim=1)


def splitmix_reference(seed: int, counter: int) -> float:
    """Plain Python integers: the published SplitMix64 finalizer on an unsigned 64-bit state."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    return (mix((mix((seed + gamma) % 2**64) + gamma * (counter + 1)) % 2**64) >> 11) / 2**53


def test_splitmix_is_the_published_generator() -> None:
    # First outputs of SplitMix64 from state 1234567, as on Rosetta Code and in Java's SplittableRandom.
    from tandem.engines.live import draws

    state = 1234567 + draws._GAMMA * torch.arange(1, 4)
    outputs = [z % 2**64 for z in draws._mix(state).tolist()]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_numbers_match_unsigned_integers_and_spread() -> None:
    seeds = [0, 1, 2**62 + 12345, 2**63 - 1]
    for counter in (0, 1, 1000):
        found = uniform(torch.tensor(seeds), torch.full((4,), counter))
        assert found.tolist() == [splitmix_reference(s, counter) for s in seeds]
    u = uniform(torch.arange(200).repeat_interleave(500), torch.arange(500).repeat(200))
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    # 100k draws: mean within 4 standard errors; neighbouring seeds and positions uncorrelated.
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * len(u))
    grid = u.view(200, 500)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 4 / math.sqrt(a.numel())


@pytest.mark.parametrize("vocabulary", [5, 128, 300])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_softmax(vocabulary: int, temperature: float) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 1.5
    count = 200_000
    tokens, behaviour, untruncated = draw_many(logits, SamplingParams(temperature=temperature), count)
    probability = torch.softmax(logits.double() / temperature, dim=0)
    observed = torch.bincount(tokens.long(), minlength=vocabulary)
    chi_square = float(((observed - count * probability) ** 2 / (count * probability)).sum())
    freedom = vocabulary - 1
    # The mean and spread of a chi-square; 5 standard deviations.
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)
    torch.testing.assert_close(untruncated, probability.log()[tokens.long()], atol=1e-5, rtol=0)
    assert torch.equal(behaviour, untruncated)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=1),
        SamplingParams(top_k=7, temperature=1.7),
        SamplingParams(top_k=1000),
        SamplingParams(top_p=0.3),
        SamplingParams(top_p=0.95, temperature=2.0),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=40, top_p=0.9, min_p=0.02, temperature=1.2),
    ],
)
def test_truncation_keeps_what_transformers_keeps(params: SamplingParams) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        logits = torch.randn(200, generator=generator) * 2
        warped = warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None].clone())[0].double()
        truth = torch.log_softmax(warped, dim=0)
        tokens, behaviour, untruncated = draw_many(logits, params, 20_000)
        index = tokens.long()
        torch.testing.assert_close(behaviour, truth[index], atol=1e-5, rtol=0)
        plain = torch.log_softmax(logits.double() / params.temperature, dim=0)
        torch.testing.assert_close(untruncated, plain[index], atol=1e-5, rtol=0)
        # Whatever is likely enough to be sure to appear in 20k draws has appeared.
        assert set((truth.exp() > 1e-3).nonzero().flatten().tolist()) <= set(index.tolist())


def test_rows_keep_their_own_parameters() -> None:
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.5, top_k=3),
        SamplingParams(top_p=0.5),
        SamplingParams(min_p=0.3, temperature=1.5),
    ]
    logits = torch.randn(5, 150, generator=torch.Generator().manual_seed(3))
    seeds = [11, 12, 13, 14, 15]
    rows, counts = [4, 2, 0, 1, 3], [5, 0, 9, 2, 2]
    found = drawn(logits[rows], [kinds[row] for row in rows], [seeds[row] for row in rows], counts)
    for place, row in enumerate(rows):
        expected = drawn(logits[row : row + 1], [kinds[row]], [seeds[row]], [counts[place]])
        torch.testing.assert_close(found[:, place], expected[:, 0], atol=1e-7, rtol=0)
    greedy = found[:, 3]
    assert int(greedy[0]) == int(logits[1].argmax())
    assert float(greedy[1]) == 0.0
    assert float(greedy[2]) == pytest.approx(float(torch.log_softmax(logits[1], 0).max()), abs=1e-6)


def test_the_tail_of_a_large_vocabulary_is_drawn_and_zeros_never_are() -> None:
    vocabulary = 150_001
    weight = torch.zeros(2, vocabulary)
    weight[:, 5] = 1.0
    weight[:, 100_000] = 1e-12
    weight[0, 149_990] = 3e-12
    # Mass left of each token, in float64, decides: just before and after each edge, and the very last number.
    low = torch.tensor([1 / (1 + 4e-12) - 1e-14, 1 / (1 + 1e-12) - 1e-14], dtype=torch.float64)
    high = torch.tensor([1 - 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    middle = torch.tensor([1 - 3.5e-12, 1 - 0.5e-12], dtype=torch.float64)
    assert inverse_cdf(weight, torch.zeros(2, dtype=torch.float64))[0].tolist() == [5, 5]
    assert inverse_cdf(weight, low)[0].tolist() == [5, 5]
    assert inverse_cdf(weight, middle)[0].tolist() == [100_000, 100_000]
    assert inverse_cdf(weight, high)[0].tolist() == [149_990, 100_000]


def test_many_draws_near_the_edges_hit_only_positive_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(2000, 777, generator=generator) * (torch.rand(2000, 777, generator=generator) < 0.05)
    weight[:, 3] = 0.1
    edges = weight.double().cumsum(1)
    pick = edges.gather(1, torch.randint(777, (2000, 1), generator=generator)).squeeze(1) / edges[:, -1]
    for u in (pick.clamp(max=1 - 2.0**-53), torch.rand(2000, dtype=torch.float64, generator=generator)):
        token, mass = inverse_cdf(weight, u)
        assert bool((weight.gather(1, token[:, None]) > 0).all())
        torch.testing.assert_close(mass, edges[:, -1], atol=1e-4, rtol=1e-6)


def test_logits_that_are_not_finite_come_back_as_nan() -> None:
    logits = torch.zeros(4, 200)
    logits[0, 3], logits[1, 4], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, 10:] = float("-inf")  # a mask is fine
    for params in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.9, top_k=5)):
        token, behaviour, untruncated = drawn(logits, [params] * 4, [1, 2, 3, 4], [0] * 4)
        assert untruncated.isnan().tolist() == [True, True, True, False]
        assert behaviour.isnan().tolist() == [True, True, True, False]
        assert int(token[3]) < 10
