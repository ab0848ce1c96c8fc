"""A run's length in epochs of its data is so many steps: for the schedule, the plan, a resume, and the last save."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from helpers.runs import arguments, write_inputs

import tandem
from tandem.cli.main import main
from tandem.errors import UserError


@pytest.mark.parametrize(
    ("epochs", "rows", "per_step", "steps"),
    [
        (1, 40, 7, 6),
        (1, 42, 7, 6),
        (0.1, 70, 7, 1),
        (0.3, 100, 10, 3),
        (2.5, 40, 10, 10),
        (0.001, 10, 10, 1),
        (3, 5, 8, 2),
        (1.1, 10, 11, 1),
    ],
)
def test_whole_steps_that_hold_every_row_that_often(epochs, rows, per_step, steps):
    config = tandem.read_config("sft", model="m", data="d.jsonl", out="o", epochs=epochs, batch_size=per_step)
    assert config.steps_over(rows) == steps
    assert steps * per_step >= Fraction(str(epochs)) * rows
    assert steps == 1 or (steps - 1) * per_step < Fraction(str(epochs)) * rows


def test_the_length_is_given_once():
    keys = {"model": "m", "data": "d.jsonl", "out": "o"}
    with pytest.raises(UserError, match=r"steps: .*give --steps, or --epochs"):
        tandem.read_config("sft", **keys)
    with pytest.raises(UserError, match=r"epochs: steps is set too"):
        tandem.read_config("sft", steps=3, epochs=1, **keys)
    for wrong in (0, -1):
        with pytest.raises(UserError, match="epochs: expected more than 0"):
            tandem.read_config("sft", epochs=wrong, **keys)


def test_an_epoch_is_its_steps(tmp_path, monkeypatch, capsys):
    """40 rows, 7 a step: the 6 steps of ``--steps 6``, with the learning rate that falls to 0 at the sixth."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    sft = arguments("sft")
    assert main([*sft, "--steps", "6", "--out", "steps"]) == 0
    assert main([*sft, "--epochs", "1", "--out", "epochs"]) == 0
    assert "1 epochs of 40 rows are 6 steps of 7" in capsys.readouterr().out
    weights = [Path(out, "model/model.safetensors").read_bytes() for out in ("steps", "epochs")]
    assert weights[0] == weights[1]
    rates = [
        [json.loads(line).get("learning_rate") for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        for out in ("steps", "epochs")
    ]
    assert len(rates[0]) == 7
    assert rates[0] == rates[1]
    resumed = ["sft", "--config", "epochs/config.yaml", "--resume"]
    assert main(resumed) == 0
    assert "all 6 steps are done" in capsys.readouterr().out
    assert main([*resumed, "--epochs", "2"]) == 2
    assert "epochs (1.0 there, 2.0 now: its linear" in capsys.readouterr().err
    assert main(["sft", "--config", "epochs/config.yaml", "--out", "other", "--dry-run"]) == 0
    assert "gone through 1.05 times in 6 steps" in capsys.readouterr().out
    assert main([*arguments("grpo"), "--epochs", "2", "--out", "other", "--dry-run"]) == 0
    assert "gone through 2.10 times in 14 steps" in capsys.readouterr().out


def test_a_longer_or_shorter_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    sft = [*arguments("sft", lr_schedule="constant"), "--save-every", "1", "--out", "run"]
    assert main([*sft, "--epochs", "0.3"]) == 0
    assert main([*sft, "--epochs", "0.1", "--resume"]) == 2
    assert "epochs: 1 steps, and the run in run has done 2 already" in capsys.readouterr().err
    assert main([*sft, "--steps", "3", "--resume"]) == 0
    assert "3 steps now; what is done was done for 0.3 epochs" in capsys.readouterr().out
