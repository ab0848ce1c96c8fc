"""A schedule ends where it says, whatever the steps had to learn from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.runs import write_inputs

from tandem.cli.main import main

STEPS, RATE = 6, 3e-3
ALONE = {2, 6}
"""Steps of which every sample but one is left out."""


def test_steps_with_few_samples_leave_the_end_of_the_schedule_where_it_is(tmp_path, monkeypatch):
    """Of the 4 minibatches asked for, one a sample, there are 4 or 1. The rate is the mean of those of a step."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    (tmp_path / "leaving.py").write_text(
        "calls = 0\n"
        "def out(prompts, completions):\n"
        "    global calls\n"
        "    calls += 1\n"
        f"    left_out = 3 if calls in {ALONE} else 0\n"
        "    return [None if i < left_out else float(len(set(c))) for i, c in enumerate(completions)]\n"
    )
    argv = ["grpo", "--model", "base", "--data", "prompts.jsonl", "--reward", "leaving.py:out", "--out", "run"]
    argv += ["--prompts-per-step", "2", "--samples-per-prompt", "2", "--max-new-tokens", "5"]
    argv += ["--minibatches", "4", "--sample-epochs", "2", "--steps", str(STEPS)]
    argv += ["--learning-rate", str(RATE), "--lr-schedule", "linear", "--warmup-steps", "1"]
    assert main([*argv, "--ess-floor", "1e-6"]) == 0  # far below what samples of these weights are worth
    rates = {}
    for line in Path("run/metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        rates[metrics["step"]] = metrics.get("learning_rate")
        assert metrics.get("ess_scale", 1.0) == 1
    assert "ess_scale" in metrics
    # Two epochs of four minibatches, or of one; up to the peak in the first step, then down to 0 at the end.
    expected = {}
    for step in range(1, STEPS + 1):
        count = 2 if step in ALONE else 8
        done = [step - 1 + number / count for number in range(count)]
        shares = [(d + 1) / 2 if d < 1 else 1 - (d - 1) / (STEPS - 1) for d in done]
        expected[step] = RATE * sum(shares) / count
    assert {step: rates[step] for step in expected} == pytest.approx(expected)
