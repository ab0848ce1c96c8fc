"""Samples are judged when they end, in calls of their own, and nobody waits for a judge that is slow."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from test_function_reward import batch

import tandem
from tandem.engines.stepper import Stepper
from tandem.errors import Cancelled, RunFailure, UserError
from tandem.rewards.calling import LocalFunction, Per
from tandem.rewards.function import FunctionReward
from tandem.rewards.process import RewardProcesses
from tandem.rollout.judging import GROUP, Judge
from tandem.rollout.sampling import Sampling, groups_of
from tandem.types import Completion, Group, Prompt, SamplingParams, Ticket

JUDGES = Path(__file__).parents[1] / "helpers" / "judges.py"


@pytest.fixture(scope="module")
def judges():
    """Rewards by name, each in its processes; made once for all tests of this file."""
    names = (
        "one",
        "one_draws",
        "best",
        "waits",
        "works",
        "when",
        "when_all",
        "one_nan",
        "one_fails",
        "counting",
        "counting_one",
        "counting_two",
        "too_large",
    )
    processes = RewardProcesses(
        [f"{JUDGES}:{name}" for name in names], deadline_s=20.0, waits_s=(0.01, 0.01), processes=2
    )
    yield dict(zip(names, processes.rewards(), strict=True))
    processes.close()


class Core:
    """A sample ends after as many steps as its job says; a step takes a hundredth of a second."""

    def __init__(self, pace_s: float) -> None:
        self.jobs: dict[int, tuple[int, str]] = {}
        self.pace_s = pace_s

    def add(self, name: int, job: tuple[int, str]) -> None:
        self.jobs[name] = job

    def step(self) -> Mapping[int, Completion | Exception]:
        time.sleep(self.pace_s)
        self.jobs = {name: (left - 1, text) for name, (left, text) in self.jobs.items()}
        ended = {
            name: UserError("not finite") if text == "fails" else completed(text)
            for name, (left, text) in self.jobs.items()
            if left == 0
        }
        self.jobs = {name: job for name, job in self.jobs.items() if name not in ended}
        return ended

    def abort(self, names: Any) -> None: ...

    def renew(self, version: int) -> None: ...


def completed(text: str) -> Completion:
    ids = [ord(c) for c in text]
    return Completion(
        token_ids=ids, behaviour_logp=[0.0] * len(ids), untruncated_logp=[0.0] * len(ids), stop="eos", text=text
    )


class Engine:
    """An engine that gives prompt ``i`` its texts, each after so many steps."""

    def __init__(self, texts: list[list[str]], steps: list[list[int]], pace_s: float = 0.0, *, watched: bool = True):
        self.jobs = [list(zip(s, t, strict=True)) for s, t in zip(steps, texts, strict=True)]
        self.stepper = Stepper(Core(pace_s))
        self.watched = watched
        self.sampled = 0.0

    ended = property(lambda self: self.stepper.ended)

    def submit(self, requests: Any, watch: Any = None) -> Any:
        jobs = [self.jobs[request.prompt_ids[0] - 1] for request in requests]
        return self.stepper.submit(jobs, watch if self.watched else None)

    def wait(self, until: Any, at_least: int = 0) -> None:
        self.stepper.wait(until)

    def cancel(self) -> None:
        self.stepper.cancel()


def clock(*_: Any, **__: Any) -> Any:
    return nullcontext()


def run(engine: Engine, *rewards: FunctionReward, **columns: list) -> list[Group]:
    source = source_of(engine, *rewards, **columns)
    return source.finish(source.begin(tickets(engine), clock), clock)


def tickets(engine: Engine) -> list[Ticket]:
    return [Ticket(number=i, row=i, step=5, place=i) for i in range(len(engine.jobs))]


def source_of(engine: Engine, *rewards: FunctionReward, **columns: list) -> Sampling:
    prompts = [
        Prompt(
            prompt_id=f"p{i}",
            prompt="q",
            token_ids=(i + 1,),
            columns={name: values[i] for name, values in columns.items()},
        )
        for i in range(len(engine.jobs))
    ]
    return Sampling(
        engine=engine,
        prompts=prompts,
        params=SamplingParams(),
        samples_per_prompt=len(engine.jobs[0]),
        judge=Judge(rewards=rewards, weights=(1.0,) * len(rewards)),
        seed=3,
    )


def parts(groups: list[Group], name: str) -> list[float | None]:
    return [r.reward_parts.get(name) for group in groups for r in group.rollouts]


TEXTS = [["a", "bb", "ccc"], ["dd", "skip", "a"]]


@pytest.mark.parametrize("steps", [[[1, 2, 3], [4, 5, 6]], [[6, 5, 4], [3, 2, 1]], [[2, 2, 2], [2, 2, 2]]])
@pytest.mark.parametrize("watched", [True, False])
def test_what_a_sample_gets_does_not_depend_on_when_it_ended(judges, steps, watched):
    names = ("one", "one_draws", "best", "counting")
    groups = run(
        Engine(TEXTS, steps, watched=watched),
        *(judges[name] for name in names),
        answer=["a", "a"],
    )
    assert parts(groups, "one") == [1.01, 0.02, 0.03, 0.02, None, 1.01]
    assert parts(groups, "best") == [0, 0, 1, 0, 1, 0]
    assert parts(groups, "counting") == [1, 2, 3, 2, 4, 1]
    draws = parts(groups, "one_draws")
    assert len(set(draws)) == 6
    assert draws == DRAWS.setdefault("", draws)
    reward = groups[0].rollouts[0].reward
    assert reward == 1.01 + draws[0] + 0 + 1


DRAWS: dict[str, list] = {}


def test_a_slow_sample_delays_neither_sampling_nor_other_judging(judges):
    """A second of sampling, and a second for the sample that ends first: together little more than one."""
    texts = [["slow", *map(str, range(9))], [*map(str, range(10))]]
    steps = [[1, *range(12, 102, 10)], [*range(10, 110, 10)]]
    start = time.monotonic()
    groups = run(Engine(texts, steps, 0.01), judges["waits"], judges["works"], judges["when"], judges["when_all"])
    took = time.monotonic() - start
    sampled = min(parts(groups, "when_all"))
    assert sampled - start > 1.0
    assert took < 1.5, "two seconds and more, if one waited for the other"
    for name in ("waits", "works"):
        slow, *others = parts(groups, name)[:10]
        assert slow - start > 1.0
        assert sum(when < slow for when in others) >= 7, "what ended meanwhile was judged meanwhile"
    assert parts(groups, "when")[0] < start + 0.5


@pytest.mark.parametrize("watched", [True, False])
def test_a_prompt_whose_reward_is_late_has_not_ended_and_others_have(judges, watched):
    """The wait is for the processes of the rewards: nobody asks again and again in between."""
    engine = Engine([["slow", "b"], ["c", "d"], ["e", "f"]], [[1, 1], [2, 2], [40, 40]], 0.001, watched=watched)
    source, asked = source_of(engine, judges["waits"], judges["when"]), []
    start = time.monotonic()
    begun = source.begin(tickets(engine), clock)

    def enough(count: int) -> bool:
        asked.append(count)
        return sum(item.done() for item in begun) >= count

    source.wait(partial(enough, 2), clock, at_least=2)
    assert [item.done() for item in begun] == [False, True, True]
    assert time.monotonic() - start < 0.9
    del asked[:]
    source.wait(partial(enough, 3), clock, at_least=1)
    assert time.monotonic() - start >= 1.0
    assert len(asked) < 10
    assert [len(parts([group], "waits")) for group in source.finish(begun, clock)] == [2, 2, 2]
    assert (source.open, source.calls) == ([], [])


def test_a_kept_prompt_is_judged_no_second_time_and_a_changed_one_is_not_kept(judges):
    engine = Engine([["slow", "bb"], ["c", "d"]], [[1, 2], [1, 99]])
    source = source_of(engine, judges["waits"], judges["one_draws"], judges["best"])
    first, second = source.begin(tickets(engine), clock)
    source.wait(lambda: first.completions.done(), clock)
    kept = source.kept(first)
    assert source.kept(second) is None
    before = judges["waits"].score(batch("a"))[0]
    # One reward of its first sample had not answered yet; those that had are kept.
    assert {tuple(call[:2]) for call in kept["scores"]} < {(0, 0), (0, 1), (1, 0), (1, 1), (2, GROUP)}
    again = source_of(engine, judges["waits"], judges["one_draws"], judges["best"])
    (group,) = again.finish([again.again(tickets(engine)[0], json.loads(json.dumps(kept)))], clock)
    (straight, _) = source.finish([first, second], clock)
    assert parts([group], "one_draws") == parts([straight], "one_draws")
    assert parts([group], "best") == [1.0, 0.0]
    assert {call[1]: call[2][0] for call in kept["scores"] if call[0] == 0}.items() <= dict(
        enumerate(parts([group], "waits"))
    ).items()
    assert max(parts([group], "waits")) > before
    assert again.again(tickets(engine)[0], kept | {"prompt_ids": [7]}) is None


def test_a_reward_that_fails_ends_the_wait_and_what_is_open_is_given_up(judges):
    engine = Engine([["bad"], ["1"]], [[1], [10**9]], 0.001)
    source = source_of(engine, judges["one_fails"])
    begun = source.begin(tickets(engine), clock)
    for work in (lambda: source.wait(begun[1].done, clock), lambda: source.finish(begun, clock)):
        with pytest.raises(RunFailure, match=r"'one_fails' raised ValueError: .* called 3 times"):
            work()
    source.cancel()
    with pytest.raises(Cancelled):
        begun[1].result()


def test_a_request_that_fails_ends_the_wait_for_others_at_once(judges):
    """Nothing ends but it, and nobody waits for it."""
    engine = Engine([["1"], ["fails"]], [[10**5], [1]])
    source = source_of(engine, judges["one"], answer=["1", "1"])
    first, second = tickets(engine)
    (long,) = source.begin([first], clock)
    source.begin([second], clock)
    with pytest.raises(UserError, match="not finite"):
        source.wait(long.done, clock)
    assert not long.done()
    with pytest.raises(UserError, match="not finite"):
        source.finish([long], clock)
    source.cancel()


def test_counts_beside_the_scores(judges):
    assert judges["counting"].judge(batch("a", "bb", "ccc")) == ([1.0, 2.0, 3.0], {"odd": 2, "even": 0})
    judge = Judge(rewards=(judges["counting"],), weights=(1.0,))
    (prompt,) = [Prompt(prompt_id="p", prompt="q", token_ids=(1,))]
    groups = groups_of([prompt], [[completed("a"), completed("bb")]])
    assert judge.fill(groups) == {"counting/odd": 1, "counting/even": 0}


def test_counts_are_those_of_the_samples_judged_whatever_else_is_judged_meanwhile(judges):
    """Held-out samples are judged between the answer to a step's samples and its end: neither has the other's."""
    engine = Engine([["a", "bb"], ["c", "d"]], [[1, 1], [1, 1]])
    source = source_of(engine, judges["counting_one"])
    begun = source.begin(tickets(engine), clock)
    source.wait(lambda: all(item.done() for item in begun), clock)
    kept = json.loads(json.dumps(source.kept(begun[0])))
    held_out = groups_of([source.prompts[0]], [[completed("ee"), completed("f")]])
    assert source.judge.fill(held_out) == {"counting_one/odd": 1, "counting_one/even": 0}
    source.finish(begun, clock)
    assert source.counts == {"counting_one/odd": 3, "counting_one/even": 0}
    again = source_of(engine, judges["counting_one"])
    again.finish([again.again(tickets(engine)[0], kept)], clock)
    assert again.counts == {"counting_one/odd": 1, "counting_one/even": 0}


def test_counts_of_calls_that_are_made_side_by_side_are_each_ones_own(judges):
    calls = [judges["counting_two"].begin(batch(text)) for text in ("a", "bbbb")]
    assert [call.result().counts for call in calls] == [{"letters": 2}, {"letters": 8}]


def test_counts_of_functions_in_this_process_and_their_threads():
    class Judge:
        counts: ClassVar[dict[str, int]] = {"here": 0, "thread": 0}

        async def __call__(self, completions):
            self.counts["here"] += 1
            with ThreadPoolExecutor(1) as pool:
                pool.submit(self._in_thread).result()
            return [1.0] * len(completions)

        def _in_thread(self):
            self.counts["thread"] += 1

    judge = Judge()
    for function in (LocalFunction(judge), LocalFunction(judge)):
        for _ in range(2):
            assert function.begin({"completions": ["a"]}, 1, None, str).result() == ([1.0], {"here": 1, "thread": 1})


def test_what_goes_wrong_names_the_sample(judges):
    with pytest.raises(UserError, match=r"'one_nan' returned nan for sample 1 \(prompt p0\): completion 'bad'"):
        run(Engine([["good", "bad"]], [[1, 2]]), judges["one_nan"])
    with pytest.raises(UserError, match=r"'too_large' returned inf for sample 0 \(prompt p0\)"):
        run(Engine([["a"]], [[1]]), judges["too_large"])
    with pytest.raises(RunFailure, match=r"'one_fails' raised ValueError: .* last at sample 1 .* called 3 times"):
        run(Engine([["1", "bad"]], [[2, 1]]), judges["one_fails"])
    with pytest.raises(UserError, match=r"'one' wants the column 'answer'.*can have: completion, completion_ids, prom"):
        run(Engine([["1"]], [[1]]), judges["one"])
    with pytest.raises(UserError, match=r"wants the column 'prompt'.*, or 'prompt' with @tandem.judges\('sample'\)"):
        FunctionReward(lambda prompt: 1.0).require_columns(["answer"])
    with pytest.raises(UserError, match="expected 'sample', 'group' or 'all', got 'each'"):
        tandem.judges("each")


def test_a_column_that_a_row_lacks_is_none(judges):
    prompts = [Prompt(prompt_id="p", prompt="q", token_ids=(1,), columns={"answer": "a"}),
               Prompt(prompt_id="r", prompt="q", token_ids=(1,))]  # fmt: skip
    groups = groups_of(prompts, [[completed("a")], [completed("a")]])
    Judge(rewards=(judges["one"],), weights=(1.0,))(groups)
    assert parts(groups, "one") == [1.01, 0.01]


def test_in_this_process_too():
    @tandem.judges("sample")
    def one(completion, level):
        return len(completion) + level

    @tandem.judges("group")
    async def group(completions):
        return [len(completions) + random.random()] * len(completions)

    data = batch("a", "bc", level=[1, 2])
    assert FunctionReward(one).score(data) == [2.0, 4.0]
    scores = FunctionReward(group).score(data)
    assert [int(score) for score in scores] == [1, 1]
    assert scores[0] != scores[1], "two groups, two draws"


@pytest.mark.parametrize("per", ["sample", "group", "all"])
def test_a_sample_that_failed_is_judged_by_nobody_and_moves_no_other(per: Per) -> None:
    seen: list[str] = []

    def said(texts: list[str]) -> list[float]:
        seen.extend(texts)
        return [float(len(text)) for text in texts]

    functions = {"sample": lambda completion: said([completion])[0], "group": lambda completions: said(completions)}
    function = functions["sample" if per == "sample" else "group"]
    failed = replace(completed("never"), stop="error", error="no room")
    prompts = [Prompt(prompt_id=f"p{i}", prompt="q", token_ids=(1,)) for i in range(2)]
    groups = groups_of(prompts, [[completed("aa"), failed, completed("b")], [failed, completed("cccc")]])
    Judge(rewards=(FunctionReward(tandem.judges(per)(function), name="r"),), weights=(1.0,))(groups)
    assert sorted(seen) == ["aa", "b", "cccc"]
    assert [[r.reward for r in group.rollouts] for group in groups] == [[2.0, None, 1.0], [None, 4.0]]
    assert [group.rewards for group in groups] == [[2.0, 1.0], [4.0]]
