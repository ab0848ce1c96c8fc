"""What a reference said of rows is found again by content, and a changed row, model or file is never a hit."""

import gc
import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from helpers.models import make_module, make_tokenizer

from tandem.data.packing import pack_pairs
from tandem.errors import RunFailure
from tandem.models.loading import prepare_module
from tandem.rollout.known import Known, content_keys
from tandem.training.scorer import LocalScorer
from tandem.types import PreferencePair, Sequence
from tandem.workers.homes import seat_of


def answered(prompt, *answer):
    ids = [*prompt, *answer]
    return Sequence(token_ids=ids, trainable=[False] * len(prompt) + [True] * len(answer))


PROMPT = [5, 6, 7, 8]
PAIRS = [
    PreferencePair(chosen=answered(PROMPT, 9, 1), rejected=answered(PROMPT, 10, 11, 1)),
    PreferencePair(chosen=answered([3, 4], 12, 1), rejected=answered([3, 4], 1)),
    PreferencePair(chosen=answered(PROMPT, 13, 1), rejected=answered(PROMPT, 9, 1)),
]


class Asked(LocalScorer):
    """A scorer that counts what it is asked about."""

    segments = 0

    def score(self, batch, temperature=None):
        self.segments += batch.segments
        return super().score(batch, temperature)


@pytest.fixture
def scorer():
    return Asked(prepare_module(make_module("llama"), make_tokenizer()), token_budget=1000)


def test_what_was_asked_is_read_again_bit_for_bit(tmp_path, scorer):
    batch = pack_pairs(PAIRS)
    wanted = LocalScorer.score(scorer, batch).logp_T
    first = Known(tmp_path, {"model": "a"})
    first.ask(seat_of(scorer), [batch])
    assert scorer.segments == 6
    again = Known(tmp_path, {"model": "a"})
    assert again.read() == []
    assert again.lacking(batch) == []
    for known in (first, again):
        assert torch.equal(known.score(batch).logp_T, wanted)
        # In another order, and with prompts that are not shared.
        other = batch.unshared().select([2, 0])
        assert torch.equal(known.score(other).logp_T, wanted[batch.tokens_of([2, 0])])
    again.ask(seat_of(scorer), [batch])
    assert scorer.segments == 6


def test_only_what_is_new_is_asked(tmp_path, scorer):
    Known(tmp_path, {}).ask(seat_of(scorer), [pack_pairs(PAIRS[:1])])
    known = Known(tmp_path, {})
    known.read()
    # The third pair's rejected answer is the first one's chosen answer; a pair is asked about whole.
    assert known.lacking(pack_pairs(PAIRS)) == [1, 2]
    known.ask(seat_of(scorer), [pack_pairs(PAIRS[:2]), pack_pairs(PAIRS)])
    assert scorer.segments == 2 + 2 + 2
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    with pytest.raises(ValueError, match="not known"):
        known.score(pack_pairs([PreferencePair(chosen=answered([2], 1), rejected=answered([2], 3))]))


def test_a_key_depends_on_tokens_and_what_is_trained(tmp_path, scorer):
    keys = content_keys(pack_pairs(PAIRS))
    assert len(set(keys)) == 5
    assert keys[0] == keys[5]
    moved = replace(PAIRS[0].chosen, trainable=[False] * 3 + [True] * 3)
    assert content_keys(pack_pairs([replace(PAIRS[0], chosen=moved)]))[0] not in keys
    # What a batch says of a token that begins a sequence, which is never trained, does not count.
    whole = replace(PAIRS[1].chosen, trainable=[True] * 4)
    without = replace(whole, trainable=[False, True, True, True])
    a, b = (content_keys(pack_pairs([replace(PAIRS[1], chosen=c)]))[0] for c in (whole, without))
    assert a == b


def test_another_model_never_hits(tmp_path, scorer):
    batch = pack_pairs(PAIRS)
    Known(tmp_path, {"model": "a"}).ask(seat_of(scorer), [batch])
    other = Known(tmp_path, {"model": "b"})
    assert other.read() == []
    assert other.lacking(batch) == [0, 1, 2]
    # Nor where somebody has put the one's file into the other's folder.
    (file,) = tmp_path.rglob("*.safetensors")
    other.folder.mkdir()
    shutil.copy(file, other.folder)
    (line,) = other.read()
    assert "it is of another model" in line
    assert other.lacking(batch) == [0, 1, 2]


def flipped(content):
    return content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]


@pytest.mark.parametrize("damage", [flipped, lambda c: c[:-7], lambda c: c[:5], lambda c: b"", lambda c: b"x" * 400])
def test_a_damaged_file_is_said_and_its_rows_are_asked_again(tmp_path, scorer, damage):
    batch = pack_pairs(PAIRS)
    Known(tmp_path, {}).ask(seat_of(scorer), [batch])
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    known = Known(tmp_path, {})
    (line,) = known.read()
    assert line.startswith(f"{file}: damaged (")
    known.ask(seat_of(scorer), [batch])
    assert scorer.segments == 12
    assert file.read_bytes() == whole


def test_what_is_damaged_and_cannot_be_deleted_is_passed_over(tmp_path, scorer):
    known = Known(tmp_path, {})
    assert known.folder is not None
    (known.folder / "x.safetensors").mkdir(parents=True)
    (line,) = known.read()
    assert "x.safetensors: damaged (" in line
    known.ask(seat_of(scorer), [pack_pairs(PAIRS)])


def test_a_folder_that_cannot_be_written_ends_the_run(tmp_path, scorer):
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunFailure, match="cannot be written"):
        Known(tmp_path / "taken", {}).ask(seat_of(scorer), [pack_pairs(PAIRS)])


def run(*argv):
    from tandem.cli.main import main

    return main(list(map(str, argv)))


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_runs_that_share_a_cache_ask_once_and_end_the_same(tmp_path, model_folder, capsys, monkeypatch, method):
    """Also with a reference of its own, which is loaded only where something must be asked."""
    words = ["abc", "bcd", "cab", "dda", "bbd", "acd"]
    rows = [{"prompt": w, "chosen": w[::-1], "rejected": w[:2]} for w in words]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_module("llama", seed=5).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    argv = [method, "--model", model_folder, "--data", tmp_path / "d.jsonl", "--eval-data", tmp_path / "d.jsonl",
            "--steps", 3, "--batch-size", 4, "--learning-rate", 1e-3, "--save-every", 0]  # fmt: skip
    others = [*argv, "--reference", tmp_path / "other"]
    shared = ["--reference-cache", tmp_path / "cache"]

    def printed(name, *words):
        assert run(*words, "--out", tmp_path / name) == 0
        return capsys.readouterr().out

    def weights(name):
        return (tmp_path / name / "model" / "model.safetensors").read_bytes()

    said = printed("a", *argv)
    assert "loading the reference" not in said
    assert "reference: asked about" in said
    assert (tmp_path / "a" / "reference").is_dir()
    said = printed("b", *others, *shared)
    assert "loading the reference" in said
    said = printed("c", *others, *shared)
    assert "loading the reference" not in said
    assert "asked about" not in said
    assert weights("c") == weights("b") != weights("a")
    # A reference that has changed is another one.
    make_module("llama", seed=6).save_pretrained(tmp_path / "other")
    said = printed("d", *others, *shared)
    assert "loading the reference" in said
    assert weights("d") != weights("b")
    # One that follows the policy is asked in each step.
    said = printed("e", *argv, "--reference-every", 1)
    assert "loading the reference" in said
    assert "asked about" not in said
    assert weights("e") != weights("a")


def test_a_model_that_is_let_go_gives_its_memory_back(scorer):
    """Also where a run has put what is loaded out of the garbage collector's way."""
    module = weakref.ref(scorer.model.module)
    gc.freeze()
    try:
        scorer.forget()
        assert module() is None
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
