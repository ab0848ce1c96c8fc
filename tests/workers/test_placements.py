"""Law 2: where roles live changes nothing. One process, one worker and many give the same parameters.

Runs here use the Ray of this process, so that none of them has to start one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.shared_ray import arguments, cluster_address, inputs
from helpers.unfilled import NeverFilled
from safetensors.torch import load_file
from torch import Tensor

from tandem.assembly import wiring
from tandem.cli.main import main

__all__ = ["cluster_address", "inputs"]
STEPS = 3
# From the trainer's own log-probs, so that the gap to the sampler's is logged and what is trained on does not depend on
# how many samples an engine decodes together, which its rounding does.
TRAINER_LOGP = ("--old-logp", "trainer")
# Within the actor's processes, or from them to the reference's own.
REFRESHED = ("--reference-every", "1", "--reference-mix", "0.5")


@pytest.fixture(autouse=True)
def folder(inputs: Path, cluster_address: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(inputs)
    return inputs


def train(
    out: str, method: str, *options: str, steps: int = STEPS, learning_rate: str = "1e-4", lr_schedule: str = "linear"
) -> dict[str, Tensor]:
    """Runs a command in this process. Returns the parameters it ends with."""
    argv = arguments(method, learning_rate=learning_rate, lr_schedule=lr_schedule)
    assert main([*argv, "--steps", str(steps), "--out", out, *options]) == 0
    return load_file(f"{out}/model/model.safetensors")


def metrics(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()][1:]


def ready(out: str) -> dict[str, dict[str, float]]:
    """Seconds of the stages of each process's start, which are no more than the start took."""
    events = [json.loads(line) for line in Path(out, "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "ready"]
    assert max(sum(seconds.values()) for seconds in event["stages"].values()) <= event["seconds"] + 0.5
    return event["stages"]


def assert_sampler_agrees(out: str) -> None:
    """Law 4."""
    gaps = [line["sampler_gap_max"] for line in metrics(out)]
    assert len(gaps) == STEPS
    assert max(gaps) < 1e-4


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def ppo_here(inputs: Path, cluster_address: str) -> dict[str, Tensor]:
    """What one process without workers gives, and that it has moved the parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        trained = train("ppo-here", "ppo", *TRAINER_LOGP)
        assert_sampler_agrees("ppo-here")
        assert difference(trained, load_file("base/model.safetensors")) > 1e-4
        return trained


def test_ppo_in_one_worker_is_the_same_bit_for_bit(ppo_here):
    assert_equal(train("ppo-one", "ppo", *TRAINER_LOGP, "--placement.actor", "1"), ppo_here)
    assert_sampler_agrees("ppo-one")


def test_ppo_in_two_workers(ppo_here):
    """On gathered weights, each samples its share."""
    trained = train("ppo-two", "ppo", *TRAINER_LOGP, "--placement.actor", "2")
    assert 0 < difference(trained, ppo_here) < 1e-6
    assert_sampler_agrees("ppo-two")


@pytest.mark.usefixtures("helpers_importable")
def test_engines_in_the_actors_workers_that_are_never_filled_end_the_run(monkeypatch, capsys):
    monkeypatch.setattr(wiring, "Replicas", NeverFilled)
    argv = [*arguments("grpo"), "--steps", "3", "--placement.actor", "2", "--out", "unfilled"]
    assert main(argv) == 75
    # Two optimizer steps make the first step.
    assert "after push 2 engine 1 does not hold the trainer's model.embed_tokens.weight" in capsys.readouterr().err


def test_all_apart_trained_on_the_engines_own_log_probs(inputs, capsys):
    """Bit for bit, too, where the ratios come from the sampler: one engine decodes the same samples together."""
    here = train("own-here", "ppo", *REFRESHED)
    places = [word for role in ("actor", "critic", "engine", "reference") for word in (f"--placement.{role}", "1")]
    apart = train("own-apart", "ppo", *REFRESHED, *places)
    assert_equal(apart, here)
    assert "sync_gb_per_second" in metrics("own-apart")[-1]
    of_worker = ready("own-apart")
    assert [*of_worker] == ["here", *(f"{role} rank 0" for role in ("actor", "reference", "critic", "engine"))]
    assert all({"processes", "imports"} <= seconds.keys() for name, seconds in of_worker.items() if name != "here")
    assert re.search(r"^ready after [\d.]+ s: .*; \w+ rank 0: processes .*, imports ", capsys.readouterr().out, re.M)


def test_online_dpo_in_a_worker(inputs):
    here = train("online-dpo-here", "online-dpo", *REFRESHED)
    assert difference(here, load_file("base/model.safetensors")) > 1e-4
    assert_equal(train("online-dpo-one", "online-dpo", *REFRESHED, "--placement.actor", "1"), here)
    lines = zip(metrics("online-dpo-one"), metrics("online-dpo-here"), strict=True)
    assert all(one["reward_margin"] == other["reward_margin"] for one, other in lines)


def test_grpo_with_scorers_in_groups_of_their_own(inputs):
    rm = ["--reward-model", "judge/model", "--kl-coef", "0.1", *TRAINER_LOGP]
    train("judge", "rm", steps=2)
    here = train("grpo-here", "grpo", *rm)
    apart = train(
        "grpo-apart", "grpo", *rm, "--placement.actor", "1", "--placement.reference", "1", "--placement.reward", "2"
    )
    # Two workers hold the reward model in slices, but what they gather is the whole of it.
    assert difference(apart, here) < 1e-6
    assert_sampler_agrees("grpo-apart")
    kl = [line["kl"] for line in metrics("grpo-apart")]
    assert abs(kl[-1]) > 1e-5
    assert kl == pytest.approx([line["kl"] for line in metrics("grpo-here")], abs=1e-6)


def test_a_run_goes_on_in_other_processes(ppo_here):
    """Stopped after 2 steps in this process; the third is made by two workers and two engines apart."""
    every = ["--save-every", "1", *TRAINER_LOGP]
    # A falling learning rate would refuse a third step after two.
    unbroken = train("unbroken", "ppo", *every, lr_schedule="constant")
    train("moved", "ppo", *every, lr_schedule="constant", steps=2)
    placement = ["--placement.actor", "2", "--placement.engine", "2", "--cluster.deadline", "100"]
    moved = train("moved", "ppo", *every, "--resume", *placement, lr_schedule="constant")
    assert difference(moved, unbroken) < 1e-6
    assert [line["step"] for line in metrics("moved")] == [1, 2, 3]
    assert_sampler_agrees("moved")


def test_a_teacher_in_a_worker_of_its_own(inputs):
    """Beside an actor here: ``test_the_hidden_states_and_the_head_of_a_teacher_travel``."""
    apart = train("taught-apart", "opd", "--placement.actor", "1", "--placement.teacher", "1")
    assert_equal(apart, train("taught-here", "opd"))


def test_a_command_that_trains_nothing_divides_its_prompts_among_engines():
    words = ["generate", "--model", "base", "--data", "prompts.jsonl", "--max-new-tokens", "5"]
    assert main([*words, "--out", "sampled/here"]) == 0
    assert main([*words, "--out", "sampled/apart", "--placement.engine", "2"]) == 0
    here, apart = (Path("sampled", name, "samples.jsonl").read_bytes() for name in ("here", "apart"))
    assert here == apart


def test_the_hidden_states_and_the_head_of_a_teacher_travel(inputs):
    apart = train("distill-apart", "distill", "--placement.teacher", "1")
    assert_equal(apart, train("distill-here", "distill"))
