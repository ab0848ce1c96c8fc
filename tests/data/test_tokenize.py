"""Dataset become the tokens that sampling would see, with one EOS right behind every answer."""

import random
import string
from fractions import Fraction

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tandem.data import tokenize
from tandem.data.items import Counts, build_pairs, build_prompts, build_sequences
from tandem.data.room import Room
from tandem.data.rows import Dataset
from tandem.data.tokenize import preference_pair, prompt_of, sft_sequence
from tandem.errors import UserError

SPECIAL = ["<pad>", "<eos>", "<bos>", "<user>", "<assistant>", "<tool>", "<end>"]


def template(turn: str, *, start: str = "", end: str = "") -> str:
    """A chat template that writes ``turn`` for each message, and ``end`` where no answer is to follow."""
    prompt = "{% if add_generation_prompt %}<assistant>{% else %}" + end + "{% endif %}"
    return start + "{% for m in messages %}<{{m.role}}>" + turn + "{% endfor %}" + prompt


TURNS = template("{{m.content}}<eos>\n", start="{{bos_token}}")
MARKED = template(
    "{% if m.role == 'assistant' %}{% generation %}{{m.content}}{% endgeneration %}"
    "{% else %}{{m.content}}{% endif %}<eos>\n",
    start="{{bos_token}}",
)
NO_END = template("{{m.content}}\n")
PHI = template("{{m.content}}<end>\n", end="{{eos_token}}")
FORGETFUL = template("{% if loop.last %}!{% endif %}{{m.content}}<eos>")


def characters(*, bos: bool = False, end: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a character; <bos> in front (and <eos> behind) of a text where asked."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{'<bos> ' * bos}$A{' <eos>' * end}", special_tokens=[("<bos>", 2), ("<eos>", 1)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    fast.chat_template = chat_template
    return fast


def merging() -> PreTrainedTokenizerFast:
    """Characters, but "=4" and ".\\n" are one token each."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *string.printable, "=4", ".\n"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("=", "4"), (".", "\n")]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = NO_END
    return fast


def marking() -> PreTrainedTokenizerFast:
    """Characters, and a mark for the beginning of a text and of every word, as SentencePiece has."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *string.printable, "▁"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def pieces(tokenizer, sequence) -> str:
    """The text, with the trainable stretches in [brackets]."""
    text, inside = "", False
    for token, train in zip(sequence.token_ids, sequence.trainable, strict=True):
        text += ("]" if inside and not train else "[" if train and not inside else "") + tokenizer.decode([token])
        inside = train
    return text + "]" * inside


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHAT = [user("hi"), assistant("yo"), user("so"), assistant("ok")]


def test_the_end_of_an_answer_is_trained_whoever_wrote_it() -> None:
    """Marks of a template may end before it: a model that is never trained to end does not."""
    tokenizer = characters()
    eos = tokenizer.eos_token_id
    for ids, trained, expected in (
        ([5, 6, eos], [False, True, False], ([5, 6, eos], [False, True, True])),
        ([5, 6], [False, True], ([5, 6, eos], [False, True, True])),
        ([5, eos], [False, False], ([5, eos, eos], [False, False, True])),
    ):
        found = tokenize.with_eos(ids, trained, tokenizer)
        assert (found.token_ids, found.trainable) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2+2=", "completion": "4"}, "2+2=[4<eos>]"),
        ({"prompt": "2+2=", "completion": "4<eos>"}, "2+2=[4<eos>]"),
        ({"prompt": "2+2=", "completion": " 4 "}, "2+2=[ 4 <eos>]"),
        ({"prompt": "2+2=", "completion": ""}, "2+2=[<eos>]"),
        ({"prompt": "over<eos>", "completion": ""}, "over<eos>[<eos>]"),
        ({"prompt": "", "completion": "4"}, "[4<eos>]"),
        ({"text": "abc"}, "[abc<eos>]"),
        ({"text": "abc<eos>"}, "[abc<eos>]"),
    ],
)
def test_plain_rows(row, expected) -> None:
    plain, begun, both = characters(), characters(bos=True), characters(bos=True, end=True)
    assert pieces(plain, sft_sequence(row, plain)) == expected
    for tokenizer in (begun, both):
        begun_text = pieces(tokenizer, sft_sequence(row, tokenizer))
        assert begun_text == ("[<bos>" + expected[1:] if "text" in row else "<bos>" + expected)


def test_bos_stands_once_where_the_text_brings_its_own() -> None:
    tokenizer = characters(bos=True)
    assert tokenizer.decode(prompt_of({"prompt": "<bos>a"}, tokenizer).token_ids) == "<bos>a"
    assert tokenizer.decode(prompt_of({"prompt": ""}, tokenizer).token_ids) == "<bos>"


def test_train_on_all() -> None:
    tokenizer = characters(chat_template=TURNS)
    assert pieces(tokenizer, sft_sequence({"prompt": "a", "completion": "b"}, tokenizer, train_on="all")) == "[ab<eos>]"
    assert all(sft_sequence({"messages": CHAT}, tokenizer, train_on="all").trainable)


def test_a_completion_never_changes_the_prompt_s_tokens() -> None:
    tokenizer = merging()
    row = {"prompt": "2+2=", "completion": "4"}
    sequence = sft_sequence(row, tokenizer)
    assert tuple(sequence.token_ids[:4]) == prompt_of(row, tokenizer).token_ids
    assert [tokenizer.decode([t]) for t in sequence.token_ids] == ["2", "+", "2", "=", "4", "<eos>"]
    assert len(tokenizer("2+2=4")["input_ids"]) == 4, "the two would merge"


def in_whole(texts, tokenizer) -> list[list[int]]:
    """The tokens of consecutive texts, each in all of the text before it or, where that would change, alone."""
    text, ids, found = "", [], []
    for piece in texts:
        text += piece
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        known = whole[: len(ids)] == ids
        found.append(whole[len(ids) :] if known else tokenizer(piece, add_special_tokens=False)["input_ids"])
        ids = [*ids, *found[-1]]
    return found


def test_pieces_of_a_conversation_are_those_in_all_of_its_text(monkeypatch) -> None:
    """Tokenized from the last special token on, and in time that grows with the text and not with its square."""
    draw = random.Random(0)
    words = ["<user>", "<assistant>", "<eos>", "a", "=4", "=", "4", ".", "\n", " ", "ab cd", "<us", "<end>"]
    for make in (characters, merging, marking):
        tokenizer = make()
        for _ in range(40):
            texts = ["".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(draw.randint(1, 8))]
            assert tokenize._pieces(texts, tokenizer, special_tokens=False) == in_whole(texts, tokenizer)
    read = []
    encode = tokenize.encode
    monkeypatch.setattr(tokenize, "encode", lambda text, *a, **k: read.append(len(text)) or encode(text, *a, **k))
    turns = ["<user>", "b" * 50, "<eos>\n<assistant>", "c" * 50, "<eos>\n"] * 40
    tokenize._pieces(turns, characters(), special_tokens=False)
    assert sum(read) < 3 * len("".join(turns))


def test_no_mark_of_a_text_s_beginning_inside_it() -> None:
    tokenizer = marking()
    sequence = sft_sequence({"prompt": "a=", "completion": "4"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(sequence.token_ids) == ["▁", "a", "=", "4", "<eos>"]


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        (TURNS, "<bos><user>hi<eos>\n<assistant>[yo<eos>]\n<user>so<eos>\n<assistant>[ok<eos>]"),
        (MARKED, "<bos><user>hi<eos>\n<assistant>[yo<eos>]\n<user>so<eos>\n<assistant>[ok<eos>]"),
        (NO_END, "<user>hi\n<assistant>[yo]\n<user>so\n<assistant>[ok<eos>]"),
        (PHI, "<user>hi<end>\n<assistant>[yo<end>]\n<user>so<end>\n<assistant>[ok<end>\n<eos>]"),
    ],
    ids=["turns", "marked", "no end", "phi"],
)
def test_conversations_train_on_the_assistant_s_turns(chat, expected) -> None:
    tokenizer = characters(chat_template=chat, bos=True)
    assert pieces(tokenizer, sft_sequence({"messages": CHAT}, tokenizer)) == expected
    assert pieces(tokenizer, sft_sequence({"messages": [*CHAT, user("bye")]}, tokenizer)) == expected


def test_generation_marks_win_over_the_turns() -> None:
    """Only text inside the marks is trained, where the template leaves a prefix of the turn outside of them."""
    chat = MARKED.replace("{% generation %}", "think:{% generation %}")
    tokenizer = characters(chat_template=chat)
    assert pieces(tokenizer, sft_sequence({"messages": CHAT[:2]}, tokenizer)).endswith("<assistant>think:[yo<eos>]")


def test_no_stray_token_between_answer_and_eos_even_where_it_would_merge() -> None:
    tokenizer = merging()
    sequence = sft_sequence({"messages": [user("hi"), assistant("yo.")]}, tokenizer)
    assert [tokenizer.decode([t]) for t in sequence.token_ids][-4:] == ["y", "o", ".", "<eos>"]
    marked = merging()
    marked.chat_template = NO_END.replace("{{m.content}}", "{% generation %}{{m.content}}{% endgeneration %}")
    sequence = sft_sequence({"messages": [assistant("yo.")]}, marked)
    assert [marked.decode([t]) for t in sequence.token_ids][-4:] == ["y", "o", ".", "<eos>"]


def test_chat_completions_train_on_their_own_assistant_turns_only() -> None:
    tokenizer = characters(chat_template=TURNS)
    completion = [assistant("call"), {"role": "tool", "content": "5"}, assistant("five")]
    row = {"prompt": CHAT[:3], "completion": completion}
    assert pieces(tokenizer, sft_sequence(row, tokenizer)) == (
        "<bos><user>hi<eos>\n<assistant>yo<eos>\n<user>so<eos>\n"
        "<assistant>[call<eos>]\n<tool>5<eos>\n<assistant>[five<eos>]"
    )


def test_chat_sequence_begins_with_the_tokens_that_are_sampled_from() -> None:
    for chat in (TURNS, MARKED, NO_END, PHI):
        tokenizer = characters(chat_template=chat)
        prompt = prompt_of({"prompt": CHAT[:3]}, tokenizer)
        row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
        assert tuple(sft_sequence(row, tokenizer).token_ids[: len(prompt.token_ids)]) == prompt.token_ids
        assert sft_sequence(row, tokenizer).trainable.index(True) == len(prompt.token_ids)


def test_prompts_open_or_continue_the_assistant_s_turn() -> None:
    tokenizer = characters(chat_template=TURNS)
    assert tokenizer.decode(prompt_of({"prompt": [user("hi")]}, tokenizer).token_ids) == (
        "<bos><user>hi<eos>\n<assistant>"
    )
    assert tokenizer.decode(prompt_of({"prompt": [user("hi"), assistant("yo")]}, tokenizer).token_ids) == (
        "<bos><user>hi<eos>\n<assistant>yo"
    )


def test_tools_and_template_arguments_reach_the_template() -> None:
    tokenizer = characters(chat_template="{{ tools[0]['name'] }}{{ mood }}:{{ messages[0].content }}")
    row = {"prompt": [user("hi")], "tools": '[{"name": "add"}]', "chat_template_kwargs": {"mood": "glad"}}
    assert tokenizer.decode(prompt_of(row, tokenizer).token_ids) == "addglad:hi"


def test_prompt_keeps_the_row_s_other_columns() -> None:
    prompt = prompt_of({"prompt": "a", "answer": 4, "level": None}, characters())
    assert prompt.prompt == "a"
    assert prompt.columns == {"answer": 4, "level": None}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q:", "chosen": " yes", "rejected": " no"},
        {"chosen": "Q: yes", "rejected": "Q: no"},
        {"prompt": [user("Q")], "chosen": [assistant(" yes")], "rejected": [assistant(" no")]},
        {"chosen": [user("Q"), assistant(" yes")], "rejected": [user("Q"), assistant(" no")]},
    ],
)
def test_preference_pairs(row) -> None:
    tokenizer = characters(chat_template=TURNS)
    pair = preference_pair(row, tokenizer)
    before = "Q:" if isinstance(row["chosen"], str) else "<bos><user>Q<eos>\n<assistant>"
    assert pieces(tokenizer, pair.chosen) == f"{before}[ yes<eos>]"
    assert pieces(tokenizer, pair.rejected) == f"{before}[ no<eos>]"
    assert pair.margin == 0.0
    assert preference_pair(row | {"margin": 2}, tokenizer).margin == 2.0


@pytest.mark.parametrize(
    ("make", "row", "chat", "words"),
    [
        (sft_sequence, {"prompt": "a", "answer": "b"}, None, "columns present: 'prompt', 'answer'"),
        (sft_sequence, {"messages": CHAT}, None, "no chat template"),
        (sft_sequence, {"messages": "hi"}, TURNS, "must be a list of messages, not a string"),
        (sft_sequence, {"messages": [user("hi")]}, TURNS, "no assistant message to train on (roles: user)"),
        (sft_sequence, {"messages": CHAT}, FORGETFUL, "renders message 1 differently"),
        (sft_sequence, {"messages": CHAT}, "{{ raise_exception('no\nchat') }}", "refuses the messages: no chat"),
        (sft_sequence, {"text": CHAT}, None, "'text' must be a string"),
        (prompt_of, {"prompt": ""}, None, "'prompt' is empty"),
        (prompt_of, {"question": "a"}, None, "no column 'prompt'; columns present: 'question'"),
        (prompt_of, {"prompt": [{"role": "system", "content": "a"}]}, TURNS, "not from 'system'"),
        (prompt_of, {"prompt": [user("a")]}, None, "no chat template"),
        (prompt_of, {"prompt": [user("a")], "tools": "[{"}, TURNS, "'tools' is malformed JSON"),
        (
            preference_pair,
            {"chosen": "ab", "rejected": "ac", "margin": "much"},
            None,
            "'margin' must be a finite number",
        ),
        (preference_pair, {"chosen": "ab"}, None, "no column 'rejected'"),
    ],
)
def test_wrong_rows_are_refused(make, row, chat, words) -> None:
    with pytest.raises(UserError) as caught:
        make(row, characters(chat_template=chat))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = characters()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        sft_sequence({"text": "a"}, tokenizer)


# Whole datasets ---------------------------------------------------------------------------------------------------


def rows(*values, column: str = "prompt") -> Dataset:
    origins = [("data.jsonl", 2 * n) for n in range(1, len(values) + 1)]
    return Dataset([{column: v} if isinstance(v, str) else v for v in values], source="data.jsonl", origins=origins)


def test_prompt_ids_depend_on_content_not_order_and_repeats_are_numbered() -> None:
    tokenizer = characters()
    prompts, counts = build_prompts(rows("a", "b", "a", "a"), tokenizer)
    ids = [p.prompt_id for p in prompts]
    assert ids[2:] == [f"{ids[0]}#2", f"{ids[0]}#3"]
    assert counts == Counts(rows=4, kept=4, items_of=(4,))
    assert [p.prompt_id for p in build_prompts(rows("b", "a"), tokenizer)[0]] == [ids[1], ids[0]]


def test_long_prompts() -> None:
    tokenizer = characters(bos=True)
    data = rows("abc", "abcdefgh", "ab")
    with pytest.raises(UserError) as caught:
        build_prompts(data, tokenizer, Room(4))
    assert str(caught.value).startswith("data.jsonl:4: 9 tokens, more than the limit of 4; ")
    prompts, counts = build_prompts(data, tokenizer, Room(4, long_rows="truncate"))
    assert [tokenizer.decode(p.token_ids) for p in prompts] == ["<bos>abc", "<bos>fgh", "<bos>ab"]
    assert prompts[1].prompt == "abcdefgh"
    assert counts == Counts(rows=3, kept=3, items_of=(3,), truncated=1)
    prompts, counts = build_prompts(data, tokenizer, Room(4, long_rows="drop"))
    assert [p.prompt for p in prompts] == ["abc", "ab"]
    assert counts == Counts(rows=3, kept=2, items_of=(2,), dropped=1)
    with pytest.raises(UserError, match=r"data\.jsonl: all 3 rows are longer than the limit of 1 tokens"):
        build_prompts(data, tokenizer, Room(1, long_rows="drop"))


def test_long_sequences_keep_their_right_end() -> None:
    tokenizer = characters()
    data = rows({"prompt": "abcdef", "completion": "gh"}, {"prompt": "a", "completion": "b"})
    with pytest.raises(UserError, match=r"^data\.jsonl:2: 9 tokens, more than the limit of 5"):
        build_sequences(data, tokenizer, Room(5))
    sequences, counts = build_sequences(data, tokenizer, Room(5, long_rows="truncate"))
    assert [pieces(tokenizer, s) for s in sequences] == ["ef[gh<eos>]", "a[b<eos>]"]
    assert counts.truncated == 1
    assert len(build_sequences(data, tokenizer, Room(5, long_rows="drop"))[0]) == 1
    sequences, _ = build_sequences(data, tokenizer, train_on="all")
    assert all(all(s.trainable) for s in sequences)


def test_long_pairs_are_cut_alike_and_never_into_their_answers() -> None:
    tokenizer = characters(bos=True)
    row = {"prompt": "abcdef", "chosen": "gh", "rejected": "ghijk"}
    data = rows(row, {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(UserError, match=r"^data\.jsonl:2: 13 tokens"):
        build_pairs(data, tokenizer, Room(10))
    pairs, counts = build_pairs(data, tokenizer, Room(10, long_rows="truncate"))
    assert pieces(tokenizer, pairs[0].chosen) == "<bos>def[gh<eos>]"
    assert pieces(tokenizer, pairs[0].rejected) == "<bos>def[ghijk<eos>]"
    assert counts == Counts(rows=2, kept=2, items_of=(2,), truncated=1)
    pairs, _ = build_pairs(data, tokenizer, Room(8, long_rows="truncate"))
    assert pieces(tokenizer, pairs[0].chosen) == "<bos>f[gh<eos>]"
    _, counts = build_pairs(data, tokenizer, Room(7, long_rows="truncate"))
    assert counts == Counts(rows=2, kept=1, items_of=(1,), dropped=1)


def test_a_wrong_row_is_named_by_file_and_line() -> None:
    data = rows("ok", {"question": "x"})
    with pytest.raises(UserError, match=r"^data\.jsonl:4: no column 'prompt'; columns present: 'question'$"):
        build_prompts(data, characters())
    with pytest.raises(UserError, match=r"^data\.jsonl:2: no column 'text', no 'messages'"):
        build_sequences(data, characters())
    with pytest.raises(UserError, match=r"^data\.jsonl:2: no column 'chosen'"):
        build_pairs(data, characters())


def test_progress_is_told_row_by_row() -> None:
    told = []
    build_sequences(rows("a", "b", "c", column="text"), characters(), on_progress=lambda *args: told.append(args))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_rows_of_which_nothing_is_trained_are_counted() -> None:
    """An empty text is its end alone, and the first token of a sequence is never trained: nothing is before it."""
    tokenizer = characters()
    sequences, counts = build_sequences(rows("", "ab", "", column="text"), tokenizer)
    assert (len(sequences), counts) == (1, Counts(rows=3, kept=1, untrained=2, items_of=(1,)))
    assert str(counts) == "1 rows (2 left out with nothing to train on)"
    with pytest.raises(UserError, match=r"^data\.jsonl: no row is left to train on; of all: 0 rows \(2 left out"):
        build_sequences(rows("", "", column="text"), tokenizer)
    with pytest.raises(UserError, match=r"left to train on; of all: 0 rows \(1 truncated, 1 left out with nothing"):
        build_sequences(rows("ab", column="text"), tokenizer, Room(1, long_rows="truncate"))
    pair = {"prompt": "", "chosen": "", "rejected": "b"}
    pairs, counts = build_pairs(rows(pair, {"prompt": "p", "chosen": "", "rejected": "b"}), tokenizer)
    assert (len(pairs), counts.untrained) == (1, 1)


def test_a_weighted_source_that_has_no_row_left_is_named() -> None:
    long = Dataset([{"text": "abcdef"}], source="long")
    mixed = Dataset.joined([Dataset([{"text": "a"}], source="short"), long], [Fraction(1), Fraction(2)], source="both")
    with pytest.raises(UserError, match=r"^long: no row is left to train on; of all: 1 rows \(1 dropped\)"):
        build_sequences(mixed, characters(), Room(3, long_rows="drop"))
    plain = Dataset.joined([Dataset([{"text": "a"}], source="short"), long], [None, None], source="both")
    assert build_sequences(plain, characters(), Room(3, long_rows="drop"))[1].items_of == (1, 0)
