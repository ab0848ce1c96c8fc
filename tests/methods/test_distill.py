"""Distillation: what the student's forward makes of a teacher's word, and that it nears its teacher."""

import copy

import pytest
import torch
from helpers.models import make_module, make_tokenizer
from helpers.ranks import run_ranks
from torch import nn

from tandem.assembly.feeds import require_words
from tandem.batch import Asks
from tandem.data.packing import pack, stamp
from tandem.errors import UserError
from tandem.functional.divergence import Divergence, divergence, with_tail
from tandem.methods.distill import Distill
from tandem.models.loading import prepare_module
from tandem.parallel.world import World
from tandem.rollout import evaluate
from tandem.rollout.evaluate import HeldOutRows
from tandem.rollout.prepare import Preparation
from tandem.training.optim import OptimParams
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer
from tandem.types import Limits, Sequence
from tandem.workers.homes import seat_of

WORDS = len(make_tokenizer())


def rows(count, seed, longest=12):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest, (count,), generator=g).tolist()
    return [
        Sequence(token_ids=torch.randint(2, WORDS, (n,), generator=g).tolist(), trainable=[False] + [True] * (n - 1))
        for n in lengths
    ]


def of(method, student, teacher, *, budget=10_000, learning_rate=3e-3, world=None):
    """The two of a run, made as a run makes them."""
    its = method.asks_of("teacher")
    scorer = LocalScorer(teacher, token_budget=budget, asks=its, world=world)
    trainer = LocalTrainer(
        student,
        method.loss,
        OptimParams(learning_rate=learning_rate, total_steps=100, warmup_steps=0),
        token_budget=budget,
        asks=method.asks,
        world=world,
    )
    if its.states:
        head = scorer.head()  # rank 0 has it, and a run gives it to all
        trainer.learn_from(head if world is None else world.gather(head)[0])
    return trainer, scorer


def seen(batch, scorer, method):
    batch = stamp(batch, method.aggregation)
    batch.seen["teacher"] = scorer.score(batch)
    return batch


def by_hand(method, student, teacher, sequences):
    """The mean over tokens, from the modules' own logits of one sequence at a time."""
    found = []
    for s in sequences:
        logits = [m(input_ids=torch.tensor([s.token_ids])).logits[0, :-1, :WORDS].double() for m in (student, teacher)]
        a, b = (x / method.kd_temperature for x in logits)
        if k := method.teacher_top_k:
            ids = b.topk(k).indices
            a, b = with_tail(a, ids), with_tail(b, ids)
        kd = divergence(a.log_softmax(-1), b.log_softmax(-1), method.divergence, method.beta)
        whole = student(input_ids=torch.tensor([s.token_ids])).logits[0, :-1].double().log_softmax(-1)
        sft = -whole.gather(1, torch.tensor(s.token_ids[1:])[:, None])[:, 0]
        found.append(method.kd_coef * kd + (1 - method.kd_coef) * sft)
    return torch.cat(found).mean()


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (("qwen2", "llama"), Distill()),
        (("qwen2", "llama"), Distill(divergence="jsd", beta=0.2, kd_coef=0.4, kd_temperature=2.0)),
        (("llama", "granite_scaled_logits"), Distill(divergence="reverse", teacher_top_k=5, kd_coef=0.7)),
        (("granite_scaled_logits", "granite_scaled_logits"), Distill(kd_temperature=1.5)),
        (("bloom", "gemma2_softcap"), Distill(teacher_top_k=5, kd_temperature=2.0)),
    ],
)
@pytest.mark.parametrize("budget", [15, 10_000])
def test_loss_and_gradient_are_those_of_the_modules_own_logits(names, method, budget):
    """Packed or padded, with a head that can be split or not; the loss's gradient by each parameter."""
    student, teacher = make_module(names[0]), make_module(names[1], seed=1)
    truth, other = copy.deepcopy(student), copy.deepcopy(teacher)
    other.set_attn_implementation("eager")  # transformers' SDPA leaves out Gemma 2's cap
    trainer, scorer = of(method, *(prepare_module(m, make_tokenizer()) for m in (student, teacher)), budget=budget)
    sequences = rows(6, 0)
    metrics = trainer.forward_backward(seen(pack(sequences), scorer, method))
    expected = by_hand(method, truth, other, sequences)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=2e-5)
    combined = method.kd_coef * metrics["kd_loss"] + (1 - method.kd_coef) * metrics["sft_loss"]
    assert metrics["loss"] == pytest.approx(combined, abs=1e-6)
    expected.backward()
    gradients = dict(truth.named_parameters())
    for name, parameter in student.named_parameters():
        wanted = gradients[name].grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-6)


def two_kinds(world):
    """A step of each on a world, and the parameters after it."""
    found = []
    for method in (Distill(kd_coef=0.5), Distill(divergence="jsd", teacher_top_k=5)):
        models = (prepare_module(make_module("llama", seed=i), make_tokenizer()) for i in (0, 1))
        trainer, scorer = of(method, *models, budget=30, learning_rate=1e-4, world=world)
        metrics = trainer.forward_backward(seen(pack(rows(7, 0)), scorer, method)) | trainer.optim_step()
        found.append((metrics, trainer.state_dict()["model"]))
    return found


def test_law_2_student_and_teacher_split_over_two_ranks():
    one, (two, _) = two_kinds(World()), run_ranks(two_kinds, 2)
    for (metrics, model), (others, split) in zip(one, two, strict=True):
        assert others == pytest.approx(metrics, abs=1e-6, rel=1e-5)
        assert max(float((split[name] - x).abs().max()) for name, x in model.items()) < 1e-6


@pytest.mark.parametrize("k", [0, 5])
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(k):
    model = prepare_module(make_module(), make_tokenizer())
    for kind in ("forward", "reverse", "jsd"):
        method = Distill(divergence=kind, teacher_top_k=k)
        trainer, scorer = of(method, model, model)
        metrics = trainer.forward_backward(seen(pack(rows(4, 0)), scorer, method))
        assert abs(metrics["kd_loss"]) < 1e-6
        assert max(float(p.grad.abs().max()) for p in model.module.parameters()) < 1e-5
        trainer.optimizer.zero_grad()


def test_what_a_teacher_says_goes_with_its_segments():
    batch = pack(rows(5, 0))
    for k in (0, 4):
        method = Distill(teacher_top_k=k)
        _, scorer = of(method, *(prepare_module(make_module(seed=i), make_tokenizer()) for i in (0, 1)))
        whole = seen(batch, scorer, method)
        picked = whole.select([3, 1])
        again = scorer.score(picked)
        for name, x in vars(picked.seen["teacher"]).items():
            assert (x is None) == (getattr(again, name) is None), name
            if x is not None:
                torch.testing.assert_close(x, getattr(again, name), rtol=0, atol=2e-5)
        assert (whole.seen["teacher"].top_id_TK is None) == (k == 0)
        if k:
            assert whole.seen["teacher"].top_logp_TK[whole.trainable_T].exp().sum(-1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_held_out_rows_are_measured_some_at_a_time_as_together(aggregation, monkeypatch):
    method = Distill(kd_coef=0.5, teacher_top_k=4, aggregation=aggregation)
    trainer, scorer = of(method, *(prepare_module(make_module(seed=i), make_tokenizer()) for i in (0, 1)))
    seats = {"actor": seat_of(trainer), "teacher": seat_of(scorer)}
    held_out = HeldOutRows(
        sets={"": rows(11, 0)}, actor=seats["actor"], prepare=Preparation(method=method, models=seats)
    )
    together = held_out._found(rows(11, 0), 0)
    monkeypatch.setattr(evaluate, "ROWS_AT_A_TIME", 4)
    assert held_out._found(rows(11, 0), 0) == pytest.approx(together, rel=1e-5)


def test_a_teacher_whose_logits_are_more_than_its_head_is_refused_for_the_whole_vocabulary():
    module = make_module()
    module.register_forward_hook(lambda _, __, out: type(out)(logits=out.logits + torch.arange(out.logits.shape[-1])))
    scorer = LocalScorer(prepare_module(module, make_tokenizer()), token_budget=99)
    with pytest.raises(UserError, match=r"Qwen2ForCausalLM: its logits are not .* give --teacher-top-k"):
        scorer.head()


def test_a_vocabulary_without_a_row_for_each_token_is_refused():
    require_words([Limits(vocabulary=64), Limits(vocabulary=None)], 64)
    with pytest.raises(UserError, match="small: its embedding has 60 rows, and the tokenizer 64 tokens"):
        require_words([Limits(vocabulary=64), Limits(vocabulary=60, whose="small")], 64)


def test_a_teacher_that_has_not_said_anything_is_named():
    model = prepare_module(make_module(), make_tokenizer())
    trainer = LocalTrainer(
        model,
        Distill().loss,
        OptimParams(learning_rate=1e-3, total_steps=1),
        token_budget=99,
        asks=Asks(divergence=Divergence()),
    )
    with pytest.raises(ValueError, match="the teacher has not seen the batch"):
        trainer.forward_backward(stamp(pack(rows(2, 0)), "token"))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"beta": 0.0}, "beta: expected between 0 and 1"),
        ({"kd_coef": 0.0}, "kd_coef: expected more than 0 and at most 1"),
        ({"kd_temperature": 0.0}, "kd_temperature: expected more than 0"),
        ({"teacher_top_k": -1}, "teacher_top_k: expected 0 or more"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs, message):
    with pytest.raises(UserError, match=message):
        Distill(**knobs)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", [Distill(), Distill(divergence="reverse", teacher_top_k=8)])
def test_it_nears_its_teacher_on_rows_that_it_was_not_trained_on(method, seed):
    """A teacher of which a token depends on the one before it: a student can know all of it."""
    teacher, student = make_module("llama", seed=10 + seed), make_module("llama", seed=seed)
    for layer in teacher.base_model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.zeros_(part.weight)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.ndim >= 2:
                parameter.div_(3.0)
    trainer, scorer = of(method, *(prepare_module(m, make_tokenizer()) for m in (student, teacher)))
    held = seen(pack(rows(20, 1000 + seed)), scorer, method)
    first = trainer.evaluate(held)["kd_loss"]
    for step in range(25):
        trainer.forward_backward(seen(pack(rows(16, 100 * seed + step)), scorer, method))
        trainer.optim_step()
    assert trainer.evaluate(held)["kd_loss"] < 0.5 * first
