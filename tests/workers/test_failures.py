"""Whatever dies, hangs or is wrong: the run ends in bounded time, says who and at what, and leaves nothing behind.

On one Ray for all; test_own_ray.py has the runs that start their own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers.drivers import TOKEN, Driver, assert_kept, command, descendants, error_line, events, wait_until
from helpers.shared_ray import arguments, cluster_address, inputs, unevaluated

from tandem.cli.main import main
from tandem.workers.cluster import Cluster
from tandem.workers.group import WorkerGroup

__all__ = ["cluster_address", "inputs"]
TWO = ("--placement.actor", "2")


def workers_of_this_ray() -> list[int]:
    """The workers of whatever runs on the Ray that this process has started."""
    return [pid for pid in descendants(os.getpid()) if command(pid).startswith("ray::WorkerProcess")]


def assert_no_workers() -> None:
    wait_until(lambda: not workers_of_this_ray(), "workers are left")


@pytest.mark.parametrize(
    ("placement", "who", "then"),
    [
        (
            (*TWO, "--save-every", "1"),
            r"actor rank [01] \(pid {pid} on \S+\) died \(killed, crashed, or out of .*; in \w+\.\w+\)",
            "go on after step 2 with --resume",
        ),
        # This process waits for it, and sends to it.
        (
            ("--placement.engine", "1"),
            r"engine rank 0 \(pid {pid} on \S+\) died \(.*; in engine\.receive\)",
            "go on after step 3 with --resume",
        ),
    ],
)
def test_a_worker_that_is_killed(inputs, cluster_address, placement, who, then):
    out = f"killed-{placement[0][12:]}"
    with Driver(inputs, out, "grpo", "--cluster.address", cluster_address, *placement) as driver:
        driver.reach_gate()
        pids = workers_of_this_ray()
        assert len(pids) == int(placement[1])
        os.kill(pids[0], signal.SIGKILL)
        driver.open_gate()
        code, output = driver.end()
        assert code == 75, output
        said = error_line(output)
        assert re.search(r"error: step 3, \w+: " + who.format(pid=pids[0]), said)
        assert said.endswith(f"; {then}")
        # What follows from it in others is not told as well.
        assert "Unhandled error" not in output
        assert_no_workers()
        assert events(driver.out)[-1]["reason"] == "error"


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (("--cluster.heartbeat", "3"), r"died \(.*; in \w+\.\w+\).*\(pid {pid}\) has been stopped for 3 s"),
        # As where no signal has stopped it, but a call never returns.
        (
            ("--cluster.heartbeat", "100", "--cluster.deadline", "8"),
            r"\w+\.\w+: no answer within 8 s from .*\(pid {pid} on",
        ),
    ],
)
def test_a_worker_that_hangs(inputs, cluster_address, bound, said):
    with Driver(inputs, f"hung-{bound[1]}", "grpo", "--cluster.address", cluster_address, *bound, *TWO) as driver:
        driver.reach_gate()
        pids = workers_of_this_ray()
        os.kill(pids[1], signal.SIGSTOP)
        driver.open_gate()
        code, output = driver.end()
        assert code == 75, output
        assert re.search(said.format(pid=pids[1]), error_line(output))
        assert_no_workers()


def test_ctrl_c(inputs, cluster_address):
    options = ["--cluster.address", cluster_address, "--placement.actor", "1", "--save-every", "1"]
    with Driver(inputs, "interrupted", "grpo", *options) as driver:
        driver.reach_gate()
        os.kill(driver.process.pid, signal.SIGINT)
        code, output = driver.end()
        assert code == 130, output
        assert "stopped in step 3; go on after step 2 with --resume" in output
        assert "Traceback" not in output
        assert (driver.out / "checkpoints" / "step_00000002" / "state.json").exists()
        assert_no_workers()


def test_secrets_reach_a_worker_of_any_cluster(cluster_address):
    """In a call: this Ray was started without them, and writes down what it starts workers with."""
    import ray

    cluster = Cluster(device="cpu", needed={"actor": (1, 1)})
    group = WorkerGroup("actor", 1, cluster, environment={"TANDEM_DEBUG": "0"}, secrets={"HF_TOKEN": TOKEN})
    try:
        variables = group.place("environment", lambda site: os.environ)
        assert variables.call("get", "HF_TOKEN") == TOKEN
        assert variables.call("get", "TANDEM_DEBUG") == "0"
        assert_kept(Path(ray._private.worker._global_node.get_logs_dir_path()))
    finally:
        group.close()
        cluster.close()


def test_a_killed_driver_of_a_ray_that_goes_on(inputs, cluster_address):
    with Driver(inputs, "gone-too", "grpo", "--cluster.address", cluster_address, *TWO) as driver:
        driver.reach_gate()
        assert len(workers_of_this_ray()) == 2
        driver.process.kill()
        assert_no_workers()


def ended_here(capsys: pytest.CaptureFixture[str], out: str, **changed: str) -> tuple[int, str]:
    """A run with a worker of this process's Ray, driven by this process: its exit code, and its error."""
    argv = [*unevaluated(arguments("grpo")), "--steps", "1", "--placement.actor", "1", "--out", out]
    for name, value in changed.items():
        argv[argv.index(f"--{name}") + 1] = value
    code = main(argv)
    assert_no_workers()
    return code, error_line(capsys.readouterr().err)


@pytest.mark.usefixtures("cluster_address")
def test_a_reward_function_that_raises(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    Path("left.py").write_text("def left(prompts, completions):\n    raise ValueError('the judge has left the room')\n")
    code, error = ended_here(capsys, "raised", reward="left.py:left")
    assert code == 75, error
    assert "the judge has left the room" in error


@pytest.mark.usefixtures("cluster_address")
def test_a_model_that_only_the_worker_reads(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    shutil.copytree("base", "damaged")
    Path("damaged", "model.safetensors").write_bytes(b"not at all")
    code, error = ended_here(capsys, "damaged-run", model="damaged")
    assert code == 2, error
    assert re.search(r"actor rank 0 \(pid \d+ on \S+\): damaged", error)
    assert not Path("damaged-run").exists()
