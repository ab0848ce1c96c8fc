"""Checkers that Tandem has: mathematics against an answer, tasks of reasoning-gym, and the form of a completion."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import resource
import select
import signal
from collections.abc import Callable
from typing import Any

from tandem.lazy import extra
from tandem.rewards.calling import judges

PARSE_S = 5
"""Seconds that math-verify may take for one expression, and for one comparison."""
GUARD_S = 20.0
"""Seconds after which a check is given up whatever it is doing: arithmetic in C hears no alarm."""
GUARD_BYTES = 4 << 30
"""Memory (4 GiB) that one check may map."""
ANSWERS = ("answer", "solution")
"""Columns with the right answer, the first that there is."""


@judges("sample")
class FormatCheck:
    """1 where a regular expression matches the whole completion (``.`` is any character), and 0 elsewhere."""

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern, re.DOTALL)

    def __call__(self, completion: Any) -> float:
        return float(self.pattern.fullmatch(text_of(completion)) is not None)


@judges("sample")
class MathCheck:
    """1 where the last expression of a completion equals that of the answer, by math-verify, and 0 elsewhere.

    ``column`` holds the answer; None: the first of ``ANSWERS`` that the dataset has. A sample whose answer cannot be
    read, or whose check is given up, is left out, and counted.
    """

    def __init__(self, column: str | None = None) -> None:
        math_verify = extra("math_verify", "reward math: the comparison is that", "envs")
        self._verify, self._parse = math_verify.verify, math_verify.parse
        self._read_answer = functools.lru_cache(maxsize=1 << 14)(self._read)
        self.one_of = (column,) if column else ANSWERS
        self.counts = {"no_answer": 0, "given_up": 0}

    def __call__(self, completion: Any, **columns: Any) -> float | None:
        answer = next((columns[name] for name in self.one_of if columns.get(name) is not None), None)
        right = [] if answer is None else self._read_answer(text_of(answer))
        if not right:
            self.counts["no_answer"] += 1
            return None
        return guarded(lambda: self._equals(right, text_of(completion)), self.counts)

    def _equals(self, right: list[Any], text: str) -> float:
        """A completion that cannot be read is wrong; a comparison that fails, or takes too much, says nothing of it."""
        try:
            given = self._parse(text, parsing_timeout=PARSE_S, raise_on_error=True)
        except MemoryError:
            raise
        except Exception:
            return 0.0
        return float(self._verify(right, given, timeout_seconds=PARSE_S, raise_on_error=True))

    def _read(self, text: str) -> list[Any]:
        # Answers are often bare LaTeX, which is only looked for between marks.
        marked = text if "$" in text or "\\boxed" in text else f"${text}$"
        found: list[Any] = self._parse(marked, parsing_timeout=PARSE_S)
        return found or list(self._parse(text, parsing_timeout=PARSE_S))


@judges("sample")
class GymCheck:
    """The score, from 0 to 1, that a task of reasoning-gym gives: of the last ``<answer>``, or of the whole text.

    A sample whose check fails or is given up is left out, and counted.
    """

    one_of = ("entry",)

    def __init__(self) -> None:
        reasoning_gym = extra("reasoning_gym", "reward reasoning-gym: the score is that", "envs")
        self._scorer = functools.cache(reasoning_gym.get_score_answer_fn)
        self.counts = {"given_up": 0}

    def __call__(self, completion: Any, task: Any = None, entry: Any = None) -> float | None:
        if entry is None:
            return None
        text = text_of(completion)
        answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        scorer = self._scorer(task)
        given = answers[-1].strip() if answers else text.strip()
        return guarded(lambda: float(scorer(given, entry)), self.counts)


def text_of(completion: Any) -> str:
    """A completion's text, also where it is a list with the assistant's message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def guarded(check: Callable[[], float], counts: dict[str, int]) -> float | None:
    """A check in a process forked for it, which is killed where it does not end. For one without other threads.

    None where it took too long, or too much memory, or failed: that counts as ``given_up``.
    """
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            with contextlib.suppress(ValueError, OSError):  # not every system limits this
                resource.setrlimit(resource.RLIMIT_AS, (GUARD_BYTES, GUARD_BYTES))
            os.write(write, repr(check()).encode())
        finally:
            os._exit(0)
    os.close(write)
    ready: list[int] = []
    try:
        ready, _, _ = select.select([read], [], [], GUARD_S)
        said = os.read(read, 64).decode() if ready else ""
    finally:
        os.close(read)
        if not ready:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if said:
        return float(said)
    counts["given_up"] += 1
    return None
