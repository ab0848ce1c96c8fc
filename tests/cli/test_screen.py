"""What a user sees of a run: its lines, its samples, its end, and a page that explains every number."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.runs import arguments, run, write_inputs

from tandem.cli.train import following

ROOT = Path(__file__).parents[2]
STEPS = 3
EXTRA = {
    "sft": [],
    "rm": [],
    "dpo": [],
    "ppo": ["--old-logp", "trainer"],
    "grpo": ["--old-logp", "trainer", "--rollouts-logged", "4"],
    "online-dpo": [],
    "opd": ["--old-logp", "trainer"],
}
NEXT = {
    "sft": "  next: tandem rm --model runs/sft/model --data pairs.jsonl --steps 500 --out runs/rm\n"
    "  next: tandem grpo --model runs/sft/model --reward check.py:right --data prompts.jsonl --steps 200 "
    "--out runs/grpo\n",
    "rm": "  next: tandem ppo --model base --reward-model runs/rm/model --data prompts.jsonl --steps 200 "
    "--out runs/ppo\n",
    "dpo": "",
    "ppo": "",
    "grpo": "",
    "online-dpo": "",
    "opd": "",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A short run of each method, with the knobs on that add metrics: what each printed, and their folder."""
    folder = tmp_path_factory.mktemp("screen")
    write_inputs(folder)
    printed = {}
    for method, extra in EXTRA.items():
        argv = [*arguments(method), *extra, "--steps", str(STEPS), "--out", f"runs/{method}"]
        code, printed[method] = run(folder, argv)
        assert code == 0, printed[method]
    return folder, printed


def records(folder, method, name):
    return [json.loads(line) for line in (folder / "runs" / method / name).read_text().splitlines()]


@pytest.mark.parametrize("method", EXTRA)
def test_lines_come_before_the_first_step_and_the_method_says_what_leads(outputs, method):
    printed = outputs[1][method]
    shown = ["loading libraries", "tokenizing 40 rows of", "base\n", f" 0/{STEPS}  ", f" {STEPS}/{STEPS}  "]
    places = [printed.index(text) for text in shown]
    assert places == sorted(places)
    last = [line for line in printed.splitlines() if f" {STEPS}/{STEPS}  " in line][-1]
    (names,) = [re.findall(r"  ([\w/]+) \S+", last)]
    lead = {"sft": "loss", "rm": "accuracy", "dpo": "accuracy", "opd": "teacher_kl"}.get(method, "reward")
    assert names[:2] == [lead, f"eval/{lead}"]
    assert ("loss" in names) == (method in ("sft", "rm", "dpo"))


def test_what_could_follow_a_run_in_this_very_folder_is_beside_it(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert following("ppo", Path("."), steps=2) == f"tandem ppo --steps 2 --out {tmp_path}/ppo"


@pytest.mark.parametrize("method", EXTRA)
def test_a_finished_run_says_where_its_model_is_and_what_could_follow(outputs, method):
    folder, printed = outputs
    end = f"\nThe model is in runs/{method}/model\n{NEXT[method]}"
    assert printed[method].endswith(end)
    assert f"runs/{method}: {STEPS} steps" in printed[method]
    before = [path.stat().st_mtime_ns for path in (folder / "runs" / method).iterdir()]
    argv = [*arguments(method), *EXTRA[method], "--steps", str(STEPS), "--out", f"runs/{method}", "--resume"]
    code, again = run(folder, argv)
    assert code == 0
    assert f"runs/{method}: all {STEPS} steps are done, nothing is left to resume" in again
    # The other runs are there by now, and what could follow is none of them.
    assert again.endswith(re.sub(r"--out (runs/\w+)\n", r"--out \1-2\n", end))
    assert [path.stat().st_mtime_ns for path in (folder / "runs" / method).iterdir()] == before
    code, other = run(folder, [*argv, "--weight-decay", "0.5"])
    assert code == 2
    assert "weight_decay (0.0 there, 0.5 now)" in other


def test_a_reward_model_that_went_on_from_another_is_not_proposed_as_a_policy(outputs):
    folder = outputs[0]
    first = ["rm", "--model", "runs/rm/model", "--data", "pairs.jsonl", "--steps", "1", "--out", "runs/rm-2"]
    code, printed = run(folder, first)
    assert code == 0
    assert "tandem ppo --model runs/sft/model --reward-model runs/rm-2/model" in printed


@pytest.mark.parametrize("method", ["ppo", "grpo", "online-dpo"])
def test_rollouts_are_whole_groups_with_columns_advantages_and_held_out_samples(outputs, method):
    folder, _ = outputs
    lines = records(folder, method, "rollouts.jsonl")
    answers = {f"{row['prompt']}": row["answer"] for row in map(json.loads, (folder / "prompts.jsonl").open())}
    assert all(line["columns"] == {"answer": answers[line["prompt"]]} for line in lines)
    trained = [line for line in lines if not line["held_out"]]
    limit = 4 if method == "grpo" else 8
    for step in range(1, STEPS + 1):
        counts = [len(line["samples"]) for line in trained if line["step"] == step]
        assert set(counts) == {3}
        assert sum(counts) - 3 < limit <= sum(counts)
    assert {line["step"] for line in lines if line["held_out"]} == {0, 2, 3}
    for line in lines:
        known = [sample["advantage"] is not None for sample in line["samples"]]
        # A pair has none.
        assert known == [not line["held_out"] and method != "online-dpo"] * len(known)
        assert len(line["prompt_ids"]) == line["prompt_length"]
        for sample in line["samples"]:
            of_tokens = [
                sample[name] for name in ("completion_ids", "behaviour_logp", "untruncated_logp", "advantages")
            ]
            assert {len(numbers) for numbers in of_tokens if numbers is not None} == {sample["length"]}
            # Nothing is truncated here, and every token of a completion is the sampler's own.
            assert sample["behaviour_logp"] == sample["untruncated_logp"]
            assert max(sample["behaviour_logp"]) < 0
            assert "trainable" not in sample
            if known[0]:
                mean = sum(sample["advantages"]) / sample["length"]
                assert sample["advantage"] == pytest.approx(mean, abs=1e-5)
    if method == "grpo":
        # Advantages of a group have the order of its rewards.
        for line in trained:
            ordered = sorted(line["samples"], key=lambda sample: sample["reward"])
            assert all(a["advantage"] <= b["advantage"] for a, b in pairwise(ordered))


def test_every_metric_that_a_run_writes_is_explained(outputs):
    """In the first column of a table: its name, or a form of it such as ``seconds_<phase>``."""
    page = (ROOT / "docs" / "runs.md").read_text()
    cells = re.findall(r"^\| (`.*?`) \|", page[page.index("## Metrics") :], re.M)
    named = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)} - {"eval/<name>"}
    forms = [re.compile(re.sub(r"<\w+>", ".+", name)) for name in named]
    written = {name for method in EXTRA for line in records(outputs[0], method, "metrics.jsonl") for name in line}
    assert len(written) > 40
    bare = {name.removeprefix("eval/") for name in written} - {"step"}
    assert {name for name in bare if not any(form.fullmatch(name) for form in forms)} == set()
    of_sampling = page[page.index("## Samples") : page.index("## Metrics")]
    (line, *_) = records(outputs[0], "grpo", "rollouts.jsonl")
    assert [key for key in (*line, *line["samples"][0]) if f"`{key}`" not in of_sampling] == []
