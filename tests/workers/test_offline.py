"""Offline methods over two workers, which Tandem starts itself or torchrun has started: as in one process (law 2)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.drivers import PATIENCE_S
from helpers.ranks import free_port
from helpers.runs import start
from helpers.shared_ray import arguments, cluster_address, inputs
from safetensors.torch import load_file
from test_placements import REFRESHED, difference, metrics, ready, train
from torch import Tensor

__all__ = ["cluster_address", "inputs"]
MORE = {"dpo": REFRESHED}


@pytest.fixture
def folder(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(inputs)
    return inputs


def torchrun(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """``torchrun --nproc-per-node 2 -m tandem ...``, to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tandem"]
    return subprocess.run(
        [*command, *argv],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
    )


def ranks(folder: Path, *argv: str) -> list[tuple[int, str]]:
    """Two processes as torchrun starts them, without torchrun: their exit codes and what they wrote."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    written = [folder / f"rank-{rank}.txt" for rank in range(2)]
    started = [
        start(folder, [*argv], output, environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, output in enumerate(written)
    ]
    try:
        for process in started:
            process.join(PATIENCE_S)
        return [(process.exitcode, output.read_text()) for process, output in zip(started, written, strict=True)]
    finally:
        for process in started:
            process.kill()


def in_one_process(method: str) -> dict[str, Tensor]:
    return train(f"{method}-here", method, *MORE.get(method, ()), "--overwrite")


@pytest.mark.parametrize("method", ["rm", "dpo", "kto"])
def test_two_workers_equal_one_process(folder, cluster_address, method):
    """KTO's KL is one of the whole step; its reference has a worker of its own, which ends once it has answered.

    SFT of two ranks: ``test_a_run_goes_on_under_torchrun``.
    """
    here = in_one_process(method)
    own = ["--placement.reference", "1"] if method == "kto" else []
    workers = train(f"{method}-two", method, *MORE.get(method, ()), "--placement.actor", "2", *own)
    assert 0 < difference(workers, here) < 1e-6
    assert_same_lines(f"{method}-two", f"{method}-here")


def assert_same_lines(out: str, wanted: str) -> None:
    for line, other in zip(metrics(out), metrics(wanted), strict=True):
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-4)


def test_ranks_of_torchrun_equal_one_process(folder):
    """Another model's weights travel too; without one, ``test_a_run_goes_on_under_torchrun``."""
    here = in_one_process("dpo")
    argv = [*arguments("dpo", learning_rate="1e-4"), "--steps", "3", "--out", "dpo-torchrun", *MORE["dpo"]]
    ended = ranks(folder, *argv)
    assert [code for code, _ in ended] == [0, 0], ended
    assert 0 < difference(load_file("dpo-torchrun/model/model.safetensors"), here) < 1e-6
    # Rank 0 alone writes and talks.
    assert [line["step"] for line in metrics("dpo-torchrun")] == [1, 2, 3]
    assert ["DPO 3/3" in written for _, written in ended] == [True, False]
    assert [*ready("dpo-torchrun")] == ["here", "rank 1"]


def test_a_run_goes_on_under_torchrun(folder):
    every = ["--save-every", "1"]
    unbroken = train("sft-unbroken", "sft", *every, lr_schedule="constant")
    train("sft-moved", "sft", *every, lr_schedule="constant", steps=2)
    argv = [*arguments("sft", learning_rate="1e-4", lr_schedule="constant"), "--steps", "3", *every]
    argv += ["--out", "sft-moved", "--resume"]
    ended = torchrun(folder, *argv)
    assert ended.returncode == 0, ended.stderr
    assert 0 < difference(load_file("sft-moved/model/model.safetensors"), unbroken) < 1e-6
    assert [line["step"] for line in metrics("sft-moved")] == [1, 2, 3]
    assert_same_lines("sft-moved", "sft-unbroken")


def test_a_mistake_that_only_the_ranks_see(folder):
    """Rank 0 reads the tokenizer first; the weights are read by every rank as its trainer is built."""
    shutil.copytree(folder / "base", folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes(b"not at all")
    argv = [*arguments("sft"), "--steps", "1", "--out", "damaged-run"]
    argv[argv.index("--model") + 1] = "damaged"
    ended = torchrun(folder, *argv)
    assert ended.returncode != 0
    errors = [line for line in ended.stderr.splitlines() if line.startswith("tandem: error: ")]
    assert len(errors) == 1, ended.stderr
    assert "damaged" in errors[0]
    assert not (folder / "damaged-run").exists()


def test_an_error_of_rank_0_ends_all_of_torchrun(folder):
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n')
    ended = torchrun(folder, "sft", "--model", "base", "--data", "bad.jsonl", "--steps", "1", "--out", "bad")
    assert ended.returncode != 0
    errors = [line for line in ended.stderr.splitlines() if line.startswith("tandem: error: ")]
    assert len(errors) == 1, ended.stderr
    assert "bad.jsonl" in errors[0]
    assert not (folder / "bad").exists()
