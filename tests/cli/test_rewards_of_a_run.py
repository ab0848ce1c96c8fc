"""Rewards in a whole run: one that is repeated, however many processes judge it, gives the same samples and numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import arguments, write_inputs

from tandem.cli.main import main

SERVER = Path(__file__).parents[1] / "helpers" / "reward_servers.py"

CHECK = """
import asyncio, random, tandem

@tandem.judges("sample")
def draws(completion, answer):
    return random.random() + sum(a == b for a, b in zip(completion, answer))

@tandem.judges("group")
async def spread(completions):
    await asyncio.sleep(0.01 * random.random())
    return [len(set(c)) - len(completions) for c in completions]
"""


def test_however_many_judge(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    (tmp_path / "judges.py").write_text(CHECK)
    words = arguments("grpo")
    at = words.index("--reward")
    words[at : at + 2] = ["--reward", "judges.py:draws", "judges.py:spread", "format:[a-f]+", "--reward-weights",
                          "1", "0.1", "2"]  # fmt: skip
    runs = []
    for number in (1, 3):
        out = tmp_path / f"run{number}"
        code = main([*words, "--steps", "2", "--out", str(out), "--reward-processes",
                     str(number)])  # fmt: skip
        assert code == 0, capsys.readouterr().err
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert {"reward/draws", "reward/spread", "reward/format"} <= lines[1].keys()
        runs.append([{name: value for name, value in line.items() if "reward" in name or "loss" in name}
                     for line in lines])  # fmt: skip
        groups = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
        sample = groups[0]["samples"][0]
        parts = sample["reward_parts"]
        assert sample["reward"] == parts["draws"] + 0.1 * parts["spread"] + 2 * parts["format"]
        runs[-1].append(groups)
    assert runs[0] == runs[1]


@pytest.fixture
def serve():
    """Starts a server that does as it is told (``reward_servers.py``); returns its process and its port."""
    started = []

    def begin(**plan: Any) -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen([sys.executable, SERVER, json.dumps(plan)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_whose_server_fails_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, serve):
    """With the numbers of a run whose server never failed: no sample was trained on without its score."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    words = arguments("grpo")
    at = words.index("--reward")

    def run(port: int, out: str, *more: str) -> int:
        words[at + 1] = f"http://127.0.0.1:{port}"
        return main([*words, "--steps", "3", "--out", out, "--save-every", "1", *more])

    # 40 held-out ones, and 18 of the first step.
    process, port = serve(limit=100, until=60)
    assert run(port, "broken", "--reward-deadline", "1") == 75
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tandem: error:")]
    assert "'server' got no score of" in line
    assert "status 503" in line
    done = len((tmp_path / "broken" / "metrics.jsonl").read_text().splitlines())
    assert done == 2
    process.kill()
    process.wait()
    _, port = serve(limit=100, port=port)
    assert run(port, "broken", "--reward-deadline", "1", "--resume") == 0
    assert run(port, "whole") == 0

    def losses(out: str) -> list[Any]:
        lines = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line.get("reward"), line.get("grad_norm"), line.get("eval/reward")) for line in lines]

    assert losses("broken") == losses("whole")
    assert len(losses("whole")) == 4


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1: "),
        ("ftp://a:1", "--reward: 'ftp://a:1' has an unknown scheme; give http://HOST:PORT"),
        ("judge:nowhere.yaml", "nowhere.yaml: cannot be read: No such file"),
        ("format:(", "--reward: 'format:(': not a regular expression"),
        ("math:gold", "reward 'math' wants the column 'gold', which prompts.jsonl lacks; columns present: answer"),
    ],
)
def test_wrong_rewards(tmp_path, monkeypatch, capsys, reward, message):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    words = arguments("grpo")
    words[words.index("--reward") + 1] = reward
    assert main([*words, "--steps", "2", "--out", "out", "--dry-run"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"tandem: error: {message}")
    assert not (tmp_path / "out").exists()
