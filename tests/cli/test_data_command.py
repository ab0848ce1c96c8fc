"""``tandem data``: rows as a model will see them, in a pipe and on a terminal; lengths, sources, what is cut."""

import json

import pytest
from helpers.runs import write_inputs

from tandem.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_inputs(folder)
    (folder / "turns.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    rows = [{"prompt": "ab=", "completion": "c" * length} for length in (1, 1, 2, 40)]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (folder / "talk.jsonl").write_text(json.dumps({"messages": talk + talk}) + "\n")
    return folder


@pytest.fixture
def shown(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def call(*words, code=0):
        assert main(["data", *words]) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    return call


def test_rows_with_marks_around_what_is_trained(shown):
    out = shown("talk.jsonl", "--model", "base", "--chat-template", "turns.jinja")
    assert "\nrow 1: 20 tokens, 5 trained\nu:hi\na:⟦yo⟧\nu:hi\na:⟦yo<eos>⟧\n" in out
    assert "\x1b" not in out
    last = shown("talk.jsonl", "--model", "base", "--chat-template", "turns.jinja", "--train-on", "last")
    assert "u:hi\na:yo\nu:hi\na:⟦yo<eos>⟧" in last


def test_trained_tokens_in_colour_on_a_terminal(shown, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = shown("long.jsonl", "--model", "base", "--rows", "1")
    assert "ab=\x1b[30;42mc<eos>\x1b[0m" in out


def test_lengths_of_all_and_what_is_cut(shown):
    words = ("long.jsonl", "--model", "base", "--rows", "0", "--max-length", "10")
    out = shown(*words)
    assert "long.jsonl: 4 rows, as for sft" in out
    assert "tokens       4    5       5    6   44   60" in out
    assert "         4 to 7 tokens  ######################################## 3" in out
    assert "1 of 4 rows are longer than 10 tokens, the longest has 44: a run refuses them" in out
    assert "1 are cut and 0 left out, 34 tokens in all" in shown(*words, "--long-rows", "truncate")
    dropped = shown(*words, "--long-rows", "drop")
    assert "long.jsonl: 3 rows (1 dropped)" in dropped
    assert "0 are cut and 1 left out, 44 tokens in all" in dropped


def test_pairs_prompts_and_shares_of_sources(shown):
    pairs = shown("pairs.jsonl", "--model", "base", "--rows", "1", "--method", "dpo")
    assert "row 1, chosen: 10 tokens, 5 trained\n" in pairs
    assert "row 1, rejected: 7 tokens, 2 trained\n" in pairs
    prompts = shown("pairs.jsonl", "--model", "base", "--rows", "1", "--method", "grpo")
    assert "row 1, prompt: 5 tokens\n" in prompts
    assert "⟦" not in prompts
    mixed = shown("demos.jsonl:3,long.jsonl:1", "--model", "base", "--rows", "0")
    assert "demos.jsonl    40    40           75.0%          66.7%" in mixed
    assert "long.jsonl      4     4           25.0%          33.3%" in mixed


def test_without_a_model_rows_are_as_they_are_read(shown, folder):
    out = shown("talk.jsonl", "--rows", "1")
    assert 'talk.jsonl:1\n  messages: [{"role": "user", "content": "hi"}' in out
    assert "These are rows for sft" in out
    (folder / "kto.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    assert "These are rows for kto; add" in shown("kto.jsonl", "--rows", "0")
    assert "These are rows for rm and dpo; add" in shown("pairs.jsonl", "--rows", "0")
    assert "These are rows for methods on samples; add" in shown("prompts.jsonl", "--rows", "0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.jsonl"], "nothing.jsonl: no such file"),
        (["long.jsonl", "--method", "dop"], "--method: no method 'dop'; did you mean"),
        (["long.jsonl", "--long-rows", "drop"], "--long-rows: has no effect without --model"),
        (
            ["long.jsonl", "--method", "dpo"],
            "long.jsonl:1: no column 'chosen'; columns present: 'prompt', 'comp",
        ),
        (["check.py"], "a dataset file ends in one of"),
        (["odd.jsonl"], "odd.jsonl:1: no method reads rows with the columns 'a'; --input-key and its like name"),
        (["long.jsonl", "--chosen-key", "x", "--method", "sft"], "--chosen-key: has no effect, since this run has no"),
        ([], "missing --data"),
    ],
)
def test_what_is_refused(shown, folder, words, message):
    (folder / "odd.jsonl").write_text('{"a": 1}\n')
    assert message in shown(*words, code=2)


def test_keys_of_a_file_that_the_rows_of_the_method_do_not_have_are_passed_over(shown, folder):
    (folder / "all.yaml").write_text("chosen_key: better\noutput_key: completion\n")
    assert "completion: cc\n" in shown("long.jsonl", "--config", "all.yaml", "--method", "sft", "--rows", "3")
    assert "no column 'better' (chosen_key)" in shown("long.jsonl", "--config", "all.yaml", code=2)


def test_a_run_keeps_the_chat_template_that_it_was_given(folder, monkeypatch, capsys):
    """In its model's folder; and a run does not go on with another one under the same name."""
    monkeypatch.chdir(folder)
    argv = ["sft", "--model", "base", "--data", "talk.jsonl", "--chat-template", "own.jinja", "--batch-size", "2"]
    (folder / "own.jinja").write_text((folder / "turns.jinja").read_text())
    assert main([*argv, "--steps", "1", "--out", "templated"]) == 0
    kept = folder / "templated" / "model" / "chat_template.jinja"
    assert kept.read_text() == (folder / "turns.jinja").read_text()
    (folder / "own.jinja").write_text("{{ messages[0].content }}" + (folder / "turns.jinja").read_text())
    assert main([*argv, "--steps", "2", "--out", "templated", "--resume"]) == 2
    assert "chat template own.jinja" in capsys.readouterr().err
    (folder / "own.jinja").write_text("{% if %}")
    assert main([*argv, "--steps", "1", "--out", "never", "--dry-run"]) == 2
    assert "chat_template: own.jinja:1: no chat template: " in capsys.readouterr().err
