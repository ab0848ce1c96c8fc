"""Malformed conversations are refused with the message and the nearest right name, never trained as empty turns."""

import json
import time

import pytest
from helpers.models import make_tokenizer

from tandem.data.items import build_prompts, build_sequences
from tandem.data.rows import Dataset, load_rows
from tandem.errors import UserError

ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def tokenizer():
    made = make_tokenizer()
    made.chat_template = (
        "{% for m in messages %}({{ m.role }}:{{ m.content }}){% if m.tool_calls %}+{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}(assistant:{% endif %}"
    )
    return made


def refusal(row, tokenizer) -> str:
    with pytest.raises(UserError) as caught:
        build_sequences(Dataset([row], source="talk"), tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "contents": "yes"}, "has no 'content'; did you mean 'content' by 'contents'?"),
        ({"rol": "assistant", "content": "yes"}, "has no 'role'; did you mean 'role' by 'rol'?"),
        ({"from": "gpt", "value": "yes"}, "has no 'role' (it has 'from', 'value')"),
        ({"role": "assistant", "content": None}, "has no 'content' (it has 'role')"),
        ({"role": "asistant", "content": "yes"}, "has the role 'asistant'; did you mean 'assistant'?"),
        ({"role": 3, "content": "yes"}, "must have text as its 'role', not an int"),
        ({"role": "assistant", "content": 3}, "as its 'content', not an int"),
        ({"role": "assistant", "content": ["yes"]}, "as its 'content', not a list"),
        ("yes", "must be an object with a 'role' and a 'content', not a str"),
    ],
)
def test_a_message_that_is_malformed(tokenizer, tmp_path, message, words):
    """In the column of every format, and with file and line."""
    for row in (
        {"messages": [ASK, message]},
        {"prompt": [ASK], "completion": [ANSWER, message]},
        {"prompt": [ASK, message], "completion": [ANSWER]},
    ):
        said = refusal(row, tokenizer)
        assert "message 1 " in said
        assert words in said
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps({"prompt": [ASK]}) + "\n" + json.dumps({"prompt": [ASK, message]}) + "\n")
    with pytest.raises(UserError) as caught:
        build_prompts(load_rows(str(file)), tokenizer)
    assert str(caught.value).startswith(f"{file}:2: column 'prompt': message 1 ")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": ""},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], "content": None},
        {"role": "assistant", "reasoning_content": "hm"},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "assistant", "content": "yes", "name": "bob", "anything": 3},
    ],
)
def test_messages_that_templates_can_render(tokenizer, message):
    said = "{{ m.content if m.content is string or not m.content else m.content[0].text }}"
    said += "{{ m.reasoning_content }}{{ m.tool_calls }}"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}" + said + "{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant{% endif %}"
    assert build_sequences(Dataset([{"messages": [ASK, message]}]), tokenizer)[1].kept == 1
    assert build_prompts(Dataset([{"prompt": [{"role": "critic", "content": "x"}, ASK]}]), tokenizer)[1].kept == 1


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        *(
            ({"chat_template_kwargs": {name: True}}, f"{name!r} is given by Tandem, not by a row")
            for name in ("tokenize", "add_generation_prompt", "continue_final_message", "messages", "conversation",
                         "return_dict", "tools", "padding")
        ),
        ({"chat_template_kwargs": [1]}, "must be an object, not a list"),
        ({"chat_template_kwargs": {"chat_template": LOOP}}, "may only name one of the tokenizer's templates"),
        ({"chat_template_kwargs": {"chat_template": 3}}, "may only name one of the tokenizer's templates"),
        ({"tools": 3}, "column 'tools' must be a list of objects"),
        ({"tools": "[1]"}, "column 'tools' must be a list of objects"),
    ],
)  # fmt: skip
def test_what_a_row_may_not_tell_the_template(tokenizer, columns, words):
    start = time.monotonic()
    assert words in refusal({"messages": [ASK, ANSWER], **columns}, tokenizer)
    assert time.monotonic() - start < 5


def test_a_row_may_name_one_of_the_tokenizer_s_templates(tokenizer):
    tokenizer.chat_template = {"default": "never", "short": tokenizer.chat_template}
    row = {"messages": [ASK, ANSWER], "chat_template_kwargs": {"chat_template": "short"}}
    (sequence,), _ = build_sequences(Dataset([row]), tokenizer)
    assert tokenizer.decode(sequence.token_ids).startswith("(user:hi)(assistant:yes")
    row["chat_template_kwargs"] = {"chat_template": "long"}
    assert "may only name one of the tokenizer's templates (default, short)" in refusal(row, tokenizer)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0].content + 1 }}", "the chat template refuses the messages: TypeError: "),
        ("{{ messages[9].content }}", "the chat template refuses the messages: "),
        ("{{ raise_exception('no such talk') }}", "the chat template refuses the messages: no such talk"),
        ("{% generation %}{{ messages[0].content + 1 }}{% endgeneration %}", "refuses the messages: TypeError: "),
    ],
)
def test_a_template_that_fails_is_no_traceback(tokenizer, template, words):
    tokenizer.chat_template = template
    assert words in refusal({"messages": [ASK, ANSWER]}, tokenizer)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a": %s}' % ("1" * 5000), "Exceeds the limit"),
    ],
)
def test_json_that_python_refuses(tmp_path, text, words):
    for suffix in ("jsonl", "json"):
        file = tmp_path / f"odd.{suffix}"
        file.write_text('{"a": 1}\n' + text + "\n")
        with pytest.raises(UserError, match=rf"odd\.{suffix}:2: malformed JSON: {words}"):
            load_rows(str(file))
