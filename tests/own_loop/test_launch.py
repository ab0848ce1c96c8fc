"""``tandem launch`` with real processes, and the example that is meant for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.cli.launch import run
from tandem.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_loop.py"
REPORT = """
import os, sys
from pathlib import Path
place = [os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]]
Path(sys.argv[1], os.environ["RANK"]).write_text(" ".join([*place, *sys.argv[2:]]))
"""


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from tandem.cli.launch import run; sys.exit(run(sys.argv[1:]))"
    # What a cluster sets for torchrun over machines is not about a launch on one.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PET_NNODES": "2", "PET_MAX_RESTARTS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment
    )


def test_every_process_knows_its_place_and_gets_the_arguments(tmp_path):
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    done = launch("--workers", 2, script, tmp_path, "--workers", "7", "-x")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 0 --workers 7 -x", "2 1 --workers 7 -x"]


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [("sys.exit(3)", 3, "ended with exit code 3"), ("os.kill(os.getpid(), 9)", 137, "was killed by signal 9")],
)
def test_the_exit_code_is_passed_on(tmp_path, how, code, words):
    script = tmp_path / "fail.py"
    script.write_text(f"import os, sys, time\nif os.environ['RANK'] == '1':\n    {how}\ntime.sleep(600)\n")
    done = launch("--workers", 2, script)
    assert done.returncode == code
    assert f"process 1 of 2 {words}; the others were stopped" in done.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["nowhere.py"], "no file nowhere.py"), (["--workers", "0", __file__], "--workers 0; it must be at least 1")],
)
def test_what_cannot_be_launched(argv, words):
    with pytest.raises(UserError, match=words):
        run(argv)


def test_the_example_on_two_processes(tmp_path):
    done = launch("--workers", 2, EXAMPLE, "--out", tmp_path, "--steps", 30, "--every", 15)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [15] * 8 + [30] * 8
    assert {line["weights_step"] for line in lines} == {15, 30}
    # It learns: what it samples becomes likelier.
    means = [sum(line["mean_logprob"] for line in lines if line["step"] == step) for step in (15, 30)]
    assert means[1] > means[0]
    assert "step 30: loss" in done.stdout
