"""What a run with workers is refused for before there are any, and where roles live."""

from __future__ import annotations

import os
import re
import sys

import pytest
from helpers.drivers import error_line
from helpers.shared_ray import inputs

from tandem.assembly.configs.role_sections import Placement, SamplingPlacement, placement_class
from tandem.cli.main import main
from tandem.errors import UserError
from tandem.methods.ppo import PPO
from tandem.workers.cluster import require_room, what_would_fit

__all__ = ["inputs"]
OF_PPO = placement_class(SamplingPlacement, PPO.models)


@pytest.fixture
def sft(inputs, monkeypatch, capsys):
    """Runs a step in this process: (exit code, standard error)."""
    monkeypatch.chdir(inputs)

    def call(*options: str) -> tuple[int, str]:
        code = main(["sft", "--model", "base", "--data", "demos.jsonl", "--steps", "1", "--out", "never", *options])
        return code, capsys.readouterr().err

    return call


def test_an_address_at_which_nothing_answers(sft):
    code, error = sft("--placement.actor", "1", "--cluster.address", "127.0.0.1:9")
    assert code == 2, error
    assert "cluster.address 127.0.0.1:9: no Ray cluster answers there (Connection refused)" in error_line(error)


def test_ray_that_is_not_installed(sft, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, error = sft("--placement.actor", "1")
    assert code == 2, error
    assert "Ray, which is not installed: pip install 'tandem-rlhf[cluster]'" in error_line(error)
    # One process needs none.
    code, error = sft("--overwrite")
    assert code == 0, error


def test_torchrun_and_workers_are_one_too_many(sft, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    code, error = sft("--placement.actor", "2", "--overwrite")
    assert code == 2, error
    assert "placement.actor: torchrun has started the workers already; leave the key out" in error_line(error)


def test_more_workers_than_cores(sft):
    code, error = sft("--placement.actor", "64", "--overwrite")
    assert code == 2, error
    cores = len(os.sched_getaffinity(0))
    assert re.search(rf"64 CPUs are asked for \(actor 64\), there (is|are) {cores}; --placement", error_line(error))


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        (0, r"3 GPUs are asked for \(actor 2, engine 1\), there are 0; .*--placement.actor here --device cpu"),
        (1, r"there is 1; --placement.actor here trains and samples"),
        (2, r"there are 2; --placement.actor 1 --placement.engine 1 would fit, or --placement.actor 2 with every"),
    ],
)
def test_more_gpus_than_there_are(gpus, words):
    with pytest.raises(UserError, match=words):
        require_room({"actor": 2, "engine": 1}, gpus, "GPU")
    require_room({"actor": 2, "engine": 1}, 3, "GPU")


def test_what_would_fit_fits():
    for total in range(2, 9):
        for names in (["actor"], ["actor", "engine"], ["actor", "critic", "engine"]):
            counts = re.findall(r"--placement\.\w+ (\d+)", what_would_fit(dict.fromkeys(names, 9), total))
            # The last is the other way to divide them: all to the actor.
            assert int(counts.pop()) == total
            assert sum(map(int, counts)) <= total
            assert len(counts) == (len(names) if len(names) <= total else 0)


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ({"actor": "some"}, "placement.actor: expected a number of processes or 'here', got 'some'"),
        ({"actor": "0"}, "placement.actor"),
        ({"actor": "2", "critic": "engine"}, "placement.critic: expected .*got 'engine'"),
        ({"actor": "2", "engine": "critic"}, "placement.engine: expected .*got 'critic'"),
        ({"critic": "reward", "reward": "critic"}, "reward shares with critic shares with reward, so none"),
        ({"reference": "reference"}, "placement.reference: expected"),
    ],
)
def test_placements_that_make_no_sense(placement, words):
    with pytest.raises(UserError, match=words):
        OF_PPO(**placement)


def test_homes():
    placement = OF_PPO(actor="2", critic="1", reward="critic", engine="3")
    assert [placement.home(role) for role in ("actor", "critic", "reward", "reference", "engine")] == [
        *("actor", "critic", "critic", "actor", "engine")
    ]
    assert [placement.workers(role) for role in ("actor", "critic", "reward", "engine")] == [2, 1, 0, 3]
    assert Placement().workers("actor") == 0
