"""How far a run is: a live display on a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from types import TracebackType
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Item = TypeVar("Item")
SHOWN = (
    "loss",
    "accuracy",
    "eval/loss",
    "eval/accuracy",
    "reward",
    "kl",
    "entropy",
    "response_length",
    "eos_share",
    "grad_norm",
    "tokens_per_second",
)
"""Metrics shown unless others are asked for, in this order: those a run has."""


class Progress:
    """Steps done of ``total``, time gone and left, and a row of metrics.

    >>> with Progress("PPO", total=100) as progress:                     # doctest: +SKIP
    ...     progress.update(1, {"reward": 0.25, "kl": 0.001})
    """

    def __init__(
        self,
        title: str,
        *,
        total: int,
        start: int = 0,
        shown: Seq[str] = SHOWN,
        every_seconds: float = 5.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``start`` steps were done before. Off a terminal, a line is printed every ``every_seconds`` at most."""
        self.title = title
        self.total = total
        self.start = start
        self.step = start
        self.shown = shown
        self.every_seconds = every_seconds
        self.console = console or Console()
        self._clock = clock
        self._started = clock()
        self._metrics: dict[str, float] = {}
        self._line_step: int | None = None
        self._line_time = self._started
        live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4) if live else None

    def __enter__(self) -> Progress:
        self._started = self._line_time = self._clock()
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        elif self.step not in (self._line_step, self.start):
            self._print_line()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """``step`` steps are done. Metrics not given keep the value they had."""
        self.step = step
        self._metrics |= metrics or {}
        if self._live is None and self._clock() - self._line_time >= self.every_seconds:
            self._print_line()

    def note(self, text: str) -> None:
        """A line of its own, above the display."""
        self._print(text)

    def _print_line(self) -> None:
        self._line_step, self._line_time = self.step, self._clock()
        metrics = "  ".join(f"{name} {value}" for name, value in self._shown_metrics())
        self._print(f"{self.title} {self.step}/{self.total}  {self._times()}  {metrics}".rstrip())

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()

    def _shown_metrics(self) -> list[tuple[str, str]]:
        return [(name, format_number(self._metrics[name])) for name in self.shown if name in self._metrics]

    def _times(self) -> str:
        elapsed = self._clock() - self._started
        done, left = self.step - self.start, self.total - self.step
        if left <= 0:
            return format_seconds(elapsed)
        remaining = format_seconds(elapsed / done * left) if done > 0 else "?"
        return f"{format_seconds(elapsed)} < {remaining}"

    def _render(self) -> RenderableType:
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=max(self.total, 1), completed=self.step, width=32),
            Text(f"{self.step}/{self.total}"),
            Text(self._times(), style="cyan"),
        )
        pairs = [Text.assemble((f"{name} ", "dim"), value) for name, value in self._shown_metrics()]
        return Group(bar, Text("   ").join(pairs)) if pairs else bar


def format_number(value: float) -> str:
    """Three significant digits, whole from 1000 on: ``0.0123``, ``12.3``, ``1234``, ``1.2e-05``."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}"


def format_seconds(seconds: float) -> str:
    """``0:07``, ``12:34``, ``3:02:01``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
