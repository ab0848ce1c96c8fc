"""Whatever dies, hangs or is wrong: the run ends in bounded time, says who and at what, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from drivers import PATIENCE_S, Driver, command, descendants, running, wait_until
from shared_ray import cluster_address, inputs

from tandem.cli.sections import PlacementSection, TrainerPlacement
from tandem.errors import UserError
from tandem.workers.cluster import Cluster, what_would_fit

__all__ = ["cluster_address", "inputs"]
TWO = ("--placement.actor", "2")


def workers_of_this_ray() -> list[int]:
    """The workers of whatever runs on the Ray that this process has started."""
    return [pid for pid in descendants(os.getpid()) if command(pid).startswith("ray::WorkerProcess")]


def assert_no_workers() -> None:
    wait_until(lambda: not workers_of_this_ray(), "workers are left")


def events(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def error_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("tandem: error: ")]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]


def test_a_worker_that_is_killed(inputs, cluster_address):
    with Driver(inputs, "killed", "grpo", "--cluster.address", cluster_address, *TWO) as driver:
        driver.reach_gate()
        pids = workers_of_this_ray()
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        driver.open_gate()
        code, output = driver.end()
        assert code == 2, output
        assert re.search(rf"actor rank [01] \(pid {pids[0]} on \S+\) died in \w+\.\w+ \(", error_line(output))
        assert_no_workers()
        assert events(driver.out)[-1]["reason"] == "error"


def test_a_worker_that_hangs(inputs, cluster_address):
    with Driver(
        inputs, "hung", "grpo", "--cluster.address", cluster_address, "--cluster.deadline", "15", *TWO
    ) as driver:
        driver.reach_gate()
        pids = workers_of_this_ray()
        os.kill(pids[1], signal.SIGSTOP)
        driver.open_gate()
        code, output = driver.end()
        assert code == 2, output
        line = error_line(output)
        assert re.search(r"\w+\.\w+: no answer within 15 s from ", line)
        assert f"(pid {pids[1]} on " in line
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


def test_sigterm_ends_the_ray_that_was_started_for_the_run(inputs):
    options = ["--placement.actor", "1", "--save-every", "1"]
    with Driver(inputs, "terminated", "grpo", *options) as driver:
        assert len(driver.reach_gate()) == 1
        assert any("raylet" in command(pid) for pid in driver.family)
        os.kill(driver.process.pid, signal.SIGTERM)
        code, output = driver.end()
        assert code == 143, output
        assert "go on after step 2 with --resume" in output
        wait_until(lambda: not driver.family & set(running()), "processes are left")


def test_a_driver_that_is_killed_leaves_nothing(inputs):
    with Driver(inputs, "gone", "grpo", "--placement.actor", "1") as driver:
        assert len(driver.reach_gate()) == 1
        assert any("raylet" in command(pid) for pid in driver.family)
        # Ray's own two agents find their Ray gone at once, and then try for a minute to tell it so.
        mine = {pid for pid in driver.family if not re.match("ray::(DashboardAgent|RuntimeEnvAgent)", command(pid))}
        assert len(driver.family - mine) <= 2
        driver.process.kill()
        driver.process.wait()
        wait_until(lambda: not mine & set(running()), "processes are left")


def test_a_killed_driver_of_a_ray_that_goes_on(inputs, cluster_address):
    with Driver(inputs, "gone-too", "grpo", "--cluster.address", cluster_address, *TWO) as driver:
        driver.reach_gate()
        assert len(workers_of_this_ray()) == 2
        driver.process.kill()
        assert_no_workers()


def test_a_reward_function_that_raises(inputs, cluster_address):
    options = ["--cluster.address", cluster_address, "--placement.actor", "1"]
    with Driver(inputs, "raised", "grpo", *options, reward="raising") as driver:
        code, output = driver.end()
        assert code == 2, output
        assert "the judge has left the room" in error_line(output)
        assert_no_workers()


def test_a_model_that_only_the_worker_reads(inputs, cluster_address):
    shutil.copytree(inputs / "base", inputs / "damaged")
    (inputs / "damaged" / "model.safetensors").write_bytes(b"not at all")
    options = ["--cluster.address", cluster_address, "--placement.actor", "1", "--model", "damaged"]
    with Driver(inputs, "damaged-run", "grpo", *options) as driver:
        code, output = driver.end()
        assert code == 2, output
        assert re.search(r"actor rank 0 \(pid \d+ on \S+\): damaged", error_line(output))
        assert_no_workers()
        assert not driver.out.exists()


def run_to_its_end(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)


COMMAND = """
import sys
{before}
from tandem.cli.main import main
sys.exit(main(["sft", "--model", "base", "--data", "demos.jsonl", "--steps", "1", "--out", "never", {options}]))
"""


def test_an_address_at_which_nothing_answers(inputs):
    code = COMMAND.format(before="", options="'--placement.actor', '1', '--cluster.address', '127.0.0.1:9'")
    ended = run_to_its_end(inputs, code)
    assert ended.returncode == 2, ended.stderr
    assert "cluster.address 127.0.0.1:9: no Ray cluster answers there (Connection refused)" in error_line(ended.stderr)


def test_ray_that_is_not_installed(inputs):
    before = "sys.modules['ray'] = None"
    ended = run_to_its_end(inputs, COMMAND.format(before=before, options="'--placement.actor', '1'"))
    assert ended.returncode == 2, ended.stderr
    assert "Ray, which is not installed: pip install 'tandem-rlhf[cluster]'" in error_line(ended.stderr)
    # One process needs none.
    ended = run_to_its_end(inputs, COMMAND.format(before=before, options="'--overwrite'"))
    assert ended.returncode == 0, ended.stderr


class Resources:
    """A cluster as far as its resources are concerned."""

    def __init__(self, **resources: float) -> None:
        self.resources = resources

    def cluster_resources(self) -> dict[str, float]:
        return self.resources


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        (0, r"3 GPUs are asked for \(actor 2, engine 1\), there are 0; .*--placement.actor here --device cpu"),
        (1, r"there is 1; --placement.actor here trains and samples"),
        (2, r"there are 2; --placement.actor 1 --placement.engine 1 would fit, or --placement.actor 2 with every"),
    ],
)
def test_more_gpus_than_there_are(gpus, words):
    cluster = Cluster.__new__(Cluster)
    cluster.ray, cluster.device = Resources(CPU=64, GPU=gpus), "cuda"
    with pytest.raises(UserError, match=words):
        cluster._check({"actor": 2, "engine": 1})
    cluster.ray = Resources(GPU=3)
    cluster._check({"actor": 2, "engine": 1})


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
        ({"critic": "reward", "reward": "critic"}, "critic shares with reward shares with critic, so none"),
        ({"reference": "reference"}, "placement.reference: expected"),
    ],
)
def test_placements_that_make_no_sense(placement, words):
    with pytest.raises(UserError, match=words):
        PlacementSection(**placement)


def test_homes():
    placement = PlacementSection(actor="2", critic="1", reward="critic", engine="3")
    assert [placement.home(role) for role in ("actor", "critic", "reward", "reference", "engine")] == [
        *("actor", "critic", "critic", "actor", "engine")
    ]
    assert [placement.workers(role) for role in ("actor", "critic", "reward", "engine")] == [2, 1, 0, 3]
    assert TrainerPlacement().workers("actor") == 0
