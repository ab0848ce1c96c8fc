"""``tandem eval`` reports what a run's own evaluation does, and what its samples are worth by a plain loop."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from helpers.runs import write_inputs

from tandem.assembly.configs.uses import EvalRowsConfig, eval_config
from tandem.cli.main import main
from tandem.config import load_config
from tandem.errors import UserError
from tandem.methods.table import ROWS
from tandem.runs.lines import read_lines


@pytest.fixture(scope="module", autouse=True)
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def measured(*words):
    out = Path("measured", *(word.lstrip("-").replace("/", "_") for word in words[:3]))
    assert main(["eval", *words, "--out", str(out)]) == 0
    return json.loads((out / "evaluation.json").read_text())


@pytest.mark.parametrize(("method", "data"), [("sft", "demos"), ("rm", "pairs"), ("dpo", "pairs")])
def test_rows_are_measured_as_by_the_run(method, data):
    """The model that a run wrote, on the rows that it held out: the run's last evaluation, to rounding."""
    words = [method, "--model", "base", "--data", f"{data}.jsonl", "--eval-data", f"{data}.jsonl"]
    rest = ["--steps", "2", "--batch-size", "8", "--learning-rate", "1e-2", "--out", f"runs/{method}"]
    assert main([*words, *rest]) == 0
    reference = ["--reference", "base"] if method == "dpo" else []
    found = measured(method, "--model", f"runs/{method}/model", "--data", f"{data}.jsonl", *reference)
    last = read_lines(Path(f"runs/{method}/metrics.jsonl"))[-1]
    assert last["step"] == 2
    of_the_run = {name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")}
    assert found == pytest.approx(of_the_run, rel=1e-5)
    assert "loss" in found


def test_samples_are_measured_by_their_rewards(capsys):
    words = ["--model", "base", "--data", "prompts.jsonl", "--reward", "check.py:right", "--samples-per-prompt", "4"]
    found = measured(*words, "--max-new-tokens", "5", "--eval-success", "0.3")
    rows = read_lines(next(Path("measured").rglob("samples.jsonl")))
    rewards = [[row["reward"] for row in rows if row["row"] == i] for i in range(40)]
    assert found["reward"] == pytest.approx(statistics.mean(r for of_prompt in rewards for r in of_prompt))
    assert found["reward_se"] == pytest.approx(statistics.stdev(map(statistics.mean, rewards)) / math.sqrt(40))
    right = [sum(r >= 0.3 for r in of_prompt) for of_prompt in rewards]
    assert 0 < sum(right) < 160
    assert found["pass@1"] == pytest.approx(sum(right) / 160)
    assert found["pass@4"] == pytest.approx(sum(map(bool, right)) / 40)
    assert found["response_length"] == pytest.approx(statistics.mean(row["length"] for row in rows))
    assert "± " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ppo"], "eval: no method 'ppo' that trains on a dataset; did you mean dpo?"),
        (["dpo", "--model", "base", "--data", "pairs.jsonl"], "error: reference: give the folder of the reference"),
        (["rm", "--model", "base", "--data", "pairs.jsonl"], "base: no trained 'score' head in it"),
        (["sft", "--model", "base", "--data", "pairs.jsonl"], "such columns are for rm"),
        (["sft", "--model", "base", "--data", "demos.jsonl", "--offload", "optimizer"], "has no effect"),
        (["--model", "base", "--data", "prompts.jsonl"], "reward: nothing judges the samples"),
        (["sft", "--model", "base", "--data", "demos.jsonl", "--stepz", "1"], "unknown flag --stepz"),
    ],
)
def test_wrong_input_is_one_line(capsys, words, message):
    assert main(["eval", *words, "--out", "refused"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("refused").exists()


@pytest.mark.parametrize("method", ROWS)
def test_each_method_on_rows_can_measure(method):
    """Its models must be named, since a model measured against itself says nothing."""
    cls, flags = eval_config([method, "--model", "m", "--data", "d.jsonl", "--out", "o"])
    try:
        config = load_config(cls, flags)
    except UserError as error:
        role = str(error).removeprefix("missing ").lstrip("-").split(":")[0].split(" ")[0]
        config = load_config(cls, [*flags, f"--{role}", "x"])
    assert isinstance(config, EvalRowsConfig)
    assert "evaluated model" in config.parts
    assert config.as_run.method == config.method
