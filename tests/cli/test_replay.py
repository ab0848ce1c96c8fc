"""``tandem replay``: from a run's record to its parameters, bit for bit; what it refuses; what may be given anew."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from helpers.runs import arguments, run, unevaluated, write_inputs

from tandem.assembly.configs.methods import read_config
from tandem.assembly.configs.replay import replay_config
from tandem.cli.main import main
from tandem.config import dump_config, load_config
from tandem.engines.live.engine import LiveEngine
from tandem.errors import UserError
from tandem.methods.table import SAMPLES, method_class
from tandem.runs.record import RECORD, Record, path_of, steps_in

STEPS = 3
RUNS = {
    # Some groups of DAPO are passed over, and refilled.
    "dapo": ["--max-lag", "1", "--samples-per-prompt", "2"],
    "ppo": ["--max-lag", "2", "--window", "1", "--kl-coef", "0.1", "--reference-every", "2"],
    "online-dpo": [],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    write_inputs(folder)
    (folder / "judge.py").write_text(
        "def half(completions): return [float(sum(map(ord, c)) % 2) for c in completions]\n"
    )
    return folder


def line(method, out, *flags):
    argv = [*unevaluated(arguments(method)), "--steps", str(STEPS), "--record", "--out", out]
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        if flag in argv:
            argv[argv.index(flag) + 1] = value
        else:
            argv += [flag, value]
    return argv


@pytest.fixture(scope="module")
def recorded(inputs):
    """The folder of a recorded run of GRPO that was killed in the write of its third step, and went on with a lag."""
    argv = line("grpo", "grpo", "--save-every", "1", "--max-lag", "1", "--lr-schedule", "constant", "--seed", "5")
    # After the run's identity and its config, the third step's file is about to take its name.
    code, output = run(inputs, argv, fault=("replace", 5))
    assert code == -signal.SIGKILL, output
    assert [*(inputs / "grpo" / RECORD).glob(".*-partial")], "the kill was not inside the write of a step"
    assert steps_in(inputs / "grpo" / RECORD) == [1, 2]
    code, output = run(inputs, [*argv, "--resume"])
    assert code == 0, output
    return inputs / "grpo"


@pytest.fixture
def at(inputs, monkeypatch):
    monkeypatch.chdir(inputs)


@pytest.fixture
def no_engine(monkeypatch):
    """Nothing may be sampled, and nothing judged."""

    def made(*_, **__):
        raise AssertionError("a replay has no engine")

    monkeypatch.setattr(LiveEngine, "__init__", made)


def weights(out):
    return (Path(out) / "model" / "model.safetensors").read_bytes()


def metrics(out, *without):
    lines = [json.loads(text) for text in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    left_out = ("seconds", "tokens_per", "lag", "open_groups", "engine_busy", *without)
    return [{k: v for k, v in one.items() if not k.startswith(left_out)} for one in lines]


def replay(*words):
    return main(["replay", *map(str, words)])


@pytest.mark.parametrize("method", RUNS)
def test_a_replay_has_the_parameters_of_its_run(at, method, monkeypatch, capsys):
    """With a lag, groups passed over, minibatches and epochs, critic, following reference, pairs."""
    flags = [*RUNS[method], *(("--reward", "judge.py:half") if method == "dapo" else ())]
    assert main(line(method, method, *flags)) == 0
    if method == "dapo":
        assert any(one.get("passed_over") for one in metrics(method))
    with monkeypatch.context() as patch:
        patch.setattr(LiveEngine, "__init__", None)
        assert replay(method, "--out", f"{method}-2") == 0
    assert f"Its weights are those of {method}/model, bit for bit" in capsys.readouterr().out
    assert weights(f"{method}-2") == weights(method)
    # What is measured of the groups that were passed over is not there; all else is.
    sampled = ("reward", "response", "eos", "sampled", "left_out", "passed") if method == "dapo" else ()
    assert metrics(f"{method}-2", *sampled) == metrics(method, *sampled)


def test_a_replay_of_a_replay_of_a_run_that_was_killed_and_resumed(recorded, at, no_engine):
    for folder, again in (("grpo", "grpo-2"), ("grpo-2", "grpo-3")):
        assert replay(folder, "--out", again) == 0
        assert weights(again) == weights("grpo")
    records = [Record(Path(out), json.loads((Path(out) / "run.json").read_text())["id"]) for out in ("grpo", "grpo-3")]
    assert records[0].tickets == records[1].tickets
    assert records[0].groups(3) == records[1].groups(3)
    events = [json.loads(text) for text in Path("grpo-2/events.jsonl").read_text().splitlines()]
    assert [e["tickets"] for e in events if e["event"] == "taken"] == [
        [ticket.number for ticket in step] for step in records[0].tickets
    ]


def test_a_replay_that_is_stopped_goes_on(recorded, at, capsys):
    """First two steps, then, with another last one, the third."""
    assert replay("grpo", "--out", "part", "--last-step", 2, "--no-record") == 0
    assert "grpo/model" not in capsys.readouterr().out
    assert weights("part") != weights("grpo")
    assert replay("grpo", "--out", "part", "--last-step", 3, "--no-record", "--resume") == 0
    assert weights("part") == weights("grpo")
    assert replay("grpo", "--out", "part", "--last-step", 3, "--no-record", "--resume") == 0
    assert "all 3 steps are done, nothing is left to resume" in capsys.readouterr().out
    assert replay("part", "--out", "x") == 2
    assert "part: the run was not recorded; record the next one with --record" in capsys.readouterr().err
    assert main([*line("grpo", "part", "--seed", "5"), "--resume"]) == 2
    assert "replayed" in capsys.readouterr().err


def test_what_may_be_given_anew_is_and_changes_the_result(recorded, at, capsys):
    assert replay("grpo", "--out", "anew", "--learning-rate", "1e-3", "--token-budget", 64, "--overwrite") == 0
    assert "Its weights are not those of grpo/model" in capsys.readouterr().out
    config = yaml.safe_load(Path("anew/config.yaml").read_text())
    assert (config["learning_rate"], config["replayed"], config["seed"]) == (1e-3, "grpo", 5)
    # That config repeats it; one that says something else of what was sampled is refused.
    assert replay("grpo", "--config", "anew/config.yaml", "--out", "repeated", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "learning_rate             0.001" in said
    assert not re.search("eval_every|engine.kind|accept_changed", said)  # nothing is sampled: they have no effect
    Path("other.yaml").write_text("eval_data: prompts.jsonl\n")
    assert replay("grpo", "--config", "other.yaml", "--out", "repeated") == 2
    assert "eval_data: a replay samples and judges nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "replay: which run? its folder comes first, as in: tandem replay runs/grpo --out runs/again"),
        (["none", "--out", "x"], "none: not the folder of a run: it has no run.json"),
        (["grpo"], "missing --out"),
        (["grpo", "--out", "grpo"], "--out: grpo is the run that is replayed; give another folder"),
        (["grpo", "--out", "grpo", "--overwrite"], "out: grpo is the run that is replayed; give another folder"),
        (["grpo", "--out", "grpo/x/..", "--overwrite"], "is the run that is replayed; give another folder"),
        (
            ["grpo", "--out", "x", "--temperature", "2"],
            "--temperature: a replay trains on what was recorded, with this key as",
        ),
        (
            ["grpo", "--out", "x", "--engine.kind", "vllm"],
            "--engine.kind: a replay samples and judges nothing, so it has no effect",
        ),
        (["grpo", "--out", "x", "--max-lag", "0"], "--max-lag: a replay trains on what was recorded"),
        (["grpo", "--out", "x", "--steps", "9"], "--steps: a replay trains on what was recorded"),
        (["grpo", "--out", "x", "--learning-rat", "9"], "unknown flag --learning-rat; did you mean --learning-rate?"),
        (["grpo", "--out", "x", "--last-step", "9"], "last_step: the record in grpo/record ends with step 3, got 9"),
        (["grpo", "--out", "x", "--last-step", "0"], "--last-step: expected 1 or more, got 0"),
        (["grpo", "--out", "x", "--model", "nowhere"], "nowhere: cannot load a model"),
        (
            ["grpo", "--out", "x", "--model", "teacher"],
            "actor: teacher is not the model that grpo started from: model.s",
        ),
    ],
)
def test_wrong_input_is_one_line(recorded, at, capsys, words, message):
    assert replay(*words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert not Path("x").exists()


def copied(name):
    shutil.rmtree(name, ignore_errors=True)
    shutil.copytree("grpo", name)
    return Path(name)


def test_a_damaged_record_is_refused_before_anything_is_loaded(recorded, at, capsys):
    run = copied("damaged")
    path = path_of(run / RECORD, 2)
    path.write_bytes(path.read_bytes()[:-9])
    assert replay("damaged", "--out", "x") == 2
    printed = capsys.readouterr()
    assert "damaged/record/step_00000002.jsonl.gz: step 2 is damaged or truncated" in printed.err
    assert "loading the actor" not in printed.out
    path.unlink()
    assert replay("damaged", "--out", "x") == 2
    assert "step 2 of damaged is not recorded" in capsys.readouterr().err
    assert not Path("x").exists()


def test_neither_data_nor_rewards_need_be_there_any_more(recorded, at, no_engine):
    for name in ("prompts.jsonl", "check.py"):
        Path(name).rename(f"{name}.gone")
    try:
        assert replay("grpo", "--out", "alone", "--save-every", "0", "--no-record", "--last-step", 1) == 0
    finally:
        for name in ("prompts.jsonl", "check.py"):
            Path(f"{name}.gone").rename(name)


def test_a_model_that_has_changed_and_one_of_a_run_of_rows(recorded, at, capsys):
    shutil.copytree("base", "moved")
    assert replay("grpo", "--out", "x", "--model", "moved", "--dry-run") == 0
    assert "18 groups of 3 steps" in capsys.readouterr().out
    (Path("moved") / "config.json").write_text((Path("base") / "config.json").read_text().replace("1e-06", "1e-05"))
    assert replay("grpo", "--out", "x", "--model", "moved") == 2
    assert "actor: moved is not the model that grpo started from: config.json differs" in capsys.readouterr().err
    run = copied("accepted")
    with (run / "events.jsonl").open("a") as events:
        events.write(
            json.dumps({"time": "", "event": "accept_changed", "what": "model", "changed": ["model base"]}) + "\n"
        )
    assert replay("accepted", "--out", "x") == 2
    assert "accepted: went on with another model than it began with (model base)" in capsys.readouterr().err
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"method": "SFT"}))
    assert replay("accepted", "--out", "x") == 2
    assert (
        "accepted: a run of SFT, which samples nothing; --config accepted/config.yaml repeats"
        in capsys.readouterr().err
    )


def test_nothing_is_said_of_keys_that_only_the_run_needed(tmp_path, caplog):
    given = {"keep_best": "eval/reward", "eval_every": 2, "max_lag": 1, "weights_change": "between-sequences"}
    files = {"model": "m", "data": "d.jsonl", "eval_data": "d.jsonl", "reward": "r.py:f", "placement__engine": 1}
    config = read_config("grpo", out="o", steps=3, **files, **given)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "run.json").write_text(json.dumps({"id": "", "seed": 0, "inputs": {}, "method": "GRPO"}))
    cls, words = replay_config([str(tmp_path), "--out", "x"])
    assert load_config(cls, words).schedule == config.schedule
    assert not caplog.records
    (tmp_path / "more.yaml").write_text("keep_gathered: true\n")  # one worker has nothing to keep
    load_config(cls, [*words, "--config", str(tmp_path / "more.yaml")])
    assert "keep_gathered: has no effect" in caplog.text


@pytest.mark.parametrize("method", SAMPLES)
def test_the_help_of_a_run_lists_what_may_be_given_and_no_more(tmp_path, method, capsys):
    (tmp_path / "run.json").write_text(
        json.dumps({"id": "", "seed": 0, "inputs": {}, "method": method_class(method).title})
    )
    (tmp_path / "config.yaml").write_text("out: o\nsteps: 5\nmodel: m\ndata: d\nreward: [r.py:f]\n"
                                          + ("teacher: t\n" if method == "opd" else ""))  # fmt: skip
    with pytest.raises(SystemExit):
        replay_config([str(tmp_path), "--help"])
    keys = re.findall(r"^  (\S+)  ", capsys.readouterr().out, re.M)
    assert {"last_step", "learning_rate", "minibatches", "device", "placement.actor"} <= {*keys}
    assert not {"data", "temperature", "seed", "steps", "max_lag", "engine.kind", "reward", "eval_data"} & {*keys}
    assert len(keys) == len({*keys})
    with pytest.raises(UserError, match="--temperature: a replay trains on what"):
        replay_config([str(tmp_path), "--out", "x", "--temperature", "1"])
