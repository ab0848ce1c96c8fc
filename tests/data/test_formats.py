"""TRL's formats are told apart as TRL tells them apart."""

import random

import pytest

from tandem.data import formats
from tandem.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def trl_extract_prompt(chosen, rejected):
    """TRL 1.16, trl/data_utils.py, ``extract_prompt``."""
    for idx in range(min(len(chosen), len(rejected))):
        if chosen[idx] != rejected[idx]:
            if chosen[idx - 1] == " ":
                idx -= 1
            break
    return chosen[:idx], chosen[idx:], rejected[idx:]


def test_implicit_prompt_of_conversations_is_trl_s() -> None:
    draw = random.Random(0)
    for _ in range(200):
        shared = [draw.choice([user, assistant])(str(i)) for i in range(draw.randint(1, 4))]
        chosen = [*shared, assistant("yes"), *[user("more")] * draw.randint(0, 2)]
        rejected = [*shared, assistant("no"), *[user("more")] * draw.randint(0, 2)]
        assert formats.extract_prompt(chosen, rejected) == trl_extract_prompt(chosen, rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),
        ("The sky is red.", "The sky is red!"),
        ("Q: 1+1?\nA:\n2", "Q: 1+1?\nA:\n3"),
        ("Human: hi\n\nAssistant: Yes, of course", "Human: hi\n\nAssistant: No"),
    ],
)
def test_implicit_prompt_of_texts_is_trl_s(chosen, rejected) -> None:
    assert formats.extract_prompt(chosen, rejected) == trl_extract_prompt(chosen, rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is black", "The sky is"),
        ("The sky is blue", "The sky is blue today", "The sky is"),
        ("It is (red)", "It is (rose)", "It is ("),
        ("same", "same", ""),
        ("x", "y", ""),
    ],
)
def test_texts_are_not_cut_inside_a_word_and_no_answer_is_empty(chosen, rejected, prompt) -> None:
    assert formats.extract_prompt(chosen, rejected) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def test_conversation_that_continues_the_other_keeps_an_answer() -> None:
    chosen = [user("a"), assistant("b")]
    assert formats.extract_prompt(chosen, [*chosen, user("c")]) == trl_extract_prompt(chosen, [*chosen, user("c")])
    assert formats.extract_prompt(chosen, chosen) == ([user("a")], [assistant("b")], [assistant("b")])
    with pytest.raises(UserError, match="share no first message"):
        formats.extract_prompt([user("a"), assistant("b")], [user("b"), assistant("b")])


def test_plain_prompt_beside_whole_conversations_is_implicit() -> None:
    row = {
        "prompt": "a",
        "chosen": [user("a"), assistant("x")],
        "rejected": [user("a"), assistant("y")],
    }
    assert formats.preference(row) == ([user("a")], [assistant("x")], [assistant("y")])
    explicit = row | {"prompt": [user("z")]}
    assert formats.preference(explicit) == (explicit["prompt"], explicit["chosen"], explicit["rejected"])
    assert formats.preference({"prompt": "p", "chosen": "x", "rejected": "y"}) == ("p", "x", "y")


def test_none_that_parquet_fills_in_is_left_out() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert formats.content({"prompt": [user("a") | {"tool_calls": None}, call]}, "prompt") == [user("a"), call]


@pytest.mark.parametrize(
    ("read", "row", "words"),
    [
        (formats.preference, {"chosen": "a"}, "no column 'rejected'; columns present: 'chosen'"),
        (formats.preference, {"choosen": "a", "rejected": "b"}, "'rejected'; did you mean 'chosen' by 'choosen'?"),
        (formats.prompt_completion, {"prompt": 3, "completion": "a"}, "'prompt' must be a string or a list"),
        (formats.prompt_completion, {"prompt": "a", "completion": []}, "'completion' is an empty list"),
        (formats.prompt_completion, {"prompt": "a", "completion": [assistant("b")]}, "must both be strings"),
        (formats.prompt_completion, {"prompt": [user("a"), {"content": "b"}], "completion": "c"}, "message 1 has no"),
        (formats.preference, {"chosen": "a", "rejected": [user("b")]}, "'chosen' and 'rejected' must both"),
        (formats.preference, {"prompt": [user("a")], "chosen": "a", "rejected": "b"}, "'prompt' is a list"),
        (lambda row: formats.messages(row, "messages"), {"messages": "a"}, "must be a list of messages"),
    ],
)
def test_wrong_columns_are_named(read, row, words) -> None:
    with pytest.raises(UserError) as caught:
        read(row)
    assert words in str(caught.value)
