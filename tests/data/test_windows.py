"""A stream of tokens in windows: each token once an epoch, and a window is a function of its number alone."""

import json
import random
from itertools import pairwise

import pytest

from tandem.data import corpus as module
from tandem.data import windows as windows_module
from tandem.data.corpus import Corpus
from tandem.data.windows import Windows
from tandem.errors import UserError

END = 0


def encode(text):
    """A token a character, and one at the end; none of an empty text."""
    return [*map(ord, text), END] if text else []


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 120)
    monkeypatch.setattr(windows_module, "MARK_EVERY", 3)
    rng = random.Random(0)
    # Each character comes once, so that a token says where it is from; some texts are empty, one is long.
    names = iter(range(1000, 60000))
    rows = ["".join(chr(next(names)) for _ in range(rng.choice([0, 1, 5, 20, 150]))) for _ in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in rows))
    return Corpus(str(tmp_path / "a.jsonl"))


def tokens_of(corpus):
    return [id for shard in range(corpus.shards) for text in corpus.documents(shard) for id in encode(text)]


@pytest.mark.parametrize("length", [2, 7, 64, 500])
@pytest.mark.parametrize("seed", [0, None])
def test_each_token_is_predicted_once_an_epoch(corpus, length, seed):
    all_of_it = tokens_of(corpus)
    epochs = 3
    count = epochs * len(all_of_it) // (length - 1)
    found = [window.token_ids for window in Windows(corpus, encode, length, seed).take(range(count))]
    assert all(len(window) == length for window in found)
    assert all(a[-1] == b[0] for a, b in pairwise(found))
    stream = [found[0][0], *(id for window in found for id in window[1:])]
    for epoch in range(epochs - 1):
        part = stream[epoch * len(all_of_it) : (epoch + 1) * len(all_of_it)]
        assert sorted(part) == sorted(all_of_it)
        assert (part == all_of_it) == (seed is None)
        # A document comes whole: what follows a token is what followed it in its text.
        after = dict(pairwise(all_of_it))
        assert all(b == after[a] for a, b in pairwise(part) if a != END)
    if seed is not None:
        assert stream[: len(all_of_it)] != stream[len(all_of_it) : 2 * len(all_of_it)]


@pytest.mark.parametrize("noted", [True, False])
def test_a_window_does_not_depend_on_where_one_begins(corpus, tmp_path, noted):
    notes = tmp_path / "windows.jsonl" if noted else None

    def windows(identity="a", seed=5):
        return Windows(corpus, encode, 9, seed, notes=notes, identity=identity)

    first = windows()
    expected = [window for k in range(0, 300, 4) for window in first.take(range(k, k + 4))]
    if noted:
        with notes.open("a") as file:  # as a kill leaves it, and marks that are of other data
            file.write('{"window": 250, "epoch": 0, "place": 0, "token": 0, "of": "other"}\n[1]\n{"window": 29')
    rng = random.Random(1)
    for start in [0, 1, 299, *rng.sample(range(290), 20)]:
        assert windows().take(range(start, start + 3))[: 300 - start] == expected[start : start + 3]
    again = windows()
    for start in (200, 17, 18, 100):  # one that goes back and forth
        assert again.take(range(start, start + 2)) == expected[start : start + 2]


def test_a_mark_saves_reading_what_is_before_it(corpus, tmp_path):
    notes, read = tmp_path / "windows.jsonl", []

    def watched(text):
        read.append(text)
        return encode(text)

    total = len(tokens_of(corpus)) // 8
    Windows(corpus, encode, 9, 5, notes=notes).take(range(total))
    first = Windows(corpus, encode, 9, 5, notes=notes)
    list(map(first.take, (range(k, k + 1) for k in range(total))))
    at_end = Windows(corpus, watched, 9, 5, notes=notes)
    at_end.take(range(total - 1, total))
    assert len(read) < 20
    other = Windows(corpus, watched, 9, 5, notes=notes, identity="other")
    read.clear()
    other.take(range(total - 1, total))
    assert len(read) > 35


@pytest.mark.parametrize("length", [2, 7, 64, 10_000])
def test_a_corpus_once_in_order(corpus, length):
    found = [window.token_ids for window in Windows(corpus, encode, length, None)]
    assert [found[0][0], *(id for window in found for id in window[1:])] == tokens_of(corpus)
    assert all(len(window) == length for window in found[:-1])


def test_a_corpus_without_a_token_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: no document has a single token"):
        Windows(Corpus(str(tmp_path / "a.jsonl")), encode, 4, 0).take(range(1))
