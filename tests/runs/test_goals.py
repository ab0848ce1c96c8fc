"""Which evaluation is the best, when a run has nothing more to wait for, and which metrics say it."""

import math

import pytest

from tandem.errors import UserError
from tandem.runs.goals import Goal, Goals, Threshold


def lines(metric, *values):
    return [{"step": 10 * i, metric: value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("text", "metric", "sign"),
    [
        ("eval/reward", "eval/reward", 1),
        ("eval/math/reward", "eval/math/reward", 1),
        ("eval/reward/right", "eval/reward/right", 1),
        ("eval/a/reward/right", "eval/a/reward/right", 1),
        ("eval/pass@16", "eval/pass@16", 1),
        ("eval/accuracy", "eval/accuracy", 1),
        ("eval/loss", "eval/loss", -1),
        ("eval/code/sft_loss", "eval/code/sft_loss", -1),
        ("eval/teacher_kl", "eval/teacher_kl", -1),
        ("-eval/loss", "eval/loss", -1),
        ("+eval/loss", "eval/loss", 1),
        ("-eval/response_length", "eval/response_length", -1),
    ],
)
def test_the_metric_says_which_way_is_better_or_its_sign_does(text, metric, sign):
    assert Goal.parse(text) == Goal(metric=metric, sign=sign)


@pytest.mark.parametrize("text", ["eval/response_length", "eval/entropy", "eval/loss/entropy", "eval/reward_se"])
def test_a_metric_that_may_be_good_or_bad_needs_a_sign(text):
    with pytest.raises(UserError, match=r"^keep_best: whether more or less of .* is not known; say it, as in --keep-b"):
        Goal.parse(text)


@pytest.mark.parametrize(
    ("values", "sign", "place"),
    [
        ([0.1, 0.3, 0.3, 0.2], 1, 1),
        ([0.1, 0.3, 0.05, 0.05], -1, 2),
        ([math.nan, -5.0, math.nan], 1, 1),
        ([math.nan, math.nan], 1, -1),
        ([], 1, -1),
    ],
)
def test_the_best_is_the_first_of_equals_and_never_what_is_no_number(values, sign, place):
    assert Goal(metric="eval/x", sign=sign).best(lines("eval/x", *values)) == place


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("eval/x>=0.5", 0.5, True),
        ("eval/x>0.5", 0.5, False),
        ("eval/x <= -1e-3", -0.001, True),
        ("eval/x<2", 2.0, False),
        ("eval/x<2", math.nan, False),
        ("eval/x>2", math.nan, False),
        ("eval/y>2", 3.0, False),
    ],
)
def test_a_bound_holds_of_numbers_alone(text, value, holds):
    assert Threshold.parse(text).holds({"eval/x": value}) is holds


@pytest.mark.parametrize(
    "text", ["eval/x", "eval/x=1", "eval/x>=", "eval/x>=much", "eval/x>nan", "reward>=1", "eval/x>=.inf"]
)
def test_what_is_no_bound_is_refused(text):
    with pytest.raises(
        UserError, match=r"^stop_when: expected a held-out metric and its bound, as eval/reward>=0\.9, "
    ):
        Threshold.parse(text)


@pytest.mark.parametrize(
    ("values", "patience", "stops"),
    [
        ([1, 2, 2, 2], 2, True),
        ([1, 2, 2, 2], 3, False),
        ([1, 2, 1, 3], 2, False),
        ([1, math.nan, math.nan], 2, True),
        ([math.nan] * 4, 2, False),
        ([2, 1, 1, 1, 1], 0, False),
        ([], 1, False),
    ],
)
def test_patience_counts_evaluations_since_the_best(values, patience, stops):
    goals = Goals(keep_best=Goal(metric="eval/x", sign=1), patience=patience)
    found = goals.met(lines("eval/x", *values))
    assert bool(found) is stops
    if stops:
        since = len(values) - 1 - values.index(max(v for v in values if v == v))
        assert found.endswith(f"in {since} evaluations")


def test_only_the_newest_evaluation_meets_a_bound():
    goals = Goals(stop_when=Threshold.parse("eval/x>=2"))
    assert goals.met(lines("eval/x", 1.0, 2.5)) == "eval/x is 2.5 (>= 2)"
    assert goals.met(lines("eval/x", 2.5, 1.0)) == ""


def test_an_unknown_metric_is_refused_with_those_there_are():
    goals = Goals(keep_best=Goal.parse("eval/reward"), stop_when=Threshold.parse("eval/acuracy>1"))
    goals.require(["eval/acuracy", "eval/reward"])
    with pytest.raises(
        UserError, match=r"^stop_when: no evaluation of this run has eval/acuracy; they have eval/accuracy, "
    ):
        goals.require(["step", "loss", "eval/reward", "eval/accuracy"])
