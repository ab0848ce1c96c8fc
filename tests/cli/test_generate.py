"""``tandem generate`` and ``tandem sample``: each prompt once, whatever batch it was in and whenever it was killed."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
from pathlib import Path

import pytest
from helpers.runs import write_inputs

from tandem.assembly import wiring
from tandem.assembly.configs.sections import ModelSection
from tandem.assembly.models import replica_engine
from tandem.assembly.uses import sampled
from tandem.cli.main import main
from tandem.runs.lines import keep_lots, read_lines

COMMON = ["--model", "base", "--data", "prompts.jsonl", "--max-new-tokens", "5", "--seed", "3"]
GENERATE = ["generate", *COMMON, "--samples-per-prompt", "2"]
SAMPLE = ["sample", *COMMON, "--samples-per-prompt", "3"]
JUDGED = [*SAMPLE, "--reward", "check.py:right"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_inputs(folder)
    return folder


@pytest.fixture
def inputs(made, tmp_path, monkeypatch):
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_sample_has_a_row_with_its_prompts_columns(inputs):
    assert main([*GENERATE, "--out", "g", "--write", "tokens", "logprobs"]) == 0
    rows, prompts = read_lines(Path("g/samples.jsonl")), read_lines(Path("prompts.jsonl"))
    assert [(row["row"], row["sample"]) for row in rows] == [(i, k) for i in range(len(prompts)) for k in (0, 1)]
    for row in rows:
        assert {name: row[name] for name in ("prompt", "answer")} == prompts[row["row"]]
        assert len(row["token_ids"]) == len(row["logprobs"]) == row["length"] <= 5
        assert row["stop"] == ("eos" if row["token_ids"][-1] == 1 else "length")
        assert all(value <= 0 for value in row["logprobs"])
    assert len({row["completion"] for row in rows}) > 40


def test_a_sample_depends_on_seed_row_and_number_alone(inputs):
    """Not on how many decode beside it, nor on how many samples its prompt has; other seeds draw others."""
    texts = {}
    one = [*without(GENERATE, "--samples-per-prompt"), "--samples-per-prompt", "1"]
    other = [*without(GENERATE, "--seed"), "--seed", "4"]
    for name, words in {"a": GENERATE, "b": [*GENERATE, "--max-slots", "3"], "c": other, "d": one}.items():
        assert main([*words, "--out", name]) == 0
        texts[name] = {(r["row"], r["sample"]): r["completion"] for r in read_lines(Path(name, "samples.jsonl"))}
    assert texts["a"] == texts["b"]
    assert texts["d"] == {key: text for key, text in texts["a"].items() if key[1] == 0}
    assert sum(texts["a"][key] == texts["c"][key] for key in texts["a"]) < 8


def without(words, flag):
    at = words.index(flag) if flag in words else len(words)
    return words[:at] + words[at + 2 :]


def test_a_file_cut_anywhere_is_gone_on_with(inputs, capsys):
    """A kill leaves any number of bytes: each of 12 cuts ends in the file of the unbroken command."""
    assert main([*GENERATE, "--max-slots", "6", "--out", "g"]) == 0
    whole, rng = Path("g/samples.jsonl").read_bytes(), random.Random(0)
    lines = whole.splitlines(keepends=True)
    ends = {sum(map(len, lines[:lot])) for lot in range(0, len(lines) + 1, 6)} | {len(whole)}
    for cut in [0, 1, len(whole) - 1, len(whole), *rng.sample(range(len(whole)), 8)]:
        Path("g/samples.jsonl").write_bytes(whole[:cut])
        assert main([*GENERATE, "--max-slots", "6", "--out", "g", "--resume"]) == 0
        assert Path("g/samples.jsonl").read_bytes() == whole
        assert ("bytes behind the last whole lot" in capsys.readouterr().out) == (cut not in ends)


def test_a_killed_command_goes_on(inputs):
    """The reward kills the command in its third lot of 8 prompts, which begins with the 17th."""
    Path("killer.py").write_text(
        "import os, signal\n"
        "def right(prompts, completions, answer):\n"
        "    if prompts[0] == open('at').read():\n"
        "        os.kill(os.getppid(), signal.SIGKILL)\n"
        "    return [float(len(set(c))) for c in completions]\n"
    )
    Path("at").write_text(read_lines(Path("prompts.jsonl"))[16]["prompt"])
    words = [*SAMPLE, "--reward", "killer.py:right", "--max-slots", "24", "--out", "s", "--keep", "all"]
    command = multiprocessing.get_context("fork").Process(target=main, args=(words,))
    command.start()
    command.join(60)
    assert command.exitcode == -9
    assert len(read_lines(Path("s/samples.jsonl"))) == 16 * 3
    Path("at").write_text("")
    assert main([*words, "--resume"]) == 0
    assert main([*words[:-4], "--out", "t", "--keep", "all"]) == 0
    assert Path("s/samples.jsonl").read_bytes() == Path("t/samples.jsonl").read_bytes()


def test_a_tampered_file_and_another_command_are_refused(inputs, capsys):
    words = [*GENERATE, "--max-slots", "2"]  # a lot is a prompt
    assert main([*words, "--out", "g"]) == 0
    path = Path("g/samples.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:9], lines[3], *lines[10:20]]))
    assert main([*words, "--out", "g", "--resume"]) == 0  # the 10th line is not looked at
    path.write_text("".join([*lines[:9], lines[3]]))
    assert refused([*words, "--out", "g", "--resume"], capsys).startswith("g/samples.jsonl:10: not the row that was")
    assert "already holds a run" in refused([*words, "--out", "g"], capsys)
    assert "temperature (1.0 there, 0.5 now)" in refused(
        [*words, "--out", "g", "--resume", "--temperature", "0.5"], capsys
    )
    assert "holds a run of generate" in refused([*JUDGED, "--out", "g", "--resume"], capsys)


def refused(words, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    return error.removeprefix("tandem: error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SAMPLE, "--out", "s"], "reward: nothing judges the samples"),
        ([*without(JUDGED, "--samples-per-prompt"), "--out", "s", "--keep", "pairs", "--samples-per-prompt", "1"],
         "--samples-per-prompt: a pair is of 2 samples"),
        ([*GENERATE, "--out", "s", "--temperature", "0"], "--temperature: 0 is greedy"),
        ([*JUDGED, "--out", "s", "--keep", "all", "--min-reward", "1"], "--min-reward: has no effect with --keep all"),
        ([*JUDGED, "--out", "s", "--token-budget", "9"], "--token-budget: has no effect, since this run has no"),
        ([*GENERATE, "--out", "s", "--offload", "optimizer"], "--offload: has no effect, since this run has no"),
        ([*GENERATE, "--out", "s", "--engine.max-length", "5"], "max_new_tokens: 5 leave no room for a prompt"),
        ([*JUDGED, "--out", "s", "--min-reward", "9"], "s/samples.jsonl: no prompt in it can be kept: 40 with a best"),
        ([*GENERATE, "--out", "s", "--engine.kind", "vllm", "--top-k", "5", "--write", "logprobs"], "--write: vLLM"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(inputs, capsys, words, message):
    assert message in refused(words, capsys)
    assert "no prompt in it" in message or not Path("s").exists()


def test_a_column_that_the_samples_take_is_said(inputs, capsys):
    assert main([*[w.replace("prompts.jsonl", "demos.jsonl") for w in GENERATE], "--out", "g"]) == 0
    assert (
        "data: left out of g/samples.jsonl, where columns of that name are the sample's own: completion\n"
        in capsys.readouterr().out
    )


def test_best_and_pairs_are_those_of_the_samples(inputs, capsys):
    """Against a plain loop over the rows; one more start changes what is kept without sampling anything."""
    assert main([*JUDGED, "--out", "s", "--keep", "pairs"]) == 0
    rows = read_lines(Path("s/samples.jsonl"))
    groups = [[r for r in rows if r["row"] == i] for i in range(40)]
    pairs = []
    for group in groups:
        rewards = [r["reward"] for r in group]
        assert all(r["reward_parts"] == {"right": r["reward"]} for r in group)
        if max(rewards) > min(rewards):
            best, worst = group[rewards.index(max(rewards))], group[rewards.index(min(rewards))]
            pairs.append((best["prompt"], best["completion"], worst["completion"]))
    found = [(r["prompt"], r["chosen"], r["rejected"]) for r in read_lines(Path("s/pairs.jsonl"))]
    assert found == pairs
    assert 0 < len(pairs) < 40
    assert (
        f"{len(pairs)} prompts are kept in s/pairs.jsonl; left out are {40 - len(pairs)} whose"
        in capsys.readouterr().out
    )
    assert main([*JUDGED, "--out", "s", "--keep", "best", "--min-reward", "0.3", "--resume"]) == 0
    assert "loading the model" not in capsys.readouterr().out
    best = [max(group, key=lambda r: r["reward"]) for group in groups]
    kept = [(r["prompt"], r["completion"], r["answer"]) for r in best if r["reward"] >= 0.3]
    assert [(r["prompt"], r["completion"], r["answer"]) for r in read_lines(Path("s/best.jsonl"))] == kept
    assert main(["dpo", "--model", "base", "--data", "s/pairs.jsonl", "--out", "d", "--steps", "1"]) == 0


def test_chats_stay_chats(inputs):
    """Messages come back as a message, which training and scoring read."""
    shutil.copytree("base", "chatting")
    template = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else '=' }}{% endfor %}"
    Path("chatting/chat_template.jinja").write_text(template)
    rows = [{"prompt": [{"role": "user", "content": word}]} for word in ("ab", "ba", "cab", "bac")]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("count.py").write_text(
        "def count(completions):\n    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    words = [
        "--data",
        "chats.jsonl",
        "--max-new-tokens",
        "5",
        "--reward",
        "count.py:count",
        "--samples-per-prompt",
        "3",
    ]
    assert main(["sample", "--model", "chatting", *words, "--out", "s"]) == 0
    best = read_lines(Path("s/best.jsonl"))
    assert [row["prompt"] for row in best] == [row["prompt"] for row in rows]
    assert all([m["role"] for m in row["completion"]] == ["assistant"] for row in best)
    assert main(["score", "--data", "s/best.jsonl", "--reward", "count.py:count", "--out", "again"]) == 0
    assert [row["reward"] for row in read_lines(Path("again/scored.jsonl"))] == [row["reward"] for row in best]
    train = ["sft", "--model", "chatting", "--data", "s/best.jsonl", "--steps", "1", "--out", "t"]
    assert main(train) == 0


def test_a_reward_model_judges(inputs):
    """Its score is the reward."""
    assert (
        main(["rm", "--model", "base", "--data", "pairs.jsonl", "--out", "rm", "--steps", "1", "--batch-size", "4"])
        == 0
    )
    Path("few.jsonl").write_text("".join(Path("prompts.jsonl").read_text().splitlines(keepends=True)[:3]))
    words = [w.replace("prompts.jsonl", "few.jsonl") for w in SAMPLE]
    assert main([*words, "--reward-model", "rm/model", "--out", "s", "--keep", "all"]) == 0
    rows = read_lines(Path("s/samples.jsonl"))
    assert len({row["reward"] for row in rows}) == len(rows) == 9


def test_vllm_alone_is_asked_as_an_engine_of_this_process(inputs, monkeypatch):
    """Not split, not shared with a trainer, and not the one thing that this process is for."""
    asked = []

    def fake(site, params):
        asked.append(params)
        return replica_engine(site, ModelSection(model=params.model), {"max_slots": params.max_slots})

    monkeypatch.setattr(wiring, "vllm_engine", fake)
    monkeypatch.setattr(sampled, "require_engine", lambda engine: None)
    assert main([*GENERATE, "--out", "live"]) == 0
    assert main([*GENERATE, "--out", "vllm", "--engine.kind", "vllm"]) == 0
    (params,) = asked
    assert (params.seed, params.own_process, params.memory_share, params.sleep) == (3, False, None, False)
    assert Path("live/samples.jsonl").read_bytes() == Path("vllm/samples.jsonl").read_bytes()


def test_an_error_says_how_to_go_on(inputs, capsys):
    Path("fails.py").write_text("def right(completions):\n    return ['no'] * len(completions)\n")
    words = [*SAMPLE, "--reward", "fails.py:right", "--keep", "all", "--out", "s"]
    assert main(words) == 2
    assert "stopped after 0 of 40 prompts; go on with --resume" in capsys.readouterr().out
    Path("fails.py").write_text("def right(completions):\n    return [1.0] * len(completions)\n")
    assert main([*words, "--resume", "--accept-changed", "reward"]) == 0


def test_lots_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"row": i}) + "\n" for i in range(14)]
    for lines, lots, left in ((14, 3, 14), (13, 2, 12), (12, 2, 12), (11, 1, 6), (6, 1, 6), (5, 0, 0), (0, 0, 0)):
        path.write_text("".join(rows[:lines]) + '{"row"' * (lines < 14))
        assert keep_lots(path, [6, 12, 14], "row", [5, 11, 13]) == lots
        assert (path.read_text() if path.exists() else "") == "".join(rows[:left])
