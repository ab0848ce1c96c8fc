"""Triton's compiler takes every kernel. Its interpreter, in which kernels run on a CPU, is less strict."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "helpers" / "compile_kernels.py"
BROKEN = """
import sys

from helpers import compile_kernels
import torch
import triton
import triton.language as tl


@triton.jit
def _changes_type(out, count):
    total = 0
    for number in range(count):
        total += 0.5
    tl.store(out, total)


@triton.jit
def _fine(out, count):
    tl.store(out, count)


@triton.jit
def _forgotten(out, count):
    tl.store(out, count)


def call():
    _changes_type[(1,)](torch.zeros(1), 5)
    _fine[(1,)](torch.zeros(1), 5)


def forgotten():
    _forgotten[(1,)](torch.zeros(1), 5)


sys.exit(compile_kernels.check(80, [sys.modules[__name__]], call))
"""


def run(folder: Path, *command: str) -> tuple[int, str]:
    """The exit code, and the end of what was printed. The cache is empty, so that all is compiled."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, *command], env=environment, text=True, timeout=500, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout[-6000:]


def test_kernels_compile(tmp_path: Path) -> None:
    # For an H100. What is refused here is refused for all; ``compile_kernels.py 80`` says the same of an A100.
    code, printed = run(tmp_path, str(SCRIPT), "90")
    assert code == 0, printed


def test_a_broken_kernel_and_a_forgotten_one_are_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN)
    code, printed = run(tmp_path, str(file))
    assert code == 1, printed
    assert "FAILED __main__._changes_type" in printed
    assert "Loop-carried variable total" in printed
    assert "FAILED __main__._forgotten for compute capability 80: never compiled: add a call" in printed
    assert "ok     __main__._fine: 1 variants" in printed
