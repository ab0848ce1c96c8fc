"""Items that a method passes over are replaced by the next ones of the data: DAPO's dynamic sampling, as run."""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helpers.runs import arguments, unevaluated, write_inputs

from tandem.cli.main import main
from tandem.data.order import Order
from tandem.errors import UserError
from tandem.methods.base import Method, Rows
from tandem.rollout.rows import Tokenized
from tandem.schedules.buffer import Buffer
from tandem.schedules.crew import Crew
from tandem.schedules.pipeline import TRIES, Pipeline
from tandem.schedules.session import Session

STEPS, A_STEP, ROWS = 6, 6, 40
JUDGES = """
import json, os, random
def half(p, c):
    return float(p[0] in "abc" and sum(map(ord, c)) % 2)
def taught(prompts, completions):
    # Of prompts with d, e or f no answer is right. What was judged is written down.
    scores = [half(p, c) for p, c in zip(prompts, completions)]
    with open(os.environ["JUDGED"], "a") as file:
        file.write("".join(json.dumps([p, s]) + "\\n" for p, s in zip(prompts, scores)))
    taught.counts["wrong"] += scores.count(0.0)
    return scores
taught.counts = {"wrong": 0}
def undecided(prompts, completions):
    return [half(p, c) if p[0] in "abc" else None for p, c in zip(prompts, completions)]
def drawn(prompts, completions):
    return [random.random() if p[0] in "abc" else 0.0 for p in prompts]
def alike(prompts, completions):
    return [0.25] * len(prompts)
def taught_for_a_while(prompts, completions):
    return taught(prompts, completions) if not os.path.exists("stop") else alike(prompts, completions)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("refill")
    write_inputs(folder)
    (folder / "judges.py").write_text(JUDGES)
    return folder


@pytest.fixture
def dapo(inputs, monkeypatch, capsys):
    """Runs ``tandem dapo`` in the folder of the inputs: (exit code, standard output, standard error)."""
    monkeypatch.chdir(inputs)

    def call(out: str, *flags: str, reward: str = "taught", evaluated: bool = False, samples: int = 3):
        monkeypatch.setenv("JUDGED", str(inputs / f"{out}.judged"))
        argv = [*arguments("dapo", learning_rate="1e-3"), "--steps", str(STEPS)]
        argv[argv.index("--samples-per-prompt") + 1] = str(samples)
        argv = [*argv, "--eval-reward", "check.py:right"] if evaluated else unevaluated(argv)
        argv[argv.index("check.py:right")] = f"judges.py:{reward}"
        code = main([*argv, "--out", out, *flags])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def handed_out(monkeypatch) -> list[list[int]]:
    """The positions of each call for tickets. A call in ``stops`` is Ctrl-C."""
    calls: list[list[int]] = []
    tickets = Order.tickets

    def watched(self: Order, positions: range, per_step: int) -> Any:
        calls.append(list(positions))
        if len(calls) in {int(stop) for stop in os.environ.get("STOPS", "").split()}:
            raise KeyboardInterrupt
        return tickets(self, positions, per_step)

    monkeypatch.setattr(Order, "tickets", watched)
    return calls


def metrics(out: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per"))} for line in lines]


def weights(out: str) -> bytes:
    return (Path(out) / "model" / "model.safetensors").read_bytes()


def cursor(out: str, step: int) -> int:
    taken: int = json.loads((Path(out) / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())["taken"]
    return taken


def judged(out: str) -> list[tuple[str, float]]:
    return [tuple(json.loads(line)) for line in Path(f"{out}.judged").read_text().splitlines()]


def prompt_of(row: str) -> str:
    prompt: str = json.loads(row)["prompt"]
    return prompt


def taken_by(lines: list[dict[str, Any]]) -> int:
    return sum(A_STEP + int(line.get("passed_over", 0)) for line in lines if line["step"])


def test_law_7_and_metrics_of_all_that_was_sampled(dapo, handed_out):
    """Each position is handed out once, in order, over epochs; the cursor in a checkpoint counts refills."""
    assert dapo("whole", "--rollouts-logged", "999", "--save-every", "1", "--keep", "9")[0] == 0
    lines = metrics("whole")
    positions = [position for call in handed_out for position in call]
    assert positions == list(range(taken_by(lines)))
    assert len(positions) > 2 * ROWS
    assert any(len(call) < A_STEP for call in handed_out)
    for step in range(1, STEPS + 1):
        assert cursor("whole", step) == taken_by([line for line in lines if line["step"] <= step])

    samples = judged("whole")
    times = Counter(prompt for prompt, _ in samples)
    epochs = len(positions) // ROWS
    for prompt, rows in Counter(map(prompt_of, Path("prompts.jsonl").read_text().splitlines())).items():
        assert 3 * rows * epochs <= times[prompt] <= 3 * rows * (epochs + 1)

    kept: dict[int, list[float]] = {}
    for line in (Path("whole") / "rollouts.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept.setdefault(row["step"], []).extend(r["reward"] for r in row["samples"])
    done = 0
    for line in lines:
        count = 3 * (A_STEP + int(line["passed_over"]))
        rewards = [reward for _, reward in samples[done : done + count]]
        done += count
        assert line["reward"] == pytest.approx(statistics.fmean(rewards), abs=1e-12)
        assert line["reward/taught/wrong"] == rewards.count(0.0)
        # What was trained on is another mean, since no group of it is all wrong.
        assert len(kept[line["step"]]) == 3 * A_STEP
        assert statistics.fmean(kept[line["step"]]) > line["reward"] + 0.1
    assert done == len(samples)


@pytest.mark.parametrize("samples", [2, 3])
def test_law_5_stopped_at_a_refill_and_resumed_is_the_unbroken_run(dapo, handed_out, monkeypatch, samples):
    """With an evaluation in between. The same run again is the same, too."""
    names = [f"{name}-{samples}" for name in ("unbroken", "again", "broken")]
    assert [dapo(out, evaluated=True, samples=samples)[0] for out in names[:2]] == [0, 0]
    calls = handed_out[: len(handed_out) // 2]
    assert handed_out == 2 * calls
    # A refill of the second step, which after the resume is the second call.
    starts = [taken_by(metrics(names[0])[: step + 1]) for step in (1, 2)]
    second = [call[0] for call in calls].index(starts[0])
    assert calls[second + 1][0] < starts[1]
    del handed_out[:]
    monkeypatch.setenv("STOPS", f"{second + 2} {second + 4}")
    codes = [dapo(names[2], *resume, evaluated=True, samples=samples)[0] for resume in ([], ["--resume"], ["--resume"])]
    assert codes == [130, 130, 0]
    assert handed_out == [*calls[: second + 2], *calls[second : second + 2], *calls[second:]]
    assert metrics(names[0]) == metrics(names[1]) == metrics(names[2])
    assert weights(names[0]) == weights(names[1]) == weights(names[2])
    assert [line["step"] for line in metrics(names[2]) if "eval/reward" in line] == [0, 2, 4, 6]


def test_data_that_teaches_nothing_ends_the_run(dapo, handed_out):
    code, stdout, stderr = dapo("nothing", "--save-every", "0", reward="alike")
    assert code == 2
    assert stderr.splitlines()[-1].startswith("tandem: error: DAPO keeps 0 of the 60 items of this step, and needs 6: ")
    assert stderr.endswith("see its samples with 'tandem eval'\n")
    assert [position for call in handed_out for position in call] == list(range(TRIES * A_STEP))
    assert "stopped in step 1; nothing is saved\n" in stdout  # by --resume nothing can be gone on with


def test_data_that_has_taught_all_it_can_saves_the_steps_done(dapo, handed_out, monkeypatch):
    """And once a reward tells samples apart again, ``--resume`` goes on at the step's first position."""
    take = Session.take

    def until_step_3(self: Session, count: int) -> range:
        if self.step == 2:
            Path("stop").touch()
        return take(self, count)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "take", until_step_3)
        code, stdout, stderr = dapo("some", reward="taught_for_a_while")
    assert (code, "go on after step 2 with --resume" in stdout) == (2, True), stderr
    assert stderr.endswith("see what rollouts.jsonl says of earlier steps\n")
    stopped_at = cursor("some", 2)
    assert stopped_at == taken_by(metrics("some"))
    Path("stop").unlink()
    del handed_out[:]
    assert dapo("some", "--resume", reward="taught_for_a_while")[0] == 0
    assert handed_out[0][0] == stopped_at
    assert dapo("straight", reward="taught_for_a_while")[0] == 0
    assert metrics("some") == metrics("straight")
    assert weights("some") == weights("straight")


def test_groups_without_a_reward_are_passed_over(dapo, handed_out):
    """One at a time as well: a prompt that nobody can judge is no fault where it came in another's place."""
    code, stdout, stderr = dapo("undecided", reward="undecided")
    assert code == 0, stderr
    lines = metrics("undecided")
    told = f"after step 1: samples without a reward, which are left out: {lines[0]['left_out']:.0f} (left_out in"
    assert stdout.count("left out:") == stdout.count(told) == 1
    assert min(map(len, handed_out)) == 1
    assert all(line["left_out"] >= 3 for line in lines if line["step"])
    assert all(line["left_out"] <= 3 * line["passed_over"] for line in lines if line["step"])


def test_refills_are_judged_by_draws_of_their_own(dapo):
    """A reward that draws would draw the same numbers for a refill as for the step that its tickets are named after."""
    assert dapo("drawn", "--rollouts-logged", "999", reward="drawn")[0] == 0
    rows = map(json.loads, (Path("drawn") / "rollouts.jsonl").read_text().splitlines())
    rewards = [r["reward"] for row in rows for r in row["samples"]]
    assert len(rewards) == len(set(rewards)) == STEPS * A_STEP * 3


@dataclass(frozen=True, kw_only=True)
class Some(Method):
    """Keeps the items that are true."""

    reads: ClassVar = Rows("demonstrations")
    title: ClassVar = "Some"

    def keep(self, item: Any) -> bool:
        return bool(item)


def taken(rows: list[int], items_per_step: int) -> tuple[list[int], list[int], int]:
    """What a step takes of a stream of such items: kept, passed over, and where the cursor stands."""
    session = Session(run=None, store=None, save_every=None, trainers={}, progress=None, clock=None)
    crew = Crew(
        method=Some(),
        tickets=lambda positions: Order(len(rows), 0).tickets(positions, items_per_step),
        source=Tokenized(rows),
        prepare=None,
        trainers={},
        push_weights=None,
        evaluate=None,
    )
    buffer = Buffer(items_per_step=items_per_step)
    Pipeline(steps=1, items_per_step=items_per_step)._take(crew, session, buffer)
    kept, passed = ([place.made for place in places] for places in (buffer.taken, buffer.passed))
    return kept, passed, session.handed_out


def stream(kept_at: set[int], length: int) -> list[int]:
    """Rows of which the seeded order makes a stream whose items at these positions are kept."""
    rows = [0] * length
    for position in kept_at:
        rows[Order(length, 0).item(position)] = 1
    return rows


def test_the_tenth_try_is_the_last():
    most = TRIES * 2
    assert taken(stream({0, 1}, 99), 2) == ([1, 1], [], 2)
    # One is kept; the other comes when one less than the most have been passed over, and then one too late.
    assert taken(stream({0, most}, 99), 2) == ([1, 1], [0] * (most - 1), most + 1)
    with pytest.raises(UserError, match=f"Some keeps 1 of the {most + 1} items of this step, and needs 2"):
        taken(stream({0, most + 1}, 99), 2)
