"""Rewards in a whole run: one that is repeated, however many processes judge it, gives the same samples and numbers."""

from __future__ import annotations

import json

from helpers.runs import arguments, write_inputs

from tandem.cli.main import main

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
