"""What a person calls from Python says which of its arguments is of the wrong type, before it does anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.engine_models import model, tokenizer

import tandem
from tandem.arguments import checked
from tandem.engines.vllm.setup import VLLMParams
from tandem.errors import UserError


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tandem.LiveEngine(None, None, max_slots="4"), "max_slots is '4'; it must be a whole number"),
        (lambda: tandem.LiveEngine(None, None, max_length=1.5), "max_length is 1.5; it must be a whole number or None"),
        (
            lambda: tandem.LiveEngine(None, None, way="fast"),
            "way is 'fast'; it must be 'auto' or 'captured' or 'slo",
        ),
        (lambda: tandem.Sampler("m", deadline_s="9"), "deadline_s is '9'; it must be a number"),
        (lambda: tandem.Sampler("m", engine=3), "engine is 3; it must be 'live' or 'vllm'"),
        (lambda: tandem.OptimParams(learning_rate="1e-5", total_steps=3), "learning_rate is '1e-5'; it must be a numb"),
        (lambda: tandem.LocalScorer(None, token_budget=None), "token_budget is None; it must be a whole number"),
        (
            lambda: tandem.LocalTrainer(None, None, None, token_budget="many"),
            "token_budget is 'many'; it must be a w",
        ),
        (lambda: tandem.load_causal("m", dtype="float8"), "dtype is 'float8'; it must be 'float32' or 'bfloat16'"),
        (lambda: tandem.load_scalar("m", new_head=None), "new_head is None; it must be 'refuse' or 'zero' or 'random'"),
        (lambda: VLLMParams(model="m", dtype="float32", max_slots="4"), "max_slots is '4'; it must be a whole number"),
    ],
)
def test_a_wrong_type_is_said(call, words):
    with pytest.raises(UserError, match=f"^{words}"):
        call()


def test_what_counts_as_a_number_is_taken():
    @checked
    def taken(whole: int, share: float, maybe: int | None = None, folder: str | Path = "") -> tuple:
        return whole, share, maybe, folder

    for numbers in ((2, 0.5), (np.int64(2), np.float32(0.5)), (torch.tensor(2), torch.tensor(0.5)), (2, 1)):
        assert taken(*numbers) == (*numbers, None, "")
    assert taken(2, share=0.5, maybe=3, folder=Path("x")) == (2, 0.5, 3, Path("x"))
    with pytest.raises(TypeError, match="missing a required argument: 'share'"):
        taken(2)
    live = tandem.LiveEngine(model("qwen2"), tokenizer(), max_slots=np.int64(2))
    assert live.generate([]) == []
