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

from tandem.data.order import Order
from tandem.engines.live.draws import Wanted, draw, param_columns, race, stream, waiting
from tandem.kernels.draw import block_size
from tandem.seeds import DRAWS, derive_seed
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


def mix(z: int) -> int:
    """Plain Python integers: the published SplitMix64 finalizer on an unsigned 64-bit state."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


GAMMA = 0x9E3779B97F4A7C15


def waiting_reference(seed: int, counter: int, number: int) -> float:
    start = mix((mix((seed + GAMMA) % 2**64) + GAMMA * (counter + 1)) % 2**64)
    return -math.log(((mix((start + GAMMA * (number + 1)) % 2**64) >> 12) + 0.5) / 2**52)


def test_splitmix_is_the_published_generator() -> None:
    # First outputs of SplitMix64 from state 1234567, as on Rosetta Code and in Java's SplittableRandom.
    from tandem.engines.live import draws

    outputs = [z % 2**64 for z in draws._mix_(1234567 + draws._GAMMA * torch.arange(1, 4)).tolist()]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_draw_is_a_race_of_blocks_and_then_inside_the_one_that_won() -> None:
    """The same winners as plain Python's, of seeds at both ends, whatever is drawn beside."""
    vocabulary = 200
    size = block_size(vocabulary)
    seeds, counters = [0, 1, 2**62 + 12345, 2**63 - 1, -(2**63)], [0, 1, 1000, 7, 2**40]
    weight = torch.rand(5, vocabulary, generator=torch.Generator().manual_seed(0))
    found, mass = race(weight, stream(torch.tensor(seeds), torch.tensor(counters)))
    for row, (seed, counter) in enumerate(zip(seeds, counters, strict=True)):
        w = weight[row].double().tolist()
        blocks = [w[start : start + size] for start in range(0, vocabulary, size)]
        times = [waiting_reference(seed, counter, n) / sum(b) for n, b in enumerate(blocks)]
        block = times.index(min(times))
        inside = [waiting_reference(seed, counter, len(blocks) + i) / x for i, x in enumerate(blocks[block])]
        assert int(found[row]) == block * size + inside.index(min(inside))
        assert float(mass[row]) == pytest.approx(sum(w), rel=1e-6)


def test_what_a_seed_gives_is_of_a_version() -> None:
    """Whoever has to write other numbers here raises ``DRAWS``: a run that began with these cannot go on."""
    assert DRAWS == 3
    seeds = torch.tensor([derive_seed(0, "sample", "prompt-17", number) for number in range(4)])
    weight = (1 + torch.arange(200) % 7).float().expand(4, -1)
    assert race(weight, stream(seeds, torch.arange(4)))[0].tolist() == [119, 90, 39, 180]
    assert Order(10, seed=0).take(range(6)) == [1, 9, 4, 7, 2, 0]


def test_waiting_times_are_exponential_and_spread() -> None:
    streams = stream(torch.arange(200), torch.zeros(200, dtype=torch.int64))
    found = waiting(streams, torch.arange(500))
    assert found[3, :2].tolist() == pytest.approx([waiting_reference(3, 0, n) for n in (0, 1)], rel=1e-12)
    assert float(found.min()) > 0
    # 100k numbers: the share beyond each time within 4 standard errors; neighbouring seeds and numbers uncorrelated.
    for time in (0.01, 0.1, 1.0, 4.0):
        share = math.exp(-time)
        assert abs((found > time).double().mean() - share) < 4 * math.sqrt(share * (1 - share) / found.numel())
    for a, b in ((found[1:], found[:-1]), (found[:, 1:], found[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 4 / math.sqrt(a.numel())
    counted = waiting(stream(torch.zeros(200, dtype=torch.int64), torch.arange(200)), torch.arange(500))
    assert abs(torch.corrcoef(torch.stack([counted[1:].flatten(), counted[:-1].flatten()]))[0, 1]) < 0.013


@pytest.mark.parametrize("vocabulary", [5, 128, 300])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_softmax(vocabulary: int, temperature: float) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 1.5
    count = 100_000
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


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.875, {0, 1, 2, 3})])
def test_a_nucleus_ends_with_the_token_that_fills_it(top_p: float, kept: set[int]) -> None:
    """Of 1/2, 1/4, 1/8 and 1/8, which float32 has exactly: none more at the very edge, ties together."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert torch.softmax(logits, dim=0).tolist() == [0.5, 0.25, 0.125, 0.125]
    assert set(draw_many(logits, SamplingParams(top_p=top_p), 200)[0].long().tolist()) == kept


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
    """At the very end and in a block of their own, in 150,001; also where they are the smallest numbers there are."""
    vocabulary, rows = 150_001, 800
    weight = torch.zeros(vocabulary)
    weight[5], weight[100_000], weight[150_000] = 1.0, 0.01, 0.03
    tail = weight.repeat(rows // 8, 1)
    found: list[int] = []
    for part in range(8):
        seeds = torch.arange(part * len(tail), (part + 1) * len(tail))
        found += race(tail, stream(seeds, seeds))[0].tolist()
    assert set(found) == {5, 100_000, 150_000}
    for token in (100_000, 150_000):
        expected = rows * float(weight[token] / weight.sum())
        assert abs(found.count(token) - expected) < 5 * math.sqrt(expected)
    rare = torch.zeros(3, vocabulary)
    rare[0, 149_999], rare[1, 64], rare[2, 0] = 1e-38, 1e-38, 1e-38
    for seed in range(20):
        seeds = torch.full((3,), seed)
        assert race(rare, stream(seeds, seeds))[0].tolist() == [149_999, 64, 0]


def test_draws_hit_only_positive_weights_and_know_their_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(2000, 777, generator=generator) * (torch.rand(2000, 777, generator=generator) < 0.05)
    weight[:, 3] = 0.1
    token, mass = race(weight, stream(torch.arange(2000), torch.arange(2000)))
    assert bool((weight.gather(1, token[:, None]) > 0).all())
    torch.testing.assert_close(mass, weight.double().sum(1), atol=1e-4, rtol=1e-6)


def test_rounding_of_neighbours_flips_no_more_draws_than_it_moves_probability() -> None:
    """Logits off by 1e-3 each in 20,000 words: a lookup among cumulative sums flips many times as many draws."""
    rows, vocabulary = 100, 20_000
    generator = torch.Generator().manual_seed(0)
    flips, looked_up, moved = 0, 0, 0.0
    for part in range(20):
        logits = torch.randn(rows, vocabulary, generator=generator)
        off = logits + 1e-3 * torch.randn(rows, vocabulary, generator=generator)
        pair = [torch.softmax(x, dim=1) for x in (logits, off)]
        seeds = torch.arange(part * rows, (part + 1) * rows)
        one, two = (race(p, stream(seeds, seeds))[0] for p in pair)
        flips += int((one != two).sum())
        moved += float((pair[0] - pair[1]).abs().sum()) / 2
        u = torch.rand(rows, 1, dtype=torch.float64, generator=generator)
        one, two = (torch.searchsorted(p.double().cumsum(1), u) for p in pair)
        looked_up += int((one != two).sum())
    # The least that any way to draw can flip is `moved`; a race in two levels flips at most 4 times that.
    assert 0.4 < moved < 2
    assert flips <= 8
    assert looked_up > 5 * max(flips, 4)


def test_logits_that_are_not_finite_come_back_as_nan() -> None:
    logits = torch.zeros(4, 200)
    logits[0, 3], logits[1, 4], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, 10:] = float("-inf")  # a mask is fine
    for params in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.9, top_k=5)):
        token, behaviour, untruncated = drawn(logits, [params] * 4, [1, 2, 3, 4], [0] * 4)
        assert untruncated.isnan().tolist() == [True, True, True, False]
        assert behaviour.isnan().tolist() == [True, True, True, False]
        assert int(token[3]) < 10
