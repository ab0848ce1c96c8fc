"""The command's shell: finding a subcommand, and what each way of ending looks like from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from types import ModuleType

import pytest

from tandem.cli import main as shell
from tandem.config import key_names
from tandem.errors import UserError
from tandem.flags import THEIRS
from tandem.version import __version__


@pytest.fixture
def probe(monkeypatch):
    """A subcommand named ``probe`` whose behavior the test sets as ``probe.run``."""
    module = ModuleType("tandem_probe")
    monkeypatch.setitem(sys.modules, "tandem_probe", module)
    monkeypatch.setitem(shell.COMMANDS, "probe", shell.Command("Tests", "tandem_probe", "a test's own command", None))
    return module


def raising(error: BaseException):
    def run(argv: list[str]) -> int:
        raise error

    return run


def test_help_names_every_command(capsys):
    assert shell.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, command in shell.COMMANDS.items():
        assert f"  {name} " in out
        assert command.about in out
    assert all(len(line) <= 120 for line in out.splitlines())


def test_no_command_prints_the_help_and_fails(capsys):
    assert shell.main([]) == 2
    assert "usage: tandem COMMAND" in capsys.readouterr().err


def test_version(capsys):
    assert shell.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tandem {__version__}\n"


def test_unknown_command_names_the_nearest(capsys):
    assert shell.main(["grop"]) == 2
    assert capsys.readouterr().err == "tandem: error: no command 'grop'; did you mean grpo?\n"


def test_a_command_gets_the_rest_of_the_line_and_gives_the_exit_code(probe):
    seen = []
    probe.run = lambda argv: seen.append(argv) or 7
    assert shell.main(["probe", "--steps", "3"]) == 7
    assert seen == [["--steps", "3"]]


def test_user_error_is_one_line_without_traceback(probe, capsys):
    probe.run = raising(UserError("data.jsonl:3: not JSON\n  mend it"))
    assert shell.main(["probe"]) == 2
    assert capsys.readouterr().err == "tandem: error: data.jsonl:3: not JSON mend it\n"


def test_debug_shows_the_traceback(probe, capsys, monkeypatch):
    monkeypatch.setenv("TANDEM_DEBUG", "1")
    probe.run = raising(UserError("wrong"))
    assert shell.main(["probe"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("tandem: error: wrong\n")


def test_a_bug_keeps_its_traceback(probe):
    probe.run = raising(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        shell.main(["probe"])


def test_ctrl_c(probe, capsys):
    probe.run = raising(KeyboardInterrupt())
    assert shell.main(["probe"]) == 130
    assert capsys.readouterr().err == "tandem: stopped by Ctrl-C\n"


def test_sigterm_stops_as_ctrl_c_does(probe, capsys):
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def run(argv: list[str]) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            cleaned.append(True)
            raise
        return 0

    probe.run = run
    assert shell.main(["probe"]) == 143
    assert cleaned == [True]
    assert capsys.readouterr().err == "tandem: stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_sys_exit_in_a_command_does_not_pass_for_its_end(probe, capsys):
    """A reward or a model's own code that called sys.exit(0) ended a run of 0 steps with code 0."""
    probe.run = raising(SystemExit(0))
    assert shell.main(["probe"]) == 2
    assert re.search(r"test_main.py:\d+ ended the command with sys.exit\(0\)", capsys.readouterr().err)


@pytest.mark.parametrize("made", [RuntimeError("unexpected pos 64 vs 0"), KeyboardInterrupt()])
def test_a_library_s_own_error_in_the_middle_of_a_signal_is_a_stop(probe, capsys, made):
    """torch.save and numpy's import make RuntimeError and ImportError of the exception that a signal raises, and Ray,
    while it waits, a KeyboardInterrupt: SIGTERM was told as Ctrl-C."""

    def run(argv: list[str]) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise made from error
        return 0

    probe.run = run
    assert shell.main(["probe"]) == 143
    assert capsys.readouterr().err == "tandem: stopped by SIGTERM\n"


THREAD = """
import sys, threading, types
from tandem.cli import main as shell
shell.EXIT_DEADLINE_S = 0.3
def run(argv):
    threading.Thread(target=threading.Event().wait, name="uploader").start()
    print("done")
    return 7
sys.modules["probe"] = types.SimpleNamespace(run=run)
shell.COMMANDS["probe"] = shell.Command("Tests", "probe", "a test's own", None)
sys.argv = ["tandem", "probe"]
shell.process()
"""


def test_a_thread_that_goes_on_does_not_keep_the_process():
    done = subprocess.run([sys.executable, "-c", THREAD], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, "done\n")
    assert done.stderr == "tandem: the command has ended and left the thread 'uploader', which is ended now\n"
    # Nor does it after Ctrl-C, which comes once the command has ended, and is no other end of it.
    code = THREAD.replace("0.3", "60").replace("threading.Event().wait", "interrupt")
    interrupt = "time.sleep(0.6); os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    begin = "import os, signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{begin}\ndef interrupt():\n    {interrupt}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (7, "done\n", "")


LEFT = """
import atexit, os, signal, sys, types
from tandem.cli import main as shell
class Cycle:
    def __init__(self):
        self.own = self
    def __del__(self):
        print("taken apart")
kept = Cycle()
before = open("before", "w")
before.write("nor this")
def run(argv):
    global left
    left = open("left", "w")
    left.write("nobody closes it")
    atexit.register(print, "called at exit")
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
    return 7
sys.modules["probe"] = types.SimpleNamespace(run=run)
shell.COMMANDS["probe"] = shell.Command("Tests", "probe", "a test's own", None)
sys.argv = ["tandem", "probe"]
shell.process()
"""


def test_a_process_ends_without_taking_apart_what_it_holds(tmp_path):
    """That took 1.2 s of torch and transformers. What was left open is written, and who asked to be called is; Ctrl-C
    comes too late to be told of."""
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (7, "called at exit\n", "")
    assert (tmp_path / "left").read_text() == "nobody closes it"
    assert (tmp_path / "before").read_text() == "nor this"


def test_python_dash_m_and_a_reader_who_leaves():
    """The pipe is closed before anything is written to it."""
    command = subprocess.Popen(
        [sys.executable, "-m", "tandem", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()
    err = command.stderr.read()
    command.stderr.close()
    assert command.wait(timeout=60) == 128 + signal.SIGPIPE
    assert err == ""


def test_a_reader_who_leaves_while_rich_prints(probe, monkeypatch):
    """rich makes sys.exit(1) of that: `tandem advise RUN | head -1` ended with its file, line and code 2."""
    monkeypatch.setattr(shell, "_drop_output", lambda: None)

    def run(argv: list[str]) -> int:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904

    probe.run = run
    assert shell.main(["probe"]) == 128 + signal.SIGPIPE


STREAMS = """
import os, sys, types
from tandem.cli import main as shell
def run(argv):
    print("sft \u00fc", flush=True)
    print("\u65e5", file=sys.stderr)
    return 7 if min(os.open(os.devnull, os.O_RDONLY), os.pipe()[0]) > 2 and sys.stdin.read() == "" else 1
sys.modules["probe"] = types.SimpleNamespace(run=run)
shell.COMMANDS["probe"] = shell.Command("Tests", "probe", "a test's own", None)
sys.argv = ["tandem", "probe"]
shell.process()
"""


@pytest.mark.parametrize("closed", ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_or_hold_no_such_text_change_nothing(closed):
    """A reward's process had the number of the closed one, and died; a print of another script ended the run."""
    command = f'exec {sys.executable} -c "$1" {closed}'
    done = subprocess.run(
        ["/bin/sh", "-c", command, "sh", STREAMS],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        timeout=60,
    )
    assert done.returncode == 7
    assert done.stdout == (b"" if ">&-" in closed.split() else b"sft \\xfc\n")
    assert done.stderr == (b"" if "2>&-" in closed.split() else b"\\u65e5\n")


def test_names_of_others_lead_to_keys_that_there_are():
    classes = [
        command.config_class(name)[0] for name, command in shell.COMMANDS.items() if command.config == shell.METHOD
    ]
    assert {ours for names in THEIRS.values() for ours in names} <= {key for cls in classes for key in key_names(cls)}


@pytest.mark.parametrize("name", [name for name in shell.COMMANDS if name != "quickstart"])
def test_every_command_explains_itself(name, capsys):
    """Also that no two of its sections have a key of the same name."""
    assert shell.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    first = shell.COMMANDS[name].first.upper()
    assert f"usage: tandem {name} {first}".rstrip() in out
    # launch starts a script of the user's own, which has flags of its own.
    if name != "launch":
        assert "--config FILE.yaml" in out
        assert {"serve-reward": "--reward", "advise": "--run", "replay": "replay RUN"}.get(name, "--model") in out
