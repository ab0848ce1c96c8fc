"""The trainer against torch's own AdamW, and its promises: exact accumulation, no step on a bad number, resume."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from helpers.batches import seen_batch
from helpers.models import VOCABULARY, make_module, make_tokenizer

from tandem.batch import Asks, TokenLoss
from tandem.data.packing import pack, pack_rollouts, stamp_weights
from tandem.errors import NonFiniteError
from tandem.methods.grpo import GRPO
from tandem.models.loading import prepare_module
from tandem.training.optim import OptimParams, learning_rate_at
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer
from tandem.types import Rollout, Sequence


def negative_logp(out, batch):
    return TokenLoss(loss_T=-out.logp_T, metrics_T={"nll": -out.logp_T})


def make_trainer(loss=negative_logp, token_budget=64, entropy=False, **optim):
    params = {"learning_rate": 1e-2, "total_steps": 20, "lr_schedule": "linear", "warmup_steps": 2} | optim
    model = prepare_module(make_module(), make_tokenizer())
    return LocalTrainer(model, loss, OptimParams(**params), token_budget=token_budget, asks=Asks(entropy=entropy))


def make_batch(step):
    generator = torch.Generator().manual_seed(step)
    sequences = []
    for n in (12, 30, 7, 25):
        ids = torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()
        sequences.append(Sequence(token_ids=ids, trainable=[False] * 3 + [True] * (n - 3)))
    return stamp_weights(pack(sequences), "token")


def parameters(trainer):
    return [p.detach().clone() for p in trainer.model.module.parameters()]


def test_steps_equal_a_plain_torch_loop():
    trainer = make_trainer(max_grad_norm=0.5, weight_decay=0.1)
    module = copy.deepcopy(trainer.model.module)
    module.set_attn_implementation("eager")
    decayed = [p for p in module.parameters() if p.ndim >= 2]
    rest = [p for p in module.parameters() if p.ndim < 2]
    plain = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1.0, betas=(0.9, 0.95)
    )
    for step in range(3):
        batch = make_batch(step)
        metrics = trainer.forward_backward(batch) | trainer.optim_step()
        losses = []
        for start, end in zip(batch.bounds[:-1].tolist(), batch.bounds[1:].tolist(), strict=True):
            ids = batch.token_ids_T[start:end]
            logits = module(input_ids=ids[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[2:])
        loss = torch.cat(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        for group in plain.param_groups:
            # Warmup over 2 steps to 1e-2, then down a line to 0 at step 20.
            group["lr"] = [1e-2 / 3, 2e-2 / 3, 1e-2][step]
        plain.step()
        plain.zero_grad()
        assert metrics["loss"] == pytest.approx(loss.item(), abs=2e-6)
        assert metrics["nll"] == pytest.approx(loss.item(), abs=2e-6)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for mine, theirs in zip(trainer.model.module.parameters(), module.parameters(), strict=True):
        # Adam divides by the gradient's size, so rounding in tiny gradients shows: a hundredth of one step's 1e-2.
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_same_seed_same_parameters_bit_for_bit():
    trainers = [make_trainer(), make_trainer()]
    for trainer in trainers:
        for step in range(3):
            trainer.forward_backward(make_batch(step))
            trainer.optim_step()
    assert all(torch.equal(a, b) for a, b in zip(*map(parameters, trainers), strict=True))


def test_resume_from_state_is_bit_exact():
    unbroken, first = make_trainer(), make_trainer()
    for step in range(6):
        unbroken.forward_backward(make_batch(step))
        unbroken.optim_step()
    for step in range(3):
        first.forward_backward(make_batch(step))
        first.optim_step()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    resumed = make_trainer()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.version == 3
    for step in range(3, 6):
        resumed.forward_backward(make_batch(step))
        resumed.optim_step()
    assert all(torch.equal(a, b) for a, b in zip(parameters(unbroken), parameters(resumed), strict=True))


def test_a_loss_that_is_not_finite_stops_before_anything_changes():
    def poisoned(out, batch):
        loss_T = -out.logp_T
        return TokenLoss(loss_T=torch.where(batch.segment_T == int(batch.index_S.eq(2).nonzero()), math.nan, loss_T))

    trainer = make_trainer(poisoned, token_budget=10_000)
    before = parameters(trainer)
    with pytest.raises(NonFiniteError, match=r"4 tokens; samples of this step: 2\)"):
        trainer.forward_backward(make_batch(0))
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))
    assert all(p.grad is None for p in trainer.model.module.parameters())


def test_a_gradient_that_is_not_finite_stops_before_anything_changes():
    def infinite_slope(out, batch):
        return TokenLoss(loss_T=torch.sqrt((out.logp_T - out.logp_T.detach()).clamp(min=0)))

    trainer = make_trainer(infinite_slope)
    before = parameters(trainer)
    trainer.forward_backward(make_batch(0))
    with pytest.raises(NonFiniteError, match="gradient is not finite"):
        trainer.optim_step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))
    assert all(p.grad is None for p in trainer.model.module.parameters())


def test_a_step_with_a_scale_is_one_with_that_learning_rate():
    """Bit for bit, and a scale of 1 changes nothing."""
    trainers = [make_trainer(), make_trainer(learning_rate=0.25e-2), make_trainer()]
    rates = []
    for trainer, arguments in zip(trainers, ((0, 0.25), (0,), (0, 1.0)), strict=True):
        trainer.forward_backward(make_batch(0))
        rates.append(trainer.optim_step(*arguments)["learning_rate"])
    assert rates[0] == rates[1] == rates[2] / 4
    assert all(torch.equal(a, b) for a, b in zip(*map(parameters, trainers[:2]), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(*map(parameters, trainers[1:]), strict=True))


def test_learning_rate_schedules():
    linear = OptimParams(learning_rate=1.0, total_steps=10, lr_schedule="linear", warmup_steps=4)
    rates = [learning_rate_at(s, linear) for s in range(11)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    cosine = OptimParams(learning_rate=2.0, total_steps=8, lr_schedule="cosine")
    assert [learning_rate_at(s, cosine) for s in (0, 2, 4, 8)] == pytest.approx([2, 1 + math.sqrt(0.5), 1, 0])


def test_score_is_the_forward_without_gradient_in_any_micro_batches():
    trainer = make_trainer()
    batch = make_batch(0)
    small = LocalScorer(trainer.model, token_budget=15).score(batch).logp_T
    large = LocalScorer(trainer.model, token_budget=1000).score(batch).logp_T
    assert not small.requires_grad
    torch.testing.assert_close(small, large, atol=1e-5, rtol=0)
    assert trainer.evaluate(batch)["loss"] == pytest.approx(-(large * batch.weight_T).sum().item(), abs=1e-5)


def test_metrics_are_means_and_maxima_over_tokens_with_weight_in_any_micro_batches():
    def measured(out, batch):
        value_T = batch.token_ids_T.float()
        return TokenLoss(loss_T=-out.logp_T, metrics_T={"id": value_T, "id_max": value_T})

    batch = make_batch(0)
    counted = batch.token_ids_T[batch.weight_T != 0].float()
    for budget in (20, 10_000):
        trainer = make_trainer(measured, token_budget=budget)
        metrics = trainer.forward_backward(batch)
        assert metrics["id"] == pytest.approx(counted.mean().item())
        assert metrics["id_max"] == counted.max().item()
        assert list(metrics) == ["loss", "id", "id_max"]


def test_the_first_bad_micro_batch_is_named_though_all_are_gone_through():
    def poisoned(out, batch):
        bad_S = torch.isin(batch.index_S, torch.tensor([1, 3]))
        return TokenLoss(loss_T=torch.where(bad_S[batch.segment_T], math.inf, -out.logp_T))

    trainer = make_trainer(poisoned, token_budget=1)
    with pytest.raises(NonFiniteError, match=r"27 tokens; samples of this step: 1\)"):
        trainer.forward_backward(make_batch(0))
    assert all(p.grad is None for p in trainer.model.module.parameters())


def test_an_on_policy_batch_equals_one_with_its_own_log_probs():
    def surrogate(out, batch):
        ratio_T = (out.logp_T - batch.proximal_logp_T).exp()
        return TokenLoss(loss_T=-ratio_T * batch.advantage_T, metrics_T={"ratio": ratio_T})

    batch = make_batch(0)
    generator = torch.Generator().manual_seed(1)
    batch = replace(batch, advantage_T=torch.randn(batch.tokens, generator=generator))
    two, one = make_trainer(surrogate, token_budget=30), make_trainer(surrogate, token_budget=30)
    own_logp_T = two.score(batch).logp_T
    two.forward_backward(seen_batch(batch, old_logp_T=own_logp_T))
    shifted_T = own_logp_T + 0.25 * batch.trainable_T
    metrics = one.forward_backward(replace(batch, on_policy=True, untruncated_logp_T=shifted_T))
    assert metrics["ratio"] == 1.0
    assert metrics["sampler_gap_mean"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["mismatch_ratio_q01"] == pytest.approx(math.exp(-0.25), abs=1e-5)
    assert metrics["sampler_gap_max"] == pytest.approx(0.25, abs=1e-5)
    for a, b in zip(one.model.module.parameters(), two.model.module.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=1e-6)


def test_old_log_probs_of_an_on_policy_batch_are_not_there_before_the_forward():
    batch = replace(make_batch(0), on_policy=True, untruncated_logp_T=torch.zeros(74))
    with pytest.raises(ValueError, match="on_policy"):
        _ = batch.proximal_logp_T


def test_grpo_trains_with_shared_prompts_as_without():
    def rollout(prompt, prompt_id, i, n):
        own = torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()
        zeros, logps = [0.0] * len(prompt), (-4.0 - torch.rand(n, generator=generator)).tolist()
        return Rollout(
            prompt_id=prompt_id, sample_index=i, token_ids=prompt + own, prompt_length=len(prompt),
            trainable=[False] * len(prompt) + [True] * n, behaviour_logp=zeros + logps,
            untruncated_logp=zeros + logps, stop="eos", reward=float(i),
        )  # fmt: skip

    generator = torch.Generator().manual_seed(0)
    prompts = {f"p{n}": torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in (4, 17, 30)}
    batch = pack_rollouts([rollout(ids, name, i, 3 + 4 * i) for name, ids in prompts.items() for i in range(4)])
    grpo = GRPO()
    batch = replace(
        seen_batch(stamp_weights(batch, "sequence"), reference_logp_T=batch.untruncated_logp_T),
        advantage_T=torch.randn(batch.tokens, generator=generator),
        state={"kl_coef": 0.1},
    )
    shared, unshared = (make_trainer(grpo.loss, token_budget=100, entropy=True) for _ in range(2))
    metrics = shared.forward_backward(batch), unshared.forward_backward(batch.unshared())
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6, rel=1e-5)
    for a, b in zip(shared.model.module.parameters(), unshared.model.module.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shared.score(batch).logp_T, unshared.score(batch.unshared()).logp_T, atol=1e-5, rtol=0)
