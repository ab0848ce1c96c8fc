"""Command lines run in processes of their own, which can be killed at a chosen point for real."""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import make_module, make_tokenizer
from helpers.processes import child
from helpers.undrawn import draw_nothing
from tandem.cli.main import process
from tandem.training.trainer import LocalTrainer


def write_inputs(folder: Path) -> None:
    """A base model, a teacher, demonstrations, preferences, prompts and a reward function, all tiny."""
    for name, content in _inputs().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@functools.cache
def _inputs() -> dict[str, bytes]:
    """Each file's content, by its name in the folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_module("llama").save_pretrained(folder / "base")
        make_module("llama", seed=1).save_pretrained(folder / "teacher")
        for model in ("base", "teacher"):
            make_tokenizer().save_pretrained(folder / model)
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*")}
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdef", k=4)) for _ in range(40)]
    rows = {
        "demos": [{"prompt": f"{w}=", "completion": w[::-1]} for w in words],
        "pairs": [{"prompt": f"{w}=", "chosen": w[::-1], "rejected": "x"} for w in words],
        "texts": [{"text": f"{w} is {w[::-1]}. " * (1 + i % 3)} for i, w in enumerate(words)],
        "prompts": [{"prompt": f"{w}=", "answer": w[::-1]} for w in words],
    }
    for data, lines in rows.items():
        files[f"{data}.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    files["check.py"] = (
        b"def right(prompts, completions, answer):\n"
        b"    return [sum(a == b for a, b in zip(c, t)) / 4 + len(set(c)) / 100 for c, t in zip(completions, answer)]\n"
    )
    return files


def arguments(
    method: str, *, learning_rate: str = "3e-3", lr_schedule: str = "linear", prompts_per_step: int = 6
) -> list[str]:
    """A few steps of each method on those inputs."""
    common = ["--seed", "3", "--eval-every", "2", "--learning-rate", learning_rate, "--lr-schedule", lr_schedule]
    sampled = ["--data", "prompts.jsonl", "--eval-data", "prompts.jsonl",
               "--prompts-per-step", str(prompts_per_step), "--samples-per-prompt", "3",
               "--max-new-tokens", "5"]  # fmt: skip
    online = [*sampled, "--reward", "check.py:right"]
    pairs = ["--data", "pairs.jsonl", "--eval-data", "pairs.jsonl", "--batch-size", "7"]
    special = {
        "sft": ["--data", "demos.jsonl", "--eval-data", "demos.jsonl", "--batch-size", "7"],
        "distill": ["--data", "demos.jsonl", "--eval-data", "demos.jsonl", "--batch-size", "7", "--teacher", "teacher"],
        "pretrain": ["--data", "texts.jsonl", "--eval-data", "texts.jsonl", "--batch-size", "3", "--max-length", "20"],
        "rm": pairs,
        "dpo": [*pairs, "--sft-coef", "0.1"],
        "kto": pairs,
        "ppo": [*online, "--sample-epochs", "2", "--minibatches", "2", "--kl-target", "0.5", "--normalize-rewards"],
        "grpo": [*online, "--minibatches", "2"],
        "online-dpo": [*online, "--sample-epochs", "2", "--minibatches", "2"],
        "opd": [*sampled, "--teacher", "teacher", "--minibatches", "2"],
    }
    return [method, "--model", "base", *special.get(method, online), *common]


def unevaluated(argv: list[str]) -> list[str]:
    """The same without held-out data."""
    at = [argv.index(flag) for flag in ("--eval-data", "--eval-every")]
    return [word for i, word in enumerate(argv) if not {i, i - 1} & set(at)]


def _child(
    folder: str, argv: list[str], fault: tuple[str, int] | None, output: str, environment: dict[str, str]
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server that forks ignores it
    written = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(written, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))  # noqa: SIM115
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if fault is not None:
        _die_at(*fault)
    # For as long as this process lives.
    draw_nothing(pytest.MonkeyPatch())
    sys.argv = ["tandem", *argv]
    os.chdir(folder)
    process()


def _die_at(call: str, count: int) -> None:
    """SIGKILL to this process at the ``count``-th call of ``os.fsync``, ``rename``, ``replace`` or ``torch.save``.

    For ``export``: from that call on files may not grow beyond 10 kB, as on a full disk.
    """
    module = {"fsync": os, "rename": os, "replace": os, "save": torch, "export": LocalTrainer}[call]
    original, left = getattr(module, call), count

    def faulty(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0 and call == "export":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        elif left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, call, faulty)


def start(
    folder: Path,
    argv: list[str],
    output: Path,
    *,
    fault: tuple[str, int] | None = None,
    environment: dict[str, str] | None = None,
) -> ForkServerProcess:
    """``python -m tandem`` in ``folder``, as in a new session: in a process forked from one that has imported it all.

    It computes with one thread, unless the environment's OMP_NUM_THREADS says otherwise.
    """
    output.write_bytes(b"")
    process = child(_child, str(folder), argv, fault, str(output), {**os.environ, **(environment or {})})
    process.start()
    return process


def run(
    folder: Path,
    argv: list[str],
    *,
    fault: tuple[str, int] | None = None,
    kill_after: float | None = None,
    environment: dict[str, str] | None = None,
) -> tuple[int, str]:
    """(exit code, output). A negative code is the signal that ended it. ``kill_after`` seconds, it is killed."""
    output = folder / "output.txt"
    process = start(folder, argv, output, fault=fault, environment=environment)
    process.join(kill_after if kill_after is not None else 120)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, output.read_text()


def forked(
    words: list[str], *, start: Callable[..., subprocess.CompletedProcess[str]], **options: Any
) -> subprocess.CompletedProcess[str]:
    """``start``, which is ``subprocess.run``; of a ``tandem`` command in a process that has imported everything."""
    if words[1:3] != ["-m", "tandem"]:
        return start(words, **options)
    folder = Path(options.get("cwd") or Path.cwd())
    code, output = run(folder, words[3:], environment=options.get("env"))
    return subprocess.CompletedProcess(words, code, output, output)
