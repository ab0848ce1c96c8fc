"""The ``tandem`` command: finds the subcommand, and turns whatever ends it into one line and an exit code.

Exit codes: 0 done; 1 a bug (with its traceback); 2 something to put right outside Tandem, said in one line;
75 something that the run depends on failed, and ``--resume`` goes on; 130 stopped by Ctrl-C; 141 whoever read its
output has gone; 143 stopped by SIGTERM.
``TANDEM_DEBUG=1`` adds the traceback to any of them.
"""

from __future__ import annotations

import atexit
import errno
import gc
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from tandem.assembly.configs.methods import config_class
from tandem.collector import leave_out, pause
from tandem.config import load_config
from tandem.errors import RunFailure, UserError
from tandem.flags import suggest
from tandem.methods.table import ROWS, SAMPLES
from tandem.runs.folder import note_failure
from tandem.signals import Stop, stoppable
from tandem.stages import counting, stage
from tandem.version import __version__
from tandem.workers.launched import launched
from tandem.workers.supervisor import supervise


@dataclass(frozen=True)
class Command:
    """A subcommand: its flags are read into ``config``, and ``run(config) -> int`` of ``module`` does the work.

    ``module`` may name another function, ``tandem.cli.use:generate``.

    The module, which may need torch, is imported once the flags are known to be right.
    """

    group: str
    module: str
    about: str
    config: str | None
    """A class of ``tandem.cli.configs``, or of another ``module:class``, or METHOD.

    It may also name a function which, given the words of the command line, chooses the class and returns the flags
    among them. None: the command's function gets the words as they are.
    """
    first: str = ""
    """The key that a first word without a flag is the value of."""

    def config_class(self, name: str, words: Sequence[str] = ()) -> tuple[Any, list[str]]:
        """What the flags of the command with this name are read into, None where that is elsewhere; and the flags."""
        if self.first and words and not words[0].startswith("-"):
            words = [f"--{self.first}={words[0]}", *words[1:]]
        if self.config == METHOD:
            return config_class(name), [*words]
        found = self.config and _named(self.config, "tandem.cli.configs")
        return (found, [*words]) if not found or isinstance(found, type) else found([*words])

    def function(self) -> Callable[[Any], int]:
        """What does the work with what ``read`` gave. Imports the module."""
        found: Callable[[Any], int] = _named(self.module if ":" in self.module else f"{self.module}:run")
        return found

    def read(self, name: str, words: list[str]) -> Any:
        """What ``run`` is given. Raises UserError for a wrong flag, and SystemExit after ``--help``."""
        cls, flags = self.config_class(name, words)
        first = [self.first.upper()] if self.first else words[: len(words) - len(flags)]
        prog = " ".join(["tandem", name, *first])
        return words if cls is None else load_config(cls, flags, prog=prog)


def _named(name: str, module: str = "") -> Any:
    """What ``module:name`` names, or what a name alone does in ``module``."""
    place, _, name = name.rpartition(":")
    return getattr(import_module(place or module), name)


METHOD = "METHOD"
"""The config of a command that is a method's follows from the method."""
START, OFFLINE, ONLINE, USE = "Start here", "Train on a dataset", "Train on samples", "Use a model"
LOOK = "Look at a run"
USES, REPLAYS = "tandem.assembly.configs.uses", "tandem.assembly.configs.replay"
COMMANDS = {
    "quickstart": Command(
        START, "tandem.cli.quickstart", "SFT, a reward model and PPO in miniature, on a CPU", "QuickstartConfig"
    ),
    "doctor": Command(
        START, "tandem.cli.doctor", "check that devices, engine and weight sync work, and how fast", "DoctorConfig"
    ),
    "data": Command(START, "tandem.cli.data", "a dataset as a model will see it", "DataConfig", first="data"),
    "launch": Command(START, "tandem.cli.launch", "a loop of your own in several local processes", None),
    **{name: Command(OFFLINE, "tandem.cli.train", line.about, METHOD) for name, line in ROWS.items()},
    **{name: Command(ONLINE, "tandem.cli.train", line.about, METHOD) for name, line in SAMPLES.items()},
    "advise": Command(
        LOOK,
        "tandem.cli.advise",
        "what bound a run: sampling, training or rewards; what to change",
        "AdviseConfig",
        first="run",
    ),
    "replay": Command(
        LOOK,
        "tandem.cli.train:replay",
        "train again on what a run recorded, to the same parameters",
        f"{REPLAYS}:replay_config",
    ),
    "generate": Command(USE, "tandem.cli.use:generate", "samples of a dataset's prompts", f"{USES}:GenerateConfig"),
    "sample": Command(
        USE,
        "tandem.cli.use:sample",
        "the best of each prompt's samples, or pairs of them, to train on",
        f"{USES}:SampleConfig",
    ),
    "score": Command(
        USE, "tandem.cli.use:score", "answers through the rewards; the accuracy of pairs", f"{USES}:ScoreConfig"
    ),
    "eval": Command(
        USE, "tandem.cli.use:evaluate", "a model on held-out prompts, or with METHOD on rows", f"{USES}:eval_config"
    ),
    "export": Command(
        USE,
        "tandem.cli.use:export",
        "a Hugging Face folder of a run or a checkpoint; to the hub",
        f"{USES}:ExportConfig",
    ),
    "serve-reward": Command(
        USE,
        "tandem.cli.serve_reward",
        "a reward model over HTTP, for --reward http://...",
        "ServeRewardConfig",
        first="reward",
    ),
}

EXAMPLES = """\
Examples
  tandem quickstart
  tandem sft --model Qwen/Qwen3-0.6B --data demos.jsonl --out runs/sft --steps 500
  tandem rm --model Qwen/Qwen3-0.6B --data pairs.jsonl --out runs/rm --steps 500
  tandem ppo --config runs/ppo/config.yaml --kl-coef 0.02 --out runs/ppo-2
  tandem grpo --model runs/sft/model --data prompts.jsonl --reward check.py:right --out runs/grpo --steps 200
  tandem eval --model runs/grpo/model --data heldout.jsonl --reward check.py:right --out runs/eval
  tandem export --model runs/grpo --out models/grpo --dtype bfloat16

tandem COMMAND --help explains every key of a command. TANDEM_DEBUG=1 shows the traceback of an error."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What 3 kinds of errors say of a file that cannot grow: no room, no room for this user, or none in this file."""
FILES = {io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom}
"""Kinds of files that hold back what is written to them."""
EXIT_DEADLINE_S = 10.0
"""How long threads of other people's code may go on, in seconds, once the command has ended."""


def process() -> NoReturn:
    """The command as a process of its own, which ends when the command does, whoever's threads go on."""
    open_streams()
    pause()
    code = 1
    try:
        code = main(supervised=True)
    finally:
        threading.Thread(target=_end_threads, args=(code,), daemon=True).start()
    _exit(code)


def open_streams() -> None:
    """Opens standard streams that the process was started without, and lets output hold any text, whatever the locale.

    Otherwise the next file or socket would get the number of one of them, and be closed, or printed into, as such.
    """
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None, *, supervised: bool = False) -> int:
    """Runs a command line (without the program's name) and returns its exit code.

    ``supervised``: a command that works with Ray runs in a process forked here, which this one looks after.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(stoppable(_exit_stopped))
        try:
            code = _dispatch(list(sys.argv[1:] if argv is None else argv), stop, supervised)
            # Here, so that a reader who has gone away is noticed inside the try.
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            return _stopped(stop.signum or signal.SIGINT)
        except UserError as error:
            return _end(75 if isinstance(error, RunFailure) else 2, f"error: {' '.join(str(error).split())}")
        except BrokenPipeError:
            _drop_output()
            return 128 + signal.SIGPIPE
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # wherever a name is first looked for
                return _end(2, f"error: {str(error.filename)[:60]}...: no file may have so long a name; give another")
            if error.errno not in FULL:
                raise
            where = str(error.filename or "a file")
            if _output_is_full():
                _drop_output()
                where = "standard output"
            return _end(75, f"error: {where}: {error.strerror}; make room, and go on (a run: with --resume)")
        except Exception:
            if stop.signum is None:
                raise
            # Libraries turn the exception that a signal raises in the middle of them into one of their own.
            return _stopped(stop.signum)


def _dispatch(argv: list[str], stop: Stop, supervised: bool) -> int:
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
    except SystemExit as ended:
        # --help of a subcommand ends this way.
        return ended.code if isinstance(ended.code, int) else 0
    if supervised and "workers" in getattr(given, "parts", ()) and not launched():
        if (code := _supervise(given)) is not None:
            return code
        stop.pid = os.getpid()
    if command.config is not None and os.environ.get("RANK", "0") == "0":
        # Once under torchrun, and before torch and transformers are imported, which takes seconds.
        print(f"tandem {name}: loading libraries", flush=True)
    try:
        with counting():
            with stage("imports"):
                run = command.function()
                if supervised:
                    leave_out()
            stop.at_once = None
            return run(given)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):
            raise ended.__context__ from None  # rich ends a program so whose reader has gone
        # Whose it is, nobody knows, and it must not pass for a run that has ended.
        line = traceback.extract_tb(ended.__traceback__)[-1]
        raise UserError(f"{line.filename}:{line.lineno} ended the command with sys.exit({ended.code!r})") from ended


def _supervise(given: Any) -> int | None:
    """As ``supervise``; a run that ends because Ray does has that among its events."""
    try:
        return supervise()
    except RunFailure as error:
        with suppress(UserError):  # the disk may be full as well
            if hasattr(given, "run"):
                note_failure(Path(given.run.out), error)
        raise


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


def _stopped(signum: int) -> int:
    return _end(128 + signum, f"stopped by {'SIGTERM' if signum == signal.SIGTERM else 'Ctrl-C'}")


def _output_is_full() -> bool:
    """Whether what is to be printed cannot be."""
    try:
        print(flush=True)
    except OSError as error:
        return error.errno in FULL
    return False


def _drop_output() -> None:
    """Python flushes stdout once more as it exits: gives it somewhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_stopped(signum: int) -> NoReturn:
    sys.stdout.flush()
    os._exit(_stopped(signum))


def _end(code: int, line: str) -> int:
    if os.environ.get("TANDEM_DEBUG") == "1":
        traceback.print_exc()
    print(f"tandem: {line}", file=sys.stderr)
    return code


def _exit(code: int) -> NoReturn:
    """Ends the process as Python does, but leaves its memory to the system.

    To take torch and transformers apart, object by object, takes 1.2 s.
    """
    with suppress(KeyboardInterrupt):  # whoever does not wait for threads that still run leaves them
        threading._shutdown()  # type: ignore[attr-defined]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # The command has ended as it has; whoever waits for what others do at exit may end that with a second one.
        signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.SIG_DFL))
    atexit._run_exitfuncs()
    # Somebody's code may have left a file open, which may be among what the collector leaves out, and does not list.
    gc.unfreeze()
    for each in (sys.stdout, sys.stderr, *gc.get_objects()):
        if type(each) in FILES:
            with suppress(OSError, ValueError):
                each.flush()
    os._exit(code)


def _end_threads(code: int) -> None:
    """Ends the process where threads that are not daemons keep it from ending."""
    threading.Event().wait(EXIT_DEADLINE_S)
    main_thread, here = threading.main_thread(), threading.current_thread()
    left = [repr(t.name) for t in threading.enumerate() if t not in (main_thread, here) and not t.daemon]
    if left:
        print(
            f"tandem: the command has ended and left the thread {', '.join(left)}, which is ended now", file=sys.stderr
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
