# ruff: noqa: RUF001
"""What is trained of a conversation, on templates that behave as those of 12 model families do.

``templates/`` holds them, in words of our own; spans between ⟦ and ⟧ are trained, and written here by hand.
"""

import string
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tandem.data.chat import set_template
from tandem.data.tokenize import judged_sequence, labelled_answers, preference_pair, prompt_of, sft_sequence
from tandem.errors import UserError

FOLDER = Path(__file__).parent / "templates"


class Family(NamedTuple):
    special: str
    """Its special tokens: the end of sequence first, the beginning second where it has one ('-': none)."""
    spans: dict[str, str]
    """By conversation: the text with the trained spans, or 'refused: ' and words of the refusal."""


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text):
    return {"role": "tool", "content": text}


SYSTEM = {"role": "system", "content": "be"}
CALL = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
TOOL = [{"type": "function", "function": {"name": "add"}}]
TOOL_JSON = '{"type": "function", "function": {"name": "add"}}'
ROWS = {
    "two turns": {"messages": [user("hi"), assistant("yo"), user("so"), assistant(" ok ")]},
    "system": {"messages": [SYSTEM, user("hi"), assistant("yo"), user("so"), assistant("ok")]},
    "tools": {"messages": [user("hi"), assistant("", **CALL), tool("5"), tool("6"), assistant("yo")], "tools": TOOL},
    "thinking": {"messages": [user("hi"), assistant("yo", reasoning_content="hm", thinking="hm")]},
    "thinking twice": {
        "messages": [
            user("hi"),
            assistant("yo", reasoning_content="hm", thinking="hm"),
            user("so"),
            assistant("ok", reasoning_content="mm", thinking="mm"),
        ]
    },
    "thinking in the text": {"messages": [user("hi"), assistant("<think>\nhm\n</think>\n\nyo")]},
    "no thinking": {"messages": [user("hi"), assistant("yo")], "chat_template_kwargs": {"enable_thinking": False}},
}
DIFFERS = "refused: renders message 1 differently once the conversation goes on"
DROPS = "refused: leaves out something of message 1's 'reasoning_content'"

LLAMA = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutoff: 2023\n\n"
IM = "<|im_start|>"
DS_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n"
    '{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
FAMILIES = {
    "llama3": Family(
        "<|eot_id|> <|begin_of_text|> <|start_header_id|> <|end_header_id|>",
        {
            "two turns": LLAMA
            + "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
            + "<|start_header_id|>assistant<|end_header_id|>\n\n⟦yo<|eot_id|>⟧"
            + "<|start_header_id|>user<|end_header_id|>\n\nso<|eot_id|>"
            + "<|start_header_id|>assistant<|end_header_id|>\n\n⟦ok<|eot_id|>⟧",
            "system": LLAMA
            + "be<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
            + "<|start_header_id|>assistant<|end_header_id|>\n\n⟦yo<|eot_id|>⟧"
            + "<|start_header_id|>user<|end_header_id|>\n\nso<|eot_id|>"
            + "<|start_header_id|>assistant<|end_header_id|>\n\n⟦ok<|eot_id|>⟧",
            "tools": LLAMA
            + "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nadd()\nhi<|eot_id|>"
            + '<|start_header_id|>assistant<|end_header_id|>\n\n⟦{"name": "add", "parameters": {"a": 1}}<|eot_id|>⟧'
            + '<|start_header_id|>ipython<|end_header_id|>\n\n"5"<|eot_id|>'
            + '<|start_header_id|>ipython<|end_header_id|>\n\n"6"<|eot_id|>'
            + "<|start_header_id|>assistant<|end_header_id|>\n\n⟦yo<|eot_id|>⟧",
            "thinking": DROPS,
        },
    ),
    "qwen2_5": Family(
        "<|im_end|> - <|im_start|>",
        {
            "two turns": f"{IM}system\nDefault.<|im_end|>\n{IM}user\nhi<|im_end|>\n{IM}assistant\n⟦yo<|im_end|>⟧\n"
            f"{IM}user\nso<|im_end|>\n{IM}assistant\n⟦ ok <|im_end|>⟧",
            "system": f"{IM}system\nbe<|im_end|>\n{IM}user\nhi<|im_end|>\n{IM}assistant\n⟦yo<|im_end|>⟧\n"
            f"{IM}user\nso<|im_end|>\n{IM}assistant\n⟦ok<|im_end|>⟧",
            "tools": f"{IM}system\nDefault.\n<tools>\n{TOOL_JSON}\n</tools><|im_end|>\n{IM}user\nhi<|im_end|>\n"
            + f'{IM}assistant\n⟦<tool_call>\n{{"name": "add", "arguments": {{"a": 1}}}}\n</tool_call><|im_end|>⟧\n'
            + f"{IM}user\n<tool_response>\n5\n</tool_response>\n<tool_response>\n6\n</tool_response><|im_end|>\n"
            + f"{IM}assistant\n⟦yo<|im_end|>⟧",
            "thinking": DROPS,
        },
    ),
    "qwen3": Family(
        "<|im_end|> - <|im_start|>",
        {
            "two turns": DIFFERS,
            "thinking": f"{IM}user\nhi<|im_end|>\n{IM}assistant\n⟦<think>\nhm\n</think>\n\nyo<|im_end|>⟧",
            "thinking in the text": f"{IM}user\nhi<|im_end|>\n{IM}assistant\n⟦<think>\nhm\n</think>\n\nyo<|im_end|>⟧",
            "thinking twice": DIFFERS,
            "no thinking": f"{IM}user\nhi<|im_end|>\n{IM}assistant\n<think>\n\n</think>\n\n⟦yo<|im_end|>⟧",
            "tools": DIFFERS,
            "tools with thinking": f"{IM}system\n<tools>\n{TOOL_JSON}\n</tools><|im_end|>\n{IM}user\nhi<|im_end|>\n"
            + f"{IM}assistant\n⟦<think>\nhm\n</think>\n\n"
            + '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>⟧\n'
            + f"{IM}user\n<tool_response>\n5\n</tool_response>\n<tool_response>\n6\n</tool_response><|im_end|>\n"
            + f"{IM}assistant\n⟦<think>\nmm\n</think>\n\nyo<|im_end|>⟧",
        },
    ),
    "qwen3_marked": Family(
        "<|im_end|> - <|im_start|>",
        {
            "two turns": f"{IM}user\nhi<|im_end|>\n{IM}assistant\n⟦<think>\n\n</think>\n\nyo<|im_end|>⟧\n"
            f"{IM}user\nso<|im_end|>\n{IM}assistant\n⟦<think>\n\n</think>\n\n ok <|im_end|>⟧",
            "thinking twice": f"{IM}user\nhi<|im_end|>\n{IM}assistant\n⟦<think>\nhm\n</think>\n\nyo<|im_end|>⟧\n"
            f"{IM}user\nso<|im_end|>\n{IM}assistant\n⟦<think>\nmm\n</think>\n\nok<|im_end|>⟧",
            "tools": "refused: leaves out the tools",
        },
    ),
    "gemma3": Family(
        "<eos> <bos> <start_of_turn> <end_of_turn>",
        {
            "two turns": "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n⟦yo<end_of_turn>⟧\n"
            "<start_of_turn>user\nso<end_of_turn>\n<start_of_turn>model\n⟦ok<end_of_turn><eos>⟧",
            "system": "<bos><start_of_turn>user\nbe\n\nhi<end_of_turn>\n<start_of_turn>model\n⟦yo<end_of_turn>⟧\n"
            "<start_of_turn>user\nso<end_of_turn>\n<start_of_turn>model\n⟦ok<end_of_turn><eos>⟧",
            "tools": "refused: the chat template refuses the messages: turns must alternate",
            "thinking": DROPS,
        },
    ),
    "mistral": Family(
        "</s> <s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] "
        "[TOOL_RESULTS] [/TOOL_RESULTS]",
        {
            "two turns": "<s>[INST]hi[/INST]⟦yo</s>⟧[INST]so[/INST]⟦ ok </s>⟧",
            "system": "<s>[SYSTEM_PROMPT]be[/SYSTEM_PROMPT][INST]hi[/INST]⟦yo</s>⟧[INST]so[/INST]⟦ok</s>⟧",
            "tools": f"<s>[AVAILABLE_TOOLS][{TOOL_JSON}][/AVAILABLE_TOOLS][INST]hi[/INST]"
            + '⟦[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]</s>⟧'
            + "[TOOL_RESULTS]5[/TOOL_RESULTS][TOOL_RESULTS]6[/TOOL_RESULTS]⟦yo</s>⟧",
            "thinking": DROPS,
        },
    ),
    "mistral_v3": Family(
        "</s> <s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]",
        {
            "two turns": "<s>[INST] hi[/INST]⟦ yo</s>⟧[INST] so[/INST]⟦ ok</s>⟧",
            "system": "refused: renders",
        },
    ),
    "phi4": Family(
        "<|im_end|> - <|im_start|> <|im_sep|>",
        {
            "two turns": f"{IM}user<|im_sep|>hi<|im_end|>{IM}assistant<|im_sep|>⟦yo<|im_end|>⟧"
            f"{IM}user<|im_sep|>so<|im_end|>{IM}assistant<|im_sep|>⟦ ok <|im_end|>⟧",
            "system": f"{IM}system<|im_sep|>be<|im_end|>{IM}user<|im_sep|>hi<|im_end|>"
            f"{IM}assistant<|im_sep|>⟦yo<|im_end|>⟧{IM}user<|im_sep|>so<|im_end|>{IM}assistant<|im_sep|>⟦ok<|im_end|>⟧",
            "tools": "refused: leaves out the tools",
            "thinking": DROPS,
        },
    ),
    "phi4_mini": Family(
        "<|endoftext|> - <|system|> <|user|> <|assistant|> <|end|> <|tool|> <|/tool|> <|tool_call|> <|/tool_call|>",
        {
            "two turns": "<|user|>hi<|end|><|assistant|>⟦yo<|end|>⟧<|user|>so<|end|>"
            "<|assistant|>⟦ ok <|end|><|endoftext|>⟧",
            "system": "<|system|>be<|end|><|user|>hi<|end|><|assistant|>⟦yo<|end|>⟧<|user|>so<|end|>"
            "<|assistant|>⟦ok<|end|><|endoftext|>⟧",
            "tools": "refused: leaves out the tools",
        },
    ),
    "glm4": Family(
        "<|endoftext|> - [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>",
        {
            "two turns": "[gMASK]<sop><|user|>\nhi<|assistant|>⟦\n<think></think>\nyo⟧"
            "<|user|>\nso<|assistant|>⟦\n<think></think>\nok<|endoftext|>⟧",
            "system": "[gMASK]<sop><|system|>\nbe<|user|>\nhi<|assistant|>⟦\n<think></think>\nyo⟧"
            "<|user|>\nso<|assistant|>⟦\n<think></think>\nok<|endoftext|>⟧",
            "tools": f"[gMASK]<sop><|system|>\n<tools>\n[{TOOL_JSON}]\n</tools><|user|>\nhi<|assistant|>"
            + "⟦\n<think></think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>⟧"
            + "<|observation|>\n<tool_response>\n5\n</tool_response>\n<tool_response>\n6\n</tool_response>"
            + "<|assistant|>⟦\n<think></think>\nyo<|endoftext|>⟧",
            "thinking": "[gMASK]<sop><|user|>\nhi<|assistant|>⟦\n<think>hm</think>\nyo<|endoftext|>⟧",
            "thinking twice": DIFFERS,
            "no thinking": "[gMASK]<sop><|user|>\nhi/nothink<|assistant|>\n<think></think>⟦\nyo<|endoftext|>⟧",
        },
    ),
    "olmo3": Family(
        "<|endoftext|> - <|im_start|> <|im_end|>",
        {
            "two turns": f"{IM}system\nDefault.<|im_end|>\n{IM}user\nhi<|im_end|>\n{IM}assistant\n⟦yo<|im_end|>⟧\n"
            f"{IM}user\nso<|im_end|>\n{IM}assistant\n⟦ ok <|endoftext|>⟧",
            "system": f"{IM}system\nbe<|im_end|>\n{IM}user\nhi<|im_end|>\n{IM}assistant\n⟦yo<|im_end|>⟧\n"
            f"{IM}user\nso<|im_end|>\n{IM}assistant\n⟦ok<|endoftext|>⟧",
            "tools with system": f"{IM}system\nbe <functions>[{TOOL_JSON}]</functions><|im_end|>\n"
            + f"{IM}user\nhi<|im_end|>\n"
            + f'{IM}assistant\n⟦<function_calls>add({{"a": 1}})</function_calls><|im_end|>⟧\n'
            + f"{IM}environment\n5<|im_end|>\n{IM}environment\n6<|im_end|>\n{IM}assistant\n⟦yo<|endoftext|>⟧",
            "thinking": DROPS,
            "begun thinking": f"{IM}system\nDefault.<|im_end|>\n{IM}user\nhi<|im_end|>\n"
            f"{IM}assistant\n<think>⟦hm</think>yo<|endoftext|>⟧",
            "begun, not kept": "refused: renders the answer in message 1 without the beginning",
        },
    ),
    "smollm3": Family(
        "<|im_end|> - <|im_start|>",
        {
            "two turns": f"{IM}system\nMode: /think\n\n<|im_end|>\n{IM}user\nhi<|im_end|>\n"
            f"{IM}assistant\n⟦yo<|im_end|>⟧\n{IM}user\nso<|im_end|>\n{IM}assistant\n⟦ ok <|im_end|>⟧",
            "system": f"{IM}system\nMode: /think\n\nbe<|im_end|>\n{IM}user\nhi<|im_end|>\n"
            f"{IM}assistant\n⟦yo<|im_end|>⟧\n{IM}user\nso<|im_end|>\n{IM}assistant\n⟦ok<|im_end|>⟧",
            "no thinking": f"{IM}system\nMode: /no_think\n\n<|im_end|>\n{IM}user\nhi<|im_end|>\n"
            f"{IM}assistant\n<think>\n\n</think>\n⟦yo<|im_end|>⟧",
            "tools": "refused: leaves out something of message 1's 'tool_calls'",
            "thinking in the text": f"{IM}system\nMode: /think\n\n<|im_end|>\n{IM}user\nhi<|im_end|>\n"
            f"{IM}assistant\n⟦<think>\nhm\n</think>\n\nyo<|im_end|>⟧",
            "thinking": DROPS,
        },
    ),
    "deepseek_v3": Family(
        "<｜end▁of▁sentence｜> <｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜>",
        {
            "two turns": "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>⟦yo<｜end▁of▁sentence｜>⟧"
            "<｜User｜>so<｜Assistant｜>⟦ ok <｜end▁of▁sentence｜>⟧",
            "system": "<｜begin▁of▁sentence｜>be<｜User｜>hi<｜Assistant｜>⟦yo<｜end▁of▁sentence｜>⟧"
            "<｜User｜>so<｜Assistant｜>⟦ok<｜end▁of▁sentence｜>⟧",
            "tools": f"<｜begin▁of▁sentence｜>\n\n## Tools\n[{TOOL_JSON}]<｜User｜>hi<｜Assistant｜>"
            f"⟦{DS_CALL}<｜end▁of▁sentence｜>⟧<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>5<｜tool▁output▁end｜>"
            "<｜tool▁output▁begin｜>6<｜tool▁output▁end｜><｜tool▁outputs▁end｜>⟦yo<｜end▁of▁sentence｜>⟧",
            "thinking": DROPS,
        },
    ),
    "deepseek_r1": Family(
        "<｜end▁of▁sentence｜> <｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜>",
        {
            "two turns": "refused: renders the answer in message 1 without the beginning that it gives one to sample",
            "thinking in the text": "refused: renders the answer in message 1 without the beginning",
        },
    ),
    "granite3": Family(
        "<|end_of_text|> - <|start_of_role|> <|end_of_role|> <|tool_call|>",
        {
            "two turns": "<|start_of_role|>system<|end_of_role|>Default.<|end_of_text|>\n"
            "<|start_of_role|>user<|end_of_role|>hi<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>⟦yo<|end_of_text|>⟧\n"
            "<|start_of_role|>user<|end_of_role|>so<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>⟦ ok <|end_of_text|>⟧",
            "system": "<|start_of_role|>system<|end_of_role|>be<|end_of_text|>\n"
            "<|start_of_role|>user<|end_of_role|>hi<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>⟦yo<|end_of_text|>⟧\n"
            "<|start_of_role|>user<|end_of_role|>so<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>⟦ok<|end_of_text|>⟧",
            "tools": "<|start_of_role|>system<|end_of_role|>Default.<|end_of_text|>\n"
            + f"<|start_of_role|>tools<|end_of_role|>[{TOOL_JSON}]<|end_of_text|>\n"
            + "<|start_of_role|>user<|end_of_role|>hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
            + '⟦<|tool_call|>{"name": "add", "arguments": {"a": 1}}<|end_of_text|>⟧\n'
            + "<|start_of_role|>tool_response<|end_of_role|>5<|end_of_text|>\n"
            + "<|start_of_role|>tool_response<|end_of_role|>6<|end_of_text|>\n"
            + "<|start_of_role|>assistant<|end_of_role|>⟦yo<|end_of_text|>⟧",
            "thinking": DROPS,
        },
    ),
    "gpt_oss": Family(
        "<|return|> - <|start|> <|end|> <|message|> <|channel|> <|call|>",
        {
            "two turns": "<|start|>system<|message|>Reasoning: medium<|end|><|start|>user<|message|>hi<|end|>"
            "<|start|>assistant⟦<|channel|>final<|message|>yo<|end|>⟧<|start|>user<|message|>so<|end|>"
            "<|start|>assistant⟦<|channel|>final<|message|> ok <|return|>⟧",
            "system": "<|start|>system<|message|>Reasoning: medium<|end|><|start|>developer<|message|>be<|end|>"
            "<|start|>user<|message|>hi<|end|><|start|>assistant⟦<|channel|>final<|message|>yo<|end|>⟧"
            "<|start|>user<|message|>so<|end|><|start|>assistant⟦<|channel|>final<|message|>ok<|return|>⟧",
            "thinking": "<|start|>system<|message|>Reasoning: medium<|end|><|start|>user<|message|>hi<|end|>"
            "<|start|>assistant⟦<|channel|>analysis<|message|>hm<|end|>"
            "<|start|>assistant<|channel|>final<|message|>yo<|return|>⟧",
            "thinking twice": DIFFERS,
            "tools": "<|start|>system<|message|>Reasoning: medium<|end|>"
            + "<|start|>developer<|message|>\ntype add = () => any;<|end|><|start|>user<|message|>hi<|end|>"
            + '<|start|>assistant⟦ to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>⟧'
            + '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"5"<|end|>'
            + '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"6"<|end|>'
            + "<|start|>assistant⟦<|channel|>final<|message|>yo<|return|>⟧",
            "tools with thinking": DIFFERS,
        },
    ),
}
MORE = {
    "tools with thinking": ROWS["tools"]
    | {
        "messages": [
            user("hi"),
            assistant("", reasoning_content="hm", thinking="hm", **CALL),
            tool("5"),
            tool("6"),
            assistant("yo", reasoning_content="mm", thinking="mm"),
        ]
    },
    "tools with system": ROWS["tools"] | {"messages": [SYSTEM, *ROWS["tools"]["messages"]]},
    "begun thinking": {
        "messages": [user("hi"), assistant("<think>hm</think>yo")],
        "chat_template_kwargs": {"thinks": True},
    },
    "begun, not kept": {"messages": [user("hi"), assistant("yo")], "chat_template_kwargs": {"thinks": True}},
}
CASES = [(name, row) for name, family in FAMILIES.items() for row in family.spans]
TRAINED = [(name, row) for name, row in CASES if not FAMILIES[name].spans[row].startswith("refused: ")]


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """One token a character, and the family's special tokens."""
    eos, bos, *rest = FAMILIES[name].special.split()
    special = [eos, *([] if bos == "-" else [bos]), *rest]
    vocabulary = {token: i for i, token in enumerate(["<pad>", *special, *string.printable, *"｜▁"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos, bos_token=None if bos == "-" else bos
    )
    set_template(made, str(FOLDER / f"{name}.jinja"))
    return made


@pytest.fixture(scope="module")
def tokenizers():
    return {name: tokenizer_of(name) for name in FAMILIES}


def spans(tokenizer, sequence) -> str:
    """The text with trained stretches in ⟦brackets⟧."""
    text, inside = "", False
    for token, train in zip(sequence.token_ids, sequence.trainable, strict=True):
        text += ("⟧" if inside and not train else "⟦" if train and not inside else "") + tokenizer.decode([token])
        inside = train
    return text + "⟧" * inside


@pytest.mark.parametrize(("name", "conversation"), CASES)
def test_what_is_trained(tokenizers, name, conversation):
    tokenizer, row = tokenizers[name], (ROWS | MORE)[conversation]
    expected = FAMILIES[name].spans[conversation]
    if expected.startswith("refused: "):
        with pytest.raises(UserError) as caught:
            sft_sequence(row, tokenizer)
        assert expected.removeprefix("refused: ") in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    sequence = sft_sequence(row, tokenizer)
    assert spans(tokenizer, sequence) == expected


@pytest.mark.parametrize(("name", "conversation"), TRAINED)
def test_an_answer_comes_after_the_tokens_that_it_would_be_sampled_from(tokenizers, name, conversation):
    """And an answer alone, after its prompt, is trained as the last turn of the whole conversation is."""
    tokenizer, row = tokenizers[name], (ROWS | MORE)[conversation]
    messages = row["messages"]
    sequence = sft_sequence(row, tokenizer)
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    prompt = prompt_of(row | {"prompt": messages[:first]}, tokenizer).token_ids
    assert tuple(sequence.token_ids[: sequence.trainable.index(True)]) == prompt
    last = sft_sequence(row, tokenizer, train_on="last")
    if "marked" not in name:
        assert last.token_ids == sequence.token_ids
        alone = {**row, "prompt": messages[:-1], "completion": messages[-1:], "messages": None}
        assert sft_sequence(alone, tokenizer) == last
        assert labelled_answers(alone | {"label": True}, tokenizer)[0].answer == last
        pair = preference_pair(alone | {"chosen": messages[-1:], "rejected": messages[-1:]}, tokenizer)
        assert pair.chosen == pair.rejected == last
    begin = last.trainable.index(True)
    assert all(last.trainable[begin:])
    assert tuple(last.token_ids[:begin]) == prompt_of(row | {"prompt": messages[:-1]}, tokenizer).token_ids


@pytest.mark.parametrize("conversation", ["two turns", "thinking twice", "tools"])
def test_the_last_answer_is_trained_where_the_template_has_no_stable_prefix(tokenizers, conversation):
    tokenizer, row = tokenizers["qwen3"], ROWS[conversation]
    assert FAMILIES["qwen3"].spans[conversation] == DIFFERS
    sequence = sft_sequence(row, tokenizer, train_on="last")
    begin = sequence.trainable.index(True)
    thought = "mm" if "twice" in conversation else ""
    answer = row["messages"][-1]["content"]
    assert tokenizer.decode(sequence.token_ids[begin:]) == f"<think>\n{thought}\n</think>\n\n{answer}<|im_end|>"
    assert tuple(sequence.token_ids[:begin]) == prompt_of(row | {"prompt": row["messages"][:-1]}, tokenizer).token_ids


def test_all_of_a_conversation(tokenizers):
    for tokenizer in tokenizers.values():
        with_system = {"messages": [*ROWS["two turns"]["messages"][:1], assistant("yo")]}
        if tokenizer.chat_template != tokenizers["deepseek_r1"].chat_template:
            assert all(sft_sequence(with_system, tokenizer, train_on="all").trainable)


def test_parts_that_a_template_writes_as_python_would_are_refused(tokenizers):
    """Models learned to say brackets and quotes."""
    reads_text, reads_parts = tokenizer_of("llama3"), tokenizer_of("llama3")
    parts = "{{ m.content if m.content is string else m.content[0].text }}"
    for tokenizer, content in ((reads_text, "{{ m.content }}"), (reads_parts, parts)):
        tokenizer.chat_template = f"{{% for m in messages %}}{{{{ m.role }}}}: {content}<|eot_id|>{{% endfor %}}"
    text = [{"type": "text", "text": "yo"}]
    for prompt, answer, number in ((text, "ok", 0), ("hi", text, 1)):
        row = {"messages": [user(prompt), assistant(answer)]}
        words = (
            rf"the chat template writes the parts of message {number}'s 'content' as Python would, \[{{'type': 'text'"
        )
        with pytest.raises(UserError, match=words):
            sft_sequence(row, reads_text)
        assert "yo" in spans(reads_parts, sft_sequence(row, reads_parts))
    with pytest.raises(UserError, match="the parts of message 0"):
        prompt_of({"prompt": [user(text)]}, reads_text)


def test_a_file_with_a_template(tokenizers, tmp_path):
    tokenizer = tokenizer_of("phi4")
    for text, words in (
        ("{% if %}", r":1: no chat template: "),
        ("\n{{ messages | nothing }}", r":2: no chat template: No filter named 'nothing'"),
        ("{% for m in messages %}", r":1: no chat template: Unexpected end of template"),
        (b"\xff\xfe", "cannot be read"),
    ):
        path = tmp_path / "broken.jinja"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=words) as caught:
            set_template(tokenizer, str(path))
        assert str(caught.value).startswith(f"chat_template: {path}")
    with pytest.raises(UserError, match="chat_template: nowhere is no file, and none of the tokenizer's templates"):
        set_template(tokenizer, "nowhere")
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    with pytest.raises(UserError, match=r"templates \(default, tool_use\)"):
        set_template(tokenizer, "nowhere")
    set_template(tokenizer, "tool_use")
    assert tokenizer.chat_template == "b"
    (tmp_path / "own.jinja").write_text("{{ messages[3].content }}")
    set_template(tokenizer, str(tmp_path / "own.jinja"))
    with pytest.raises(UserError, match="the chat template refuses the messages"):
        prompt_of({"prompt": [user("a")]}, tokenizer)


def test_a_reward_model_reads_what_its_template_makes_of_an_answer(tokenizers):
    """A template without thinking judges the rest: that is no fault of the answer."""
    tokenizer = tokenizers["llama3"]
    sequence = judged_sequence([user("hi")], [assistant("yo", reasoning_content="hm")], tokenizer)
    assert spans(tokenizer, sequence).endswith("assistant<|end_header_id|>\n\n⟦yo<|eot_id|>⟧")
