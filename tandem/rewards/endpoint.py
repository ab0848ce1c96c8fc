"""A language model as a judge: any endpoint that speaks OpenAI's chat completions, with a rubric from a file."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import httpx2
import yaml

from tandem.errors import UserError
from tandem.keys import Checked, must
from tandem.rewards.asking import CONNECT_S, NotNow, Patience, post
from tandem.rewards.calling import Misjudged, Setting, Unavailable, judges
from tandem.rewards.checks import text_of

FORMAT = "\n\nEnd with a line of its own that has nothing but: SCORE: <number from {low:g} to {high:g}>"
"""Added to the rubric, unless ``parse`` says how else a score is found."""
PARSE = r"SCORE:\s*\**\s*(-?\d+(?:\.\d+)?)"
"""The last match is the score."""
CACHE = "judgements.jsonl"
"""The file of replies, in the run's folder unless ``cache`` names another."""


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


def _rising(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_number, value)) and value[0] < value[1]


TEXT = must("text", lambda x: isinstance(x, str) and bool(x))
URL = must("http://... or https://...", lambda x: re.match(r"https?://\w", str(x)) is not None)
COUNT = must("a whole number of 1 or more", lambda x: type(x) is int and x >= 1)
SCALE = must("two numbers, the lower one first", _rising)
EITHER = must("error or leave_out", lambda x: x in ("error", "leave_out"))


@dataclass(frozen=True, kw_only=True)
class Rubric(Checked):
    """What a rubric file may have."""

    url: str = field(metadata=URL)
    """Where the endpoint is, up to and without ``/chat/completions``."""
    model: str = field(metadata=TEXT)
    """The judge's name there."""
    rubric: str = field(metadata=TEXT)
    """What it is told, with ``{prompt}``, ``{completion}`` and the dataset's columns in braces."""
    scale: tuple[float, float] = field(default=(0.0, 10.0), metadata=SCALE)
    """The lowest and the highest score, which become rewards of 0 and 1."""
    parse: str = field(default=PARSE, metadata=TEXT)
    """A regular expression whose first group is the score; its last match counts."""
    key: str = field(default="OPENAI_API_KEY", metadata=TEXT)
    """The environment variable with the endpoint's key."""
    temperature: float = field(default=0.0, metadata=must("0 or more", lambda x: _number(x) and x >= 0))
    max_tokens: int = field(default=1024, metadata=COUNT)
    """Longest reply."""
    concurrency: int = field(default=16, metadata=COUNT)
    """Requests under way at a time."""
    asks: int = field(default=3, metadata=COUNT)
    """How often it is asked where its reply has no score."""
    unparseable: Literal["error", "leave_out"] = field(default="error", metadata=EITHER)
    """What becomes of a sample then: the run ends, or the sample is left out and counted."""
    cache: str | None = field(default=None, metadata=TEXT)
    """A file of replies. None: the run folder's ``judgements.jsonl``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            groups = re.compile(self.parse).groups
        except re.error as error:
            raise UserError(f"parse: not a regular expression: {error}") from error
        if groups < 1:
            raise UserError("parse: it needs a group, (...), around the score")
        if "{completion}" not in self.rubric:
            raise UserError("rubric: it must show the judge the sample, as {completion}")


def read_judge(path: Path, setting: Setting) -> EndpointJudge:
    """The judge that a file describes. Raises UserError, naming the file and the key, where it is wrong."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected keys and values, such as 'model: NAME'")
    known = [f.name for f in fields(Rubric)]
    if unknown := [str(key) for key in given if key not in known]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; keys are {', '.join(known)}")
    if missing := [key for key in ("url", "model", "rubric") if key not in given]:
        raise UserError(f"{path}: missing key {missing[0]!r}")
    if empty := [key for key, value in given.items() if value is None and key != "cache"]:
        raise UserError(f"{path}: {empty[0]}: has no value; give one, or leave the key out")
    if isinstance(given.get("scale"), list):
        given["scale"] = tuple(given["scale"])
    try:
        return EndpointJudge(Rubric(**given), setting)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


@judges("sample")
class EndpointJudge:
    """Asks for a sample's score, and keeps every reply by the content that was asked: nothing is asked twice.

    A request that fails (as in ``tandem.rewards.asking``) is made again until the deadline, which begins when there is
    room for it (``concurrency``). A reply without a score is
    asked for again, ``asks`` times in all.
    """

    patient = True

    def __init__(self, rubric: Rubric, setting: Setting) -> None:
        self.rubric, self.deadline_s = rubric, setting.deadline_s
        self.counts = {"asked": 0, "from_cache": 0, "unparseable": 0}
        self.path = Path(rubric.cache).expanduser() if rubric.cache else Path(setting.folder or ".") / CACHE
        self._under_way: dict[str, asyncio.Task[float | None]] = {}
        self._room = asyncio.Semaphore(rubric.concurrency)
        token = os.environ.get(rubric.key)
        self._headers = {"authorization": f"Bearer {token}"} if token else {}

    async def __call__(self, prompt: Any, completion: Any, **columns: Any) -> float | None:
        rubric = self.rubric
        shown = filled_in(rubric.rubric, {**columns, "prompt": conversation(prompt), "completion": text_of(completion)})
        if rubric.parse == PARSE:
            shown += FORMAT.format(low=rubric.scale[0], high=rubric.scale[1])
        body = {
            "model": rubric.model,
            "messages": [{"role": "user", "content": shown}],
            "temperature": rubric.temperature,
            "max_tokens": rubric.max_tokens,
        }
        key = hashlib.blake2b(
            json.dumps([rubric.url, body, rubric.scale, rubric.parse], sort_keys=True).encode(), digest_size=16
        ).hexdigest()
        if key in self._scores:
            self.counts["from_cache"] += 1
            return self._scores[key]
        if key not in self._under_way:
            # Equal samples wait for one reply.
            self._under_way[key] = asyncio.create_task(self._ask(key, body))
            self._under_way[key].add_done_callback(lambda _: self._under_way.pop(key, None))
        return await self._under_way[key]

    @cached_property
    def _scores(self) -> dict[str, float]:
        """The scores that are known, by what was asked. Read late: nothing is touched before the first call."""
        return read_cache(self.path)

    @cached_property
    def _client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(timeout=httpx2.Timeout(self.deadline_s, connect=CONNECT_S, pool=None))

    async def _ask(self, key: str, body: dict[str, Any]) -> float | None:
        reply = ""
        for attempt in range(self.rubric.asks):
            # A server that answers equal requests alike gets another one.
            async with self._room:
                reply = await self._reply(body if attempt == 0 else body | {"seed": attempt})
            if (score := self._score(reply)) is not None:
                self._scores[key] = score
                self._keep({"key": key, "score": score, "reply": reply, "asked": body["messages"][0]["content"]})
                return score
        self.counts["unparseable"] += 1
        if self.rubric.unparseable == "leave_out":
            return None
        raise Misjudged(
            f"{self.rubric.model} gave no score from {self.rubric.scale[0]:g} to {self.rubric.scale[1]:g} in "
            f"{self.rubric.asks} replies, the last of which ends {reply[-60:]!r}"
        )

    async def _reply(self, body: dict[str, Any]) -> str:
        """Raises Unavailable where there is none within the deadline."""
        url = f"{self.rubric.url.rstrip('/')}/chat/completions"
        patience, wrong = Patience(), ""
        try:
            async with asyncio.timeout(self.deadline_s):
                while True:
                    try:
                        self.counts["asked"] += 1
                        return reply_of(url, await post(self._client, url, body, self._headers))
                    except NotNow as failure:
                        wrong = str(failure)
                        await patience.wait(failure)
        except TimeoutError:
            why = f" ({wrong})" if wrong else ""
            raise Unavailable(f"got no reply of {url} within {self.deadline_s:g} s (--reward-deadline){why}") from None

    def _score(self, reply: str) -> float | None:
        """A reward from 0 to 1; None where the reply has no score, or one beyond the scale."""
        low, high = self.rubric.scale
        found = [match[1] for match in re.finditer(self.rubric.parse, reply)]
        try:
            score = float(found[-1])
        except (IndexError, TypeError, ValueError):
            return None
        return (score - low) / (high - low) if low <= score <= high else None

    def _keep(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")


def read_cache(path: Path) -> dict[str, float]:
    """The scores of a file of replies. A line that a kill cut off is passed over, and the next one begins anew."""
    scores: dict[str, float] = {}
    if not path.exists():
        return scores
    data = path.read_bytes()
    for line in data.split(b"\n"):
        try:
            found = json.loads(line)
            scores[found["key"]] = float(found["score"])
        except (ValueError, TypeError, KeyError):
            continue
    if data and not data.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return scores


def reply_of(url: str, answer: Any) -> str:
    """The text of a chat completion. Raises Misjudged where the answer is none."""
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise Misjudged(f"{url} did not answer with a chat completion")
    return text


def conversation(prompt: Any) -> str:
    """A prompt as the judge reads it: text as it is, messages each after its role."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def filled_in(rubric: str, values: dict[str, Any]) -> str:
    """The rubric with its names in braces replaced, once: braces in what is put in stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), rubric)
