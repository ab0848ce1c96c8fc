"""A reference that follows the policy: taken over or mixed, in few bits and in slices, and never twice after a step."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from helpers.models import make_module, make_tokenizer
from helpers.ranks import run_ranks
from test_trainer import make_batch, make_trainer

import tandem
from tandem.assembly.refresh import Renewal, every, refresh_of
from tandem.errors import UserError
from tandem.models.loading import prepare_module
from tandem.parallel.world import World
from tandem.training.optim import OptimParams
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer
from tandem.workers.homes import Here
from tandem.workers.process import Site


def scorer(dtype: Any = "float32", world: World | None = None) -> LocalScorer:
    return LocalScorer(prepare_module(make_module(), make_tokenizer(), dtype=dtype), token_budget=64, world=world)


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in make_module(seed=seed).named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_taken_over_it_says_what_the_policy_says(dtype):
    reference, policy = scorer(dtype), make_trainer()
    for step in range(2):
        policy.forward_backward(make_batch(step))
        policy.optim_step()
    batch = make_batch(5)
    before = reference.score(batch).logp_T
    reference.follow(policy.weights, 1.0, 3)
    same = LocalScorer(prepare_module(policy.model.module, make_tokenizer(), dtype=dtype), token_budget=64)
    assert torch.equal(reference.score(batch).logp_T, same.score(batch).logp_T)
    assert not torch.equal(reference.score(batch).logp_T, before)


@pytest.mark.parametrize(("dtype", "mix"), [("float32", 0.6), ("bfloat16", 0.6), ("bfloat16", 0.002)])
def test_a_mixture_is_the_formulas(dtype, mix):
    """TRL's ref_model_mixup_alpha: mix policy + (1 - mix) reference, in float64; small shares add up in few bits."""
    reference = scorer(dtype)
    expected = {name: p.detach().double() for name, p in reference.parameters.items()}
    for step in range(1, 13):
        weights = weights_of(seed=step % 3 + 1)
        reference.follow(weights, mix, step)
        expected = {name: mix * weights[name].double() + (1 - mix) * x for name, x in expected.items()}
    for name, parameter in reference.parameters.items():
        wanted = expected[name].to(parameter.dtype)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=2**-7 if dtype == "bfloat16" else 1e-5, atol=1e-6)
        exact = reference.exact.get(name, parameter.detach())
        assert (exact.double() - expected[name]).abs().max() < 1e-6


def test_once_after_a_step_and_resumed_bit_for_bit():
    unbroken, first, resumed = (scorer("bfloat16") for _ in range(3))
    for reference in (unbroken, first):
        reference.follow(weights_of(1), 0.3, 2)
    first.follow(weights_of(1), 0.3, 2)  # What ended the run came between this and the step's training.
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    resumed.follow(weights_of(1), 0.3, 2)
    for reference in (unbroken, resumed):
        reference.follow(weights_of(2), 0.3, 4)
    for name, parameter in unbroken.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name])


def test_it_is_due_after_every_so_many_steps():
    renewed: list[int] = []
    refresh = every(3, renewed.append)
    for step in range(8):
        refresh(step)
    assert renewed == [3, 6]


def _follow(world: World) -> list[torch.Tensor]:
    """What a reference says that follows a policy in the same processes, and then weights from elsewhere."""
    policy = LocalTrainer(
        prepare_module(make_module(seed=1), make_tokenizer()), lambda out, batch: None,  # type: ignore[arg-type,return-value]
        OptimParams(learning_rate=1.0, total_steps=1), token_budget=64, world=world,
    )  # fmt: skip
    reference, batch, said = scorer(world=world), make_batch(0), []
    reference.score(batch)
    Renewal(Site(world, {"actor": policy, "reference": reference})).follow(0.5, 1)
    said.append(reference.score(batch).logp_T)
    reference.follow(weights_of(2), 1.0, 2)
    said.append(reference.score(batch).logp_T)
    return [logp_T.detach() for logp_T in said]


def test_slices_follow_slices_and_whole_weights():
    one = _follow(World())
    for found in run_ranks(_follow, 2):
        for logp_T, wanted_T in zip(found, one, strict=True):
            assert (logp_T - wanted_T).abs().max() < 1e-5


def test_another_kind_of_model_cannot_become_the_policy():
    config = tandem.read_config("dpo", model="m", reference="r", data="d.jsonl", out="o", steps=9, reference_every=2)
    home = Here(Site(World()))
    other = LocalScorer(prepare_module(make_module("llama"), make_tokenizer()), token_budget=64)
    models = {
        "actor": home.place("actor", lambda site: make_trainer()),
        "reference": home.place("r", lambda site: other),
    }
    with pytest.raises(UserError, match="reference_every: the model in r has other parameters than that in m"):
        refresh_of(config, models)
    for key, value in {"reference_every": -1, "reference_mix": 0}.items():
        with pytest.raises(UserError, match=key.replace("_", "-")):
            tandem.read_config(
                "dpo", model="m", data="d.jsonl", out="o", steps=9, **{"reference_every": 2} | {key: value}
            )
    with pytest.raises(UserError, match="unknown flag --reference-every"):
        tandem.read_config("sft", model="m", data="d.jsonl", out="o", steps=9, reference_every=2)
