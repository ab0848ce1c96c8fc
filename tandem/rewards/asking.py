"""Asking a server over HTTP, again and again while that may help."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx2

from tandem.rewards.calling import Misjudged

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""After a failure it is asked again in half a second, then in twice the time before, up to 30 s."""
CONNECT_S = 10.0
"""Seconds in which a connection must be made."""
_MAY_PASS = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
"""HTTP statuses of a server that may answer when it is asked again."""


class NotNow(Exception):
    """A failure that may pass: why, and in how many seconds the server itself wants to be asked again."""

    def __init__(self, why: str, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class Patience:
    """How long to wait before the next try: longer after each failure, from the start again after a success."""

    def __init__(self) -> None:
        self.failures = 0

    def passed(self) -> None:
        self.failures = 0

    async def wait(self, failure: NotNow) -> None:
        wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**self.failures)
        self.failures += 1
        await asyncio.sleep(wait_s if failure.wait_s is None else min(failure.wait_s, LONGEST_WAIT_S))


async def post(client: httpx2.AsyncClient, url: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Any:
    """The JSON that a server answers. Raises NotNow for what may pass, Misjudged for what will not."""
    try:
        data = json.dumps(body, default=str)
        response = await client.post(url, content=data, headers={"content-type": "application/json", **headers})
    except (httpx2.TransportError, httpx2.StreamClosed) as error:
        raise NotNow(f"{url}: {reason(error)}") from error
    return answer_of(url, response)


def answer_of(url: str, response: httpx2.Response) -> Any:
    """What a response says. Raises as ``post`` does."""
    if response.status_code != 200:
        said = " ".join(response.text.split())[:200]
        what = f"{url}: status {response.status_code}" + (f": {said}" if said else "")
        if response.status_code in _MAY_PASS:
            raise NotNow(what, _seconds(response.headers.get("retry-after")))
        raise Misjudged(what)
    try:
        return json.loads(response.content)
    except ValueError as error:
        raise Misjudged(f"{url}: the answer is not JSON") from error


def reason(error: Exception) -> str:
    """A failed connection in words."""
    if isinstance(error, httpx2.ConnectTimeout):
        return f"no connection within {CONNECT_S:g} s"
    if isinstance(error, httpx2.TimeoutException):
        return "no answer in time"
    return " ".join(str(error).split()) or type(error).__name__


def _seconds(header: str | None) -> float | None:
    """The seconds of ``Retry-After``, which may also be a date."""
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None
