"""``tandem launch``: a script of your own in several processes of this machine, as torchrun starts it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from tandem.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"launch: {message}; see tandem launch --help")


def run(argv: list[str]) -> int:
    """Starts the script. Returns the exit code of the first process that failed, or 0."""
    parser = _Parser(
        prog="tandem launch",
        description="Starts a script in several processes of this machine, as torchrun does: RANK, WORLD_SIZE and "
        "LOCAL_RANK say which one it is; where there are GPUs, the one numbered LOCAL_RANK is its own.",
    )
    parser.add_argument("--workers", type=int, help="how many processes (default: one for each GPU, or one)")
    parser.add_argument("script", type=Path, help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what follows is the script's own")
    try:
        options = parser.parse_args(argv)
    except SystemExit:  # after --help
        return 0
    script = options.script.expanduser()
    if not script.is_file():
        raise UserError(f"launch: no file {options.script}; give the path of a Python script")
    return _start(_workers(options.workers), [str(script), *options.arguments])


def _workers(asked: int | None) -> int:
    """Raises UserError for more processes than GPUs, where there are any."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    workers = asked if asked is not None else max(1, gpus)
    if workers < 1:
        raise UserError(f"launch: --workers {workers}; it must be at least 1")
    if gpus and workers > gpus:
        raise UserError(f"launch: --workers {workers} and there are {gpus} GPUs, one for each; set at most {gpus}")
    return workers


def _start(workers: int, command: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    # Processes that each take all cores wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    # Said in full, since torchrun takes what is not from variables that clusters set (PET_NNODES, PET_MAX_RESTARTS).
    one_machine = ["--standalone", "--nnodes=1", "--max-restarts=0"]
    try:
        torchrun(parse_args([*one_machine, f"--nproc-per-node={workers}", *command]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        print(f"tandem launch: process {rank} of {workers} {how}; the others were stopped", file=sys.stderr)
        return 128 - code if code < 0 else code
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0
