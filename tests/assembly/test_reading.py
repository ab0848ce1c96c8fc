"""The rows of a run: what fits its method, and what the keys of its data do."""

import json

import pytest

from tandem.assembly.configs.evaluation_sections import EvaluationSection
from tandem.assembly.configs.sections import DataSection, DatasetSection
from tandem.assembly.reading import load_data, load_held_out
from tandem.errors import UserError

PAIR, DEMO, PROMPT = (
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "completion": "b"},
    {"prompt": "a", "answer": "b"},
)
TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def file(tmp_path):
    def write(*rows, name="a.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        (
            PAIR,
            "demonstrations",
            "no 'prompt' with 'completion'; columns present: 'prompt', 'chosen', 'rejected'; ",
        ),
        (
            TALK,
            "prompts",
            "a.jsonl:2: no column 'prompt'; columns present: 'messages'; such columns are for sft, distill",
        ),
        (
            DEMO,
            "preferences",
            "no column 'chosen'; columns present: 'prompt', 'completion'; such columns are for s",
        ),
        (
            {"prompt": "a"},
            "demonstrations",
            "a.jsonl:2: no column 'completion', as the first row has; columns present: ",
        ),
        ({"question": "a"}, "prompts", "a.jsonl:2: no column 'prompt'; columns present: 'question'"),
    ],
)
def test_columns_that_fit_no_method_or_another(file, row, kind, words):
    right = {"demonstrations": DEMO, "prompts": PROMPT, "preferences": PAIR}[kind]
    data = file(right, row)
    with pytest.raises(UserError) as caught:
        load_data(DataSection(data=data), kind)
    assert words in str(caught.value)
    if row is PAIR:
        assert " rm" in str(caught.value)
        assert " dpo" in str(caught.value)
    with pytest.raises(UserError, match=r"b\.jsonl:1: no column|b\.jsonl:1: no "):
        load_held_out(EvaluationSection(eval_data=(file(row, name="b.jsonl"),)), DataSection(data=data), kind)


def test_a_key_of_columns_that_such_rows_do_not_have_is_passed_over(file):
    """Of a file it was said to have no effect (``test_effects.py``): it has none."""
    data = DataSection(data=file(PROMPT), output_key="none", chosen_key="none", rejected_key="none", label_key="answer")
    assert load_data(data, "prompts")[0] == {"prompt": "a", "label": "b"}
    sets = load_held_out(EvaluationSection(eval_data=(file(PROMPT, name="b.jsonl"),)), data, "prompts")
    assert [row["label"] for rows in sets.values() for row in rows] == ["b"]
    with pytest.raises(UserError, match=r"no column .none. .output_key"):
        load_data(DataSection(data=file(DEMO), output_key="none"), "demonstrations")


def test_every_key_of_the_data_reaches_its_rows(file):
    data, held = file({"q": "a", "gold": 1}, {"q": "b", "gold": 2}), file({"q": "c", "gold": 3}, name="held.jsonl")
    keys = {"input_key": "q", "label_key": "gold", "input_template": "<{}>", "apply_chat_template": True, "system": "s"}
    section = DataSection(data=data, max_samples=1, **keys)
    (row,) = load_data(section, "prompts")
    (held_out,) = load_held_out(EvaluationSection(eval_data=(held,)), section, "prompts")[""]
    assert (row["label"], [m["content"] for m in row["prompt"]]) == (1, ["s", "<a>"])
    assert (held_out["label"], [m["content"] for m in held_out["prompt"]]) == (3, ["s", "<c>"])
    two = EvaluationSection(eval_data=(data, f"other={data},{held}"), max_eval_samples=1)
    assert {name: len(rows) for name, rows in load_held_out(two, section, "prompts").items()} == {"a": 1, "other": 2}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data": "a.jsonl:x,b.jsonl:1"}, "data: a.jsonl:x: the weight 'x' is no number"),
        ({"max_samples": 0}, "max_samples: expected 1 or more, got 0"),
        ({"input_key": ""}, "input_key: expected the name of a column"),
        ({"input_template": "User:"}, "input_template: expected a text with one {}, got 'User:'"),
        ({"condition": "{a.b}"}, "condition: {a.b} names no column"),
        ({"input_template": "{}{}"}, "input_template: expected a text with one {}"),
    ],
)
def test_values_that_are_refused(keys, words):
    with pytest.raises(UserError) as caught:
        DataSection(**({"data": "a.jsonl"} | keys))
    assert str(caught.value).startswith(words)


def test_weights_where_every_row_is_read_once():
    for section in (
        lambda: EvaluationSection(eval_data=("e=a.jsonl:1,b.jsonl:1",)),
        lambda: DatasetSection(data="a.jsonl:1,b.jsonl:1"),
    ):
        with pytest.raises(UserError, match=r"data: a\.jsonl has a weight, and here each of its rows is read once"):
            section()


def test_a_chat_template_for_rows_without_a_conversation(file):
    section = DataSection(data=file(PROMPT), chat_template="x.jinja")
    with pytest.raises(UserError, match=r"^chat_template: no row of .* has a conversation"):
        load_data(section, "prompts")
    load_data(DataSection(data=file(PROMPT), chat_template="x.jinja", apply_chat_template=True), "prompts")
