"""A critic on the policy's base: one copy in memory; values, gradients and checkpoints as of a critic of its own."""

from __future__ import annotations

import pytest
import torch
from helpers.targets import batch_of_rows, make_bases, negative_logp, train, trainer_of

from tandem.assembly.configs.methods import config_class
from tandem.assembly.models import adapter_params, beside_actor, trained
from tandem.batch import TokenLoss
from tandem.config import load_config
from tandem.errors import UserError
from tandem.models.forward import hidden_states
from tandem.models.loading import load_scalar
from tandem.models.lora.adapters import AdapterParams
from tandem.parallel.world import World
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.workers.process import Site

pytest.importorskip("peft")
KINDS = {
    "llama": ("all-linear", "embed_tokens", "lm_head"),
    "qwen3_moe": ("all-linear", "experts"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


def loss(out, batch):
    return TokenLoss(loss_T=(out.scalar_T - 1) ** 2 * batch.trainable_T, metrics_T={})


def critic_of(model):
    return LocalTrainer(model, loss, OptimParams(learning_rate=3e-2, total_steps=9), token_budget=40)


def shared(base, actor, **params):
    site = Site(World())
    site.roles["actor"] = actor
    return critic_of(beside_actor(site, str(base), AdapterParams(rank=4, beside=True, **params)))


def bytes_of(*trainers):
    """Of all that lies in memory, each storage once: what is frozen, and what is trained."""
    found = {True: {}, False: {}}
    for trainer in trainers:
        for parameter in trainer.model.module.parameters():
            storage = parameter.untyped_storage()
            found[parameter.requires_grad][storage.data_ptr()] = storage.nbytes()
    return {trained: sum(sizes.values()) for trained, sizes in found.items()}


@pytest.mark.parametrize(
    ("kind", "dtype", "quantize"),
    [("llama", "float32", "fp8"), ("llama", "float32", "none"), ("qwen3_moe", "bfloat16", "none")],
)
def test_it_is_a_critic_of_its_own_but_for_the_memory(bases, kind, dtype, quantize):
    base, targets = bases[kind], KINDS[kind]
    actor = trainer_of(base, AdapterParams(rank=4, targets=targets, quantize=quantize), dtype=dtype)
    alone = bytes_of(actor)
    critic = shared(base, actor, targets=targets)
    own = critic_of(
        load_scalar(base, new_head="zero", device="cpu", dtype=dtype,
                    adapters=AdapterParams(rank=4, targets=targets, beside=True, quantize=quantize))
    )  # fmt: skip
    assert bytes_of(actor, critic)[False] == alone[False] < bytes_of(actor, own)[False]
    assert bytes_of(actor, critic)[True] == alone[True] + bytes_of(own)[True]
    assert critic.weights.keys() == own.weights.keys()
    assert "score.weight" in own.weights
    assert critic.model.adapters.saved == own.model.adapters.saved
    assert "of the policy's own" in critic.describe()
    # Whatever becomes of the policy meanwhile.
    for _ in range(3):
        train(actor, 1)
        found, wanted = critic.score(batch_of_rows()).scalar_T, own.score(batch_of_rows()).scalar_T
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        for one in (critic, own):
            one.forward_backward(batch_of_rows())
        for name, weight in own.masters.named.items():
            if weight.requires_grad:
                torch.testing.assert_close(critic.masters.named[name].grad, weight.grad, rtol=0, atol=1e-6)
        assert all(p.grad is None for n, p in actor.masters.named.items())
        before = actor.score(batch_of_rows()).logp_T
        for one in (critic, own):
            one.optim_step()
        assert torch.equal(actor.score(batch_of_rows()).logp_T, before)
    assert (found - found[0]).abs().max() > 0.01


def test_a_checkpoint_goes_on_bit_for_bit_shared_or_not(bases):
    base = bases["llama"]
    whole, first, again = (shared(base, trainer_of(base, AdapterParams(rank=4)), seed=s) for s in (0, 0, 5))
    train(whole, 4)
    train(first, 2)
    again.load_state_dict(first.state_dict())
    train(again, 2)
    own = critic_of(load_scalar(base, new_head="zero", device="cpu", adapters=AdapterParams(rank=4, seed=9)))
    own.load_state_dict(first.state_dict())
    train(own, 2)
    for name, weight in whole.weights.items():
        assert torch.equal(again.weights[name], weight)
        assert torch.equal(own.weights[name], weight)


def test_it_begins_with_adapters_of_the_same_base(bases, tmp_path):
    base = bases["llama"]
    options = {"loss": loss, "load": load_scalar, "new_head": "random"}
    judge = trainer_of(base, AdapterParams(rank=2), **options)
    train(judge)
    judge.export(tmp_path / "judge")
    site = Site(World())
    actor = site.roles["actor"] = trainer_of(base, AdapterParams(rank=4, targets=KINDS["llama"]))
    train(actor)
    words = ["--model", str(base), "--data", "d", "--out", "o", "--steps", "9",
             "--reward", "r.py:f", "--lora.rank", "4",
             "--lora.share-critic", "--critic", str(tmp_path / "judge")]  # fmt: skip
    config = load_config(config_class("ppo"), words)
    assert config.is_shared("critic")
    params = adapter_params(config, "critic")
    assert params.folder == str(tmp_path / "judge")
    actor.export(tmp_path / "policy")
    folder = str(tmp_path / "policy")
    again = beside_actor(site, folder, AdapterParams(folder=folder, beside=True))
    torch.testing.assert_close(hidden_states(again, batch_of_rows()), hidden_states(actor.model, batch_of_rows()))
    critic = trained(
        site, lambda s: beside_actor(s, config.sources["critic"], params), config.model, negative_logp,
        OptimParams(learning_rate=1e-2, total_steps=9),
    )  # fmt: skip
    assert torch.equal(critic.score(batch_of_rows()).scalar_T, judge.score(batch_of_rows()).scalar_T)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--critic", "other"], "begins with other, which is not on the policy's base, base; give --critic base"),
        (["--reward-model", "judge"], "begins with judge, which is not on the policy's base"),
        (["--placement.critic", "1"], "the critic lives with the critic, and what it shares is memory"),
        (["--placement.actor", "2"], "split over 2 workers"),
        (["--placement.actor", "1", "--offload", "parameters"], "layers come and go by themselves"),
    ],
)
def test_where_it_cannot_be_shared_is_refused(flags, message):
    words = ["--model", "base", "--data", "d", "--out", "o", "--steps", "9", "--reward", "r.py:f", "--lora.rank", "4"]
    if "--reward-model" in flags:
        words = [word for word in words if word not in ("--reward", "r.py:f")]
    load_config(config_class("ppo"), [*words, *flags])
    with pytest.raises(UserError, match=f"lora.share-critic: .*{message}"):
        load_config(config_class("ppo"), [*words, *flags, "--lora.share-critic"])
