"""How far a run is: a live display on a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

GAP = 3
"""3 columns stand between two metrics on a terminal."""


class Progress:
    """Steps done of ``total``, time gone and left, a row of metrics, and what the step in progress is doing.

    >>> with Progress("PPO", total=100, leads=("reward", "kl")) as progress:     # doctest: +SKIP
    ...     with progress.phase("sampling", of=256, done=lambda: engine.ended):
    ...         groups = sample()
    ...     progress.update(1, {"reward": 0.25, "kl": 0.001})
    """

    def __init__(
        self,
        title: str,
        *,
        total: int,
        start: int = 0,
        leads: Seq[str] = (),
        judge: str = "",
        every_seconds: float = 1.0,
        silent_seconds: float = 30.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``start`` steps were done before. ``leads`` are the metrics that are shown, in this order.

        Beside each of them stands the same of the held-out data (``eval/NAME``), where it was measured, a reward with
        its ``judge`` where that is another one than in training. Off a
        terminal there is a line for each step, but one every ``every_seconds`` at most, and one that says what goes
        on whenever nothing was printed for ``silent_seconds``.
        """
        self.title = title
        self.total = total
        self.start = start
        self.step = start
        self.leads = leads
        self.judge = judge
        self.every_seconds = every_seconds
        self.silent_seconds = silent_seconds
        self.console = console or Console()
        self._clock = clock
        self._started = clock()
        self._metrics: dict[str, float] = {}
        self._phase = ""
        self._failed: tuple[BaseException, str] | None = None
        """The newest error that has ended a phase, and the innermost one that it did."""
        self._phase_of = 0
        self._phase_done: Callable[[], int] | None = None
        self._phase_started = self._started
        self._line_step: int | None = None
        self._line_time = -math.inf
        self._printed = self._started
        live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4) if live else None
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._break_silences, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._started = self._printed = self._clock()
        if self._live:
            self._live.start()
        else:
            self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._live:
            self._live.stop()
        else:
            self._watch.join()
            if self.step not in (self._line_step, self.start):
                self._print_line()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """``step`` steps are done. Metrics not given keep the value they had."""
        self.step = step
        self._metrics |= metrics or {}
        if self._live is None and self._clock() - self._line_time >= self.every_seconds:
            self._print_line()

    @contextmanager
    def phase(self, phase: str, *, of: int = 0, done: Callable[[], int] | None = None) -> Iterator[None]:
        """What the step in progress does in the body. ``done()`` says how many of ``of`` things are, at any time."""
        self._phase_started, self._phase_of, self._phase_done = self._clock(), of, done
        self._phase, self._failed = phase, None
        try:
            yield
        except BaseException as error:
            if not self.ended_in(error):
                self._failed = error, phase
            raise
        finally:
            self._phase = ""

    def ended_in(self, error: BaseException) -> str:
        """The phase that an error has ended, or the one that it comes from; nothing where it was raised in none."""
        chain: BaseException | None = error
        while chain is not None and self._failed is not None:
            if chain is self._failed[0]:
                return self._failed[1]
            chain = chain.__cause__ or chain.__context__
        return ""

    def note(self, text: str) -> None:
        """A line of its own, above the display."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()
        self._printed = self._clock()

    def _break_silences(self) -> None:
        while not self._ended.wait(max(0.0, self._printed + self.silent_seconds - self._clock())):
            if self._clock() - self._printed < self.silent_seconds:
                continue
            self._printed = self._clock()
            if doing := self._doing():
                self.note(f"{self.title} {self.step}/{self.total}  {doing}")

    def _print_line(self) -> None:
        self._line_step, self._line_time = self.step, self._clock()
        metrics = "  ".join(f"{name} {value}" for name, value in self._shown_metrics())
        self.note(f"{self.title} {self.step}/{self.total}  {self._times()}  {metrics}".rstrip())

    def _shown_metrics(self) -> list[tuple[str, str]]:
        names = leading(self.leads, self._metrics)
        return [(judged(name, self.judge), format_number(self._metrics[name])) for name in names]

    def _times(self) -> str:
        elapsed = self._clock() - self._started
        done, left = self.step - self.start, self.total - self.step
        if left <= 0:
            return format_seconds(elapsed)
        remaining = format_seconds(elapsed / done * left) if done > 0 else "?"
        return f"{format_seconds(elapsed)} < {remaining}"

    def _doing(self) -> str:
        """``sampling 120 of 256, 0:12``; nothing between two phases."""
        phase, done = self._phase, self._phase_done
        if not phase:
            return ""
        counted = f" {done()} of {self._phase_of}" if done is not None else ""
        return f"{phase}{counted}, {format_seconds(self._clock() - self._phase_started)}"

    def _render(self) -> RenderableType:
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=max(self.total, 1), completed=self.step, width=32),
            Text(f"{self.step}/{self.total}"),
            Text(self._times(), style="cyan"),
        )
        rows: list[RenderableType] = [bar, *self._metric_rows()]
        return Group(*rows, Text(self._doing(), style="dim")) if self.leads else bar

    def _metric_rows(self) -> list[Text]:
        """Metrics side by side, as many in a row as the terminal is wide enough for."""
        rows: list[Text] = []
        for name, value in self._shown_metrics():
            pair = Text.assemble((f"{name} ", "dim"), value)
            if rows and len(rows[-1]) + GAP + len(pair) <= self.console.width:
                rows[-1].append(" " * GAP).append_text(pair)
            else:
                rows.append(pair)
        return rows


def say(text: str) -> None:
    """A line for what goes on before there is a display: loading, tokenizing, starting processes."""
    print(text, flush=True)


def leading(leads: Seq[str], names: Collection[str]) -> list[str]:
    """Those of ``names`` that lead, in the order of ``leads``, each before the same of held-out data."""
    return [name for lead in leads for name in (lead, *held_out_of(lead, names)) if name in names]


def held_out_of(metric: str, names: Collection[str]) -> list[str]:
    """Those of ``names`` that are a metric of held-out data: ``eval/METRIC``, or ``eval/SET/METRIC`` of each set."""
    alone = f"eval/{metric}"
    if alone in names:
        return [alone]
    return [name for name in names if re.fullmatch(rf"eval/[^/]+/{re.escape(metric)}", name)]


def judged(metric: str, judge: str) -> str:
    """The name of a metric to be shown, of a reward of held-out data with its ``judge``; empty: training's own."""
    return f"{metric} ({judge})" if judge and re.fullmatch("eval/(.*/)?reward", metric) else metric


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
