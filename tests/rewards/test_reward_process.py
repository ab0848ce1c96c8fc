"""Rewards are judged in a process of their own, and whatever they do to it, the run hears of it in one line."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_function_reward import batch

from tandem.errors import RunFailure, UserError
from tandem.rewards import process
from tandem.rewards.function import FunctionReward
from tandem.rewards.process import RewardProcesses
from tandem.roles import Reward

JUDGES = Path(__file__).parents[1] / "helpers" / "judges.py"


def at(text: str) -> str:
    """The line of the judges that has a text, as an error names it."""
    return f"judges.py:{next(i for i, line in enumerate(JUDGES.read_text().splitlines(), 1) if text in line)}"


@pytest.fixture
def judges():
    """Starts a process for some of the judges; returns their rewards."""
    started = []

    def start(*names: str, **options) -> list[FunctionReward]:
        started.append(
            RewardProcesses(
                [f"{JUDGES}:{name}" for name in names], **{"waits_s": (0.01, 0.01), "deadline_s": 60.0, **options}
            )
        )
        return started[-1].rewards()

    yield start
    for one in started:
        one.close()
        assert all(gone(worker.process.pid) for worker in one._workers)


@pytest.fixture
def pids(tmp_path, monkeypatch):
    """Reads the ids of the processes that a judge has started, and its own."""
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    return lambda: [int(word) for word in (tmp_path / "pids").read_text().split()]


def gone(pid: int) -> bool:
    """Whether no process of this id runs (one that nobody has waited for yet does not run)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def await_gone(pids: list[int]) -> None:
    end = time.monotonic() + 20
    while left := [pid for pid in pids if not gone(pid)]:
        assert time.monotonic() < end, f"{left} still run"
        time.sleep(0.01)


def failure(reward: Reward, *completions: str) -> str:
    with pytest.raises(RunFailure) as caught:
        reward.score(batch(*completions or ("a", "bc")))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_goes_well(judges, capsys):
    length, heavy, draws, prints, big, asks = judges("length", "heavy", "draws", "prints", "big", "asks")
    assert (length.name, length.score(batch("a", "bc"))) == ("length", [1.0, 2.0])
    # Nothing but what the function itself imports: no second copy of torch in memory.
    assert heavy.score(batch("a")) == [0.0]
    seeded = replace(batch("a", "b"), seed=1)
    assert draws.score(seeded) == draws.score(seeded)
    assert draws.score(batch("a", "b")) != draws.score(replace(seeded, seed=2)) != draws.score(seeded)
    assert big.score(batch("x" * 3_000_000, "y" * 2_000_000)) == [5e6, 5e6]
    with pytest.raises(UserError, match="'asks' wants the column 'answer', which the dataset lacks"):
        asks.score(batch("a"))
    prints.score(batch("a"))
    length._function.owner.close()
    out, err = capsys.readouterr()
    assert (out, err) == ("a line of the reward's\n", "an error of the reward's\n")


def test_processes_that_no_function_would_use_are_said_to_be_none(judges, caplog):
    judges("length", processes=2)
    assert [r.getMessage().partition(", since")[0] for r in caplog.records] == ["reward_processes: has no effect"]
    judges("length", "one_hangs", processes=2)
    assert len(caplog.records) == 1


def test_a_call_that_fails_is_made_again_whole(judges, caplog):
    """It was called again 32 times one by one, and all answers were thrown away."""
    once, always, wrong = judges("fails_once", "always_fails", "wrong")
    with caplog.at_level(logging.WARNING):
        assert once.score(batch("a", "b")) == [2.0, 2.0]
    assert [r.getMessage() for r in caplog.records] == [
        f"reward 'fails_once' raised ConnectionError: the server blinks ({at('blinks')}); it is called again in 0.01 s"
    ]
    assert failure(always, "1", "two") == (
        f"reward 'always_fails' raised ValueError: could not convert string to float: 'two' ({at('[float(c)')}), "
        "last at sample 1 (prompt p1): completion 'two'; "
        "it was called 3 times: mend it, or what it asks, and go on with --resume (a function that was mended: "
        "--accept-changed reward)"
    )
    # What it returns is wrong for good.
    with pytest.raises(UserError, match=r"'wrong' returned nan for sample 1 .*leave a sample out") as caught:
        wrong.score(batch("a", "b"))
    assert not isinstance(caught.value, RunFailure)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("exits", "exit code 3"),
        ("crashes", "SIGSEGV, at " + at("string_at")),
        ("killed", "SIGKILL"),
    ],
)
def test_a_function_that_ends_its_process(judges, name, how):
    (reward,) = judges(name)
    assert failure(reward) == f"reward {name!r} ended its process ({how}); go on with --resume"
    assert failure(reward) == f"reward {name!r}: its process has ended; go on with --resume"


@pytest.mark.parametrize(
    ("name", "place"),
    [("hangs", ", at " + at("Event().wait()  # for ever")), ("computes", ", at " + at("re.match")), ("stops", "")],
)
def test_a_function_that_hangs_is_named_with_its_line(judges, monkeypatch, name, place):
    monkeypatch.setattr(process, "END_S", 1.0)
    (reward,) = judges(name)
    reward._function.owner.deadline_s = 0.3
    assert failure(reward) == (
        f"reward {name!r} has not answered within 0.3 s (--reward-deadline){place}; go on with --resume"
    )


def test_one_call_of_many_that_hangs_is_named(judges, monkeypatch):
    """In one of two processes; what waits behind it, and what goes on in the other, keeps nobody."""
    monkeypatch.setattr(process, "END_S", 1.0)
    (reward,) = judges("one_hangs", processes=2)
    assert reward.score(batch("a", "b", "c")) == [1.0] * 3
    reward._function.owner.deadline_s = 0.3
    said = failure(reward, *"abc", "hang", *"defghijkl")
    assert said == (
        f"reward 'one_hangs' has not answered within 0.3 s (--reward-deadline), at {at('one of them, for ever')}; "
        "go on with --resume"
    )


def test_the_deadline_holds_for_a_process_that_does_not_read(judges, monkeypatch):
    monkeypatch.setattr(process, "END_S", 1.0)
    (reward,) = judges("length")
    reward._function.owner.deadline_s = 0.5
    os.kill(reward._function._workers[0].process.pid, signal.SIGSTOP)
    assert "has not answered within 0.5 s" in failure(reward, "x" * 5_000_000)


@pytest.mark.parametrize("name", ["pool", "pool_then_exits", "pool_then_hangs"])
def test_what_a_function_has_started_ends_with_it(judges, pids, name):
    (reward,) = judges(name)
    reward._function.owner.deadline_s = 3.0 if name == "pool_then_hangs" else 60.0
    if name == "pool":
        assert reward.score(batch("a", "bc")) == [1.0, 2.0]
        assert not any(map(gone, pids()))
        reward._function.owner.close()
    else:
        assert "exit code 4" in (said := failure(reward)) or "has not answered" in said
    assert len(pids()) == 3
    await_gone(pids())


def test_a_thread_that_goes_on_does_not_keep_it(judges, monkeypatch):
    monkeypatch.setattr(process, "END_S", 0.5)
    (reward,) = judges("thread")
    assert reward.score(batch("a")) == [1.0]
    start = time.monotonic()
    reward._function.owner.close()
    assert time.monotonic() - start < 5


PARENT = """
import sys
sys.path[:0] = {paths!r}
from test_function_reward import batch
from tandem.rewards.process import RewardProcesses
reward, = RewardProcesses([{source!r}], deadline_s=60.0).rewards()
print("ready", flush=True)
reward.score(batch("a", "bc"))
sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["pool", "pool_then_hangs", "computes"])
def test_it_is_gone_when_the_run_is_killed(tmp_path, pids, name):
    """Also what it has started, and also one that lets no thread of its own run."""
    code = PARENT.format(paths=[str(Path(__file__).parent)], source=f"{JUDGES}:{name}")
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    if name == "computes":
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        started = [int(pid) for pid in children]
        assert len(started) == 1
    else:
        end = time.monotonic() + 20
        while not (tmp_path / "pids").exists() or len(pids()) < 3:
            assert time.monotonic() < end
            time.sleep(0.01)
        started = pids()
    parent.kill()
    parent.communicate()
    await_gone(started)


def test_imports_that_fail_end_or_hang(tmp_path, judges):
    for text, words in (
        ("import os\nos._exit(5)\n", "the import of {} ended its process (exit code 5)"),
        ("import sys\nsys.exit(0)\n", "the import of {} ended its process (exit code 0)"),
        ("import threading\nthreading.Event().wait()\n", "the import of {} has not ended within 0.5 s"),
        ("x = 1\n", "no function 'f'"),
        ("x = = 1\n", "import failed: SyntaxError"),
    ):
        (tmp_path / "mine.py").write_text(text)
        source = f"{tmp_path}/mine.py:f"
        broken = RewardProcesses([source], deadline_s=0.5 if "Event" in text else 60.0)
        with pytest.raises(UserError) as caught:
            broken.rewards()
        assert words.format(source) in str(caught.value)
        broken.close()


def test_a_process_that_is_gone_before_it_hears_what_to_import(monkeypatch):
    exchange = process.Worker.exchange

    def late(self) -> None:
        self.process.wait()
        exchange(self)

    monkeypatch.setattr(process.Worker, "exchange", late)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    broken = RewardProcesses([f"{JUDGES}:pool"], deadline_s=60.0)
    with pytest.raises(UserError, match=rf"the import of {JUDGES}:pool ended its process \(exit code 1\)"):
        broken.rewards()
    broken.close()
