"""Asynchronous runs as a whole: law 1, what they train on and say of it, evaluation and refills amid open samples."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.models import make_tokenizer
from helpers.runs import arguments, run, unevaluated, write_inputs

from tandem.assembly.feeds import SamplesFeed
from tandem.checkpoint.store import CheckpointStore
from tandem.cli.main import main
from tandem.engines.live.engine import LiveEngine
from tandem.models.compiled import Blocks
from tandem.rollout.ahead import made_up
from tandem.rollout.prepare import Preparation
from tandem.rollout.sampling import groups_of, request
from tandem.runs.folder import RunFolder
from tandem.runs.lines import read_lines, read_metrics
from tandem.schedules.crew import Crew
from tandem.schedules.pipeline import Pipeline
from tandem.schedules.session import ENDED, Session
from tandem.seeds import derive_seed

STEPS, A_STEP = 3, 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("lag")
    write_inputs(folder)
    return folder


@pytest.fixture
def train(inputs, monkeypatch, capsys):
    """Trains in the folder of the inputs, with this reward of ``check.py``; the bytes of the weights."""
    monkeypatch.chdir(inputs)

    def call(method: str, out: str, *flags: str, evaluated: bool = False, steps: int = STEPS, ends: int = 0) -> bytes:
        argv = arguments(method)
        argv = [*(argv if evaluated else unevaluated(argv)), "--steps", str(steps), "--out", out, *flags]
        code = main(argv)
        assert code == ends, capsys.readouterr().err
        return b"" if code else next(Path(out, "model").glob("*model.safetensors")).read_bytes()

    return call


def synchronous(self: Pipeline, crew: Crew, session: Session) -> None:
    """A run without any lag, written down once more without a buffer: all of a step sampled, then trained on."""
    source: Any = crew.source
    session.resume(crew.method.initial_state())
    for step in range(1, self.steps + 1):
        crew.publish(session.clock)
        tickets = crew.tickets(range((step - 1) * self.items_per_step, step * self.items_per_step))
        prompts = [source.prompts[ticket.row] for ticket in tickets]
        requests = [
            request(prompt, ticket, source.params, samples_per_prompt=source.samples_per_prompt, seed=source.seed)
            for prompt, ticket in zip(prompts, tickets, strict=True)
        ]
        groups = groups_of(prompts, source.engine.generate(requests))
        source.judge(groups, derive_seed(source.seed, "judge", step))
        prepared = crew.prepare(groups, session.state, step)
        roles = crew.method.trains(session.state)
        metrics = crew.train(prepared, roles=roles, done=step - 1, changing=session.changing)
        session.reached(prepared.state, metrics)
        session.record(crew.evaluate)


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo", "online-dpo"])
def test_law_1(train, monkeypatch, capsys, method):
    """Without lag, parameters are those of the plain loop; with it, they are not. Every run ends with its advice."""
    without = train(method, f"{method}-0", "--max-lag", "0")
    assert "advice: a step takes " in capsys.readouterr().out
    lagging = train(method, f"{method}-1", "--max-lag", "1") if method == "grpo" else b""
    monkeypatch.setattr(Pipeline, "run", synchronous)
    assert without == train(method, f"{method}-plain") != lagging


@pytest.mark.parametrize(("method", "what"), [("dpo", "pair"), ("grpo", "sequence")])
def test_what_is_longer_than_a_micro_batch_is_said_once(train, capsys, method, what):
    same = train(method, f"{method}-whole", "--token-budget", "8")
    said = [line for line in capsys.readouterr().out.splitlines() if "token_budget" in line]
    assert len(said) == 1
    assert re.match(
        rf"after step \d: token_budget: a {what} of (9|1\d) tokens is more than 8 and goes through", said[0]
    )
    assert [e["message"] in said[0] for e in read_lines(Path(f"{method}-whole/events.jsonl")) if e["event"] == "note"]
    enough = train(method, f"{method}-enough", "--token-budget", "40")
    assert "token_budget" not in capsys.readouterr().out
    assert len(enough) == len(same)


def test_what_compiles_while_the_first_samples_are_drawn_learns_nothing(train, monkeypatch, capsys):
    """As if the engine were apart from the models: each compiles for samples that nobody has drawn.

    These are of the tokenizer's 61 tokens. The policy's embedding has 64 rows, and another model's may have fewer
    (Qwen 2.5: 152,064 of the 7B model, 151,936 of the 1.5B).
    """
    monkeypatch.setattr("tandem.models.forward.Blocks", partial(Blocks, backend="eager"))
    plain = train("ppo", "unprepared", "--compile", "on", steps=1)
    said = capsys.readouterr().out
    assert "compiling for" not in said
    assert re.search(r"^in the first step only: compiling [\d.]+ s$", said, re.M)
    ahead, apart = SamplesFeed._ahead, SimpleNamespace(home=lambda role: role, workers=lambda role: 0)

    def begin(feed: SamplesFeed, models: Any, progress: Any) -> Any:
        homes = SimpleNamespace(device=feed.wiring.homes.device, placement=apart)
        monkeypatch.setattr(feed, "wiring", SimpleNamespace(homes=homes))
        return ahead(feed, models, progress)

    monkeypatch.setattr(SamplesFeed, "_ahead", begin)
    batches = []
    monkeypatch.setattr("tandem.assembly.feeds.made_up", lambda **shape: batches.append(made_up(**shape)) or batches[0])
    assert train("ppo", "prepared", "--compile", "on", steps=1) == plain
    wanted = "compiling for the actor and the critic and the reference while the first samples are drawn"
    assert wanted in capsys.readouterr().out
    assert int(batches[0].token_ids_T.max()) < len(make_tokenizer()) == 61


def test_what_a_lagging_run_says_of_itself(train):
    """Each ticket is trained once; versions, lags and open groups are those of the tickets that were taken."""
    train("grpo", "said", "--max-lag", "2", "--window", "1", "--rollouts-logged", "999", evaluated=True, steps=5)
    lines = read_metrics(Path("said/metrics.jsonl"))
    taken = [event for event in read_lines(Path("said/events.jsonl")) if event["event"] == "taken"]
    assert [event["step"] for event in taken] == [1, 2, 3, 4, 5]
    assert sorted(n for event in taken for n in event["tickets"]) == list(range(5 * A_STEP))
    assert [line["open_groups"] for line in lines[1:]] == [2 * A_STEP, 2 * A_STEP, 2 * A_STEP, A_STEP, 0]
    # 2 minibatches a step: 2 optimizer steps.
    for line, event in zip(lines[1:], taken, strict=True):
        now = 2 * (event["step"] - 1)
        rows = [r for r in read_lines(Path("said/rollouts.jsonl")) if r["step"] == event["step"] and not r["held_out"]]
        assert [[min(s["version_min"] for s in r["samples"]), max(s["version_max"] for s in r["samples"])]
                for r in rows] == event["versions"]  # fmt: skip
        assert line["lag_max"] == now - min(low for low, _ in event["versions"])
        shares = {int(name.rpartition("_")[2]): share for name, share in line.items() if name.startswith("lag_share_")}
        assert sum(shares.values()) == pytest.approx(1)
        assert sum(lag * share for lag, share in shares.items()) == pytest.approx(line["lag_mean"])
    assert max(line["lag_max"] for line in lines[1:]) >= 2
    # Evaluations amid open samples are of one version, and as good as without any.
    assert [line["step"] for line in lines if "eval/reward" in line] == [0, 2, 4, 5]


def test_what_ends_a_run_as_its_step_is_written_down_trains_no_ticket_twice(train, inputs, monkeypatch):
    """The step counts as reached by then, and is in the checkpoint that the end of the run makes."""
    log, out = RunFolder.log_rollouts, inputs / "written"

    def interrupted(self: RunFolder, step: int, *rest: Any, **options: Any) -> None:
        log(self, step, *rest, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "log_rollouts", interrupted)
        train("grpo", "written", steps=2, ends=130)
    checkpoint = CheckpointStore(out / "checkpoints", keep=2).latest()
    assert checkpoint is not None
    assert (checkpoint.step, f"{ENDED}.pt" in checkpoint.files) == (1, False)
    train("grpo", "written", "--resume", steps=2)
    taken = taken_in_the_end(out)
    assert [taken[step]["tickets"] for step in (1, 2)] == [[*range(A_STEP)], [*range(A_STEP, 2 * A_STEP)]]


def taken_in_the_end(out: Path) -> dict[int, dict[str, Any]]:
    """The ``taken`` event of each step, those left out that a resume has taken back."""
    found: dict[int, dict[str, Any]] = {}
    for event in read_lines(out / "events.jsonl"):
        if event["event"] == "resume":
            found = {step: taken for step, taken in found.items() if step <= event["step"]}
        if event["event"] == "taken":
            found[event["step"]] = event
    return found


def test_law_5_killed_at_any_place_and_resumed_trains_each_ticket_once(inputs):
    """What had ended is trained on as it was, what was open is drawn anew; no file has a step twice."""
    steps, out = 6, inputs / "killed"
    argv = [*unevaluated(arguments("grpo")), "--steps", str(steps), "--out", "killed", "--max-lag", "2"]
    argv[argv.index("--max-new-tokens") + 1] = "16"
    argv += ["--save-every", "1", "--rollouts-logged", "999"]
    kept: dict[int, list[Any]] = {}
    opened: set[int] = set()
    for start, fault in enumerate([("fsync", 13), ("rename", 2), ("save", 2), None]):
        code, output = run(inputs, [*argv, *(["--resume"] if start else [])], fault=fault)
        assert code == (0 if fault is None else -9), output
        checkpoint = CheckpointStore(out / "checkpoints", keep=2).latest()
        assert checkpoint is not None
        if f"{ENDED}.pt" in checkpoint.files and fault:
            items = checkpoint.load(ENDED)["items"]
            kept |= {one["number"]: [c["token_ids"] for c in one["item"]["completions"]] for one in items}
            opened |= set(checkpoint.state.get("open", []))
            assert not {one["number"] for one in items} & set(checkpoint.state.get("open", []))
    assert kept
    assert opened
    taken = taken_in_the_end(out)
    assert list(taken) == [line["step"] for line in read_metrics(out / "metrics.jsonl")] == [*range(1, steps + 1)]
    assert sorted(n for event in taken.values() for n in event["tickets"]) == list(range(steps * A_STEP))
    trained = {
        number: [sample["completion_ids"] for sample in row["samples"]]
        for step, event in taken.items()
        for number, row in zip(
            event["tickets"], [r for r in read_lines(out / "rollouts.jsonl") if r["step"] == step], strict=True
        )
    }
    assert {number: trained[number] for number in kept} == kept


def samples_of_several_versions(out: str) -> list[bool]:
    return [s["version_min"] < s["version_max"] for r in read_lines(Path(out, "rollouts.jsonl")) for s in r["samples"]]


def test_a_run_goes_on_once_enough_has_ended(train, monkeypatch):
    """Where few decode at once, most groups are still being sampled when a step has its own; rewards judge them all.

    What is asked of schedule and engine reaches them.
    """
    buffers, told = [], []
    made, engine = Pipeline._buffer, LiveEngine.__init__
    monkeypatch.setattr(Pipeline, "_buffer", lambda *a: buffers.append(made(*a)) or buffers[-1])
    monkeypatch.setattr(LiveEngine, "__init__", lambda *a, **k: told.append(k["stale_cache"]) or engine(*a, **k))
    flags = ["--max-lag", "1", "--max-slots", "3", "--rollouts-logged", "99"]
    train("grpo", "few", *flags, "--window", "0.75", "--stale-cache", "recompute")
    assert [line["open_groups"] for line in read_metrics(Path("few/metrics.jsonl"))] == [A_STEP, A_STEP, 0]
    assert any(samples_of_several_versions("few"))
    assert [(buffer.size, buffer.reach) for buffer in buffers] == [(2 * A_STEP, 0.75 * 2 * A_STEP)]
    assert told == ["recompute"]


def test_a_copy_with_adapters_folded_in_may_take_weights_between_sequences(train):
    flags = ["--max-lag", "1", "--max-slots", "3", "--rollouts-logged", "99", "--lora.rank", "2", "--lora.fold"]
    train("grpo", "folded", *flags, "--weights-change", "between-sequences")
    assert [line["open_groups"] for line in read_metrics(Path("folded/metrics.jsonl"))] == [A_STEP, A_STEP, 0]
    assert max(line["lag_max"] for line in read_metrics(Path("folded/metrics.jsonl"))) > 0
    assert not any(samples_of_several_versions("folded"))


def test_stopped_early_and_in_a_step_with_refills_each_ticket_is_trained_once_or_passed_over(train, monkeypatch):
    """DAPO under lag: a run that has met its goal gives up what is open, and goes on with it when it is resumed.

    One that is stopped in a step keeps what that step has taken of what was open before.
    """
    flags, out = ["--max-lag", "2", "--save-every", "9m", "--keep-best=+eval/left_out"], Path("stopped")
    train("dapo", "stopped", *flags, "--patience", "1", evaluated=True, steps=6)
    assert [event["step"] for event in read_lines(out / "events.jsonl") if event["event"] == "finish"] == [2]
    prepare = Preparation.__call__

    def interrupted(self: Preparation, items: Any, state: Any, step: int) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return prepare(self, items, state, step)

    with monkeypatch.context() as patch:
        patch.setattr(Preparation, "__call__", interrupted)
        train("dapo", "stopped", *flags, "--resume", evaluated=True, steps=6, ends=130)
    checkpoint = CheckpointStore(out / "checkpoints", keep=2).latest()
    assert checkpoint is not None
    carried = [one["number"] for one in checkpoint.load(ENDED)["items"]] + checkpoint.state.get("open", [])
    assert (checkpoint.step, len(carried)) == (3, 2 * A_STEP)
    train("dapo", "stopped", *flags, "--resume", evaluated=True, steps=6)
    taken = taken_in_the_end(out)
    assert list(taken) == [1, 2, 3, 4, 5, 6]
    trained = [number for event in taken.values() for number in event["tickets"]]
    passed = [number for event in taken.values() for number in event["passed"]]
    assert passed
    assert sorted([*trained, *passed]) == list(range(6 * A_STEP + len(passed)))
