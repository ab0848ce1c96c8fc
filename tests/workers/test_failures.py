"""Whatever dies, hangs or is wrong: the run ends in bounded time, says who and at what, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.drivers import PATIENCE_S, Driver, command, descendants, running, wait_until
from helpers.shared_ray import cluster_address, inputs

from tandem.assembly.needed import Placement, SamplingPlacement, placement_class
from tandem.errors import UserError
from tandem.methods.ppo import PPO
from tandem.workers.cluster import Cluster, require_room, what_would_fit
from tandem.workers.group import WorkerGroup

__all__ = ["cluster_address", "inputs"]
OF_PPO = placement_class(SamplingPlacement, PPO.models)
TWO = ("--placement.actor", "2")
TOKEN = "hf_" + "NotForAnybodysEyes"
LOOPBACKS = ("0100007F:", "0000000000000000FFFF00000100007F:", "00000000000000000000000001000000:")
"""The beginnings of ``/proc/net/tcp``'s and ``tcp6``'s addresses for 127.0.0.1 and ::1."""


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


@pytest.mark.parametrize(
    ("placement", "who"),
    [
        (TWO, r"actor rank [01] \(pid {pid} on \S+\) died in \w+\.\w+ \("),
        # This process waits for it, and sends to it.
        (("--placement.engine", "1"), r"engine rank 0 \(pid {pid} on \S+\) died in engine\.receive \("),
    ],
)
def test_a_worker_that_is_killed(inputs, cluster_address, placement, who):
    out = f"killed-{placement[0][12:]}"
    with Driver(inputs, out, "grpo", "--cluster.address", cluster_address, *placement) as driver:
        driver.reach_gate()
        pids = workers_of_this_ray()
        assert len(pids) == int(placement[1])
        os.kill(pids[0], signal.SIGKILL)
        driver.open_gate()
        code, output = driver.end()
        assert code == 75, output
        assert re.search(who.format(pid=pids[0]), error_line(output))
        assert_no_workers()
        assert events(driver.out)[-1]["reason"] == "error"


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (("--cluster.heartbeat", "3"), r"died in \w+\.\w+ .*\(pid {pid}\) has been stopped for 3 s"),
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
        driver.process.kill()
        driver.process.wait()
        wait_until(lambda: not driver.family & set(running()), "processes are left")


@pytest.mark.parametrize(
    ("name", "number", "said"),
    [
        ("raylet", signal.SIGSTOP, r"Ray's raylet \(pid {pid}\) has been stopped for 3 s"),
        ("gcs_server", signal.SIGKILL, r"Ray's gcs_server \(pid {pid}\) died"),
        ("RuntimeEnvAgent", signal.SIGKILL, r"Ray's RuntimeEnvAgent \(pid {pid}\) died"),
    ],
)
def test_ray_itself_dies_or_freezes(inputs, monkeypatch, name, number, said):
    """No signal reaches a driver that waits for a frozen raylet, and Ray ends one without GCS after a minute."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Driver(inputs, f"no-{name}", "grpo", "--placement.actor", "2", "--cluster.heartbeat", "3") as driver:
        driver.reach_gate()
        pid = next(pid for pid in driver.family if re.match(rf"(\S+/|ray::){name}\b", command(pid)))
        assert_closed_doors({driver.process.pid, *driver.family})
        gcs = next(command(pid) for pid in driver.family if "/gcs_server " in command(pid))
        assert_kept(Path(re.search(r"--log_dir=(\S+)", gcs)[1]))
        os.kill(pid, number)
        driver.open_gate()
        start = time.monotonic()
        code, output = driver.end()
        assert time.monotonic() - start < 30
        assert code == 75, output
        assert re.search(said.format(pid=pid), error_line(output))
        assert events(driver.out)[-1]["reason"] == "error"
        assert re.search(said.format(pid=pid), events(driver.out)[-1]["message"])
        wait_until(lambda: not driver.family & set(running()), "processes are left")


def assert_closed_doors(pids: set[int]) -> None:
    """Whatever these processes listen on is the loopback's."""
    sockets = {os.readlink(file)[8:-1] for pid in pids for file in Path(f"/proc/{pid}/fd").iterdir() if is_socket(file)}
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[9] in sockets
    ]
    ours = [address for address in listening if not address.startswith(LOOPBACKS)]
    assert len(listening) > 5
    assert not ours


def is_socket(file: Path) -> bool:
    try:
        return os.readlink(file).startswith("socket:[")
    except OSError:
        return False


def assert_kept(logs: Path) -> None:
    """The token is in no log of Ray's, and on no command line."""
    files = [file for file in logs.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]
    assert not [pid for pid in running() if TOKEN in command(pid)]


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


def test_a_reward_function_that_raises(inputs, cluster_address):
    options = ["--cluster.address", cluster_address, "--placement.actor", "1"]
    with Driver(inputs, "raised", "grpo", *options, reward="raising") as driver:
        code, output = driver.end()
        assert code == 75, output
        assert "the judge has left the room" in error_line(output)
        assert_no_workers()


def test_a_model_that_only_the_worker_reads(inputs, cluster_address):
    shutil.copytree(inputs / "base", inputs / "damaged")
    (inputs / "damaged" / "model.safetensors").write_bytes(b"not at all")
    options = ["--cluster.address", cluster_address, "--placement.actor", "1"]
    with Driver(inputs, "damaged-run", "grpo", *options, model="damaged") as driver:
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


def test_more_workers_than_cores(inputs):
    ended = run_to_its_end(inputs, COMMAND.format(before="", options="'--placement.actor', '64', '--overwrite'"))
    assert ended.returncode == 2, ended.stderr
    cores = len(os.sched_getaffinity(0))
    assert re.search(
        rf"64 CPUs are asked for \(actor 64\), there (is|are) {cores}; --placement", error_line(ended.stderr)
    )


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
