"""The quickstart as a user runs it: two seeds, each in a process of its own, and Ctrl-C in the middle of one.

A seed computes for a minute; ``bench/quickstart.py`` has the numbers of more.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tandem.cli.quickstart import quickstart
from tandem.errors import RunFailure, UserError
from tandem.tasks import letters

SEEDS = [0, 1]


def start(out, seed, **popen):
    command = [sys.executable, "-m", "tandem", "quickstart", "--seed", str(seed), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All seeds at once, one thread each: (folder, output) by seed."""
    folder = tmp_path_factory.mktemp("quickstart")
    processes = {seed: start(folder / str(seed), seed) for seed in SEEDS}
    finished = {}
    for seed, process in processes.items():
        output, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
        finished[seed] = (folder / str(seed), output)
    return finished


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_learns_what_only_the_checker_knows(runs, seed):
    out, output = runs[seed]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seed"] == seed
    assert summary["reward_model_accuracy"] >= 0.85
    assert summary["gold_ppo"] >= summary["gold_sft"] + 0.30
    assert f"{summary['gold_ppo']:.1%}" in output
    assert "\x1b" not in output  # piped: plain lines
    lines = [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(41))


def test_held_out_prompts_are_in_no_training_file(runs):
    out, _ = runs[0]

    def sets_of_letters(name):
        rows = [json.loads(line) for line in (out / "data" / f"{name}.jsonl").read_text().splitlines()]
        return {letters.answer(row["prompt"]) for row in rows}

    trained = sets_of_letters("demonstrations") | sets_of_letters("preferences") | sets_of_letters("prompts")
    assert not trained & (sets_of_letters("heldout_prompts") | sets_of_letters("heldout_preferences"))


def test_models_load_with_transformers_alone(runs):
    out, _ = runs[0]
    tokenizer = AutoTokenizer.from_pretrained(out / "ppo" / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "ppo" / "model")
    prompts = letters.prompts(64, 0, split="heldout")
    right = 0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=letters.MAX_NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        right += letters.check(prompt, tokenizer.decode(answer, skip_special_tokens=True))
    assert right / len(prompts) > 0.6
    reward_model = AutoModelForSequenceClassification.from_pretrained(out / "reward_model" / "model")
    assert reward_model.score.out_features == 1
    AutoModelForCausalLM.from_pretrained(out / "sft" / "model")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_readmes_loop_runs_and_learns(runs, tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert "runs/quickstart" in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("runs/quickstart", str(runs[0][0])), "README.md", "exec"), {})
    accuracy = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(accuracy) == 20
    assert sum(accuracy[-5:]) / 5 > sum(accuracy[:2]) / 2 + 0.2
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "mine")


def test_each_run_counts_its_own_start(runs):
    """PPO was ready after 64 s: those of SFT, the reward model and the command's libraries were counted, too."""
    for name in ("sft", "reward_model", "ppo"):
        events = map(json.loads, (runs[0][0] / name / "events.jsonl").read_text().splitlines())
        [ready] = [event for event in events if event["event"] == "ready"]
        assert "imports" not in ready["stages"]["here"]


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        quickstart(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match=r"thesis\.txt: cannot be written") as refused:
        quickstart(tmp_path / "thesis.txt", 0)
    assert not isinstance(refused.value, RunFailure)  # whose exit code would say that it may be begun again as it is


@pytest.mark.parametrize("name", ["data", "base"])
def test_a_folder_of_somebody_else_s_with_a_name_of_ours_is_left_alone(tmp_path, name):
    """``data`` was deleted without a word, and a model in ``base`` written over."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=f"holds '{name}', which no quickstart made"):
        quickstart(tmp_path, 0)
    assert (tmp_path / name / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle(tmp_path, stop, code):
    out = tmp_path / "run"
    process = start(out, 0, start_new_session=True)
    metrics = out / "sft" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
    process.send_signal(stop)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert re.fullmatch(r"tandem: stopped by \S+\n", errors)
    # Nobody of its process group is left, and what it wrote can be read.
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert all(json.loads(line) for line in metrics.read_text().splitlines())
    events = [json.loads(line) for line in (out / "sft" / "events.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["reason"]) == ("stop", "interrupted")
