"""Reward functions are called as TRL calls them, and what goes wrong in one is said with its sample and line."""

import asyncio
import functools
import math
import random
import sys
from dataclasses import replace

import numpy
import pytest
import torch

from tandem.errors import RunFailure, UserError
from tandem.rewards.calling import Per
from tandem.rewards.function import FunctionReward, divided, load_reward
from tandem.roles import Reward, RewardBatch
from tandem.types import Rollout


def batch(*completions: str, **columns: list) -> RewardBatch:
    rollouts = [
        Rollout(
            prompt_id=f"p{i}",
            sample_index=0,
            token_ids=[9, *map(ord, text)],
            prompt_length=1,
            trainable=[False] + [True] * len(text),
            behaviour_logp=[0.0] * (1 + len(text)),
            untruncated_logp=[0.0] * (1 + len(text)),
            stop="eos",
            completion=text,
        )
        for i, text in enumerate(completions)
    ]
    return RewardBatch(prompts=["q"] * len(rollouts), completions=list(completions), rollouts=rollouts, columns=columns)


def refused(function, data: RewardBatch) -> str:
    with pytest.raises(UserError) as caught:
        FunctionReward(function, name="r").score(data)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("per", "sizes"), [("sample", [1] * 6), ("group", [2, 1, 2, 1]), ("all", [6])])
def test_what_is_judged_in_one_call_has_its_own_samples_columns_and_seed(per: Per, sizes: list[int]) -> None:
    """Of two prompts alike, one behind the other, each is a group; and so is one whose first sample failed."""
    whole = batch(*"abcdef", answer=list(range(6)))
    places = [("p", 0), ("p", 1), ("p", 0), ("q", 1), ("q", 2), ("p", 0)]
    for rollout, (prompt_id, index) in zip(whole.rollouts, places, strict=True):
        rollout.prompt_id, rollout.sample_index = prompt_id, index
    parts = list(divided(replace(whole, seed=3), per))
    assert [len(part.rollouts) for part in parts] == sizes
    assert [text for part in parts for text in part.completions] == list("abcdef")
    for part in parts:
        assert part.columns["answer"] == ["abcdef".index(text) for text in part.completions]
        assert [rollout.completion for rollout in part.rollouts] == part.completions
        assert len(part.prompts) == len(part.completions)
    assert len({part.seed for part in parts}) == len(sizes)
    assert [part.seed for part in divided(whole, per)] == [None] * len(sizes)


def test_a_function_gets_what_it_names() -> None:
    def only_completions(completions):
        return [len(c) for c in completions]

    def everything(prompts, completions, completion_ids, answer, **kwargs):
        assert prompts == ["q", "q"]
        assert completion_ids == [[97], [98, 99]]
        assert kwargs == {"level": [1, 2]}
        return [c == a for c, a in zip(completions, answer, strict=True)]

    def defaulted(completions, weight=None, *, level):
        assert weight is None
        return level

    data = batch("a", "bc", answer=["a", "x"], level=[1, 2])
    assert FunctionReward(only_completions).score(data) == [1.0, 2.0]
    assert FunctionReward(everything).score(data) == [1.0, 0.0]
    assert FunctionReward(defaulted).score(data) == [1.0, 2.0]
    assert isinstance(FunctionReward(only_completions), Reward)
    assert FunctionReward(only_completions).name == "only_completions"


def test_objects_and_partials_can_be_rewards() -> None:
    class Length:
        def __call__(self, completions, **kwargs):
            return [len(c) for c in completions]

    def scaled(completions, scale):
        return [scale * len(c) for c in completions]

    assert FunctionReward(Length()).score(batch("abc")) == [3.0]
    assert FunctionReward(functools.partial(scaled, scale=2)).score(batch("abc")) == [6.0]


def test_async_functions_share_one_loop() -> None:
    loops = []

    async def slow(completions):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    reward = FunctionReward(slow)
    assert reward.score(batch("a")) == [1.0]
    assert reward.score(batch("a", "b")) == [1.0, 1.0]
    assert loops[0] is loops[1]
    assert not loops[0].is_closed()
    del reward
    assert loops[0].is_closed()


@pytest.mark.parametrize(
    "returned",
    [
        [1, None, 0.5],
        (True, None, 0.5),
        [numpy.float32(1), None, numpy.float64(0.5)],
        [torch.tensor(1.0), None, torch.tensor(0.5)],
    ],
)
def test_numbers_of_any_kind_and_none(returned) -> None:
    scores = FunctionReward(lambda completions: returned).score(batch("a", "b", "c"))
    assert scores == [1.0, None, 0.5]
    assert type(scores[0]) is float


def test_whole_arrays() -> None:
    for array in (numpy.array([1.0, 2.0]), torch.tensor([1.0, 2.0])):
        assert FunctionReward(lambda completions, array=array: array).score(batch("a", "b")) == [1.0, 2.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, numpy.float32("nan"), torch.tensor(math.inf)])
def test_non_finite_scores_name_sample_and_text(value) -> None:
    message = refused(lambda completions: [1.0, value], batch("fine", "bad\ntext"))
    assert message.startswith(f"reward 'r' returned {float(value)} for sample 1 (prompt p1): completion 'bad\\ntext'")


def test_long_texts_are_shortened() -> None:
    message = refused(lambda completions: [math.nan], batch("x" * 5000 + "the end"))
    assert len(message) < 300
    assert "the end" in message


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], "returned 1 values for 2 samples"),
        ([1.0] * 3, "returned 3 values for 2 samples"),
        (1.0, "returned a value of type float; it must return a list"),
        (None, "returned a value of type NoneType; it must return a list"),
        ({"a": 1}, "returned a value of type dict; it must return a list"),
        ([1.0, "2"], "returned a value of type str, not a number or None, for sample 1 (prompt p1): completion 'b'"),
        ([1.0, [2.0]], "returned a value of type list, not a number or None, for sample 1"),
    ],
)
def test_wrong_returns(returned, words) -> None:
    assert words in refused(lambda completions: returned, batch("a", "b"))


def test_missing_column_is_named_before_the_call() -> None:
    def wants(completions, answer):
        raise AssertionError("not to be called")

    message = refused(wants, batch("a", question=["q"]))
    assert "wants the column 'answer'" in message
    assert "completion_ids, completions, prompts, question" in message


def write(path, text):
    path.write_text(text)
    return path


def test_a_raising_function_is_put_down_to_its_line_and_sample(tmp_path) -> None:
    file = write(
        tmp_path / "mine.py",
        "def parse(text):\n    return float(text)\n\n"
        "def score(completions):\n    return [parse(c) for c in completions]\n",
    )
    reward = load_reward(f"{file}:score")
    assert reward.name == "score"
    assert reward.score(batch("1", "2")) == [1.0, 2.0]
    with pytest.raises(RunFailure) as caught:
        reward.score(batch("1", "two", "three"))
    assert str(caught.value) == (
        "reward 'score' raised ValueError: could not convert string to float: 'two' (mine.py:2), last at "
        "sample 1 (prompt p1): completion 'two'"
    )


def test_the_line_is_the_user_s_even_where_a_library_raises(tmp_path) -> None:
    file = write(
        tmp_path / "mine.py",
        "import json\n\ndef score(completions):\n    return [json.loads(c) for c in completions]\n",
    )
    with pytest.raises(UserError, match=r"JSONDecodeError: .* \(mine\.py:4\), last at sample 0 "):
        load_reward(f"{file}:score").score(batch("{"))


def test_async_failures_are_put_down_too() -> None:
    async def one(c):
        await asyncio.sleep(0)
        return 1 / len(c)

    async def score(completions):
        return await asyncio.gather(*map(one, completions))

    message = refused(score, batch("a", ""))
    assert "ZeroDivisionError: division by zero (test_function_reward.py:" in message
    assert message.endswith("last at sample 1 (prompt p1): completion ''")


def test_a_function_that_fails_is_not_called_again() -> None:
    """It was called with each sample by itself, to find the one at fault: 32 more requests of a judge on a server."""
    calls = []

    def score(completions):
        calls.append(len(completions))
        raise RuntimeError("too\nmany")

    assert refused(score, batch("a", "b")).endswith(
        f"raised RuntimeError: too many (test_function_reward.py:{line_of(score, 2)})"
    )
    assert calls == [2]


def line_of(function, offset: int) -> int:
    return function.__code__.co_firstlineno + offset


def test_sys_exit_in_a_function_is_an_error_like_any_other() -> None:
    assert "raised SystemExit: 0 (test_function_reward.py:" in refused(lambda completions: sys.exit(0), batch("a"))


def test_only_a_seed_starts_the_generators_anew() -> None:
    def draws(completions):
        return [random.random(), numpy.random.rand(), torch.rand(()).item()]

    seeded = replace(batch("a", "b", "c"), seed=7)
    first = FunctionReward(draws).score(seeded)
    assert FunctionReward(draws).score(seeded) == first
    assert FunctionReward(draws, name="another").score(seeded) != first
    assert len({*first, *FunctionReward(draws).score(batch("a", "b", "c"))}) == 6


def test_conversations_show_the_assistant_s_words() -> None:
    data = batch("hello")
    data.completions = [[{"role": "assistant", "content": "hello"}]]
    assert "completion 'hello'" in refused(lambda completions: [math.nan], data)
