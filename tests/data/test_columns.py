"""Rows with other columns and plain texts become TRL's rows; a key that changes nothing, or names nothing, is said."""

import pytest

from tandem.data import formats
from tandem.data.columns import shape
from tandem.data.rows import Dataset
from tandem.data.sources import Columns
from tandem.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def shaped(row, kind="demonstrations", **keys):
    return next(iter(shape(Dataset([row], source="list"), Columns(**keys), kind)))


@pytest.mark.parametrize(
    ("kind", "row", "keys", "expected"),
    [
        ("prompts", {"q": "a", "x": 1}, {"input_key": "q"}, {"prompt": "a", "x": 1}),
        ("prompts", {"q": "a", "prompt": "b"}, {"input_key": "q"}, {"prompt": "a"}),
        ("prompts", {"prompt": "a", "gold": 4}, {"label_key": "gold"}, {"prompt": "a", "label": 4}),
        (
            "demonstrations",
            {"q": "a", "r": "b"},
            {"input_key": "q", "output_key": "r"},
            {"prompt": "a", "completion": "b"},
        ),
        ("demonstrations", {"talk": [user("a")]}, {"input_key": "talk"}, {"messages": [user("a")]}),
        ("demonstrations", {"body": "a"}, {"input_key": "body"}, {"text": "a"}),
        ("demonstrations", {"q": "a", "completion": "b"}, {"input_key": "q"}, {"prompt": "a", "completion": "b"}),
        (
            "preferences",
            {"q": "a", "good": "b", "bad": "c"},
            {"input_key": "q", "chosen_key": "good", "rejected_key": "bad"},
            {"prompt": "a", "chosen": "b", "rejected": "c"},
        ),
        (
            "preferences",
            {"chosen": "c", "rejected": "b"},
            {"chosen_key": "rejected", "rejected_key": "chosen"},
            {"chosen": "b", "rejected": "c"},
        ),
        ("prompts", {"prompt": "a"}, {"input_template": r"User: {}\nAssistant: "}, {"prompt": "User: a\nAssistant: "}),
        ("prompts", {"prompt": "a"}, {"apply_chat_template": True}, {"prompt": [user("a")]}),
        (
            "preferences",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"apply_chat_template": True, "input_template": "({})", "system": "s"},
            {"prompt": [system("s"), user("(a)")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        ),
        (
            "demonstrations",
            {"prompt": [user("a")], "completion": "b"},
            {"apply_chat_template": True},
            {"prompt": [user("a")], "completion": [assistant("b")]},
        ),
        ("demonstrations", {"messages": [user("a")]}, {"system": "s"}, {"messages": [system("s"), user("a")]}),
        (
            "preferences",
            {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            {"system": "s"},
            {
                "prompt": "a",
                "chosen": [system("s"), user("a"), assistant("b")],
                "rejected": [system("s"), user("a"), assistant("c")],
            },
        ),
    ],
)
def test_rows_become_trl_s(kind, row, keys, expected):
    assert shaped(row, kind, **keys) == expected
    assert kind in formats.kinds(expected)


def test_answers_change_places_at_once():
    """Both keys are read from the row as it is, in whichever order they are applied."""
    row = {"prompt": "p", "chosen": "c", "rejected": "b"}
    assert shaped(row, "preferences", chosen_key="rejected", rejected_key="chosen") == row | {
        "chosen": "b",
        "rejected": "c",
    }


@pytest.mark.parametrize(
    ("prompt", "keys", "expected"),
    [
        ("a", {}, "a\nReward: 0.7"),
        ("a", {"input_template": "Q: {} A:"}, "Q: a\nReward: 0.7 A:"),
        ("a", {"apply_chat_template": True}, [user("a\nReward: 0.7")]),
        ([system("s"), user("a")], {}, [system("s"), user("a\nReward: 0.7")]),
    ],
)
def test_a_condition_stands_behind_the_prompt(prompt, keys, expected):
    row = {"prompt": prompt, "completion": "b" if isinstance(prompt, str) else [assistant("b")], "reward": 0.66}
    assert shaped(row, condition=r"\nReward: {reward:.1f}", **keys)["prompt"] == expected
    fixed = shaped({"prompt": "a", "completion": "b"}, condition=" {{best}}")
    assert fixed["prompt"] == "a {best}"


@pytest.mark.parametrize(
    ("row", "condition", "words"),
    [
        ({"prompt": "a"}, "{reward}", "list row 1: no column 'reward' (condition); columns present: 'prompt'"),
        ({"prompt": "a", "reward": None}, "{reward}", "no column 'reward' (condition)"),
        ({"prompt": "a", "reward": "x"}, "{reward:.1f}", "list row 1: condition: column 'reward' has 'x'"),
        ({"prompt": [assistant("a")], "reward": 1}, "{reward}", "the prompt does not end in a text of the user's"),
        ({"messages": [user("a")], "reward": 1}, "{reward}", "condition: no column 'prompt' to put it behind"),
        ({"prompt": "a"}, "{", "is no template"),
        ({"prompt": "a"}, "{reward.real}", "{reward.real} names no column"),
        ({"prompt": "a"}, "{}", "{} names no column"),
        ({"prompt": "a"}, "{reward!r}", "names no column"),
    ],
)
def test_conditions_that_cannot_be_filled_are_refused(row, condition, words):
    with pytest.raises(UserError) as caught:
        shaped(row, condition=condition)
    assert words in str(caught.value)


def test_a_system_message_of_its_own_stays():
    rows = Dataset([{"messages": [system("own"), user("a")]}, {"messages": [user("b")]}])
    first, second = shape(rows, Columns(system="s"), "demonstrations")
    assert [m["content"] for m in first["messages"]] == ["own", "a"]
    assert [m["content"] for m in second["messages"]] == ["s", "b"]


@pytest.mark.parametrize(
    ("row", "keys", "words"),
    [
        ({"prompt": "a"}, {"input_key": "q"}, "list row 1: no column 'q' (input_key); columns present: 'prompt'"),
        ({"prompt": "a", "q": None}, {"input_key": "q"}, "list row 1: no column 'q' (input_key)"),
        ({"prompt": [user("a")]}, {"input_template": "({})"}, "input_template: has no effect on any row of list"),
        ({"prompt": [user("a")]}, {"apply_chat_template": True}, "apply_chat_template: has no effect on any row"),
        ({"prompt": "a"}, {"system": "s"}, "for plain prompts add --apply-chat-template"),
        ({"messages": [system("t")]}, {"system": "s"}, "system: has no effect on any row of list"),
        ({"chosen": "ab", "rejected": "ac"}, {"apply_chat_template": True}, "list row 1: apply_chat_template: no colu"),
    ],
)
def test_keys_that_name_or_change_nothing(row, keys, words):
    with pytest.raises(UserError) as caught:
        shaped(row, **keys)
    assert words in str(caught.value)
    if "has no effect" in str(caught.value):
        held_out = Dataset([row])
        assert list(shape(held_out, Columns(**keys), "demonstrations", strict=False)) == [row]


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"prompt": "a", "completion": None}, "demonstrations", "no 'messages', and no 'prompt' with 'completion'"),
        ({"prompt": "a", "chosen": "b"}, "preferences", "no column 'rejected'; columns present: 'prompt', 'chosen'"),
        ({}, "prompts", "no column 'prompt'; columns present: none"),
    ],
)
def test_rows_of_no_such_kind(row, kind, words):
    with pytest.raises(UserError) as caught:
        formats.require_kind(row, kind)
    assert words in str(caught.value)
    assert kind not in formats.kinds(row)


def test_numbers_and_truths_also_as_csv_has_them():
    assert [formats.number({"m": m}, "m", 0.0) for m in (2, 0.5, "0.5", None)] == [2.0, 0.5, 0.5, 0.0]
    assert [formats.truth({"l": l}, "l") for l in (True, 1, "true", "False", 0, False)] == [True] * 3 + [False] * 3
    for wrong in (True, "x", "nan", [1], float("inf")):
        with pytest.raises(UserError, match="must be a finite number"):
            formats.number({"m": wrong}, "m", 0.0)
    for wrong in (2, 1.0, "yes", [], -1):
        with pytest.raises(UserError, match="must be true or false"):
            formats.truth({"l": wrong}, "l")
