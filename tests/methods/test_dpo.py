"""DPO and IPO against plain loops, and their optima in closed form; a run's held-out numbers from its two folders."""

import copy
import json
import math
import random
from dataclasses import replace
from typing import get_args

import pytest
import torch
from helpers.models import make_module, make_tokenizer
from preference_golden import DPO_CASES, GOLDEN, LENGTHS, problem
from safetensors.torch import load_file

from tandem.batch import Outputs
from tandem.cli.main import main
from tandem.data.items import build_pairs
from tandem.data.packing import pack_pairs, stamp_unit_weights
from tandem.data.room import Room
from tandem.data.rows import load_rows
from tandem.errors import UserError
from tandem.functional.preference import PreferenceLoss, preference_loss
from tandem.methods.dpo import DPO
from tandem.models.loading import prepare_module
from tandem.parallel.shares import shares
from tandem.training.optim import OptimParams
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer
from tandem.types import PreferencePair, Sequence

METHODS = [
    DPO(),
    DPO(label_smoothing=0.1, sft_coef=0.5),
    DPO(loss_type="ipo", beta=0.2),
    DPO(loss_type="ipo", label_smoothing=0.1, sft_coef=0.5),
]


def loss_of_pair(method, chosen, rejected):
    """In plain floats. Each is a list of (log-prob, reference's) of an answer's tokens."""
    x = 0.0
    for sign, answer in ((1, chosen), (-1, rejected)):
        total = sum(logp - reference for logp, reference in answer)
        x += sign * (total / len(answer) if method.loss_type == "ipo" else total)

    def loss(x):
        if method.loss_type == "ipo":
            return (x - 1 / (2 * method.beta)) ** 2
        return math.log(1 + math.exp(-method.beta * x))

    e = method.label_smoothing
    nll = -sum(logp for logp, _ in chosen) / len(chosen)
    return (1 - e) * loss(x) + e * loss(-x) + method.sft_coef * nll, x


def seen(batch, reference_T):
    return replace(batch, seen={"reference": Outputs(logp_T=reference_T * batch.trainable_T)})


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_loop_gives_the_same(method):
    """Prompts that are not trained on, an answer with a gap in it, and a pair that is a tie."""
    rng = random.Random(0)
    masks = [([0, 0, 1, 1, 1], [0, 0, 1]), ([0, 1, 0, 1, 1, 0], [0, 1]), ([0, 1, 1], [0, 1, 1])]
    pairs, answers = [], []
    for number, pair in enumerate(masks):
        tokens = [[(rng.uniform(-3, -0.1), rng.uniform(-3, -0.1)) for _ in mask] for mask in pair]
        if number == 2:
            tokens[1] = tokens[0]
        answers.append(tokens)
        chosen, rejected = (Sequence(token_ids=[5] * len(m), trainable=list(map(bool, m))) for m in pair)
        pairs.append(PreferencePair(chosen=chosen, rejected=rejected))
    flat_T2 = torch.tensor([token for pair in answers for answer in pair for token in answer], dtype=torch.float64)
    batch = seen(stamp_unit_weights(pack_pairs(pairs)), flat_T2[:, 1])
    token_loss = method.loss(Outputs(logp_T=flat_T2[:, 0] * batch.trainable_T), batch)

    kept = [
        [[t for t, m in zip(tokens, mask, strict=True) if m] for tokens, mask in zip(pair, marks, strict=True)]
        for pair, marks in zip(answers, masks, strict=True)
    ]
    expected, x = zip(*(loss_of_pair(method, *pair) for pair in kept), strict=True)
    assert token_loss.loss_T[batch.last_S[0::2]].tolist() == pytest.approx(expected, abs=1e-12)
    assert token_loss.loss_T[batch.weight_T == 0].abs().max() == 0
    at_pairs = {name: value_T[batch.weight_T != 0] for name, value_T in token_loss.metrics_T.items()}
    assert at_pairs["accuracy"].tolist() == [float(x[0] > 0), float(x[1] > 0), 0.0]
    assert at_pairs["reward_margin"].tolist() == pytest.approx([method.beta * number for number in x], abs=1e-12)
    difference = at_pairs["chosen_reward"] - at_pairs["rejected_reward"]
    torch.testing.assert_close(difference, at_pairs["reward_margin"], rtol=0, atol=1e-12)
    for side, name in enumerate(("chosen_logp", "rejected_logp")):
        assert at_pairs[name].tolist() == pytest.approx([sum(t[0] for t in pair[side]) for pair in kept], abs=1e-12)


REWARD = torch.tensor([0.9, 0.1, -0.4, 0.5], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64).log()


def optimum_of(method, reward_V, reference_V):
    """A table of logits, one answer each, trained on every pair as often as the Bradley-Terry model of the rewards."""
    arms = len(reward_V)
    ordered = [(i, j) for i in range(arms) for j in range(arms) if i != j]

    def answer(token):
        return Sequence(token_ids=[arms, token], trainable=[False, True])

    batch = pack_pairs([PreferencePair(chosen=answer(i), rejected=answer(j)) for i, j in ordered])
    likely_P = torch.stack([(reward_V[i] - reward_V[j]).sigmoid() for i, j in ordered])
    batch = replace(batch, weight_T=batch.of_units(likely_P))
    nothing_V = torch.zeros(1, dtype=torch.float64)
    batch = seen(batch, torch.cat([reference_V, nothing_V])[batch.token_ids_T])
    theta_V = reference_V.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta_V], max_iter=500, tolerance_grad=1e-12, tolerance_change=0.0,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        logp_T = torch.cat([theta_V.log_softmax(0), nothing_V])[batch.token_ids_T] * batch.trainable_T
        loss = (method.loss(Outputs(logp_T=logp_T), batch).loss_T * batch.weight_T).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta_V.detach().softmax(0)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_optimum_is_the_references_times_exp_of_the_reward_over_beta(beta):
    pi = optimum_of(DPO(beta=beta), REWARD, REFERENCE)
    torch.testing.assert_close(pi, (REFERENCE + REWARD / beta).softmax(0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_ipos_optimum_has_the_chance_to_be_preferred_in_the_rewards_place(beta):
    """arXiv:2310.12036, section 4: psi is the identity, and answers are compared with uniform ones."""
    preferred_V = (REWARD[:, None] - REWARD).sigmoid().mean(1)
    pi = optimum_of(DPO(beta=beta, loss_type="ipo"), REWARD, REFERENCE)
    torch.testing.assert_close(pi, (REFERENCE + preferred_V / beta).softmax(0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", [DPO(label_smoothing=0.2), DPO(label_smoothing=0.2, loss_type="ipo")])
def test_smoothed_labels_end_where_labels_with_that_share_of_mistakes_do(method):
    reward_V, reference_V = REWARD[:2], REFERENCE[:2].log_softmax(0)
    chance = (reward_V[0] - reward_V[1]).sigmoid()
    chance = 0.8 * chance + 0.2 * (1 - chance)
    worse = torch.stack([chance.logit(), torch.zeros_like(chance)])
    expected = optimum_of(replace(method, label_smoothing=0.0), worse, reference_V)
    torch.testing.assert_close(optimum_of(method, reward_V, reference_V), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", get_args(PreferenceLoss))
def test_far_away_and_gradcheck(kind):
    chosen = torch.tensor([1.3, -0.2, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.4, 0.1, -9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, r: preference_loss(c, r, 0.3, kind, 0.1), (chosen, rejected))
    far = torch.tensor([-1e6, 1e6])
    assert torch.isfinite(preference_loss(far, -far, 0.1, kind, 0.1)).all()


def test_goldens_of_the_papers_formulas():
    # -log sigmoid(0.1 x) and (x - 5)^2 at beta 0.1: log 2, log(1 + e^-0.2), log(1 + e^0.3).
    x, y = torch.tensor([[0.5, 1.0, -2.0], [0.5, -1.0, 1.0]], dtype=torch.float64)
    expected = [0.6931471805599453, 0.5981388693815919, 0.8543552444685272]
    assert preference_loss(x, y, 0.1).tolist() == pytest.approx(expected, abs=1e-12)
    assert preference_loss(x, y, 0.1, "ipo").tolist() == pytest.approx([25.0, 9.0, 64.0], abs=1e-12)
    smoothed = preference_loss(x[1:2], y[1:2], 0.1, label_smoothing=0.25)
    assert smoothed.item() == pytest.approx(0.6481388693815919, abs=1e-12)


@pytest.mark.parametrize("name", DPO_CASES)
def test_loss_and_gradient_are_trls(name):
    golden, given, knobs = json.loads(GOLDEN.read_text())[name], problem(), DPO_CASES[name]
    kinds = {"loss_type": "sigmoid", "answer_logp": "mean"} if name == "sigmoid_norm" else {"loss_type": name}
    method = DPO(beta=knobs["beta"], **kinds)

    def flat(rows):
        return torch.tensor([x for row in rows for x in (0.0, *row)], dtype=torch.float64)

    answers = [Sequence(token_ids=[5] * (n + 1), trainable=[False] + [True] * n) for n in LENGTHS]
    pairs = [PreferencePair(chosen=c, rejected=r) for c, r in zip(answers[::2], answers[1::2], strict=True)]
    batch = seen(stamp_unit_weights(pack_pairs(pairs)), flat(given["reference"]))
    logp = flat(given["logp"]).requires_grad_()
    loss = (method.loss(Outputs(logp_T=logp), batch).loss_T * batch.weight_T).sum()
    # Weights are float32.
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-7)
    (gradient,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(gradient, flat(golden["gradient"]), rtol=0, atol=1e-6)


def test_knobs_out_of_range_are_refused():
    for wrong in ({"beta": 0.0}, {"label_smoothing": 0.5}, {"sft_coef": -0.1}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}: expected"):
            DPO(**wrong)


def pairs_of(path, tokenizer):
    """Prompts that both answers share, of which the longest is cut."""
    rng = random.Random(0)
    letters = "abcdefghij"
    rows = [
        {"prompt": "".join(rng.choices(letters, k=n)), "chosen": "".join(rng.choices(letters, k=a)), "rejected": "xy"}
        for n, a in ((40, 3), (12, 9), (90, 5), (25, 2))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, counts = build_pairs(load_rows(str(path)), tokenizer, Room(60, long_rows="truncate"))
    assert counts.truncated == 1
    return pairs


def logp_by_hand(module, sequence):
    """[A] float64: of the answer's tokens, one sequence at a time."""
    log_p = module(input_ids=torch.tensor([sequence.token_ids])).logits[0].double().log_softmax(-1)
    places = [t for t, trained in enumerate(sequence.trainable) if trained]
    return torch.stack([log_p[t - 1, sequence.token_ids[t]] for t in places])


@pytest.mark.parametrize("method", [METHODS[1], METHODS[3]])
def test_a_shared_prompt_and_micro_batches_change_nothing(method, tmp_path):
    """Law 3, on a real model and its reference, against a float64 copy that sees one whole sequence at a time."""
    tokenizer = make_tokenizer()
    pairs = pairs_of(tmp_path / "pairs.jsonl", tokenizer)
    policy, reference = make_module("llama", seed=0), make_module("llama", seed=1)
    truth, frozen = copy.deepcopy(policy).double(), copy.deepcopy(reference).double()
    loss = 0.0
    for pair in pairs:
        sides = []
        for sequence in (pair.chosen, pair.rejected):
            with torch.no_grad():
                by_reference = logp_by_hand(frozen, sequence)
            sides.append(list(zip(logp_by_hand(truth, sequence), by_reference, strict=True)))
        loss = loss + torch_loss_of_pair(method, *sides) / len(pairs)
    loss.backward()

    trainer = LocalTrainer(
        prepare_module(policy, tokenizer), method.loss, OptimParams(learning_rate=1.0, total_steps=1), token_budget=1
    )
    scorer = LocalScorer(prepare_module(reference, tokenizer), token_budget=70)
    batch = stamp_unit_weights(pack_pairs(pairs))
    batch = replace(batch, seen={"reference": scorer.score(batch)})
    assert batch.prefix_S.sum() > 100
    for variant in (batch, batch.unshared(), batch.select([2, 0, 3, 1])):
        for budget in (1, 120, 10_000):
            trainer.token_budget = budget
            trainer.optimizer.zero_grad()
            assert (len(list(shares(variant, budget, trainer.world))) == 1) == (budget == 10_000)
            assert trainer.forward_backward(variant)["loss"] == pytest.approx(loss.item(), abs=2e-6 * loss.item())
            for name, parameter in policy.named_parameters():
                want = dict(truth.named_parameters())[name].grad
                scale = max(want.abs().max().item(), 1.0)
                torch.testing.assert_close(parameter.grad.double(), want, atol=2e-6 * scale, rtol=0)


def torch_loss_of_pair(method, chosen, rejected):
    """As ``loss_of_pair``, of tensors."""
    means = method.loss_type == "ipo"
    one, other = (
        torch.stack([logp - reference for logp, reference in answer]).sum() / (len(answer) if means else 1)
        for answer in (chosen, rejected)
    )

    def loss(x):
        return (x - 1 / (2 * method.beta)) ** 2 if means else torch.log1p(torch.exp(-method.beta * x))

    e = method.label_smoothing
    nll = -torch.stack([logp for logp, _ in chosen]).mean()
    return (1 - e) * loss(one - other) + e * loss(other - one) + method.sft_coef * nll


def test_held_out_numbers_are_those_of_the_models_in_its_folders(tmp_path, monkeypatch):
    """The reference stays what the policy was at the start, and sees the held-out pairs."""
    monkeypatch.chdir(tmp_path)
    module, tokenizer = make_module("llama"), make_tokenizer()
    module.save_pretrained("base")
    tokenizer.save_pretrained("base")
    pairs = pairs_of(tmp_path / "pairs.jsonl", tokenizer)
    argv = ["dpo", "--model", "base", "--data", "pairs.jsonl", "--eval-data", "pairs.jsonl", "--out", "run",
            "--max-length", "60", "--long-rows", "truncate"]  # fmt: skip
    assert main([*argv, "--steps", "4", "--batch-size", "2", "--learning-rate", "1e-3", "--beta", "0.3"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    assert (first["eval/accuracy"], first["eval/reward_margin"]) == (0.0, 0.0)
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    trained = copy.deepcopy(module)
    trained.load_state_dict(load_file("run/model/model.safetensors"), strict=False)
    with torch.no_grad():
        ratios = [
            [(logp_by_hand(trained, s).sum() - logp_by_hand(module, s).sum()).item() for s in (p.chosen, p.rejected)]
            for p in pairs
        ]
    chosen, rejected = (0.3 * sum(side) / len(pairs) for side in zip(*ratios, strict=True))
    assert last["eval/chosen_reward"] == pytest.approx(chosen, abs=1e-5)
    assert last["eval/rejected_reward"] == pytest.approx(rejected, abs=1e-5)
    assert last["eval/accuracy"] == sum(c > r for c, r in ratios) / len(pairs)
    assert last["eval/reward_margin"] > 0.05
