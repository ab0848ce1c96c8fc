"""The checkers that Tandem has: mathematics, reasoning-gym's tasks, forms. What they cannot judge is left out."""

from __future__ import annotations

import time

import pytest
from test_function_reward import batch

import tandem
from tandem.data.rows import load_rows
from tandem.errors import UserError
from tandem.rewards import checks
from tandem.rewards.checks import MathCheck, guarded
from tandem.rewards.function import load_reward
from tandem.rewards.process import RewardProcesses


def test_a_form_matches_the_whole_completion():
    reward = load_reward(r"format:<think>.*</think>\s*\d+")
    texts = ["<think>a\nb</think> 12", "x<think></think> 12", "<think></think> 12.", "<think></think>3"]
    assert reward.score(batch(*texts)) == [1.0, 0.0, 0.0, 1.0]
    chat = batch("7")
    chat.completions = [[{"role": "assistant", "content": "<think></think>7"}]]
    assert reward.score(chat) == [1.0]


@pytest.fixture(scope="module")
def processes():
    started = RewardProcesses(["math", "math:gold", "reasoning-gym"], deadline_s=60.0, processes=1)
    yield started.rewards()
    started.close()


def test_mathematics(processes):
    math, _, _ = processes
    cases = [
        (r"so $\frac{1}{2}$", "0.5", 1.0),
        (r"\boxed{\frac{2}{4}}", r"\frac12", 1.0),
        ("The answer is 42.", "42", 1.0),
        ("The answer is 41.", "42", 0.0),
        ("no idea", "42", 0.0),
        ("it is 3", "", None),
        (r"\boxed{x^2+2x+1}", r"$(x+1)^2$", 1.0),
        (r"\boxed{" + "9^" * 6 + "9}", "42", (0.0, None)),
    ]
    data = batch(*(text for text, _, _ in cases), answer=[answer for _, answer, _ in cases])
    start = time.monotonic()
    judged = math.judge(data)
    for (text, _, wanted), score in zip(cases, judged.scores, strict=True):
        assert score in (wanted if isinstance(wanted, tuple) else (wanted,)), text
    assert time.monotonic() - start < 30
    assert judged.counts["no_answer"] == 1


def test_the_column_of_the_answer(processes):
    math, gold, _ = processes
    assert gold.score(batch("7", gold=["7"])) == [1.0]
    with pytest.raises(UserError, match=r"'math' wants the column 'answer' or 'solution', which d.* lacks; .*: gold"):
        math.require_columns({"gold"}, "d.jsonl")
    math.require_columns({"solution"})


@pytest.mark.parametrize(
    ("part", "error", "score"),
    [("_parse", ValueError, 0.0), ("_parse", MemoryError, None), ("_verify", ValueError, None)],
)
def test_a_check_that_fails_is_no_number(monkeypatch, part, error, score):
    """A completion that cannot be read is wrong; of one that cannot be compared nothing is known."""
    check = MathCheck()
    assert check("It is $4$.", answer="4") == 1.0  # the answer has been read

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(check, part, fail)
    assert check("It is $4$.", answer="4") == score
    assert check.counts == {"no_answer": 0, "given_up": int(score is None)}


def test_a_check_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(checks, "GUARD_S", 0.2)

    def fails() -> float:
        raise RuntimeError

    for check in (lambda: float(pow(3, 10**9) % 7), fails, lambda: float(len(b"x" * (5 << 30)))):
        counts = {"given_up": 0}
        assert guarded(check, counts) is None
        assert counts == {"given_up": 1}
    assert guarded(lambda: 0.25, counts) == 0.25
    assert counts == {"given_up": 1}


def test_tasks_of_reasoning_gym(processes):
    _, _, gym = processes
    rows = load_rows("reasoning-gym:leg_counting?size=3&seed=7,reasoning-gym:chain_sum?size=2")
    assert [row["task"] for row in rows] == ["leg_counting"] * 3 + ["chain_sum"] * 2
    again = load_rows("reasoning-gym:leg_counting?size=3&seed=7")
    assert [row["prompt"] for row in again] == [row["prompt"] for row in rows][:3]
    other = load_rows("reasoning-gym:leg_counting?size=3&seed=8")
    assert [row["prompt"] for row in again] != [row["prompt"] for row in other]
    right = [row["entry"]["answer"] for row in rows]
    columns = {name: [row[name] for row in rows] for name in ("task", "entry")}
    assert gym.score(batch(*right, **columns)) == [1.0] * 5
    tagged = [f"thus 5 <answer>{answer}</answer>" for answer in right]
    assert gym.score(batch(*tagged, **columns)) == [1.0] * 5
    assert max(gym.score(batch(*["x"] * 5, **columns))) < 0.1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("reasoning-gym:leg_countin", "no task 'leg_countin'; did you mean leg_counting"),
        ("reasoning-gym:leg_counting?sise=3", "unexpected keyword argument 'sise'"),
        ("reasoning-gym:leg_counting?size=many", "arguments are whole numbers"),
        ("reasoning-gym:leg_counting?min_animals=9&max_animals=2", "max_animals"),
    ],
)
def test_wrong_tasks(source, words):
    with pytest.raises(UserError, match=words):
        load_rows(source)


def test_a_gym_s_tasks_are_judged_by_their_own_checkers():
    def rewards(method: str = "grpo", **keys) -> tuple[str, ...]:
        return tandem.read_config(method, model="m", out="o", steps=1, **keys).reward.reward

    tasks = "reasoning-gym:leg_counting:0.5,reasoning-gym:chain_sum?size=9:0.5"
    assert rewards(data=tasks) == ("reasoning-gym",)
    assert rewards(data=tasks, reward=["format:.*", "math"]) == ("format:.*", "math")
    assert rewards(data=tasks, reward_model="rm") == ()
    assert rewards("opd", data=tasks, teacher="t") == ()
    with pytest.raises(UserError, match="nothing judges the samples"):
        rewards(data=f"{tasks},d.jsonl:1")
    with pytest.raises(UserError, match="--split: has no effect"):
        rewards(data="reasoning-gym:chain_sum", split="train2")
