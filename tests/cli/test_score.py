"""``tandem score``: answers that are there already get what training's rewards would give them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.runs import write_inputs

from tandem.assembly.uses import scored
from tandem.cli.main import main
from tandem.runs.lines import read_lines


@pytest.fixture(scope="module", autouse=True)
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def score(out, *words):
    assert main(["score", *words, "--out", out]) == 0
    return read_lines(Path(out, "scored.jsonl"))


def test_samples_get_the_rewards_that_they_got_when_they_were_sampled(monkeypatch):
    """And a file cut anywhere is gone on with."""
    words = ["--model", "base", "--data", "prompts.jsonl", "--max-new-tokens", "5", "--samples-per-prompt", "3"]
    assert main(["sample", *words, "--reward", "check.py:right", "--keep", "all", "--out", "s"]) == 0
    rows = read_lines(Path("s/samples.jsonl"))
    bare = [{k: v for k, v in row.items() if not k.startswith("reward")} for row in rows]
    Path("bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    monkeypatch.setattr(scored, "LOT", 20)
    words = ["--data", "bare.jsonl", "--reward", "check.py:right"]
    assert score("a", *words) == rows
    whole = Path("a/scored.jsonl").read_bytes()
    for cut in (0, 5000, len(whole) - 1):
        Path("a/scored.jsonl").write_bytes(whole[:cut])
        assert score("a", *words, "--resume") == rows
    assert score("a", *words, "--overwrite") == rows


def test_pairs_have_an_accuracy(capsys):
    """That of 'tandem eval rm' of the same reward model; a tie counts for neither side."""
    train = ["rm", "--model", "base", "--data", "pairs.jsonl", "--steps", "2", "--batch-size", "8"]
    assert main([*train, "--learning-rate", "1e-2", "--out", "rm"]) == 0
    assert main(["eval", "rm", "--model", "rm/model", "--data", "pairs.jsonl", "--out", "e"]) == 0
    measured = json.loads(Path("e/evaluation.json").read_text())
    rows = score("p", "--data", "pairs.jsonl", "--reward-model", "rm/model")
    found = scored.summary(Path("p/scored.jsonl"))
    assert (found["accuracy"], found["ties"], found["unjudged"]) == (measured["accuracy"], 0, 0)
    assert found["chosen_reward"] == pytest.approx(measured["chosen_score"], rel=1e-4)
    assert found["rejected_reward"] == pytest.approx(sum(r["rejected_reward"] for r in rows) / 40)
    Path("long.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b" * 127}) + "\n")
    assert main(["score", "--data", "long.jsonl", "--reward-model", "rm/model", "--out", "long"]) == 2
    assert "129 tokens, more than the 128 positions of rm/model" in capsys.readouterr().err
    pairs = [("ab", "a", 1), ("a", "ab", 0), ("ab", "cd", None), ("a", "?", None)]
    Path("few.jsonl").write_text(
        "".join(json.dumps({"question": "q", "good": c, "bad": r}) + "\n" for c, r, _ in pairs)
    )
    Path("length.py").write_text(
        "def length(completions):\n    return [None if c == '?' else float(len(c)) for c in completions]\n"
    )
    keys = ["--input-key", "question", "--chosen-key", "good", "--rejected-key", "bad"]
    score("f", "--data", "few.jsonl", "--reward", "length.py:length", *keys)
    means = {"chosen_reward": (2 + 1 + 2) / 3, "rejected_reward": (1 + 2 + 2) / 3}
    assert scored.summary(Path("f/scored.jsonl")) == {"accuracy": 0.5, "ties": 1, "unjudged": 1} | means
    assert "accuracy" in capsys.readouterr().out


def test_conversations_and_ids(capsys):
    """One assistant message is read; ids come from --model's tokenizer, or from the rows, and else are refused."""
    row = {"prompt": [{"role": "user", "content": "ab"}], "completion": [{"role": "assistant", "content": "abc"}]}
    Path("chat.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"token_ids": [7, 7]}) + "\n")
    Path("ids.py").write_text(
        "def ids(completions, completion_ids):\n"
        "    assert all(c[0]['role'] == 'assistant' for c in completions)\n"
        "    return [float(sum(i)) for i in completion_ids]\n"
    )
    words = ["--data", "chat.jsonl", "--reward", "ids.py:ids"]
    assert [r["reward"] for r in score("c", *words, "--model", "base")] == [2.0 + 3.0 + 4.0, 14.0]
    for data, message in (
        ("chat.jsonl", "model: a reward names 'completion_ids', and not all rows have token_ids; give --model"),
        ("prompts.jsonl", "prompts.jsonl:1: no column 'text'"),
        ("demos.jsonl", "reward 'right' wants the column 'answer'"),
    ):
        function = "check.py:right" if data == "demos.jsonl" else "ids.py:ids"
        assert main(["score", "--data", data, "--reward", function, "--out", "refused"]) == 2
        assert message in capsys.readouterr().err
    Path("turns.jsonl").write_text(json.dumps(row | {"completion": row["completion"] * 2}) + "\n")
    assert main(["score", "--data", "turns.jsonl", "--reward", "ids.py:ids", "--out", "refused"]) == 2
    assert "turns.jsonl:1: column 'completion' must be text or one message" in capsys.readouterr().err
    assert main(["score", "--data", "demos.jsonl", "--out", "refused"]) == 2
    assert not Path("refused").exists()


def test_a_row_is_judged_with_its_own_columns():
    """Also beside a row of the same prompt; rows of one prompt and equal columns are judged together."""
    rows = [{"prompt": "q=", "completion": "ab", "answer": answer} for answer in ("ab", "ba", "ba")]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("own.py").write_text(
        "def equal(completions, answer):\n    return [c == a for c, a in zip(completions, answer)]\n"
    )
    assert [row["reward"] for row in score("own", "--data", "own.jsonl", "--reward", "own.py:equal")] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("column", "value"), [("token_ids", "xyz"), ("token_ids", 5), ("token_ids", [1.5]), ("stop", "bogus"), ("stop", 5)]
)
def test_columns_of_samples_that_hold_something_else_are_refused(column, value, capsys):
    row = {"prompt": "q=", "completion": "ab", "answer": "ab"}
    Path("odd.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {column: value}) + "\n")
    assert main(["score", "--data", "odd.jsonl", "--reward", "check.py:right", "--out", "refused"]) == 2
    assert f"odd.jsonl:2: column '{column}' " in capsys.readouterr().err
