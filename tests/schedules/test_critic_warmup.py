"""The first steps of PPO train the critic alone: the policy of their checkpoints is the one that the run began with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from helpers.runs import arguments, write_inputs
from safetensors.torch import load_file

from tandem.cli.main import main


def test_the_policy_waits_for_the_critic(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    ppo = [*arguments("ppo"), "--save-every", "1", "--keep", "3", "--critic-warmup-steps", "2", "--out", "run"]
    assert main([*ppo, "--steps", "2"]) == 2
    assert "critic_warmup_steps: 2, and the run has 2 steps" in capsys.readouterr().err
    assert main([*ppo, "--steps", "3"]) == 0
    base = load_file("base/model.safetensors")
    saved = {
        (step, role): torch.load(f"run/checkpoints/step_0000000{step}/{role}.pt", weights_only=True)
        for step in (1, 2, 3)
        for role in ("actor", "critic")
    }
    for name, weight in base.items():
        assert torch.equal(saved[2, "actor"]["model"][name], weight)
    assert any(not torch.equal(saved[3, "actor"]["model"][name], weight) for name, weight in base.items())
    assert [saved[step, "actor"]["version"] for step in (1, 2, 3)] == [0, 0, 4]
    assert [saved[step, "critic"]["version"] for step in (1, 2, 3)] == [4, 8, 12]
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()][1:]
    assert ["policy_loss" in line for line in lines] == [False, False, True]
    assert all("value_loss" in line and "reward" in line for line in lines)
    # A policy that has not moved is its reference, and the KL's coefficient waits too.
    assert [line["kl_coef"] for line in lines] == [lines[0]["kl_coef"]] * 3
