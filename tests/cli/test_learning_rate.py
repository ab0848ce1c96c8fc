"""A schedule ends where it says, whatever the steps had to learn from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs_in_processes import write_inputs

from tandem.cli.main import main

STEPS, RATE = 6, 3e-3
EMPTY = {2, 3}
"""Steps of which every sample is left out."""


def test_steps_without_samples_and_with_few_leave_the_end_of_the_schedule_where_it_is(tmp_path, monkeypatch):
    """At 4 samples there are 4 minibatches of the 8 asked for. The rate is the mean of those of a step."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    (tmp_path / "leaving.py").write_text(
        "calls = 0\n"
        "def out(prompts, completions):\n"
        "    global calls\n"
        "    calls += 1\n"
        f"    return [None if calls in {EMPTY} else float(len(set(c))) for c in completions]\n"
    )
    argv = ["grpo", "--model", "base", "--data", "prompts.jsonl", "--reward", "leaving.py:out", "--out", "run"]
    argv += ["--prompts-per-step", "2", "--samples-per-prompt", "2", "--max-new-tokens", "5"]
    argv += ["--minibatches", "8", "--epochs", "2", "--steps", str(STEPS)]
    argv += ["--learning-rate", str(RATE), "--lr-schedule", "linear", "--warmup-steps", "1"]
    assert main(argv) == 0
    rates = {}
    for line in Path("run/metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        rates[metrics["step"]] = metrics.get("learning_rate")
    # Eight optimizer steps a step of the run, by eighths of it; up to the peak in the first, then down to 0 at the end.
    done = {step: [step - 1 + eighth / 8 for eighth in range(8)] for step in range(1, STEPS + 1)}
    expected = {step: sum(RATE * (1 - (d - 1) / (STEPS - 1)) for d in at) / 8 for step, at in done.items()}
    expected[1] = sum(RATE * (d + 1) / 2 for d in done[1]) / 8
    for step in EMPTY:
        assert rates[step] is None
    trained = set(expected) - EMPTY
    assert {step: rates[step] for step in trained} == pytest.approx({step: expected[step] for step in trained})
