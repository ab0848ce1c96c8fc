"""The record of a run: no bit of a group is lost, no half-written file counts, and damage is named."""

import datetime
import gzip
import json
import math
import os
import resource
import signal
from dataclasses import fields

import pytest

from tandem.errors import DiskFailure, UserError
from tandem.runs.record import RECORD, Record, Recorder, forget_after, pack, path_of, steps_in, unpack
from tandem.types import Group, Prompt, Rollout, Ticket

TENTH = 0.10000000149011612  # of float32


def rollout(number=0, **changes):
    found = {
        "prompt_id": "p", "sample_index": number, "token_ids": [5, 6, 151_000, 1], "prompt_length": 2,
        "trainable": [False, False, True, False], "behaviour_logp": [0.0, -0.0, -TENTH, -1e-30],
        "untruncated_logp": [0.0, 0.0, -0.1, -math.inf], "stop": "tool", "completion": "ä\ud800\n", "reward": 1 / 3,
        "versions": [(3, 1), (5, 1)], "reward_parts": {"a": 0.1, "b": -math.inf}, "judged": 0.7, "error": "late",
    } | changes  # fmt: skip
    return Rollout(**found)


def groups(step=1, count=2):
    prompts = [Prompt(prompt_id=f"{step}-{i}", prompt=[{"role": "user", "content": "x"}], token_ids=(5, 6),
                      columns={"answer": i, "inner": {"a": [1.5, None]}}) for i in range(count)]  # fmt: skip
    return [Group(prompt=prompt, rollouts=[rollout(), rollout(1, reward=None)]) for prompt in prompts]


def tickets(step=1, count=2):
    return [Ticket(number=10 * step + i, row=i, step=step, place=i) for i in range(count)]


def recorded(out, steps=3, run="abc", length=9):
    recorder = Recorder(folder=out / RECORD, run=run, steps=length)
    out.mkdir(exist_ok=True)
    for step in range(1, steps + 1):
        recorder.write(step, list(zip(tickets(step), groups(step), strict=True)))
    return recorder


def test_every_field_comes_back_to_the_bit(tmp_path):
    empty = Rollout(prompt_id="", sample_index=0, token_ids=[], prompt_length=0, trainable=[], behaviour_logp=[],
                    untruncated_logp=[], stop="eos")  # fmt: skip
    without = {f.name for f in fields(Rollout) if getattr(rollout(1), f.name) == getattr(empty, f.name)}
    assert without == {"advantages"}, "a new field of a rollout: give it a value here"
    recorded(tmp_path / "run")
    record = Record(tmp_path / "run", "abc")
    assert (record.steps, record.lengths, record.tickets) == ([1, 2, 3], [9, 9, 9], [tickets(s) for s in (1, 2, 3)])
    for step in (1, 2, 3):
        found = record.groups(step)
        assert found == groups(step)
        signs = [math.copysign(1, x) for x in found[0].rollouts[0].behaviour_logp]
        assert signs == [1, -1, -1, -1]
        assert isinstance(found[0].rollouts[0].versions[0], tuple)


def test_what_training_finds_is_not_recorded(tmp_path):
    (tmp_path / "run").mkdir()
    recorder = Recorder(folder=tmp_path / "run" / RECORD, run="abc", steps=1)
    group = Group(prompt=groups()[0].prompt, rollouts=[rollout(advantages=[0.0, 0.0, 1.0, 0.0])])
    group.prompt.columns = {"day": datetime.date(2026, 1, 2)}
    recorder.write(1, [(tickets()[0], group)])
    (found,) = Record(tmp_path / "run", "abc").groups(1)
    assert found.rollouts[0].advantages is None
    assert found.prompt.columns == {"day": "2026-01-02"}


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [([0.5, TENTH, -math.inf], "f"), ([0.1], "d"), ([1e300], "d"), ([math.nan], "d"), ([], "f"), ([1e-320], "d")],
)
def test_numbers_take_the_least_room_that_holds_them(numbers, kind):
    packed = pack(numbers, "fd")
    assert packed[0] == kind
    assert repr(unpack(packed)) == repr(numbers)


def test_a_step_that_comes_again_takes_the_place_of_the_first(tmp_path):
    recorder = recorded(tmp_path / "run")
    recorder.write(2, list(zip(tickets(7, 1), groups(7, 1), strict=True)))
    assert Record(tmp_path / "run", "abc").groups(2) == groups(7, 1)


def test_what_comes_after_a_step_is_forgotten(tmp_path):
    recorder = recorded(tmp_path / "run")
    (recorder.folder / ".step_00000004.jsonl.gz-partial").write_bytes(b"half")
    (recorder.folder / "mine.txt").write_text("stays")
    forget_after(recorder.folder, 1)
    assert sorted(path.name for path in recorder.folder.iterdir()) == ["mine.txt", "step_00000001.jsonl.gz"]
    forget_after(tmp_path / "none", 1)
    assert steps_in(tmp_path / "none") == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_inside_a_write_leaves_whole_files(tmp_path, call):
    """The step's file is the old one, or not there."""
    recorder = recorded(tmp_path / "run")
    for step in (3, 4):
        if (child := os.fork()) == 0:
            setattr(os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            recorder.write(step, list(zip(tickets(9), groups(9), strict=True)))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert len([*recorder.folder.glob(".*-partial")]) == 1
        record = Record(tmp_path / "run", "abc")
        assert record.steps == [1, 2, 3]
        assert record.groups(3) == groups(3)
        forget_after(recorder.folder, 3)
        assert len([*recorder.folder.iterdir()]) == 3


def test_a_full_disk_names_the_file_and_leaves_nothing_half_written(tmp_path):
    recorder = recorded(tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(DiskFailure, match=r"step_00000004.jsonl.gz: cannot be written: File too large$"):
            recorder.write(4, list(zip(tickets(4), groups(4), strict=True)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Record(tmp_path / "run", "abc").steps == [1, 2, 3]
    assert len([*recorder.folder.iterdir()]) == 3


def test_any_byte_that_is_another_is_noticed_or_harmless(tmp_path):
    """gzip's sum covers what it holds; of its header some bytes say nothing."""
    recorder = recorded(tmp_path / "run", steps=1)
    path = path_of(recorder.folder, 1)
    whole, harmless, said = path.read_bytes(), 0, set()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            found = Record(tmp_path / "run", "abc").groups(1)
        except UserError as error:
            said.add(str(error).partition("truncated: ")[0])
        else:
            harmless += 1
            assert found == groups(1)
    assert said == {f"{path}: step 1 is damaged or "}
    assert harmless < 10
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="step 1 is damaged or truncated"):
            Record(tmp_path / "run", "abc")


def spoil(folder, what):
    second = path_of(folder, 2)
    if what == "missing":
        second.unlink()
    elif what == "first":
        path_of(folder, 1).unlink()
        second.unlink()
    elif what == "moved":
        second.write_bytes(path_of(folder, 3).read_bytes())
    elif what == "foreign":
        recorded(folder.parent.parent / "other", run="xyz")
        second.write_bytes(path_of(folder.parent.parent / "other" / RECORD, 2).read_bytes())
    elif what == "version":
        lines = gzip.decompress(second.read_bytes()).splitlines(keepends=True)
        second.write_bytes(gzip.compress(json.dumps(json.loads(lines[0]) | {"version": 2}).encode() + b"\n"))
    elif what == "fewer":
        second.write_bytes(gzip.compress(b"".join(gzip.decompress(second.read_bytes()).splitlines(keepends=True)[:2])))
    elif what == "text":
        second.write_bytes(gzip.compress(b"[1]\n"))
    elif what == "folder":
        second.unlink()
        second.mkdir()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"step_00000002.jsonl.gz: step 2 of .*run is not recorded, so .*; give --last-step 1$"),
        (
            "first",
            r"step_00000001.jsonl.gz: steps 1 to 2 of .*run are not recorded, so what comes after cannot be tr.*n$",
        ),
        ("moved", r"step_00000002.jsonl.gz: of step 3 of the run abc, not of step 2 of abc: it has been moved here"),
        ("foreign", r"step_00000002.jsonl.gz: of step 2 of the run xyz, not of step 2 of abc"),
        ("version", r"step_00000002.jsonl.gz: in version 2 of the format; this Tandem reads 1"),
        ("fewer", r"step 2 is damaged or truncated: 1 groups, not 2; what comes before it .* --last-step 1"),
        ("text", r"step 2 is damaged or truncated: its first line is not about a step"),
        ("folder", r"step_00000002.jsonl.gz: cannot be read: Is a directory"),
    ],
)
def test_holes_and_damage_are_named_with_step_and_file(tmp_path, what, message):
    recorder = recorded(tmp_path / "run")
    spoil(recorder.folder, what)
    with pytest.raises(UserError, match=message):
        Record(tmp_path / "run", "abc")
    if what not in ("first",):
        assert Record(tmp_path / "run", "abc", last=1).steps == [1]


def test_a_run_without_a_record_and_one_that_ends_earlier(tmp_path):
    with pytest.raises(UserError, match="run: the run was not recorded; record the next one with --record"):
        Record(tmp_path / "run", "abc")
    recorded(tmp_path / "run")
    with pytest.raises(UserError, match=r"last_step: the record in .*record ends with step 3, got 4"):
        Record(tmp_path / "run", "abc", last=4)
