"""Runs that sample with real vLLM: placed apart and shared, killed, checked by the doctor, and lied to."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.broken_engines import damaged_engine
from helpers.drivers import command, descendants, running
from helpers.models import bitsandbytes_folder
from helpers.shared_ray import arguments, cluster_address, unevaluated, write_inputs
from helpers.vllm_models import make_model, save
from safetensors.torch import load_file
from torch import Tensor

from tandem.assembly import wiring
from tandem.cli.main import main
from tandem.workers.engines import EngineGroup, RestartingOnce
from tandem.workers.keeper import SHARED_MEMORY

__all__ = ["cluster_address"]
VLLM = ("--engine.kind", "vllm", "--old-logp", "trainer", "--max-slots", "8", "--engine.max-length", "32")
SPLIT = ("--placement.engine", "1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm-runs")
    write_inputs(folder)
    save(make_model("llama", seed=0, tied=True), folder / "base")
    return folder


@pytest.fixture(autouse=True)
def at_inputs(inputs: Path, cluster_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)


def train(out: str, method: str, *options: str, model: str = "base") -> dict[str, Tensor]:
    argv = [*unevaluated(arguments(method, learning_rate="1e-4")), "--steps", "3", "--out", out, *options]
    assert main([model if word == "base" else word for word in argv]) == 0
    (weights,) = Path(out, "model").glob("*model.safetensors")
    return load_file(weights)


def metrics(out: str) -> list[dict[str, Any]]:
    """Of each step."""
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_sampler_agrees(out: str) -> None:
    """Law 4."""
    gaps = [line["sampler_gap_max"] for line in metrics(out)]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4


@pytest.fixture(scope="module")
def grpo_split(inputs: Path, cluster_address: str) -> dict[str, Tensor]:
    """The trainer here, one engine apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        return train("grpo-split", "grpo", *VLLM, *SPLIT)


def test_grpo_split(grpo_split, inputs):
    assert_sampler_agrees("grpo-split")
    assert difference(grpo_split, load_file("base/model.safetensors")) > 1e-4
    # Before the first step, and after each.
    assert all(line["sync_seconds"] > 0 for line in metrics("grpo-split"))


def test_ppo_on_two_workers_shared_devices():
    """Adapters of a sharded actor, which alone travel once the base has: that of a folder in 4 bits, in full."""
    bitsandbytes_folder(Path("base"), Path("four"))
    options = ("--placement.actor", "2", "--engine.arguments", '{"enforce_eager": true}', "--lora.rank", "4")
    trained = train("ppo-shared", "ppo", *VLLM, *options, model="four")
    assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)
    assert_sampler_agrees("ppo-shared")


def kill_engine_at(
    patch: pytest.MonkeyPatch, calls: set[int], of: Callable[[int], int] = lambda engine: engine
) -> list[int]:
    """Has the engine's process, or the one ``of`` it, killed just before these calls to it (1 is the first).

    Returns the pids as they come.
    """
    killed: list[int] = []
    submit = EngineGroup.submit
    count = 0

    def fatal(self: EngineGroup, *given: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            killed.append(of(self.group.wheres[0].pid))
            os.kill(killed[-1], signal.SIGKILL)
        return submit(self, *given)

    patch.setattr(EngineGroup, "submit", fatal)
    return killed


def test_a_tensor_parallel_rank_that_is_killed(grpo_split, monkeypatch):
    """The engine ends with it, is started again, and draws the open samples anew: the run is the unbroken one.

    Neither its other processes nor its shared memory stay.
    """
    family: set[int] = set()
    shared: set[str] = set()

    def rank(engine: int) -> int:
        family.update({engine}, descendants(engine))
        shared.update(*map(shared_memory, family))
        return next(pid for pid in family if command(pid).startswith("VLLM::Worker_TP1"))

    killed = kill_engine_at(monkeypatch, {2}, rank)
    trained = train("rank-killed", "grpo", *VLLM, *SPLIT, "--engine.tensor-parallel", "2")
    assert difference(trained, grpo_split) < 1e-5
    assert len(killed) == 1
    assert shared
    assert_sampler_agrees("rank-killed")
    assert not family & set(running())
    assert not [name for name in shared if (SHARED_MEMORY / name).exists()]


def shared_memory(pid: int) -> set[str]:
    """The names that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    mapped = {line.split()[4] for line in lines if f"{SHARED_MEMORY}/" in line}
    return {path.name for path in SHARED_MEMORY.iterdir() if str(path.stat().st_ino) in mapped}


def test_killed_while_others_train_and_then_again(grpo_split, monkeypatch, capsys):
    """The first is noticed by the push that follows, and made good; the second while it samples, and is not."""
    killed: list[int] = []
    guard = RestartingOnce.guard

    def fatal(self: RestartingOnce, push: Any, again: Any) -> Any:
        guarded = guard(self, push, again)

        def pushed(step: int) -> Any:
            if not killed:
                killed.append(self.engines.group.wheres[0].pid)
                os.kill(killed[0], signal.SIGKILL)
            return guarded(step)

        return pushed

    monkeypatch.setattr(RestartingOnce, "guard", fatal)
    again = kill_engine_at(monkeypatch, {3})
    argv = [*unevaluated(arguments("grpo", learning_rate="1e-4")), "--steps", "3", "--out", "twice", *VLLM, *SPLIT]
    assert main(argv) == 75
    said = capsys.readouterr().err
    assert f"engine rank 0 (pid {again[0]} on" in said
    assert "(it was restarted once already)" in said
    assert killed != again
    # Both steps before were made with the weights that they should have been made with.
    done = metrics("twice")
    assert [line["step"] for line in done] == [1, 2]
    for line, wanted in zip(done, metrics("grpo-split"), strict=False):
        assert line["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
        assert line["sampler_gap_max"] < 1e-4


@pytest.mark.usefixtures("helpers_importable")
def test_the_truth_check_names_the_parameter_that_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(wiring, "vllm_engine", damaged_engine)
    argv = [*unevaluated(arguments("grpo")), "--steps", "3", "--out", "damaged", *VLLM, *SPLIT]
    assert main(argv) == 75
    assert "engine 0 does not hold the trainer's model.norm.weight: checksum" in capsys.readouterr().err
