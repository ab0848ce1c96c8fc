"""The ``tandem`` command: finds the subcommand, and turns whatever ends it into one line and an exit code.

Exit codes: 0 done; 1 a bug (with its traceback); 2 something to put right outside Tandem, said in one line;
75 something that the run depends on failed, and ``--resume`` goes on; 130 stopped by Ctrl-C; 143 stopped by SIGTERM.
``TANDEM_DEBUG=1`` adds the traceback to any of them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import Any

from tandem import __version__
from tandem.config import load_config, suggest
from tandem.errors import RunFailure, UserError


@dataclass(frozen=True)
class Command:
    """A subcommand: its flags are read into ``config``, and ``run(config) -> int`` of ``module`` does the work.

    The module, which may need torch, is imported once the flags are known to be right.
    """

    group: str
    module: str
    about: str
    config: str | None
    """A class of ``tandem.cli.configs``. None: ``run`` gets the words of the command line as they are."""

    def read(self, name: str, words: list[str]) -> Any:
        """What ``run`` is given. Raises UserError for a wrong flag, and SystemExit after ``--help``."""
        if self.config is None:
            return words
        return load_config(getattr(import_module("tandem.cli.configs"), self.config), words, prog=f"tandem {name}")


START, OFFLINE, ONLINE = "Start here", "Train on a dataset", "Train on samples"
COMMANDS = {
    "quickstart": Command(
        START, "tandem.cli.quickstart", "SFT, a reward model and PPO in miniature, on a CPU", "QuickstartConfig"
    ),
    "doctor": Command(
        START, "tandem.cli.doctor", "check that devices, engine and weight sync work, and how fast", "DoctorConfig"
    ),
    "launch": Command(START, "tandem.cli.launch", "a loop of your own in several local processes", None),
    "sft": Command(OFFLINE, "tandem.cli.sft", "supervised fine-tuning on demonstrations", "SFTConfig"),
    "rm": Command(OFFLINE, "tandem.cli.rm", "a reward model from preference pairs", "RMConfig"),
    "ppo": Command(ONLINE, "tandem.cli.ppo", "PPO with a critic and a KL penalty to a reference", "PPOConfig"),
    "grpo": Command(ONLINE, "tandem.cli.grpo", "GRPO: each sample against the others of its prompt", "GRPOConfig"),
}

EXAMPLES = """\
Examples
  tandem quickstart
  tandem sft --model Qwen/Qwen3-0.6B --data demos.jsonl --out runs/sft --steps 500
  tandem rm --model Qwen/Qwen3-0.6B --data pairs.jsonl --out runs/rm --steps 500
  tandem ppo --config ppo.yaml --kl-coef 0.02 --dry-run
  tandem grpo --model runs/sft/model --data prompts.jsonl --reward checker.py:score --out runs/grpo --steps 200

tandem COMMAND --help explains every key of a command. TANDEM_DEBUG=1 shows the traceback of an error."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Whatever stops cleanly at Ctrl-C does so now."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (without the program's name) and returns its exit code."""
    try:
        with _sigterm_as_interrupt():
            code = _dispatch(list(sys.argv[1:] if argv is None else argv))
            # Here, so that a reader who has gone away is noticed inside the try.
            sys.stdout.flush()
            return code
    except UserError as error:
        return _end(75 if isinstance(error, RunFailure) else 2, f"error: {' '.join(str(error).split())}")
    except Terminated:
        return _end(143, "stopped by SIGTERM")
    except KeyboardInterrupt:
        return _end(130, "stopped by Ctrl-C")
    except BrokenPipeError:
        # Python flushes stdout once more as it exits: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _dispatch(argv: list[str]) -> int:
    if not argv:
        print(help_text(), file=sys.stderr)
        return 2
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name in ("-V", "--version"):
        print(f"tandem {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}{suggest(name, COMMANDS)}")
    command = COMMANDS[name]
    try:
        given = command.read(name, rest)
        return import_module(command.module).run(given)
    except SystemExit as stop:
        # --help of a subcommand ends this way.
        return stop.code if isinstance(stop.code, int) else 0


def help_text() -> str:
    """The commands by group, and examples."""
    lines = [
        f"Tandem {__version__} aligns language models with human preferences and verifiable rewards.",
        "",
        "usage: tandem COMMAND [--config FILE.yaml] [--key value ...]",
    ]
    width = max(map(len, COMMANDS))
    group = ""
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            lines += ["", group]
        lines.append(f"  {name:<{width}}  {command.about}")
    return "\n".join([*lines, "", EXAMPLES])


def _end(code: int, line: str) -> int:
    if os.environ.get("TANDEM_DEBUG") == "1":
        traceback.print_exc()
    print(f"tandem: {line}", file=sys.stderr)
    return code


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Raises Terminated in the main thread at SIGTERM. Elsewhere signals cannot be handled, and none are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
