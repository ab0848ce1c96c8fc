"""Dataset against what the models that will read them can take: positions and token ids, with file and line."""

import pytest
from helpers.models import make_tokenizer

from tandem.data.items import build_pairs, build_prompts, build_sequences
from tandem.data.room import Room
from tandem.data.rows import Dataset
from tandem.errors import UserError
from tandem.types import Limits

TOKENIZER = make_tokenizer()
SMALL = Limits(positions=10, vocabulary=64, whose="small")
LARGE = Limits(positions=1000, vocabulary=64, whose="large")
ENDLESS = Limits(vocabulary=64, whose="endless")


def rows(*lengths: int) -> Dataset:
    return Dataset(
        [{"prompt": "a" * n, "completion": "b", "chosen": "b", "rejected": "c"} for n in lengths], source="d"
    )


def refusal(build, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        build(*arguments, **options)
    return str(caught.value)


def test_the_tightest_of_the_models_counts() -> None:
    """A sequence may fill every position; a prompt leaves room for what is sampled after it."""
    for build in (build_sequences, build_pairs):
        # The answer is a letter and its end of sequence.
        assert build(rows(8), TOKENIZER, Room(4096, [LARGE, SMALL, ENDLESS]))[1].kept == 1
        message = refusal(build, rows(8, 9), TOKENIZER, Room(4096, [LARGE, SMALL, ENDLESS]))
        assert message.startswith("d row 2: 11 tokens, more than the 10 positions of small; choose to truncate")
    assert build_prompts(rows(7), TOKENIZER, Room(4096, [SMALL], 3))[1].kept == 1
    message = refusal(build_prompts, rows(7, 8), TOKENIZER, Room(4096, [SMALL], 3))
    assert message.startswith("d row 2: 8 tokens and up to 3 new ones, more than the 10 positions of small; lower")
    message = refusal(Room, 4096, [SMALL], 10)
    assert message == "max_new_tokens: 10 leave no room for a prompt in the 10 positions of small"
    assert build_sequences(rows(5000), TOKENIZER, Room(None, [ENDLESS]))[1].kept == 1


def test_a_limit_of_the_user_s_below_the_model_s_is_named_as_before() -> None:
    message = refusal(build_sequences, rows(8), TOKENIZER, Room(6, [SMALL]))
    assert message == (
        "d row 1: 10 tokens, more than the limit of 6; raise the limit, or choose to truncate or to drop long rows"
    )


def test_long_rows_go_the_way_of_those_above_max_length() -> None:
    prompts, counts = build_prompts(rows(20, 3), TOKENIZER, Room(4096, [SMALL], 3, long_rows="truncate"))
    assert ([len(p.token_ids) for p in prompts], counts.truncated) == ([7, 3], 1)
    sequences, counts = build_sequences(rows(20, 3), TOKENIZER, Room(4096, [SMALL], long_rows="drop"))
    assert ([len(s.token_ids) for s in sequences], counts.dropped) == ([5], 1)


def test_token_ids_that_a_model_has_no_embedding_of() -> None:
    few = Limits(vocabulary=TOKENIZER.get_vocab()["b"], whose="few")
    for build in (build_sequences, build_pairs):
        message = refusal(build, rows(2), TOKENIZER, Room(None, [LARGE, few]))
        assert message.startswith("d row 1: token id 3, and the embedding of few has 3 rows: the tokenizer is another")
    # What no row holds does no harm: Gemma 3's text models have a tokenizer with one token more than embeddings.
    assert build_prompts(rows(2), TOKENIZER, Room(None, [few]))[1].kept == 1
