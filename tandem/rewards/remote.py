"""Reward servers as a reward: samples go out as they come, in lots, to whichever server has room."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import httpx2

from tandem.errors import UserError
from tandem.rewards.asking import CONNECT_S, NotNow, Patience, answer_of, post, reason
from tandem.rewards.calling import Misjudged, Setting, Unavailable, judges
from tandem.rewards.protocol import HEALTH, PROTOCOL, SCORE, TOKEN

AT_ONCE = 2
"""Requests under way to one server: it finds the next one there when it is done with the one before."""


@dataclass
class Waiting:
    """A sample that has no score yet."""

    sample: Mapping[str, Any]
    score: asyncio.Future[Any]


@judges("sample")
class RewardServers:
    """Servers of one reward, which share the load.

    A request that fails (no connection, no answer, status 408, 409, 425, 429 or 5xx) is made again, after a wait that
    grows, by whichever server is free, until none has given a score for the length of the deadline. What will not pass
    (another status, too few scores, a model that has changed) is an error at once. A failure is never a score.
    """

    patient = True

    def __init__(self, urls: Seq[str], setting: Setting) -> None:
        """Raises UserError where one does not answer, speaks another protocol, refuses the token, or judges otherwise
        than the others."""
        self.urls, self.deadline_s = list(urls), setting.deadline_s
        token = os.environ.get(TOKEN)
        self.headers = {"authorization": f"Bearer {token}"} if token else {}
        self._waiting: deque[Waiting] = deque()
        self._some = asyncio.Condition()
        self._takers: list[asyncio.Task[None]] = []
        self._wrong = ""
        """What was last wrong."""
        self._scored = 0.0
        """When a server last gave scores."""
        # The environment's proxies are for the world outside.
        with httpx2.Client(timeout=min(CONNECT_S, self.deadline_s), trust_env=False) as client:
            known = [self._greet(client, url) for url in urls]
        self.version = known[0]["version"]
        for url, other in zip(urls, known, strict=True):
            if other["version"] != self.version:
                raise UserError(
                    f"{url} serves version {other['version']!r} and {urls[0]} {self.version!r}: servers that share the "
                    "load must serve the same reward"
                )
        self.limits = [int(one["batch_limit"]) for one in known]

    async def __call__(
        self, prompt: Any, completion: Any, stop_reason: str, completion_ids: Any = None, **columns: Any
    ) -> Any:
        if not self._takers:
            self._begin()
        sample = {"prompt": prompt, "completion": completion, "stop_reason": stop_reason, "columns": columns}
        waiting = Waiting(sample, asyncio.get_running_loop().create_future())
        async with self._some:
            self._waiting.append(waiting)
            self._some.notify()
        begun = time.monotonic()
        # While scores come, the others only wait for their turn.
        while (left_s := max(begun, self._scored) + self.deadline_s - time.monotonic()) > 0:
            done, _ = await asyncio.wait({waiting.score}, timeout=left_s)
            if done:
                return waiting.score.result()
        waiting.score.cancel()
        wrong = f" ({self._wrong})" if self._wrong else ""
        raise Unavailable(
            f"got no score of {', '.join(self.urls)} within {self.deadline_s:g} s (--reward-deadline){wrong}"
        )

    def _greet(self, client: httpx2.Client, url: str) -> dict[str, Any]:
        try:
            known = answer_of(f"{url}{HEALTH}", client.get(f"{url}{HEALTH}"))
            if not isinstance(known, dict) or known.get("protocol") != PROTOCOL:
                raise UserError(f"{url}{HEALTH} does not speak version {PROTOCOL} of the protocol of docs/rewards.md")
            limit = known.get("batch_limit")
            if not isinstance(known.get("version"), str) or not isinstance(limit, int) or limit < 1:
                raise UserError(f"{url}{HEALTH} must give a text 'version' and a 'batch_limit' of 1 or more")
            response = client.post(f"{url}{SCORE}", json={"samples": []}, headers=self.headers)
            scores_of(url, answer_of(f"{url}{SCORE}", response), 0)
        except httpx2.TransportError as error:
            raise UserError(f"{url}: {reason(error)}; is the reward server there, and ready?") from error
        except (NotNow, Misjudged) as error:
            hint = f"; is {TOKEN} its token?" if "status 401" in str(error) else ""
            raise UserError(f"{error}{hint}") from error
        return known

    def _begin(self) -> None:
        timeout = httpx2.Timeout(self.deadline_s, connect=min(CONNECT_S, self.deadline_s), pool=None)
        client = httpx2.AsyncClient(timeout=timeout, trust_env=False)
        for url, limit in zip(self.urls, self.limits, strict=True):
            patience = Patience()
            self._takers += [asyncio.create_task(self._serve(client, url, limit, patience)) for _ in range(AT_ONCE)]

    async def _serve(self, client: httpx2.AsyncClient, url: str, limit: int, patience: Patience) -> None:
        """Takes lots of what waits, as long as the process lives."""
        while True:
            lot = await self._take(limit)
            try:
                body = {"samples": [one.sample for one in lot]}
                answer = await post(client, f"{url}{SCORE}", body, self.headers)
                self._require_version(url, answer)
                scores = scores_of(url, answer, len(lot))
            except NotNow as failure:
                self._wrong = str(failure)
                async with self._some:
                    self._waiting.extendleft(reversed(lot))
                    self._some.notify_all()
                await patience.wait(failure)
            except Exception as error:
                for one in lot:
                    if not one.score.done():
                        one.score.set_exception(error)
            else:
                patience.passed()
                self._scored = time.monotonic()
                for one, score in zip(lot, scores, strict=True):
                    if not one.score.done():
                        one.score.set_result(score)

    async def _take(self, limit: int) -> list[Waiting]:
        lot: list[Waiting] = []
        while not lot:
            async with self._some:
                await self._some.wait_for(lambda: len(self._waiting) > 0)
            await asyncio.sleep(0)  # whatever has come with it is there now
            while self._waiting and len(lot) < limit:
                one = self._waiting.popleft()
                lot += [] if one.score.done() else [one]
        return lot

    def _require_version(self, url: str, answer: Any) -> None:
        version = answer.get("version", self.version) if isinstance(answer, dict) else self.version
        if version != self.version:
            raise Misjudged(
                f"{url} serves version {version!r} now, and {self.version!r} when the run began: serve that again, or "
                "go on with --resume --accept-changed reward"
            )


def scores_of(url: str, answer: Any, samples: int) -> list[Any]:
    """The scores of an answer. Raises Misjudged where they are not one a sample."""
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise Misjudged(f"{url}{SCORE} must answer with a list 'scores'")
    if len(scores) != samples:
        raise Misjudged(f"{url}{SCORE} returned {len(scores)} scores for {samples} samples")
    return scores
