"""A language model as a judge: asked once for each content, again where its reply has no score, never made up."""

from __future__ import annotations

import asyncio
import json

import pytest
from test_function_reward import batch
from test_reward_servers import seen, serve  # noqa: F401

from tandem.errors import RunFailure, UserError
from tandem.rewards.calling import Setting
from tandem.rewards.endpoint import filled_in, read_cache
from tandem.rewards.kinds import find_function
from tandem.rewards.process import RewardProcesses

RUBRIC = """
url: {url}
model: judge-1
rubric: |
  Question: {{prompt}} Answer: {{completion}} Level: {{level}}
"""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Judges in their processes, each of a rubric, all of one run folder."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    started = []

    def begin(url: str, more: str = "", deadline_s: float = 20.0):
        (tmp_path / "tone.yaml").write_text(RUBRIC.format(url=url) + more)
        started.append(
            RewardProcesses([f"judge:{tmp_path}/tone.yaml"], deadline_s=deadline_s, folder=f"{tmp_path}/run")
        )
        return started[-1].rewards()[0]

    yield begin
    for processes in started:
        processes.close()


def test_nothing_is_asked_twice(tmp_path, serve, judge):  # noqa: F811
    url = serve(replies=["Good. SCORE: 7"])
    reward = judge(url)
    data = batch("a", "b{level}", "a", level=[1, 2, 1])
    assert (reward.name, reward.per) == ("tone", "sample")
    assert reward.judge(data) == ([0.7] * 3, {"asked": 2, "from_cache": 0, "unparseable": 0})
    path, key, body = sorted(seen(url), key=str)[1]
    assert (path, key) == ("/chat/completions", "Bearer sk-1")
    assert (body["model"], body["temperature"]) == ("judge-1", 0.0)
    assert [one["role"] for one in body["messages"]] == ["user"]
    asked = body["messages"][0]["content"]
    assert asked.startswith("Question: q Answer: b{level} Level: 2\n")
    assert asked.endswith("SCORE: <number from 0 to 10>")
    # A kill cut the last line off, and the run is resumed: another process, the same folder.
    cache = tmp_path / "run" / "judgements.jsonl"
    assert len(cache.read_text().splitlines()) == 2
    with cache.open("a") as file:
        file.write('{"key": "half')
    resumed = judge(url)
    assert resumed.judge(data) == ([0.7] * 3, {"asked": 0, "from_cache": 3, "unparseable": 0})
    assert resumed.score(batch("new", level=[1])) == [0.7]
    assert len(seen(url)) == 3
    assert len(read_cache(cache)) == 3
    # Another rubric is another question.
    assert judge(url, "scale: [0, 7]\n").score(batch("a", level=[1])) == [1.0]


def test_replies_without_a_score(serve, judge):  # noqa: F811
    url = serve(replies=["Well.", "SCORE: 11", "SCORE: 2, no: **SCORE: 4**"])
    assert judge(url).score(batch("a", level=[1])) == [0.4]
    assert [body.get("seed") for _, _, body in seen(url)] == [None, 1, 2]
    never = serve(replies=["I would rather not say"])
    with pytest.raises(UserError, match=r"judge-1 gave no score from 0 to 10 in 3 replies, .*not say.*completion 'a'"):
        judge(never).score(batch("a", level=[1]))
    left_out = judge(never, "unparseable: leave_out\nasks: 1\n")
    judged = left_out.judge(batch("a", "b", level=[1, 1]))
    assert judged == ([None, None], {"asked": 2, "from_cache": 0, "unparseable": 2})


def test_an_endpoint_that_fails(serve, judge):  # noqa: F811
    url = serve(replies=["SCORE: 5"], fail=1, status=429)
    assert judge(url).score(batch("a", level=[1])) == [0.5]
    with pytest.raises(RunFailure, match=r"got no reply of .* within 1 s .*status 503"):
        judge(serve(fail=99), deadline_s=1.0).score(batch("a", level=[2]))
    with pytest.raises(UserError, match="status 401"):
        judge(serve(fail=99, status=401)).score(batch("a", level=[2]))
    with pytest.raises(UserError, match="did not answer with a chat completion"):
        judge(serve(replies=[None])).score(batch("a", level=[2]))


def test_a_deadline_begins_when_there_is_room(tmp_path, serve, monkeypatch):  # noqa: F811
    url, begin, answered = serve(replies=["SCORE: 5"]), asyncio.timeout, []
    (tmp_path / "tone.yaml").write_text(RUBRIC.format(url=url) + "concurrency: 1\n")
    ask = find_function(f"judge:{tmp_path}/tone.yaml", Setting(folder=str(tmp_path))).function

    def timeout(seconds):
        answered.append(len(seen(url)))
        return begin(seconds)

    async def ask_all():
        return await asyncio.gather(*(ask("q", completion, level=9) for completion in "abcd"))

    monkeypatch.setattr(asyncio, "timeout", timeout)
    assert asyncio.run(ask_all()) == [0.5] * 4
    assert answered == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a", "expected keys and values"),
        ("a: [", "not YAML"),
        ("url: http://a\nmodel: b", "missing key 'rubric'"),
        ("url: http://a\nmodel: b\nrubric: c\nmodle: d", "unknown key 'modle'; keys are url, model"),
        ("url: http://a\nmodel: b\nrubric: c", "rubric: it must show the judge the sample, as {completion}"),
        ("url: a\nmodel: b\nrubric: '{completion}'", "url: expected http"),
        ("url: http://a\nmodel: b\nrubric: '{completion}'\nscale: [3, 1]", "scale: expected two numbers"),
        ("url: http://a\nmodel: b\nrubric: '{completion}'\nparse: 'x'", "parse: it needs a group"),
        ("url: http://a\nmodel: b\nrubric: '{completion}'\nparse: '('", "parse: not a regular expression"),
        ("url: http://a\nmodel: b\nrubric: '{completion}'\nasks: 0", "asks: expected a whole number of 1 or more"),
        (
            "url: http://a\nmodel: b\nrubric: '{completion}'\nunparseable: zero",
            "unparseable: expected error or leave_out",
        ),
        ("url:\nmodel: b\nrubric: '{completion}'", "url: has no value"),
        ("url: http://a\nmodel: b\nrubric: '{completion}'\nconcurrency:", "concurrency: has no value"),
        (None, "cannot be read"),
    ],
)
def test_wrong_rubrics(tmp_path, text, words):
    file = tmp_path / "tone.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as caught:
        find_function(f"judge:{file}", Setting())
    assert str(caught.value).startswith(f"{file}: ")
    assert words in str(caught.value)


def test_braces_of_a_sample_stay():
    assert filled_in("{a} {b} {c}", {"a": "{b}", "b": 1}) == "{b} 1 {c}"
    assert json.dumps(filled_in("{{a}}", {"a": 1})) == '"{1}"'
