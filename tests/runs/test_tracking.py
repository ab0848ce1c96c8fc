"""Trackers follow a run and never lead it: their own files read back, resumed runs, and every way to fail injected."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.runs import arguments, unevaluated, write_inputs

from tandem.cli.main import main
from tandem.runs.lines import append_line, keep_until, read_lines
from tandem.runs.trackers import mlflow_name
from tandem.runs.tracking import Tracking

SAMPLE = {"completion": "a|b\nc", "reward": 1.0, "length": 2, "stop": "eos", "advantage": None}


def record(out, step, **metrics):
    """What a run writes of a step."""
    line = {"step": step, "held_out": False, "prompt": f"p{step}", "samples": [SAMPLE, SAMPLE]}
    append_line(out / "rollouts.jsonl", line)
    append_line(out / "metrics.jsonl", {"step": step, "loss": 1.0 / (1 + step), **metrics})


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("learning_rate: 0.5\nmodel: base\nresume_me: true\n")
    (folder / "run.json").write_text(json.dumps({"id": "ab12", "method": "SFT", "seed": 0, "inputs": {}}))
    return folder


def scalars(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    return events


def follow(out, names, steps, deadline_s=60.0):
    """A start of a run: it writes its steps, says so, and ends. What it is told of its trackers."""
    tracking = Tracking(out, names, deadline_s=deadline_s)
    told = []
    for step in steps:
        record(out, step)
        told += tracking.written(step)
    return told + tracking.close()


def test_tensorboard_has_every_step_once_the_samples_and_the_config(out):
    assert follow(out, ["tensorboard"], [0, 1, 2]) == []
    # Resumed from a checkpoint of step 1: step 2 is written again.
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        keep_until(out / name, 1)
    append_line(out / "metrics.jsonl", {"step": 2, "loss": 9.0, "pass@2": None})
    assert follow(out, ["tensorboard"], [3]) == []
    events = scalars(out)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(1 / (1 + step))) for step in range(4)
    ]
    texts = events.Tensors("samples")
    assert [text.step for text in texts] == [0, 1, 2, 3]
    table = texts[1].tensor_proto.string_val[0].decode().splitlines()
    assert table[0] == "| set | prompt | completion | reward | length | stop | advantage |"
    assert table[2:] == ["| training | p1 | a\\|b<br>c | 1 | 2 | eos |  |"] * 2
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert (hparams["learning_rate"].number_value, hparams["model"].string_value) == (0.5, "base")
    assert hparams["resume_me"].bool_value is True


def test_mlflow_goes_on_in_the_same_run(out, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert follow(out, ["mlflow"], [0, 1]) == []
    assert follow(out, ["mlflow"], [2]) == []
    ((run, text),) = [(path.parent, path.read_text()) for path in (out / "mlruns").glob("*/*/meta.yaml")]
    assert {path.name: path.read_text() for path in (run / "params").iterdir()} == {
        "learning_rate": "0.5", "model": "base", "resume_me": "True",
    }  # fmt: skip
    assert "run_name: run\n" in text
    assert "status: 3\n" in text
    assert (run / "tags" / "tandem.id").read_text() == "ab12"
    history = [line.split()[1:] for line in (run / "metrics" / "loss").read_text().splitlines()]
    assert [(int(step), float(value)) for value, step in history] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    files = sorted(path.name for path in (run / "artifacts" / "samples").iterdir())
    assert files == [f"step_{step:08d}.md" for step in range(3)]


@pytest.mark.parametrize(
    ("metric", "name"),
    [("eval/a/pass@4_se", "eval.a.pass_at_4_se"), ("reward/f#2", "reward.f_2"), ("loss", "loss")],
)
def test_names_that_mlflow_may_have(metric, name):
    assert mlflow_name(metric) == name


def test_wandb_offline_has_the_scalars_the_table_and_the_config_under_the_runs_own_id(out, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert follow(out, ["wandb"], [0, 1]) == []
    (file,) = (out / "wandb").glob("offline-run-*/run-ab12.wandb")
    from wandb.proto import wandb_internal_pb2

    rows, config = {}, {}
    for data in leveldb_records(file.read_bytes()[7:]):
        found = wandb_internal_pb2.Record.FromString(data)
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in found.history.item}
        if items:
            rows[items["_step"]] = items
        config |= {item.key: json.loads(item.value_json) for item in found.run.config.update}
    assert {step: row["loss"] for step, row in rows.items()} == {0: 1.0, 1: 0.5}
    assert (config["learning_rate"], config["model"]) == (0.5, "base")
    tables = sorted((out / "wandb").glob("offline-run-*/files/media/table/*.json"))
    assert len(tables) == 2
    assert json.loads(tables[0].read_text())["data"][0][2:5] == ["a|b\nc", 1.0, 2]


def leveldb_records(data):
    """Those of a log as LevelDB writes it, in blocks of 32 KiB of which the first begins 7 bytes before ``data``."""
    at, parts = 7, b""
    while at + 7 <= len(data) + 7:
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        head = data[at - 7 : at]
        length, kind = int.from_bytes(head[4:6], "little"), head[6]
        parts += data[at : at + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


FAKE = """
import json, os, pathlib, signal, sys, time
print("noise on standard output", flush=True)
log = pathlib.Path(os.environ["FAKE_LOG"])
{at_import}
class Table:
    def __init__(self, columns, data): pass
class Settings:
    def __init__(self, **_): pass
class Run:
    def log(self, metrics, step):
        {at_log}
        with log.open("a") as file: file.write(str(step) + chr(10))
    def finish(self):
        {at_finish}
        pass
def init(**_):
    {at_init}
    return Run()
"""
FAULTS = {
    "import": ({"at_import": "raise ImportError('half installed')"}, "half installed"),
    "network": ({"at_init": "raise ConnectionError('no route to host')"}, "no route to host"),
    "exception": ({"at_log": "raise RuntimeError('quota')"}, "quota"),
    "disk": ({"at_log": "raise OSError(28, 'No space left on device')"}, "[Errno 28] No space left on device"),
    "exit": ({"at_log": "os._exit(7)"}, "its process ended (exit code 7)"),
    "crash": ({"at_init": "os.kill(os.getpid(), signal.SIGSEGV)"}, "its process ended (SIGSEGV)"),
    "hang": ({"at_log": "signal.pause()"}, "it has not ended in time and is killed"),
    "hang in finish": ({"at_finish": "signal.pause()"}, "it has not ended in time and is killed"),
}


def fake(folder, monkeypatch, **faults):
    """A package named wandb that fails as it is told, found before the real one."""
    path = folder / "fake"
    path.mkdir(exist_ok=True)
    blank = dict.fromkeys(("at_import", "at_log", "at_finish", "at_init"), "pass")
    (path / "wandb.py").write_text(FAKE.format(**blank | faults))
    monkeypatch.setattr(sys, "path", [str(path), *sys.path])
    monkeypatch.setenv("FAKE_LOG", str(folder / "logged"))
    return folder / "logged"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tracker_that_fails_is_said_once_and_nobody_waits_for_it(out, tmp_path, monkeypatch, fault):
    faults, message = FAULTS[fault]
    fake(tmp_path, monkeypatch, **faults)
    tracking, told = Tracking(out, ["wandb"], deadline_s=1.0 if "hang" in fault else 60.0), []
    for step in range(200):
        append_line(out / "metrics.jsonl", {"step": step, "loss": 1.0})
        began = time.monotonic()
        told += tracking.written(step)
        assert time.monotonic() - began < 1
    told += tracking.close()
    told = [line.replace(", and begins again with --resume only, which logs what it has missed", "") for line in told]
    assert told == [f"wandb fails: {message}; the run goes on, see trackers/wandb.log"]
    assert tracking._followers["wandb"].process.poll() is not None
    if fault != "hang in finish":
        assert not (tmp_path / "logged").exists()


@pytest.mark.parametrize("failed_before", [False, True])
def test_that_a_tracker_was_killed_is_said_in_the_run_once(out, tmp_path, monkeypatch, failed_before):
    """And that nothing more is logged before the run is resumed; also of one that was said to fail before."""
    logged = fake(tmp_path, monkeypatch, at_log="raise OSError('down')" if failed_before else "pass")
    tracking, told = Tracking(out, ["wandb"]), []
    record(out, 0)
    while not (told if failed_before else logged.exists()):
        told += tracking.written(0)
        time.sleep(0.01)
    assert len(told) == failed_before
    process = tracking._followers["wandb"].process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    ended = "its process ended (SIGKILL), and begins again with --resume only, which logs what it has missed"
    assert tracking.written(0) == [f"wandb fails: {ended}; the run goes on, see trackers/wandb.log"]
    assert [*tracking.written(0), *tracking.close()] == []


def test_a_tracker_that_hangs_with_a_full_pipe_does_not_hold_the_run(out, tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, at_init="signal.pause()")
    record(out, 0)
    tracking = Tracking(out, ["wandb"], deadline_s=0.1)
    began = time.monotonic()
    for step in range(40_000):  # some 220 kB of steps, and the pipe holds 64
        tracking.written(step)
    assert time.monotonic() - began < 10
    assert len(tracking.close()) == 1


def test_a_run_that_ends_before_its_first_step_begins_no_run_elsewhere(out, tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, at_init="raise RuntimeError('begun')")
    assert follow(out, ["wandb"], []) == []


def test_what_failed_is_logged_when_the_tracker_can_again(out, tmp_path, monkeypatch):
    """The files of the run are its queue: nothing is lost, and nothing logged twice."""
    logged = fake(tmp_path, monkeypatch, at_log="if not (log.parent / 'up').exists(): raise ConnectionError('down')")
    tracking = Tracking(out, ["wandb"])
    told = []
    record(out, 0)
    while not told:
        told = tracking.written(0)
        time.sleep(0.01)
    assert told == ["wandb fails: down; the run goes on, see trackers/wandb.log"]
    for step in (1, 2):
        record(out, step)
    (tmp_path / "up").touch()
    assert tracking.written(2) == []
    assert tracking.close() == []
    assert logged.read_text().split() == ["0", "1", "2"]


def test_a_killed_run_leaves_no_tracker_and_the_next_start_logs_no_step_twice(out, tmp_path, monkeypatch):
    logged = fake(tmp_path, monkeypatch)
    code = (
        f"import sys, os, signal; sys.path[:] = {sys.path!r}; from pathlib import Path\n"
        "from tandem.runs.tracking import Tracking\n"
        f"tracking = Tracking(Path({str(out)!r}), ['wandb']); tracking.written(1)\n"
        "print(tracking._followers['wandb'].process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for step in range(2):
        record(out, step)
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL
    assert follow(out, ["wandb"], [2]) == []
    assert logged.read_text().split() == ["0", "1", "2"]
    try:
        tracker = os.pidfd_open(int(died.stdout))
    except ProcessLookupError:
        return
    assert select.select([tracker], [], [], 20)[0]
    os.close(tracker)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    write_inputs(folder)
    return folder


def test_a_run_is_the_same_with_trackers_that_work_or_fail_or_none(inputs, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(inputs)
    argv = [*unevaluated(arguments("grpo")), "--steps", "2", "--out"]
    assert main([*argv, "untracked"]) == 0
    fake(tmp_path, monkeypatch, at_log="raise RuntimeError('quota')")
    assert main([*argv, "tracked", "--track", "tensorboard", "wandb"]) == 0
    assert "wandb fails: quota; the run goes on" in capsys.readouterr().out
    models = [Path(name, "model", "model.safetensors").read_bytes() for name in ("untracked", "tracked")]
    assert models[0] == models[1]
    (failed,) = [event for event in read_lines(Path("tracked/events.jsonl")) if event["event"] == "tracker"]
    assert failed["message"].startswith("wandb fails: quota")
    assert "tracker: wandb fails: quota" in Path("tracked/summary.md").read_text()
    events = scalars(Path("tracked"))
    assert [event.step for event in events.Scalars("reward")] == [1, 2]
    # Another tracker may be taken when the run goes on, and a new run in the folder begins anew everywhere.
    assert main([*argv, "tracked", "--overwrite"]) == 0
    assert not any(Path("tracked", name).exists() for name in ("tensorboard", "trackers"))


def test_a_package_that_is_missing_is_refused_before_anything_is_read(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr("tandem.runs.trackers.find_spec", lambda name: None if name == "mlflow" else name)
    code = main([*arguments("sft"), "--steps", "1", "--out", "missing", "--track", "tensorboard", "mlflow"])
    said = capsys.readouterr()
    assert (code, said.err) == (
        2,
        "tandem: error: track: mlflow is not installed; pip install 'tandem-rlhf[trackers]', or leave it out\n",
    )
    assert "tokenizing" not in said.out
    assert not Path("missing").exists()
