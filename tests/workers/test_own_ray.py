"""A run that starts its own Ray ends in bounded time, whichever of them dies, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from helpers.drivers import TOKEN, Driver, assert_kept, command, error_line, events, running, wait_until
from helpers.shared_ray import inputs

__all__ = ["inputs"]
LOOPBACKS = ("0100007F:", "0000000000000000FFFF00000100007F:", "00000000000000000000000001000000:")
"""The beginnings of ``/proc/net/tcp``'s and ``tcp6``'s addresses for 127.0.0.1 and ::1."""


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
        lines = [command(pid) for pid in driver.family]
        # It waits for no port that another Ray has, and starts no process that no role asked for.
        assert any("/raylet " in line and "--listen-port=0" in line for line in lines)
        assert not any("ray::IDLE" in line for line in lines)
        driver.process.kill()
        driver.process.join()
        wait_until(lambda: not driver.family & set(running()), "processes are left")


@pytest.mark.parametrize(
    ("name", "number", "workers", "said"),
    [
        ("raylet", signal.SIGSTOP, "2", r"Ray's raylet \(pid {pid}\) has been stopped for 3 s"),
        ("gcs_server", signal.SIGKILL, "1", r"Ray's gcs_server \(pid {pid}\) died"),
        ("RuntimeEnvAgent", signal.SIGKILL, "1", r"Ray's RuntimeEnvAgent \(pid {pid}\) died"),
    ],
)
def test_ray_itself_dies_or_freezes(inputs, monkeypatch, name, number, workers, said):
    """No signal reaches a driver that waits for a frozen raylet, and Ray ends one without GCS after a minute."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Driver(inputs, f"no-{name}", "grpo", "--placement.actor", workers, "--cluster.heartbeat", "3") as driver:
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
