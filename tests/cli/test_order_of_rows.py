"""Law 7: every row is trained on exactly once an epoch, whatever the steps, the stops and the rows that are dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.models import make_tokenizer
from helpers.runs import arguments, write_inputs

from tandem.batch import Batch
from tandem.cli.main import main
from tandem.methods.table import ROWS as ROW_METHODS
from tandem.training.trainer import LocalTrainer

ROWS, DROPPED, EPOCHS = 20, 3, 3
A_STEP = {"sft": 7, "rm": 7, "dpo": 7, "grpo": 6, "ppo": 6, "online-dpo": 6}
"""Rows that a step takes: an epoch ends in the middle of one."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual files, of which ``DROPPED`` more rows are longer than ``--max-length``."""
    folder: Path = tmp_path_factory.mktemp("rows")
    write_inputs(folder)
    for name in ("demos", "pairs", "prompts"):
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()[:ROWS]]
        for long in range(DROPPED):
            lines.insert(5 * long, lines[long] | {"prompt": 30 * "long"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def steps_of(run: Path, method: str, batches: list[Batch]) -> list[list[str]]:
    """The prompts of each step: of the batches that were trained on, or of the samples."""
    if method in ROW_METHODS:
        tokenizer = make_tokenizer()
        found = [[tokenizer.decode(ids) for ids in b.token_ids_T.split(b.lengths)] for b in batches]
        return [[text.split("=")[0] for text in step[:: batches[0].segments_per_unit]] for step in found]
    steps: dict[int, list[str]] = {}
    for line in (run / "rollouts.jsonl").read_text().splitlines():
        row = json.loads(line)
        steps.setdefault(row["step"], []).append(row["prompt"].split("=")[0])
    return [prompts for _, prompts in sorted(steps.items())]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Batches that a trainer took a step on. At the fifth call and at the ninth, Ctrl-C."""
    batches: list[Batch] = []
    calls = 0
    whole = LocalTrainer.forward_backward

    def watched(self: LocalTrainer, batch: Batch) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls in (5, 9):
            raise KeyboardInterrupt
        batches.append(batch)
        return whole(self, batch)

    monkeypatch.setattr(LocalTrainer, "forward_backward", watched)
    return batches


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_each_source_by_its_weight_and_once_an_epoch_of_its_own(inputs, method, trained, monkeypatch, capsys):
    """40% of the rows from a file of 17, 60% from one of 6, over stops."""
    monkeypatch.chdir(inputs)
    steps, a_step = 10, A_STEP[method]
    argv = [*arguments(method), "--out", f"mixed-{method}", "--max-length", "40", "--long-rows", "drop"]
    argv += [] if method in ROW_METHODS else ["--rollouts-logged", "99"]
    for flag in ("--eval-data", "--eval-every"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    first = argv[argv.index("--data") + 1]
    lines = [json.loads(line) for line in Path(first).read_text().splitlines()]
    second = [line | {"prompt": f"{i}{line['prompt']}"} for i, line in enumerate(lines[1:5] + lines[6:8])]
    Path("second.jsonl").write_text("".join(json.dumps(line) + "\n" for line in second))
    argv[argv.index("--data") + 1] = f"{first}:0.4,second.jsonl:0.6"
    assert main([*argv, "--steps", str(steps), "--dry-run"]) == 0
    assert f": {first} 40.0%, {0.4 * steps * a_step / ROWS:.2f} times, second.jsonl 60.0%, " in capsys.readouterr().out
    assert [main([*argv, "--steps", str(steps), "--resume"]) for _ in range(3)] == [130, 130, 0]
    times = [dict.fromkeys((row["prompt"].split("=")[0] for row in rows), 0) for rows in (lines, second)]
    times[0] = {prompt: count for prompt, count in times[0].items() if not prompt.startswith("long")}
    for number, prompts in enumerate(steps_of(Path(f"mixed-{method}"), method, trained), start=1):
        for prompt in prompts:
            times[prompt in times[1]][prompt] += 1
        assert all(max(source.values()) - min(source.values()) <= 1 for source in times)
        assert abs(sum(times[0].values()) - 0.4 * number * a_step) < 1
    assert [sum(source.values()) for source in times] == [0.4 * steps * a_step, 0.6 * steps * a_step]


@pytest.mark.parametrize("method", A_STEP)
def test_every_row_once_an_epoch_over_stops_and_dropped_rows(inputs, method, trained, monkeypatch):
    monkeypatch.chdir(inputs)
    steps = -(-ROWS * EPOCHS // A_STEP[method])
    argv = [*arguments(method), "--out", method, "--max-length", "40", "--long-rows", "drop"]
    argv += [] if method in ROW_METHODS else ["--rollouts-logged", "99"]
    for flag in ("--eval-data", "--eval-every"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    codes = [main([*argv, "--steps", str(steps), "--resume"]) for _ in range(3)]
    assert codes == [130, 130, 0]
    taken = steps_of(Path(method), method, trained)
    assert [len(prompts) for prompts in taken] == [A_STEP[method]] * steps
    rows = {json.loads(line)["prompt"].split("=")[0] for line in Path("demos.jsonl").read_text().splitlines()}
    times = dict.fromkeys((row for row in rows if not row.startswith("long")), 0)
    for prompts in taken:
        for prompt in prompts:
            times[prompt] += 1
        assert max(times.values()) - min(times.values()) <= 1
    assert min(times.values()) == EPOCHS
