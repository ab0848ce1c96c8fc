"""Rewards over HTTP: a failure is waited out or is an error, and never a score; several servers share the load."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from test_function_reward import batch

from tandem.errors import RunFailure, UserError
from tandem.rewards import asking
from tandem.rewards.function import FunctionReward
from tandem.rewards.kinds import kind_of, reward_name
from tandem.rewards.process import RewardProcesses

SCRIPT = Path(__file__).parents[1] / "helpers" / "reward_servers.py"


def start(**plan: Any) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, SCRIPT, json.dumps(plan)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{process.stdout.readline().strip()}"


@pytest.fixture
def serve():
    """Starts a server that does as it is told; returns its URL."""
    started = []

    def begin(**plan: Any) -> str:
        process, url = start(**plan)
        started.append(process)
        return url

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def ask():
    """A reward of some servers, in a process as in a run."""
    started = []

    def begin(*urls: str, deadline_s: float = 20.0) -> FunctionReward:
        started.append(RewardProcesses([",".join(urls)], deadline_s=deadline_s))
        # The process keeps to its deadline by itself; its import may take longer where much else runs.
        started[-1].deadline_s = 20.0
        (reward,) = started[-1].rewards()
        return reward

    yield begin
    for processes in started:
        processes.close()


def seen(url: str) -> list[Any]:
    with urllib.request.urlopen(f"{url}/seen") as answer:
        return json.loads(answer.read())


def sizes(url: str) -> list[int]:
    return [len(body["samples"]) for _, _, body in seen(url)]


def test_two_servers_share_the_load(serve, ask, monkeypatch):
    """Elsewhere the second of two URLs got nothing, ever."""
    monkeypatch.setenv("TANDEM_REWARD_TOKEN", "secret")
    urls = [serve(delay=0.05), serve(delay=0.05) + "/deep/er"]
    reward = ask(*urls)
    texts = ["x" * (i % 7) for i in range(60)]
    assert (reward.name, reward.per, reward.version) == ("server", "sample", "v1")
    assert reward.score(batch(*texts, level=list(range(60)))) == [float(len(text)) for text in texts]
    first, second = sizes(urls[0]), sizes(urls[1].removesuffix("/deep/er"))
    assert sum(first) + sum(second) == 60
    assert max(first + second) <= 8
    assert min(sum(first), sum(second)) >= 16
    path, token, body = seen(urls[1].removesuffix("/deep/er"))[0]
    assert (path, token) == ("/deep/er/score", "Bearer secret")
    assert body["samples"][0].keys() == {"prompt", "completion", "stop_reason", "columns"}
    assert body["samples"][0]["columns"].keys() == {"level"}


def test_what_may_pass_is_waited_out(serve, ask):
    """A failed call was None, or 0, and trained on."""
    broken, whole = serve(fail=2), serve(delay=0.2)
    assert ask(broken, whole).score(batch(*"ab" * 12)) == [1.0] * 24
    assert sizes(whole)
    process, url = start(port=free_port())
    reward = ask(url)
    assert reward.score(batch("ab")) == [2.0]
    process.kill()
    process.communicate()
    call = reward.begin(batch("abc"))
    assert not call.done()
    again, _ = start(port=int(url.rpartition(":")[2]))
    assert call.result().scores == [3.0]
    again.kill()
    again.communicate()


def test_many_samples_may_take_longer_than_the_deadline(serve, ask):
    """While scores come, nothing is wrong."""
    reward = ask(serve(delay=0.25, limit=1), deadline_s=0.8)
    assert reward.score(batch(*"abcdefghij")) == [1.0] * 10


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("plan", "kind", "words"),
    [
        ({"fail": 99}, RunFailure, "within 1 s (--reward-deadline) (http://{}/score: status 503: {{"),
        ({"hang": True}, RunFailure, "got no score of http://{} within 1 s (--reward-deadline)"),
        ({"fail": 99, "status": 400}, UserError, "http://{}/score: status 400"),
        # One fewer than it was asked for: of both samples in one request, or of one that went ahead.
        ({"few": True}, UserError, "http://{}/score returned "),
        ({"nan": True}, UserError, "returned nan for sample "),
        ({"later": "v2"}, UserError, "serves version 'v2' now, and 'v1' when the run began"),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_an_error(serve, ask, plan, kind, words):
    url = serve(**plan)
    with pytest.raises(UserError) as caught:
        ask(url, deadline_s=1.0).score(batch("a", "bc"))
    assert type(caught.value) is kind
    message = str(caught.value)
    assert words.format(url.removeprefix("http://")) in message
    assert "\n" not in message
    assert "completion '" in message
    if "few" in plan:
        assert "returned 1 scores for 2 samples" in message or "returned 0 scores for 1 samples" in message
    if kind is RunFailure:
        assert message.endswith("; go on with --resume")


@pytest.mark.parametrize(
    ("plans", "words"),
    [
        ([{"protocol": 2}], "does not speak version 1 of the protocol"),
        ([{"limit": 0}], "a 'batch_limit' of 1 or more"),
        ([{}, {"version": "v2"}], "serves version 'v2' and http"),
    ],
)
def test_servers_are_looked_at_first(serve, ask, plans, words):
    with pytest.raises(UserError, match=words):
        ask(*(serve(**plan) for plan in plans))


def test_a_server_that_is_down(ask):
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"{url}: .*refused.*; is the reward server there, and ready") as caught:
        ask(url)
    assert not isinstance(caught.value, RunFailure)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("ftp://a:1", "unknown scheme"),
        ("http://", "not the URL of a reward server"),
        ("http://a:x", "not the URL of a reward server"),
        ("http://a:1?b=c", "not the URL of a reward server"),
        ("http://a:1,file.py:f", "'file.py:f' is not the URL"),
        ("http://a:1,http://a:1/", "named twice"),
        ("format:(", "not a regular expression"),
        ("rewards.py", "expected FILE.py:function"),
    ],
)
def test_what_can_be_no_reward(source, words):
    with pytest.raises(UserError, match=words):
        kind_of(source)


def test_names():
    sources = ("a.py:right", "http://a:1", "judge:rubrics/tone.yaml", "math:solution", "format:.*", "reasoning-gym")
    assert [reward_name(source) for source in sources] == [
        "right", "server", "tone", "math", "format", "reasoning_gym",
    ]  # fmt: skip


def test_waits_grow_and_end(monkeypatch):
    waited = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(asking.asyncio, "sleep", sleep)
    patience = asking.Patience()

    def wait(failure: asking.NotNow) -> None:
        with pytest.raises(StopIteration):
            patience.wait(failure).send(None)

    for _ in range(9):
        wait(asking.NotNow("x"))
    wait(asking.NotNow("x", 3.0))
    patience.passed()
    wait(asking.NotNow("x"))
    assert waited == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 3, 0.5]
