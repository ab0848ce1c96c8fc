"""The reward protocol, served: requests of several runs are joined into batches (``tandem serve-reward``)."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict

from tandem.errors import UserError
from tandem.rewards.protocol import HEALTH, PROTOCOL, SCORE

SAID_EVERY_S = 10.0
"""A line says every 10 s at most what has been judged since the last one."""

log = logging.getLogger("tandem")


class Sample(BaseModel):
    """A prompt and what was sampled after it: texts, or lists of messages."""

    model_config = ConfigDict(extra="forbid")
    prompt: str | list[dict[str, Any]]
    completion: str | list[dict[str, Any]]
    stop_reason: Literal["eos", "length", "stop_string", "tool"] = "eos"
    columns: dict[str, Any] = {}


class Asked(BaseModel):
    """The body of ``POST /score``."""

    model_config = ConfigDict(extra="forbid")
    samples: list[Sample]


Score = Callable[[Seq[Sample]], list[float | None]]
"""Judges samples, in a thread of its own. Raises UserError where they cannot be judged."""


@dataclass
class Batches:
    """Requests on their way through the judge, one batch at a time: while it works, the next one comes together."""

    score: Score
    limit: int
    waiting: list[tuple[Seq[Sample], asyncio.Future[list[float | None]]]] = field(default_factory=list)
    some: asyncio.Event = field(default_factory=asyncio.Event)
    judged: int = 0
    batches: int = 0

    async def ask(self, samples: Seq[Sample]) -> list[float | None]:
        """The scores of a request's samples, in their order."""
        if not samples:
            return []
        future: asyncio.Future[list[float | None]] = asyncio.get_running_loop().create_future()
        self.waiting.append((samples, future))
        self.some.set()
        return await future

    async def work(self) -> None:
        """Until it is cancelled."""
        said = time.monotonic()
        while True:
            await self.some.wait()
            await asyncio.sleep(0)  # requests that have come with this one are there now
            together = [self.waiting.pop(0)]
            size = len(together[0][0])
            while self.waiting and size + len(self.waiting[0][0]) <= self.limit:
                together.append(self.waiting.pop(0))
                size += len(together[-1][0])
            if not self.waiting:
                self.some.clear()
            await self._judge(together)
            if self.batches and time.monotonic() - said >= SAID_EVERY_S:
                log.info("%d samples judged in %d batches", self.judged, self.batches)
                said, self.judged, self.batches = time.monotonic(), 0, 0

    async def _judge(self, together: Seq[tuple[Seq[Sample], asyncio.Future[list[float | None]]]]) -> None:
        try:
            scores = iter(await asyncio.to_thread(self.score, [one for samples, _ in together for one in samples]))
        except Exception as error:
            if len(together) > 1:
                # Whose it is, nobody knows: each by itself.
                for one in together:
                    await self._judge([one])
            elif not together[0][1].done():
                together[0][1].set_exception(error)
            return
        self.batches += 1
        for samples, future in together:
            its = [next(scores) for _ in samples]
            self.judged += len(its)
            if not future.done():
                future.set_result(its)


def make_app(score: Score, *, name: str, version: str, batch_limit: int, token: str | None) -> FastAPI:
    """A server of one reward. ``token``: what ``POST /score`` must carry as a bearer; None: nothing."""
    batches = Batches(score, batch_limit)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batches.work())
        yield
        task.cancel()

    app = FastAPI(title="Tandem reward server", lifespan=lifespan)

    @app.get(HEALTH)
    async def health() -> dict[str, Any]:
        return {"status": "ok", "protocol": PROTOCOL, "name": name, "version": version, "batch_limit": batch_limit}

    @app.post(SCORE)
    async def judge(asked: Asked, request: Request) -> dict[str, Any]:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "a bearer token is needed, and it must be this server's")
        if len(asked.samples) > batch_limit:
            raise HTTPException(413, f"{len(asked.samples)} samples in one request; at most {batch_limit} are taken")
        try:
            return {"scores": await batches.ask(asked.samples), "version": version}
        except UserError as error:
            raise HTTPException(422, str(error)) from error

    return app
