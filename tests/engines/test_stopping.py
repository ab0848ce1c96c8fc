"""When a completion ends, and what its text is."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers.engine_models import EOS, bytes_tokenizer, model, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tandem.engines.live.engine import LiveEngine
from tandem.engines.live.sample import Sample
from tandem.engines.requests import Asked, StopRule
from tandem.types import Request, SamplingParams


def run(rule: StopRule, tokens: list[int]) -> tuple[int, str | None]:
    """Feeds tokens one by one: how many were taken, and why it ended."""
    for n in range(1, len(tokens) + 1):
        if (reason := rule.check(tokens[:n])) is not None:
            return n, reason
    return len(tokens), None


@pytest.mark.parametrize(
    ("text", "stop", "taken", "kept"),
    [
        ("one\n\ntwo", ("\n\n",), "one\n\n", "one"),
        ("say STOP now", ("STOP", "say S"), "say S", ""),
        ("a\u00e9\u4e2d\U0001f600b", ("\U0001f600",), "a\u00e9\u4e2d\U0001f600", "a\u00e9\u4e2d"),
        ("a\u00e9\u4e2d\U0001f600b", ("\u00e9\u4e2d",), "a\u00e9\u4e2d", "a"),
        ("x end y", ("end ",), "x end ", "x "),
        ("aaab", ("aab",), "aaab", "a"),
        ("never", ("ver!",), "never", "never"),
    ],
)
def test_stop_strings_over_several_tokens(text: str, stop: tuple[str, ...], taken: str, kept: str) -> None:
    tok = bytes_tokenizer()
    tokens = tok(text, add_special_tokens=False).input_ids
    rule = StopRule(SamplingParams(stop=stop), [], tok)
    count, reason = run(rule, tokens)
    assert count == len(taken.encode())
    assert reason == (None if kept == text else "stop_string")
    assert rule.cut(tok.decode(tokens[:count])) == kept


def test_a_long_completion_is_searched_at_its_end_only() -> None:
    tok = bytes_tokenizer()
    tokens = tok("ab. " * 500 + "END", add_special_tokens=False).input_ids
    rule = StopRule(SamplingParams(stop=("END",), max_new_tokens=5000), [], tok)
    decoded: list[int] = []
    plain = rule.decode
    rule.decode = lambda ids: decoded.append(len(ids)) or plain(ids)  # type: ignore[method-assign,func-returns-value]
    assert run(rule, tokens) == (2003, "stop_string")
    assert sum(decoded) < 2 * len(tokens)


def test_a_special_token_as_stop_string_and_skipped_specials() -> None:
    tok = bytes_tokenizer()
    end, pad = tok.convert_tokens_to_ids(["<|im_end|>", "<|pad|>"])
    body = tok("hi", add_special_tokens=False).input_ids
    rule = StopRule(SamplingParams(stop=("<|im_end|>", "iX")), [], tok)
    assert run(rule, [*body, end, *body]) == (3, "eos")
    assert rule.decode([*body, pad, end]) == "hi"


def test_eos_stop_ids_and_length() -> None:
    rule = StopRule(SamplingParams(stop_token_ids=(9,), max_new_tokens=4), [1, 2], tokenizer())
    assert run(rule, [5, 6, 2, 7]) == (3, "eos")
    assert run(rule, [9]) == (1, "eos")
    assert run(rule, [5, 6, 7, 1]) == (4, "eos")
    assert run(rule, [5, 6, 7, 8, 9]) == (4, "length")


def sample_of(tok: Any, **sampling: Any) -> Sample:
    request = Request(prompt_ids=(1,), seeds=(0,), sampling=SamplingParams(**sampling))
    return Sample(Asked(0, request, StopRule(request.sampling, [], tok)), 0)


def test_what_is_decoded_ahead_is_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole characters of up to four tokens, halves of them, and special tokens, taken in runs of any length."""
    monkeypatch.setattr("tandem.engines.live.sample.AHEAD", 1)
    tok = bytes_tokenizer()
    rng = random.Random(0)
    letters = tok("a\u00e9\u4e2d\U0001f600 .", add_special_tokens=False).input_ids
    for _ in range(50):
        noise = [rng.randrange(len(tok)) for _ in range(8)]
        tokens = [token for _ in range(6) for token in (*letters, *rng.sample(noise, 3))]
        sample = sample_of(tok, max_new_tokens=len(tokens))
        ahead = 0
        while sample.stop is None:
            taken = tokens[len(sample.token_ids) :][: rng.randint(1, 5)]
            sample.extend(taken, [0.0] * len(taken), [], finite=True)
            sample.decode_ahead()
            ahead = max(ahead, sample.decoded)
        assert ahead > len(tokens) // 2
        assert sample.completion(0).text == tok.decode(tokens, skip_special_tokens=True)


def test_only_texts_that_can_be_joined_are_decoded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.engines.live.sample.AHEAD", 1)
    backend = Tokenizer(models.WordLevel({"\u2581a": 0, "\u2581.": 1}, unk_token="\u2581a"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend)
    tidy = bytes_tokenizer()
    # As if it were WordPiece, whose texts are tidied up.
    monkeypatch.setattr(tidy, "decode", lambda ids, **_: type(tidy).decode(tidy, ids).replace(" .", "."))
    for tok, tokens, text in ((spaced, [0, 0, 1], "a a ."), (tidy, tidy("a a .").input_ids, "a a.")):
        sample = sample_of(tok, max_new_tokens=len(tokens))
        for token in tokens:
            sample.add(token, 0.0, 0.0)
            sample.decode_ahead()
        assert sample.decoded == 0
        assert sample.completion(0).text == text


@pytest.mark.parametrize("architecture", ["qwen2", "bloom"])
def test_the_engine_stops_and_cuts(architecture: str) -> None:
    module = model(architecture)
    tok = tokenizer()
    prompt = (20, 30, 40)
    free = SamplingParams(max_new_tokens=40)
    live = LiveEngine(module, tok)
    (whole,) = live.generate([Request(prompt_ids=prompt, seeds=(4,), sampling=free)])[0]
    if EOS in whole.token_ids:
        pytest.fail("choose another seed: this completion is too short for the test")
    stop = whole.text[10:13]
    first = whole.text.find(stop)
    again = SamplingParams(max_new_tokens=40, stop=(stop,))
    (cut,) = live.generate([Request(prompt_ids=prompt, seeds=(4,), sampling=again)])[0]
    assert cut.stop == "stop_string"
    assert cut.text == whole.text[:first]
    assert cut.token_ids == whole.token_ids[: first + 3]
    # The same forwards, so only rounding in batches of one: equal to the promise.
    torch.testing.assert_close(cut.behaviour_logp, whole.behaviour_logp[: first + 3], atol=1e-5, rtol=0)


def test_several_eos_ids_from_the_generation_config_and_the_tokenizer() -> None:
    module = model("llama")
    module.generation_config.eos_token_id = [50, 51]
    asked = [Request(prompt_ids=(9,), seeds=tuple(range(40)), sampling=SamplingParams(max_new_tokens=60))]
    ends = {c.token_ids[-1] for c in LiveEngine(module, tokenizer()).generate(asked)[0] if c.stop == "eos"}
    assert ends == {50, 51, EOS}
