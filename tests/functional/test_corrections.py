"""Weights and masks against loops in float64, and log-probs that are nowhere near each other."""

import math
from pathlib import Path

import pytest
import torch

from tandem.functional.corrections import BOUNDS, correction, mismatch

LENGTHS = [4, 1, 6, 3, 5]
GENERATOR = torch.Generator().manual_seed(0)


def drawn(scale):
    return scale * torch.randn(sum(LENGTHS), generator=GENERATOR, dtype=torch.float64)


SAMPLER = -1.5 + drawn(0.5)
TRAINER = SAMPLER + drawn(0.02)
TRAINER[[1, 5, 9]] += torch.tensor([1.9, -2.1, 0.9], dtype=torch.float64)  # far above, far below, a little above
TRAINABLE = torch.ones(sum(LENGTHS), dtype=torch.bool)
TRAINABLE[[0, 5 + 2, 11]] = False
SEGMENTS = torch.tensor([0, *LENGTHS]).cumsum(0)


def by_loops(rule, low, high, gap):
    """The rules a token at a time."""
    weights, kept, start = [], [], 0
    for length in LENGTHS:
        rows = range(start, start + length)
        own = [t for t in rows if TRAINABLE[t]]
        w = {t: math.exp(TRAINER[t].item() - SAMPLER[t].item()) for t in own}
        product = math.prod(w.values())
        mean = product ** (1 / len(own))
        for t in rows:
            probabilities = math.exp(TRAINER[t].item()), math.exp(SAMPLER[t].item())
            size = w.get(t, 0.0)
            inside = t in w
            if rule in ("icepop", "decoupled"):
                inside = inside and low <= size <= high
            elif rule == "geo":
                inside = inside and low <= mean <= high
            elif rule == "gap":
                inside = inside and abs(probabilities[0] - probabilities[1]) <= gap
                size = min(max(size, low), high)
            else:
                size = min(max(product if rule == "sequence_tis" else size, low), high)
            weights.append(size if inside else 0.0)
            kept.append(inside)
        start += length
    return weights, kept


@pytest.mark.parametrize(
    ("rule", "bounds", "gap"),
    [
        *((rule, bounds, 1.0) for rule, bounds in BOUNDS.items() if rule != "gap"),
        ("token_tis", (0.5, 1.01), 1.0),
        ("token_tis", (0.0, math.inf), 1.0),
        ("decoupled", (0.0, 1.01), 1.0),
        ("sequence_tis", (0.99, 1.02), 1.0),
        ("sequence_tis", (0.0, 5.0), 1.0),
        ("geo", (0.9, 1.1), 1.0),
        ("geo", (0.5, 1.7), 1.0),  # the first sequence is out by the mean over its 3 trainable tokens, not over all 4
        ("gap", (0.0, math.inf), 0.3),
        ("gap", (0.0, math.inf), 0.005),
        ("gap", (0.98, 1.02), 0.3),
    ],
)
def test_weights_and_masks_are_those_of_loops(rule, bounds, gap):
    low, high = bounds
    weight_T, kept_T = correction(TRAINER, SAMPLER, TRAINABLE, SEGMENTS, rule, low=low, high=high, gap=gap)
    weights, kept = by_loops(rule, low, high, gap)
    assert kept_T.tolist() == kept
    assert weight_T.tolist() == pytest.approx(weights, rel=1e-12)
    if rule in ("decoupled", "icepop", "geo", "gap"):
        assert 0 < kept_T.sum() < TRAINABLE.sum()
    else:
        assert torch.equal(kept_T, TRAINABLE)


@pytest.mark.parametrize("rule", BOUNDS)
@pytest.mark.parametrize("far", [90.0, 800.0, -90.0, -800.0, -math.inf])
def test_a_ratio_of_e_to_the_90_is_no_number_of_the_loss(rule, far):
    """In float32, whose largest number is e^88.7. And -inf: a token that the trainer's model excludes."""
    sampler_T = torch.full((6,), -1.0)
    logp_T = sampler_T + torch.tensor([0.0, 0.001, far, 0.0, 0.0, 0.001])
    low, high = BOUNDS[rule]
    weight_T, kept_T = correction(
        logp_T, sampler_T, torch.ones(6, dtype=torch.bool), torch.tensor([0, 3, 6]), rule, low=low, high=high, gap=0.3
    )
    assert torch.isfinite(weight_T).all()
    assert weight_T.max() <= high
    assert kept_T[3:].all()
    if rule in ("icepop", "gap") or (rule == "decoupled" and far > 0):
        assert kept_T.tolist() == [True, True, False, True, True, True]
    if rule == "geo":
        assert kept_T.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("rule", ["token_tis", "sequence_tis", "decoupled", "gap"])
def test_without_bounds_a_weight_is_e_to_the_20_at_most(rule):
    """A key may be .inf, and the log of a weight 90: float32 ends at 88.7."""
    logp_T, sampler_T = torch.tensor([-1.0, -60.0, -61.0]), torch.tensor([-91.0, -60.0, -1.0])
    alone = torch.ones(3, dtype=torch.bool), torch.tensor([0, 1, 2, 3])
    weight_T, kept_T = correction(logp_T, sampler_T, *alone, rule, low=0.0, high=math.inf, gap=1.0)
    assert kept_T.all()
    assert weight_T.tolist() == pytest.approx([math.exp(20.0), 1.0, math.exp(-20.0)], rel=1e-6)


def test_the_usual_bounds_are_those_of_the_page():
    """docs/methods.md, which names where each rule and its bounds are from."""
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:3] == "| `"]
    for rule, bounds in BOUNDS.items():
        (row,) = (row for row in rows if row[0] == f"`{rule}`")
        assert tuple(float(bound) for bound in row[3].split(",")) == bounds, rule


def test_gap_bounds_the_weight_of_tokens_that_both_find_unlikely():
    """Of e^-12 and e^-2: they are 0.14 apart, and one is e^10 times the other. Of the likely pair as far apart: 2."""
    sampler_T = torch.tensor([-12.0, -2.0, math.log(0.25), math.log(0.6)], dtype=torch.float64)
    logp_T = torch.tensor([-2.0, -12.0, math.log(0.5), math.log(0.95)], dtype=torch.float64)
    trainable_T, bounds = torch.ones(4, dtype=torch.bool), torch.tensor([0, 4])
    for low, high, expected in (
        (*BOUNDS["gap"], [5.0, math.exp(-10.0), 2.0, 0.0]),
        (0.1, 1.5, [1.5, 0.1, 1.5, 0.0]),
        (0.0, math.inf, [math.exp(10.0), math.exp(-10.0), 2.0, 0.0]),
    ):
        weight_T, kept_T = correction(logp_T, sampler_T, trainable_T, bounds, "gap", low=low, high=high, gap=0.3)
        assert kept_T.tolist() == [True, True, True, False]
        assert weight_T.tolist() == pytest.approx(expected, rel=1e-12)


def test_decoupled_without_a_bound_is_the_ratio_itself():
    """AReaL's objective as its paper has it: the weight is ``proximal / sampler``, and nothing is left out."""
    weight_T, kept_T = correction(TRAINER, SAMPLER, TRAINABLE, SEGMENTS, "decoupled")
    assert torch.equal(kept_T, TRAINABLE)
    assert torch.equal(weight_T, torch.where(TRAINABLE, (TRAINER - SAMPLER).exp(), 0.0))


@pytest.mark.parametrize("tokens", [1, 2, 100, 101, 250])
def test_mismatch_is_that_of_plain_sums_and_sorted_lists(tokens):
    gap_N = torch.randn(tokens, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    gaps = gap_N.tolist()
    w = [math.exp(gap) for gap in gaps]
    expected = {
        "sampler_gap_max": max(map(abs, gaps)),
        "sampler_gap_mean": sum(map(abs, gaps)) / tokens,
        "effective_sample_size": sum(w) ** 2 / (tokens * sum(x * x for x in w)),
        "mismatch_kl": sum(math.exp(gap) - 1 - gap for gap in gaps) / tokens,
    }
    for name, percent in (("q01", 1), ("q50", 50), ("q99", 99)):
        expected[f"mismatch_ratio_{name}"] = next(
            x for x in sorted(w) if 100 * sum(y <= x for y in w) >= percent * tokens
        )
    assert mismatch(gap_N) == pytest.approx(expected, rel=1e-12)


def test_mismatch_is_of_the_gaps_that_are_known():
    """vLLM tells no log-probs of truncated draws: that is no number, and no metric."""
    known = torch.tensor([0.5, -0.25, 0.0])
    assert mismatch(torch.tensor([0.5, math.nan, -0.25, math.nan, 0.0])) == mismatch(known)
    assert mismatch(torch.full((3,), math.nan)) == {}


def test_mismatch_of_one_token_far_away_is_finite():
    found = mismatch(torch.tensor([0.0] * 9 + [800.0]))
    assert all(map(math.isfinite, found.values()))
    assert found["effective_sample_size"] == pytest.approx(0.1)
    assert (found["mismatch_ratio_q50"], found["mismatch_ratio_q99"]) == (1.0, pytest.approx(math.exp(300)))
