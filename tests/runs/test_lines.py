"""Lines of a run: cut after a step, whatever a kill has left at their end. And what is written of a sample."""

import json

import pytest

from tandem.errors import UserError
from tandem.runs.folder import _describe_sample
from tandem.runs.lines import append_line, keep_until, read_lines
from tandem.types import Rollout

LINES = [b'{"step": 0}\n', b'{"step": 1, "a": "\xc3\xa9"}\n', b'{"step": 1}\n', b'{"step": 2}\n', b'{"time": "x"}\n']


@pytest.mark.parametrize(
    ("left", "step", "kept"),
    [
        (LINES, None, LINES),
        (LINES, 2, LINES),
        (LINES, 1, LINES[:3]),
        (LINES, -1, []),
        ([*LINES, b'{"step": 3'], None, LINES),
        ([*LINES[:3], b'{"step": 3, "a": "\xc3'], 9, LINES[:3]),
        ([*LINES[:3], b'{"step": 3}'], 9, [*LINES[:3], b'{"step": 3}\n']),
        ([], 3, []),
    ],
)
def test_a_file_is_cut_after_a_step_and_a_torn_line_goes(tmp_path, left, step, kept):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"".join(left))
    keep_until(path, step)
    assert path.read_bytes() == b"".join(kept)
    assert read_lines(path) == [json.loads(line) for line in kept]


def test_held_out_records_of_an_evaluation_that_comes_again_are_cut_off(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    records = [{"step": step, "held_out": held_out} for step in (1, 2) for held_out in (False, True)]
    for record in records:
        append_line(path, record)
    keep_until(path, 2, held_out=2)
    assert read_lines(path) == records
    keep_until(path, 2, held_out=1)
    assert read_lines(path) == records[:3]


@pytest.mark.parametrize("bad", [b"[1]\n", b"{'step': 1}\n", b"\n"])
def test_a_line_that_is_no_record_is_refused_and_the_file_left_alone(tmp_path, bad):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(LINES[0] + bad + LINES[1])
    with pytest.raises(UserError, match=r"lines\.jsonl:2: not a JSON"):
        keep_until(path, 0)
    assert path.read_bytes() == LINES[0] + bad + LINES[1]


def test_no_file_is_no_lines(tmp_path):
    keep_until(tmp_path / "none", 1)
    assert read_lines(tmp_path / "none") == []


def test_a_sample_is_written_with_every_number_of_its_tokens():
    rollout = Rollout(
        prompt_id="p", sample_index=0, token_ids=[7, 8, 1, 2, 3], prompt_length=2,
        trainable=[False, False, True, False, True], behaviour_logp=[0.0, 0.0, -0.1234567, 0.0, -2.0],
        untruncated_logp=[0.0, 0.0, -0.2, 0.0, -3.0], stop="eos", completion="x", versions=[(3, 1), (4, 2)],
        reward=1.5, reward_parts={"a": 1.0, "b": 0.5}, advantages=[0.0, 0.0, 1.0, 0.0, 2.0],
    )  # fmt: skip
    assert _describe_sample(rollout) == {
        "completion": "x", "length": 3, "completion_ids": [1, 2, 3],
        "reward": 1.5, "reward_parts": {"a": 1.0, "b": 0.5},
        "advantage": 1.5, "advantages": [1.0, 0.0, 2.0], "behaviour_logp": [-0.123457, 0.0, -2.0],
        "untruncated_logp": [-0.2, 0.0, -3.0], "trainable": [True, False, True], "stop": "eos",
        "version_min": 3, "version_max": 4,
    }  # fmt: skip


def test_half_a_surrogate_pair_of_the_data_is_written_and_read_back(tmp_path):
    record = json.loads(r'{"a": "x\ud800\u00e9", "b": ["\udfff"]}')
    append_line(tmp_path / "lines.jsonl", record)
    assert (tmp_path / "lines.jsonl").read_text(encoding="utf-8").startswith(r'{"a": "x\ud800é"')
    assert read_lines(tmp_path / "lines.jsonl") == [record]
