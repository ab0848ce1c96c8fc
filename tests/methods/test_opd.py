"""Distillation against loops in float64, the gradient of KL(student || teacher), and optima in closed form."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from helpers.models import make_module, make_tokenizer
from helpers.sampled_step import make_step
from test_kl_forms import REFERENCE, REWARD, one_group

from tandem.batch import Asks, Outputs
from tandem.config import settings, with_keys
from tandem.data.packing import pack_rollouts, stamp_weights
from tandem.engines.live.engine import LiveEngine
from tandem.errors import UserError
from tandem.methods.opd import OPD
from tandem.models.loading import prepare_module
from tandem.rollout.judging import Judge
from tandem.rollout.prepare import Preparation
from tandem.rollout.sampling import sample_groups
from tandem.training.optim import OptimParams
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer
from tandem.types import Prompt, SamplingParams
from tandem.workers.homes import seat_of

TEACHER = torch.cos(3 * torch.arange(13, dtype=torch.float64)).log_softmax(0)
STUDENT = torch.linspace(1, -1, 13, dtype=torch.float64).log_softmax(0)


def taught(batch, teacher_logp_T, old_logp_T=None):
    """The batch, which the teacher has seen, and the student where its old log-probs are given."""
    seen = {"teacher": Outputs(logp_T=teacher_logp_T)}
    return replace(
        batch, seen=batch.seen | seen | ({} if old_logp_T is None else {"actor": Outputs(logp_T=old_logp_T)})
    )


@pytest.mark.parametrize(
    "knobs",
    [{}, {"teacher_coef": 0.5, "reward_coef": 2.0}, {"clip_high": 0.05, "dual_clip": None}, {"teacher_discount": 0.9}],
)
@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_advantage_loss_and_metrics_are_those_of_loops(knobs, mean):
    step, opd = make_step(0), with_keys(OPD(), aggregation=mean, **knobs)
    batch = step.batch()
    batch = taught(batch, step.reference_logp[batch.token_ids_T] * batch.trainable_T)
    estimate = opd.estimate(step.groups, batch, opd.initial_state())
    ready = stamp_weights(estimate.batch, mean)
    loss = (opd.loss(step.outputs(ready), ready).loss_T * ready.weight_T).sum().item()

    sequences, gaps = [], []
    for group in step.groups:
        baseline = statistics.fmean(group.rewards)
        for rollout in group.rollouts:
            trained = [x for x, trainable in zip(rollout.token_ids, rollout.trainable, strict=True) if trainable]
            tokens, sums = [], []
            for place, token in enumerate(trained):
                old, teacher = step.old_logp[token].item(), step.reference_logp[token].item()
                credit = sum(
                    opd.teacher_discount**ahead * (step.reference_logp[later] - step.old_logp[later]).item()
                    for ahead, later in enumerate(trained[place:])
                )
                advantage = opd.teacher_coef * credit + opd.reward_coef * (rollout.reward - baseline)
                ratio = math.exp(step.theta[token].item() - old)
                value = min(ratio * advantage, min(max(ratio, 0.8), 1 + settings(opd)["clip_high"]) * advantage)
                if advantage < 0 and settings(opd)["dual_clip"]:
                    value = max(value, settings(opd)["dual_clip"] * advantage)
                tokens.append(-value)
                sums.append(old - teacher)
            sequences.append(tokens)
            gaps.append(sums)
    every = [x for tokens in sequences for x in tokens]
    expected = statistics.fmean(every) if mean == "token" else statistics.fmean(map(statistics.fmean, sequences))
    # Rewards and weights are float32.
    assert loss == pytest.approx(expected, abs=1e-6)
    # What is compared is compared in groups of different rewards.
    compared = {"equal_reward_groups": 0.0} if opd.reward_coef else {}
    compared |= {"masked_positive": 0.0, "masked_negative": 0.0}
    assert estimate.metrics == pytest.approx(
        compared
        | {
            "teacher_kl": statistics.fmean(x for sums in gaps for x in sums),
            "teacher_kl_per_sequence": statistics.fmean(map(sum, gaps)),
        },
        abs=1e-12,
    )


def expected_loss(method, groups, logp_SL, teacher_SL, **seen):
    """Over every completion, weighted by its probability: the expectation over samples of the student."""

    def packed(x_SL):
        return torch.cat([torch.zeros_like(x_SL[:, :1]), x_SL], 1).flatten()

    batch = taught(pack_rollouts(groups[0].rollouts), packed(teacher_SL), packed(logp_SL.detach()))
    batch = replace(batch, seen=batch.seen | seen)
    loss_T = method.loss(
        Outputs(logp_T=packed(logp_SL)), method.estimate(groups, batch, method.initial_state()).batch
    ).loss_T
    probability_S1 = logp_SL.detach().sum(1, keepdim=True).exp()
    return (loss_T * packed(probability_S1.expand_as(logp_SL))).sum()


def test_gradient_is_that_of_the_kl_in_each_state():
    """Two tokens of three: KL(student || teacher) over the whole vocabulary, in states drawn from the student.

    With a discount of 0 that is not the KL of whole sequences, whose first token answers for the second, too.
    """
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((3,), (3, 3)) * 2]
    student, teacher = [x.requires_grad_() for x in tables[:2]], tables[2:]
    completions = [[a, b] for a in range(3) for b in range(3)]
    first, second = torch.tensor(completions).T

    def at(first_V, second_VV):
        return torch.stack([first_V.log_softmax(0)[first], second_VV.log_softmax(1)[first, second]], 1)

    def kl(logits, other):
        logp = logits.log_softmax(-1)
        return (logp.exp() * (logp - other.log_softmax(-1))).sum(-1)

    groups = one_group(completions, torch.zeros(9))
    found = torch.autograd.grad(expected_loss(OPD(), groups, at(*student), at(*teacher)), student)
    visits_V = student[0].softmax(0)
    each_state = kl(student[0], teacher[0]) + visits_V.detach() @ kl(student[1], teacher[1])
    torch.testing.assert_close(found, torch.autograd.grad(each_state, student), rtol=0, atol=1e-12)
    sequence = kl(student[0], teacher[0]) + visits_V @ kl(student[1], teacher[1])
    whole = torch.autograd.grad(sequence, student)
    assert (found[0] - whole[0]).abs().max() > 0.01
    # With a discount of 1 it is.
    summed = expected_loss(OPD(teacher_discount=1.0), groups, at(*student), at(*teacher))
    torch.testing.assert_close(torch.autograd.grad(summed, student), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "end"),
    [
        (OPD(), TEACHER.softmax(0)),
        (OPD(teacher_coef=0.5), TEACHER.softmax(0)),
        (OPD(reward_coef=1.0, teacher_coef=0.3), (TEACHER + REWARD / 0.3).softmax(0)),
    ],
    ids=["teacher", "half", "mixed"],
)
def test_a_student_ends_at_the_teacher_or_where_reward_and_kl_balance(method, end):
    """The best of ``reward_coef E[r] - teacher_coef KL(student || teacher)``: the softmax of a sum of log-probs."""
    groups, theta = one_group([[v] for v in range(13)], REWARD), STUDENT.clone().requires_grad_()
    for _ in range(150):
        logp_V = theta.log_softmax(0)
        (gradient,) = torch.autograd.grad(expected_loss(method, groups, logp_V[:, None], TEACHER[:, None]), theta)
        with torch.no_grad():
            theta -= 0.5 * gradient / logp_V.exp()  # the natural gradient: rare tokens take no longer
    logp_V = theta.detach().log_softmax(0)
    kl = (logp_V.exp() * (logp_V - end.log())).sum().item()
    # Rewards are float32.
    assert 0 <= kl + 1e-15 < 1e-12
    torch.testing.assert_close(logp_V.exp(), end, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.6}])
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(dtype, truncation):
    """Not a bit: where the old log-probs are the trainer's, however samples were drawn, one of a prompt."""
    model = prepare_module(make_module("llama").to(getattr(torch, dtype)), make_tokenizer())
    sampling = SamplingParams(max_new_tokens=6, temperature=0.8, **truncation)
    prompts = [
        Prompt(prompt_id=text, prompt=text, token_ids=tuple(model.tokenizer(text)["input_ids"])) for text in ("ab", "c")
    ]
    engine = LiveEngine(model.module, model.tokenizer)
    groups = sample_groups(engine, prompts, sampling, samples_per_prompt=1, seed=0, step=1)
    Judge(rewards=(), weights=())(groups)
    opd, asks = OPD(), Asks(temperature=0.8)
    scorer = seat_of(LocalScorer(model, token_budget=40, asks=asks))
    prepare = Preparation(method=opd, models={"teacher": scorer, "actor": scorer}, old_logp="trainer")
    prepared = prepare(groups, {}, 1)
    assert prepared.metrics["teacher_kl"] == 0
    trainer = LocalTrainer(model, opd.loss, OptimParams(learning_rate=1e-3, total_steps=1), token_budget=40, asks=asks)
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    for minibatch in prepared:
        trainer.forward_backward(minibatch)
        assert trainer.optim_step()["grad_norm"] == 0
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())


def test_a_reference_and_a_teacher_share_the_student():
    """The best of -KL(student || teacher) / 2 - KL(student || reference): a geometric mean with weights 1/3 and 2/3."""
    method = with_keys(OPD(), teacher_coef=0.5, kl="reward", kl_coef=1.0)
    groups, theta = one_group([[v] for v in range(13)], REWARD), STUDENT.clone().requires_grad_()
    reference_T = torch.stack([torch.zeros(13, dtype=torch.float64), REFERENCE], 1).flatten()
    for _ in range(100):
        logp_V = theta.log_softmax(0)
        loss = expected_loss(method, groups, logp_V[:, None], TEACHER[:, None], reference=Outputs(logp_T=reference_T))
        with torch.no_grad():
            theta -= 0.5 * torch.autograd.grad(loss, theta)[0] / logp_V.exp()
    torch.testing.assert_close(theta.softmax(0), ((TEACHER + 2 * REFERENCE) / 3).softmax(0), rtol=0, atol=1e-6)
    assert [need.role for need in method.needs()] == ["teacher", "reference"]
    assert [need.role for need in OPD().needs()] == ["teacher"]


def test_the_reward_asks_for_groups_and_for_somebody_who_judges():
    assert (OPD().samples.at_least, OPD().samples.rewards) == (1, "optional")
    assert (OPD(reward_coef=0.1).samples.at_least, OPD(reward_coef=0.1).samples.rewards) == (2, "required")
    with pytest.raises(UserError, match="teacher_coef: expected more than 0, got 0"):
        OPD(teacher_coef=0.0)
    with pytest.raises(UserError, match="clip_low: expected from 0 to 1, got 2"):
        with_keys(OPD(), clip_low=2.0)
