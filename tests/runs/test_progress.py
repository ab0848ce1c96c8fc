"""What the display shows: on a terminal, and line by line where there is none."""

from __future__ import annotations

import io
import threading
from contextlib import ExitStack

from rich.console import Console

from tandem.runs.progress import Progress

METRICS = {"loss": 1e-8, "reward": 4.9, "eval/reward": 0.23, "kl": 0.0123, "seconds": 1.5, "lr": 1e-6}
LEADS = ("reward", "kl", "entropy", "seconds")


class Screen(io.StringIO):
    """A stream of which a thread can wait for a text."""

    def __init__(self):
        super().__init__()
        self.written = threading.Condition()

    def write(self, text):
        with self.written:
            count = super().write(text)
            self.written.notify_all()
        return count

    def wait_for(self, text):
        with self.written:
            assert self.written.wait_for(lambda: text in self.getvalue(), timeout=30), self.getvalue()


def test_held_out_numbers_stand_beside_those_of_training_and_a_loss_that_says_nothing_is_not_shown():
    screen = Screen()
    with Progress("PPO", total=3, leads=LEADS, console=Console(file=screen), every_seconds=0) as progress:
        progress.update(1, METRICS)
        progress.update(2, {"reward": 5.1})
    first, second = screen.getvalue().splitlines()
    assert first.startswith("PPO 1/3  0:00 < 0:0")
    assert first.endswith("  reward 4.9  eval/reward 0.23  kl 0.0123  seconds 1.5")
    assert second.endswith("  reward 5.1  eval/reward 0.23  kl 0.0123  seconds 1.5")
    screen = Screen()
    with Progress("PPO", total=3, leads=LEADS, judge="gold.py:right", console=Console(file=screen)) as progress:
        progress.update(1, METRICS)
    assert "  reward 4.9  eval/reward (gold.py:right) 0.23  kl 0.0123" in screen.getvalue()


def test_quick_steps_share_a_line_and_the_last_one_has_its_own():
    screen, now = Screen(), [0.0]
    progress = Progress("SFT", total=9, leads=("loss",), console=Console(file=screen), clock=lambda: now[0])
    with progress:
        for step in range(1, 10):
            now[0] += 0.3
            progress.update(step, {"loss": float(step)})
    assert [line.split()[1] for line in screen.getvalue().splitlines()] == ["1/9", "5/9", "9/9"]


def test_a_long_step_is_not_silent_without_a_terminal():
    screen = Screen()
    with Progress("GRPO", total=3, leads=LEADS, console=Console(file=screen), silent_seconds=0.02) as progress:
        with progress.phase("sampling", of=256, done=lambda: 120):
            screen.wait_for("GRPO 0/3  sampling 120 of 256, 0:00")
        with progress.phase("training"):
            screen.wait_for("GRPO 0/3  training, 0:00")
    assert "GRPO 3/3" not in screen.getvalue()


def test_a_terminal_shows_the_phase_and_no_metric_is_torn_apart():
    screen = Screen()
    console = Console(file=screen, force_terminal=True, width=50, color_system=None)
    with Progress("GRPO", total=3, leads=LEADS, console=console) as progress:
        progress.update(1, METRICS)
        with progress.phase("sampling", of=256, done=lambda: 7):
            screen.wait_for("sampling 7 of 256, 0:00")
    lines = [line.rstrip() for line in screen.getvalue().splitlines()]
    assert "reward 4.9   eval/reward 0.23   kl 0.0123" in lines
    assert "seconds 1.5" in lines


def raised(progress, *phases, cause=None):
    """A KeyError out of these phases, the first being the innermost, that follows from another error."""
    try:
        with ExitStack() as stack:
            for phase in reversed(phases):
                stack.enter_context(progress.phase(phase))
            raise KeyError("x") from cause
    except KeyError as error:
        return error


def test_an_error_is_of_the_phase_that_it_ended_and_of_no_earlier_one():
    progress = Progress("PPO", total=3, console=Console(file=Screen()))
    inner = raised(progress, "saving", "training")
    assert progress.ended_in(inner) == "saving"
    assert progress.ended_in(raised(progress, cause=inner)) == "saving"
    assert progress.ended_in(raised(progress)) == ""
    with progress.phase("sampling"):
        assert progress.ended_in(inner) == ""
    assert progress.ended_in(raised(progress, "scoring", cause=inner)) == "scoring"
