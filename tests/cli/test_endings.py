"""How a run ends: by a signal inside a save, by a disk that is full, by a reward that fails. Real signals and files."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import arguments, run, unevaluated

from tandem.checkpoint import store
from tandem.cli.main import main
from tandem.rewards import process
from tandem.runs.lines import read_metrics
from tandem.schedules.crew import Crew
from tandem.training.trainer import LocalTrainer

SIGNALS = {signal.SIGTERM: (143, "stopped by SIGTERM"), signal.SIGINT: (130, "stopped by Ctrl-C")}


def at_call(monkeypatch, owner, name, count, happening):
    """Does something in front of the ``count``-th call of ``owner.name``."""
    original, left = getattr(owner, name), count

    def counting(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            happening()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [(store._HashingFile, "write", 3), (torch, "save", 1), (os, "fsync", 3), (os, "rename", 1)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_signal_inside_a_save_waits_until_it_is_whole(tandem, inputs, monkeypatch, signum, owner, name, count):
    """It ended in a traceback and code 1: torch makes a RuntimeError of what is raised while it writes."""
    code, word = SIGNALS[signum]
    out = inputs / f"saving-{signum}-{name}"
    argv = [*arguments("sft"), "--steps", 4, "--save-every", 2, "--out", out]
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, count, lambda: os.kill(os.getpid(), signum))
        ended, stdout, stderr = tandem(*argv)
    assert (ended, stderr) == (code, f"tandem: {word}\n")
    assert "stopped in step 3; go on after step 2 with --resume" in stdout
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000002"]
    assert tandem(*argv, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("method", "name", "count", "kept"),
    [
        ("sft", "forward_backward", 3, "go on after step 2 with --resume"),
        ("sft", "optim_step", 3, "nothing is saved"),
        # A step of 2 minibatches and 2 epochs: the actor's first, then the critic's, when the actor has stepped.
        ("ppo", "forward_backward", 9, "go on after step 1 with --resume"),
        ("ppo", "forward_backward", 10, "nothing is saved"),
    ],
)
def test_an_interrupted_step_is_saved_as_long_as_it_has_changed_nothing(
    tandem, inputs, monkeypatch, method, name, count, kept
):
    out = inputs / f"{method}-{name}-{count}"
    at_call(monkeypatch, LocalTrainer, name, count, lambda: os.kill(os.getpid(), signal.SIGINT))
    ended, stdout, _ = tandem(*arguments(method), "--steps", 4, "--save-every", 9, "--out", out)
    assert ended == 130
    assert kept in stdout


def final(folder: Path) -> tuple[list[dict[str, float]], bytes]:
    lines = [{k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per"))}
             for line in read_metrics(folder / "metrics.jsonl")]  # fmt: skip
    return lines, (folder / "model" / "model.safetensors").read_bytes()


def test_a_signal_while_a_step_is_evaluated_loses_neither_step_nor_evaluation(tandem, inputs, monkeypatch):
    from tandem.training.trainer import LocalTrainer

    argv = [*arguments("sft"), "--steps", 4, "--save-every", 100]
    assert tandem(*argv, "--out", inputs / "calm")[0] == 0
    with monkeypatch.context() as patch:
        # Before the first step, after the second, after the fourth.
        at_call(patch, LocalTrainer, "evaluate", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        code, stdout, _ = tandem(*argv, "--out", inputs / "evaluated")
    assert code == 143
    assert "go on after step 2 with --resume" in stdout
    # Killed once more after it has been made up for: it must not stand twice in the file.
    with monkeypatch.context() as patch:
        at_call(patch, LocalTrainer, "optim_step", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert tandem(*argv, "--out", inputs / "evaluated", "--resume")[0] == 143
    assert tandem(*argv, "--out", inputs / "evaluated", "--resume")[0] == 0
    assert final(inputs / "evaluated") == final(inputs / "calm")


def test_a_signal_while_weights_go_to_the_sampler_loses_no_step(tandem, inputs, monkeypatch):
    """What is trained is kept; with the weights of a large model it may take a while until they are there."""
    argv = [*arguments("grpo"), "--steps", 3, "--save-every", 100]
    assert tandem(*argv, "--out", inputs / "pushed")[0] == 0
    with monkeypatch.context() as patch:
        # Before the first step, after it, after the second.
        at_call(patch, Crew, "publish", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        code, stdout, _ = tandem(*argv, "--out", inputs / "cut")
    assert code == 130
    assert "stopped in step 2; go on after step 2 with --resume" in stdout
    assert tandem(*argv, "--out", inputs / "cut", "--resume")[0] == 0
    cut, pushed = (read_metrics(inputs / out / "metrics.jsonl") for out in ("cut", "pushed"))
    assert [line["step"] for line in cut] == [line["step"] for line in pushed]
    assert "tokens_per_second" in cut[2]
    assert {*pushed[2]} - {*cut[2]} <= {"seconds_sync"}
    assert "tokens a second, over all steps" in (inputs / "cut" / "summary.md").read_text()
    assert final(inputs / "cut")[1] == final(inputs / "pushed")[1]


def test_a_full_disk_at_the_export_ends_in_a_line_and_the_checkpoint_exports_again(inputs):
    """A limit on the size of files, set once the checkpoint is written: the kernel itself refuses the export."""
    argv = [*arguments("sft"), "--steps", "2", "--out", "full"]
    code, output = run(inputs, argv, fault=("export", 1))
    assert code == 75, output
    last = output.strip().splitlines()[-1]
    assert last.startswith(
        "tandem: error: the model is trained and not written: full/.model-partial: cannot be written:"
    )
    assert "File too large" in last
    assert last.endswith("; --resume writes it again")
    assert "Traceback" not in output
    assert sorted(path.name for path in (inputs / "full").iterdir() if "model" in path.name) == []
    code, output = run(inputs, [*argv, "--resume"])
    assert code == 0, output
    assert final(inputs / "full")[1]
    events = [json.loads(line)["event"] for line in (inputs / "full" / "events.jsonl").read_text().splitlines()]
    assert events == ["start", "ready", "checkpoint", "stop", "start", "resume", "ready", "finish", "stop"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["quickstart"], "base: cannot be written: "),
        (
            [*unevaluated(arguments("sft")), "--steps", "2"],
            "there is no earlier one; nothing is saved: --resume begins",
        ),
        ([*unevaluated(arguments("sft")), "--steps", "2", "--save-every", "0"], "no checkpoint holds it either"),
    ],
)
def test_a_disk_that_is_full_from_the_start_promises_nothing(inputs, tmp_path, monkeypatch, capsys, argv, words):
    """The kernel itself refuses, whatever the file."""
    monkeypatch.chdir(inputs)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        assert main([*argv, "--out", str(tmp_path / "out")]) == 75
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    [line] = capsys.readouterr().err.splitlines()
    assert words in line
    assert "File too large" in line
    assert ("--resume" in line) is ("--resume" in words)


JUDGES = """
import os, pathlib, sys
def fails(prompts, completions):
    calls = pathlib.Path(os.environ["CALLS"])
    calls.write_text((calls.read_text() if calls.exists() else "") + ".")
    count = len(calls.read_text())
    if count > 2 and os.environ.get("FAULT") == "raise":
        raise ConnectionError("no answer from the judge")
    if count > 2 and os.environ.get("FAULT") == "exit":
        os._exit(0)
    return [len(set(c)) for c in completions]
"""


def test_a_reward_that_fails_saves_the_steps_done_and_resume_goes_on(tandem, inputs, monkeypatch):
    """It saved nothing and offered no --resume, where Ctrl-C at the same point saved; os._exit was not said at all."""
    monkeypatch.setattr(process, "WAITS_S", (0.01, 0.01))
    (inputs / "judges.py").write_text(JUDGES)
    argv = [*arguments("grpo"), "--steps", 4]
    argv[argv.index("check.py:right")] = "judges.py:fails"
    for flag in ("--eval-data", "--eval-every"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    for fault, calls, words in (
        ("", 4, ""),
        (
            "raise",
            5,
            "reward 'fails' raised ConnectionError: no answer from the judge (judges.py:8); it was called 3 times",
        ),
        ("exit", 3, "reward 'fails' ended its process (exit code 0); go on with --resume"),
    ):
        out = inputs / f"judged-{fault or 'calm'}"
        monkeypatch.setenv("FAULT", fault)
        monkeypatch.setenv("CALLS", str(inputs / f"calls-{fault}"))
        code, stdout, stderr = tandem(*argv, "--out", out)
        assert code == (75 if fault else 0), stderr
        assert len((inputs / f"calls-{fault}").read_text()) == calls
        if fault:
            assert code == 75
            assert stderr.splitlines()[-1].startswith(f"tandem: error: {words}")
            assert "stopped in step 3; go on after step 2 with --resume" in stdout
            monkeypatch.setenv("FAULT", "")
            assert tandem(*argv, "--out", out, "--resume")[0] == 0
        assert final(out) == final(inputs / "judged-calm")


class Full(io.StringIO):
    """Standard output on a disk that has room for so many lines."""

    def __init__(self, lines: int, file: Any) -> None:
        super().__init__()
        self.lines, self.file = lines, file

    def write(self, text: str) -> int:
        self.lines -= text.count("\n")
        if self.lines < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(text)

    def fileno(self) -> int:
        return int(self.file.fileno())


@pytest.mark.parametrize("lines", [0, 5])
def test_a_full_disk_that_the_output_goes_to_ends_the_run_in_a_line_and_loses_no_step(
    tandem, inputs, monkeypatch, capsys, lines
):
    """Before anything is loaded, or at the first line of the display: step 1 is saved, and comes once."""
    argv, out = [*unevaluated(arguments("sft")), "--steps", "2"], inputs / f"full-output-{lines}"
    with (inputs / "output.txt").open("w") as file, monkeypatch.context() as patch:
        patch.chdir(inputs)
        patch.setattr(sys, "stdout", Full(lines, file))
        assert main([*argv, "--out", str(out)]) == 75
    assert capsys.readouterr().err.endswith(
        "error: standard output: No space left on device; make room, and go on (a run: with --resume)\n"
    )
    assert [path.name for path in out.glob("checkpoints/*")] == ["step_00000001"] * (lines > 0)
    assert tandem(*argv, "--out", out, "--resume")[0] == 0
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line] == [1, 2]
