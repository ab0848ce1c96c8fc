"""Layers that are compiled before there is anything to learn from: nothing is learned, and nothing compiled again."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.models import VOCABULARY, make_module, make_tokenizer
from helpers.pushes import negative_logp
from torch._dynamo.utils import counters

from tandem.data.packing import pack, stamp_weights
from tandem.models.compiled import Blocks
from tandem.models.loading import prepare_module
from tandem.rollout.ahead import made_up
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.types import Sequence

BUDGET = 300


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr("tandem.models.forward.Blocks", partial(Blocks, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step_of(trainer):
    """Groups of other sizes than those that were made up, in several micro-batches."""
    generator = torch.Generator().manual_seed(1)
    ids = lambda count: torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()  # noqa: E731
    rows = []
    for number in range(7):
        prompt = ids(9 + number)
        for i in range(3 + number % 2):
            own = ids(4 + 3 * i)
            rows.append(Sequence(token_ids=prompt + own, trainable=[False] * len(prompt) + [True] * len(own)))
    trainer.forward_backward(stamp_weights(pack(rows), "token"))
    trainer.optim_step()
    return trainer.state_dict()["model"]


def test_nothing_is_learned_and_nothing_compiled_again():
    found = []
    for ahead in (True, False):
        model = prepare_module(make_module(), make_tokenizer(), dtype="bfloat16")
        optim = OptimParams(learning_rate=1e-2, total_steps=5)
        trainer = LocalTrainer(model, negative_logp, optim, token_budget=BUDGET, compile="on")
        before = torch.get_rng_state()
        if ahead:
            trainer.compile_ahead(
                made_up(prompts=9, samples=4, prompt=8, longest=24, vocabulary=VOCABULARY, tokens=BUDGET, ranks=1)
            )
            assert counters["stats"]["unique_graphs"] == 1
            assert trainer.version == 0
            assert all(p.grad is None for p in [*model.module.parameters(), *trainer.masters.named.values()])
        found.append(step_of(trainer))
        assert model.blocks.working
        assert counters["stats"]["unique_graphs"] == 1
        assert torch.equal(torch.get_rng_state(), before)
        # Nor for the check of weights that were pushed: no step goes that way.
        assert len(trainer.logprobs([[5, 6, 7], [8, 9]])[0]) == 2
        assert model.blocks.working
        assert counters["stats"]["unique_graphs"] == 1
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("prompts", "samples", "prompt", "longest", "ranks"),
    [(64, 8, 64, 1024, 2), (2, 2, 5, 4, 1), (1, 1, 30, 600, 4), (3, 16, 900, 64, 1), (9, 4, 1023, 1, 1)],
)
def test_made_up_samples_fill_a_micro_batch_and_no_two_numbers_are_equal_by_chance(
    prompts, samples, prompt, longest, ranks
):
    batch = made_up(
        prompts=prompts, samples=samples, prompt=prompt, longest=longest, vocabulary=99, tokens=16384, ranks=ranks
    )
    groups = batch.segments if batch.group_S is None else int(batch.group_S.max()) + 1
    assert groups <= max(1, prompts)
    assert samples == 1 or groups * (batch.segments // groups) == batch.segments
    assert samples == 1 or batch.segments // groups != groups / ranks
    # A model may take no more (GPT-2).
    assert max(batch.lengths) <= prompt + longest
    if prompts == 64:
        assert 0.8 * ranks * 16384 < batch.tokens - (samples - 1) * groups * prompt <= ranks * 16384
