"""Command lines in processes of their own, stopped at a point of the test's choosing, and what they leave behind."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from helpers.runs import arguments, start, unevaluated

PATIENCE_S = 150.0
"""Longest wait for anything that must happen."""
START_S = 180.0
"""For workers to be there, on cores that may be busy: how long that takes is not what is tested."""
GATE = """
import os, pathlib, time

def gated(prompts, completions):
    gate = pathlib.Path(os.environ["GATE"])
    with (gate / "calls").open("a") as calls:
        calls.write(".")
    if len((gate / "calls").read_text()) == 3:
        (gate / "reached").touch()
        while not (gate / "open").exists():
            time.sleep(0.01)
    return [float(i) for i in range(len(prompts))]
"""
TOKEN = "hf_" + "NotForAnybodysEyes"
"""Shows where it is that it must not be."""


class Driver:
    """A run of ``method`` in a process of its own. Its reward function waits in step 3 until the gate is opened."""

    def __init__(self, folder: Path, out: str, method: str, *options: str) -> None:
        (folder / "gate.py").write_text(GATE)
        self.out = folder / out
        self.gate = folder / f"{out}-gate"
        self.gate.mkdir()
        argv = [
            *unevaluated(arguments(method)),
            "--reward",
            "gate.py:gated",
            "--steps",
            "5",
            "--out",
            out,
            *options,
        ]
        self.written = folder / f"{out}.txt"
        self.process = start(folder, argv, self.written, environment={"GATE": str(self.gate)})
        self.family: set[int] = set()

    @property
    def output(self) -> str:
        return self.written.read_text()

    def reach_gate(self) -> list[int]:
        """Waits until the reward function of step 3 has been called. Returns the pids of worker processes."""
        reached = self.gate / "reached"
        wait_until(
            lambda: reached.exists() or self.process.exitcode is not None, lambda: self.output, patience_s=START_S
        )
        assert self.process.exitcode is None, self.output
        self.family = descendants(self.process.pid)
        return [pid for pid in (self.family or running()) if command(pid).startswith("ray::WorkerProcess")]

    def open_gate(self) -> None:
        (self.gate / "open").touch()

    def end(self) -> tuple[int, str]:
        """Waits for it. Returns its exit code and what it wrote."""
        self.process.join(PATIENCE_S)
        assert self.process.exitcode is not None, f"it still runs: {self.output}"
        return self.process.exitcode, self.output

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in {self.process.pid, *self.family}:
            if pid in running():
                os.kill(pid, 9)
        self.process.join()


def events(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def error_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("tandem: error: ")]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]


def assert_kept(logs: Path) -> None:
    """The token is in no log of Ray's, and on no command line."""
    files = [file for file in logs.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]
    assert not [pid for pid in running() if TOKEN in command(pid)]


def wait_until(
    condition: Callable[[], bool], otherwise: str | Callable[[], str] = "", patience_s: float = PATIENCE_S
) -> None:
    """Returns when it holds; fails after ``patience_s``, and says ``otherwise``."""
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, otherwise() if callable(otherwise) else otherwise
        time.sleep(0.05)


def running() -> list[int]:
    """Processes that are not merely waiting to be collected."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _stat(int(path.name))[:1] not in ([], ["Z"])]


def descendants(pid: int) -> set[int]:
    """Children of a process, their children, and so on."""
    parents = {other: int(stat[1]) for other in running() if (stat := _stat(other))}
    found: set[int] = set()
    level = {pid}
    while level := {child for child, parent in parents.items() if parent in level}:
        found |= level
    return found


def command(pid: int) -> str:
    """A process's command line, or the title that it has given itself; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """State, parent and the rest; nothing where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []
