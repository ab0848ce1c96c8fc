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

from tandem import __version__
from tandem.config import suggest
from tandem.errors import RunFailure, UserError


@dataclass(frozen=True)
class Command:
    """A subcommand. ``module`` has ``run(argv: list[str]) -> int`` and is imported only when it is called."""

    group: str
    module: str
    about: str


COMMANDS = {
    "quickstart": Command("Start here", "tandem.cli.quickstart", "SFT, a reward model and PPO in miniature, on a CPU"),
    "doctor": Command(
        "Start here", "tandem.cli.doctor", "check that devices, engine and weight sync work, and how fast"
    ),
    "launch": Command("Start here", "tandem.cli.launch", "a loop of your own in several local processes"),
    "sft": Command("Train on a dataset", "tandem.cli.sft", "supervised fine-tuning on demonstrations"),
    "rm": Command("Train on a dataset", "tandem.cli.rm", "a reward model from preference pairs"),
    "ppo": Command("Train on samples", "tandem.cli.ppo", "PPO with a critic and a KL penalty to a reference"),
    "grpo": Command("Train on samples", "tandem.cli.grpo", "GRPO: each sample against the others of its prompt"),
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
    try:
        return import_module(COMMANDS[name].module).run(rest)
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
