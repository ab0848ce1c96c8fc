"""KTO against TRL and a plain loop, its mismatched answers, and what it refuses."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from helpers.models import make_module, make_tokenizer
from preference_golden import GOLDEN, KTO_CASES, LABELS, LENGTHS, mismatched_of, problem

from tandem.batch import Outputs
from tandem.cli.main import main
from tandem.data.items import Counts, build_unpaired
from tandem.data.packing import pack, pack_examples, stamp
from tandem.data.room import Room
from tandem.data.rows import Dataset
from tandem.errors import UserError
from tandem.methods.kto import KTO
from tandem.models.loading import prepare_module
from tandem.rollout.prepare import Preparation
from tandem.training.optim import OptimParams
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer
from tandem.types import LabelledAnswer, Sequence
from tandem.workers.homes import seat_of


def answers_of(lengths):
    """After a prompt of one token each, whose id is their number."""
    return [Sequence(token_ids=[10 + i] + [5] * n, trainable=[False] + [True] * n) for i, n in enumerate(lengths)]


def flat(rows):
    return torch.tensor([x for row in rows for x in (0.0, *row)], dtype=torch.float64)


@pytest.mark.parametrize("name", KTO_CASES)
def test_loss_and_gradient_are_trls(name):
    golden, given, method = json.loads(GOLDEN.read_text())[name], problem(), KTO(**KTO_CASES[name])
    items = [LabelledAnswer(answer=s, desirable=d) for s, d in zip(answers_of(LENGTHS), LABELS, strict=True)]
    policy, reference = map(flat, mismatched_of(name, given))
    aside = replace(
        pack(answers_of(LENGTHS)), seen={"actor": Outputs(logp_T=policy), "reference": Outputs(logp_T=reference)}
    )
    batch = replace(pack_examples(items), aside=aside, seen={"reference": Outputs(logp_T=flat(given["reference"]))})
    batch = stamp(method.estimate(items, batch, {}).batch, method.aggregation)
    logp = flat(given["logp"]).requires_grad_()
    loss_T = method.loss(Outputs(logp_T=logp), batch).loss_T
    loss = (loss_T * batch.weight_T).sum()
    # Weights are float32.
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-7)
    (gradient,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(gradient, flat(golden["gradient"]), rtol=0, atol=1e-7)
    assert (batch.state["kl"] == 0) == (name == "kto_clamped")
    assert batch.aside is None


def labelled(prompt, answer, desirable=True):
    ids = [*prompt, *answer]
    trainable = [False] * len(prompt) + [True] * len(answer)
    return LabelledAnswer(answer=Sequence(token_ids=ids, trainable=trainable), desirable=desirable)


def test_each_prompt_gets_the_answer_of_the_row_before_it_that_has_another_prompt():
    items = [labelled([2, 3], [7, 1]), labelled([4], [8, 8, 1]), labelled([4], [9, 1]), labelled([5], [6, 1])]
    made = KTO().aside(items, None)
    assert [s.token_ids for s in made] == [[2, 3, 6, 1], [4, 7, 1], [4, 7, 1], [5, 9, 1]]
    assert [s.trainable.index(True) for s in made] == [2, 1, 1, 1]
    assert [s.token_ids for s in KTO().aside(items[:2], 3)] == [[2, 3, 8], [4, 7, 1]]
    with pytest.raises(UserError, match="all 2 rows of a step have the same one; give more rows to a step"):
        KTO().aside(items[1:3], None)


def test_a_step_on_a_real_model_is_a_plain_loops():
    """The KL of the whole step counts in each micro-batch, and neither its order nor shared prompts matter."""
    rng, tokenizer = random.Random(0), make_tokenizer()
    policy, reference = make_module("llama", seed=1), make_module("llama", seed=0)
    prompts = [[rng.randrange(2, 60) for _ in range(n)] for n in (9, 4, 12)]
    items = [
        labelled(prompts[i % 3], [rng.randrange(2, 60) for _ in range(rng.randint(1, 6))], i % 4 != 1) for i in range(8)
    ]
    method = KTO(beta=0.2, desirable_weight=1.5)

    def ratio(sequence):
        start = sequence.trainable.index(True)
        sides = []
        for module in (policy, reference):
            log_p = module(input_ids=torch.tensor([sequence.token_ids])).logits[0].log_softmax(-1)
            places = range(start, len(sequence.token_ids))
            sides.append(torch.stack([log_p[t - 1, sequence.token_ids[t]] for t in places]).sum())
        return (sides[0] - sides[1]).item()

    with torch.no_grad():
        kl = max(0.0, sum(map(ratio, method.aside(items, None))) / len(items))
        ratios = [ratio(item.answer) for item in items]
    assert kl > 0

    def worth(x):
        return 1 / (1 + math.exp(-x))

    losses = [
        1.5 * (1 - worth(0.2 * (r - kl))) if item.desirable else 1 - worth(0.2 * (kl - r))
        for item, r in zip(items, ratios, strict=True)
    ]
    trainer = LocalTrainer(
        prepare_module(policy, tokenizer), method.loss, OptimParams(learning_rate=0.0, total_steps=1), token_budget=1
    )
    scorer = LocalScorer(prepare_module(reference, tokenizer), token_budget=40)
    models = {"actor": seat_of(trainer), "reference": seat_of(scorer)}
    for budget in (1, 30, 1000):
        trainer.token_budget = budget
        (batch,) = Preparation(method=method, models=models)(items, {}, 1)
        metrics = trainer.forward_backward(batch)
        assert metrics["loss"] == pytest.approx(sum(losses) / 8, abs=1e-5)
        assert metrics["kl"] == pytest.approx(kl, abs=1e-5)
        right = [(r > kl) == item.desirable for item, r in zip(items, ratios, strict=True)]
        assert metrics["accuracy"] == sum(right) / 8
        for name, wanted in (("desirable_reward", True), ("undesirable_reward", False)):
            of_kind = [0.2 * r for item, r in zip(items, ratios, strict=True) if item.desirable == wanted]
            assert metrics[name] == pytest.approx(sum(of_kind) / len(of_kind), abs=1e-5)


def test_rows_and_pairs_become_labelled_answers(tokenizer):
    rows = Dataset([
        {"prompt": "ab", "completion": "c", "label": 1},
        {"prompt": "ab", "chosen": "c", "rejected": "dd"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": "c", "label": False},
    ])  # fmt: skip
    with pytest.raises(UserError, match="data row 3: columns 'prompt' and 'completion' must both be strings"):
        build_unpaired(rows, tokenizer)
    items, counts = build_unpaired(rows.head(2), tokenizer)
    assert counts == Counts(rows=2, kept=2, items_of=(3,))
    assert [item.desirable for item in items] == [True, True, False]
    assert items[0].answer == items[1].answer
    assert tokenizer.decode(items[2].answer.token_ids) == "abdd<eos>"
    assert items[2].answer.trainable == [False, False, True, True, True]
    short, counts = build_unpaired(Dataset([rows[1]]), tokenizer, Room(4, long_rows="truncate"))
    assert [tokenizer.decode(item.answer.token_ids) for item in short] == ["abc<eos>", "bdd<eos>"]
    with pytest.raises(UserError, match="all 1 rows are longer than the limit of 3"):
        build_unpaired(Dataset([rows[1]]), tokenizer, Room(3, long_rows="truncate"))


@pytest.mark.parametrize("label", ["yes", 2, -1, 0.5, None])
def test_a_label_out_of_range_is_refused(tokenizer, label):
    rows = Dataset([{"prompt": "ab", "completion": "c", "label": label}])
    message = "no column 'label'" if label is None else "'label' must be true or false, not"
    with pytest.raises(UserError, match=f"data row 1: .*{message}"):
        build_unpaired(rows, tokenizer)


@pytest.mark.parametrize(
    ("good", "bad", "knobs", "said"),
    [
        (2, 2, {}, ["2 desirable and 2 undesirable answers"]),
        (1, 4, {}, ["count 0.25 times", "--desirable-weight 4 "]),
        (1, 4, {"desirable_weight": 4.0}, ["1 desirable and 4 undesirable answers"]),
        (4, 1, {"desirable_weight": 2.0}, ["count 8 times", "--undesirable-weight 6 "]),
        (3, 0, {}, ["learns to keep to them"]),
        (0, 3, {}, ["learns to avoid them"]),
    ],
)
def test_the_balance_of_labels_is_said(good, bad, knobs, said):
    (note,) = KTO(**knobs).notes([labelled([2], [3], True)] * good + [labelled([2], [3], False)] * bad)
    assert all(part in note for part in said)
    assert ("would do that" in note) == (len(said) == 2)


def test_a_step_of_one_row_is_refused(model_folder, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    argv = ["kto", "--model", str(model_folder), "--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "run")]
    assert main([*argv, "--steps", "1", "--batch-size", "1"]) == 2
    assert "--batch-size: KTO compares the rows of a step with one another and needs 2" in capsys.readouterr().err
    assert main([*argv, "--steps", "1", "--eval-data", str(tmp_path / "d.jsonl"), "--dry-run"]) == 2
    assert "all 2 rows of a step have the same one" in capsys.readouterr().err
    for wrong in ({"beta": 0.0}, {"desirable_weight": -1.0}, {"desirable_weight": 0.0, "undesirable_weight": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            KTO(**wrong)
