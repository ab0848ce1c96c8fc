"""Process reward models: labels and where they are read, the loss against a float64 loop, and that one learns."""

import math

import pytest
import torch
from helpers.models import make_tokenizer, micro_batches
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import LlamaForSequenceClassification

from tandem.batch import Outputs
from tandem.data.items import build_solutions
from tandem.data.packing import pack_solutions, stamp
from tandem.data.room import Room
from tandem.data.rows import Dataset
from tandem.data.tokenize import solution
from tandem.errors import UserError
from tandem.methods.prm import ProcessReward
from tandem.models.loading import prepare_module
from tandem.tasks import letters, tiny
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.types import Sequence, Solution

TOKENIZER = make_tokenizer()
LABELS = [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0], [0.2], [0.9, 0.6, 0.5], [1.0, 0.0]]
SCORES = [[2.0, 0.5, -1.0, 3.0], [1.0, 0.1], [-0.3], [0.4, -0.2, 1.0], [-1.0, -2.0]]
# First wrong steps of rows 0, 2 and 4: 2, 0, 1; called: 2, 0, 0. Rows 1 and 3 are right; in 3 one is called wrong.
FOUND, PASSED, ACCURACY = 2 / 3, 1 / 2, 9 / 12


def made():
    ids = iter(range(100))
    items = []
    for labels in LABELS:
        size = 2 + 2 * len(labels)
        trainable = [False, False, *[False, True] * len(labels)]
        text = Sequence(token_ids=[next(ids) for _ in range(size)], trainable=trainable)
        items.append(Solution(text=text, labels=labels, prompt_length=2))
    return items


def prepared(method, items=None):
    items = items or made()
    return stamp(method.estimate(items, pack_solutions(items), {}).batch, method.aggregation)


def outputs(batch, fill=7.0):
    """The scores at steps; something else at tokens that are none."""
    table = torch.full((100,), fill, dtype=torch.float64)
    for item, scores in zip(made(), SCORES, strict=True):
        table[[i for i, t in zip(item.text.token_ids, item.text.trainable, strict=True) if t]] = torch.tensor(
            scores, dtype=torch.float64
        )
    return table[batch.token_ids_T]


def means(method, batches):
    losses, sums, count = 0.0, {}, 0
    for batch in batches:
        out = method.loss(Outputs(scalar_T=outputs(batch)), batch)
        losses += (out.loss_T * batch.weight_T).sum().item()
        mask = batch.weight_T != 0
        count += int(mask.sum())
        for name, x in out.metrics_T.items():
            sums[name] = sums.get(name, 0.0) + (x * mask).sum().item()
    return losses, {name: total / count for name, total in sums.items()}


def cross_entropy(label, score):
    p = 1 / (1 + math.exp(-score))
    return -(label * math.log(p) + (1 - label) * math.log(1 - p))


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_loss_is_the_cross_entropy_of_hard_and_soft_labels(aggregation):
    rows = [[cross_entropy(*pair) for pair in zip(*row, strict=True)] for row in zip(LABELS, SCORES, strict=True)]
    flat = [x for row in rows for x in row]
    expected = sum(flat) / len(flat) if aggregation == "token" else sum(sum(r) / len(r) for r in rows) / len(rows)
    method = ProcessReward(aggregation=aggregation)
    loss, _ = means(method, [prepared(method)])
    assert loss == pytest.approx(expected, abs=1e-7)
    batch = prepared(method)
    steps = batch.trainable_T
    torches = binary_cross_entropy_with_logits(outputs(batch)[steps], batch.label_T[steps].double(), reduction="none")
    torch.testing.assert_close(
        method.loss(Outputs(scalar_T=outputs(batch)), batch).loss_T[steps], torches, rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("budget", [1, 14, 1000])
def test_metrics_are_shares_of_answers_however_they_are_cut(budget):
    method = ProcessReward()
    batch = prepared(method)
    _, found = means(method, micro_batches(batch, budget))
    assert found == pytest.approx({"accuracy": ACCURACY, "first_error": FOUND, "all_right": PASSED})
    assert method.measured(found) == {"first_error_f1": pytest.approx(2 * FOUND * PASSED / (FOUND + PASSED))}


def test_what_has_no_such_answers_has_no_such_number():
    method, right = ProcessReward(), [item for item in made() if min(item.labels) >= 0.5]
    found = method.loss(Outputs(scalar_T=outputs(prepared(method, right))), prepared(method, right)).metrics_T
    assert set(found) == {"accuracy", "all_right"}
    assert method.measured({"accuracy": 1.0, "all_right": 1.0}) == {}
    assert method.measured({"first_error": 0.0, "all_right": 0.0}) == {"first_error_f1": 0.0}


def test_a_step_is_judged_at_its_last_token():
    found = solution({"prompt": "ab", "completions": ["cd", "e"], "labels": [True, "-"]}, TOKENIZER)
    text = "".join(TOKENIZER.convert_ids_to_tokens(found.text.token_ids))
    assert text == "abcd\ne\n"
    assert [i for i, t in enumerate(found.text.trainable) if t] == [4, 6]
    assert (found.labels, found.prompt_length) == ([1.0, 0.0], 2)
    batch = pack_solutions([found, found])
    assert batch.label_T.tolist() == [0, 0, 0, 0, 1, 0, 0] * 2


def test_a_placeholder_is_the_same_as_a_column_of_steps():
    row = {"prompt": "ab cd @\ne @", "labels": ["+", 0.25]}
    found = solution(row, TOKENIZER, placeholder="@")
    assert "".join(TOKENIZER.convert_ids_to_tokens(found.text.token_ids)) == "ab cd\ne\n"
    assert [i for i, t in enumerate(found.text.trainable) if t] == [5, 7]
    assert found.labels == [1.0, 0.25]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [True, 1.5]}, r"column 'labels': step 2 has 1\.5; a label is true or false"),
        ({"labels": [True, -1]}, "step 2 has -1"),
        ({"labels": [math.nan, 1]}, "step 1 has nan"),
        ({"labels": ["good", "+"]}, "step 1 has 'good'"),
        ({"labels": [None, 1]}, "step 1 has None"),
        ({"labels": [True]}, "one label for each of 2 steps, not 1 of them"),
        ({"labels": True}, "one label for each of 2 steps, not a bool"),
        ({"completions": ["a", ""]}, "texts of steps, none of them empty"),
        ({"completions": "a"}, "texts of steps"),
        ({"completions": None}, r"no column 'completions'; where a placeholder in 'prompt'"),
    ],
)
def test_labels_and_steps_that_are_none_are_refused_with_their_row(change, message):
    row = {"prompt": "ab", "completions": ["cd", "e"], "labels": [True, False]}
    rows = Dataset([row, row | change], source="s.jsonl", origins=[("s.jsonl", 1), ("s.jsonl", 2)])
    with pytest.raises(UserError, match=rf"^s\.jsonl:2: .*{message}"):
        build_solutions(rows, TOKENIZER)


def test_what_follows_the_last_placeholder_is_refused():
    with pytest.raises(UserError, match="goes on after the last placeholder '@': 'x'"):
        solution({"prompt": "a@x", "labels": [True]}, TOKENIZER, placeholder="@")


def test_long_rows_lose_their_prompt_and_never_a_step():
    row = {"prompt": "abcdef", "completions": ["cd", "e"], "labels": [True, False]}
    (kept,), counts = build_solutions(Dataset([row]), TOKENIZER, Room(8, long_rows="truncate"))
    assert "".join(TOKENIZER.convert_ids_to_tokens(kept.text.token_ids)) == "defcd\ne\n"
    assert kept.prompt_length == 3
    assert counts.truncated == 1
    with pytest.raises(UserError, match="longer than the limit of 5"):
        build_solutions(Dataset([row]), TOKENIZER, Room(5, long_rows="truncate"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_finds_the_first_wrong_step_of_answers_that_it_has_not_seen(seed):
    tokenizer = tiny.build_tokenizer(letters.LETTERS + letters.END_OF_PROMPT + "\n")
    config = tiny.build_model(seed, tokenizer=tokenizer, hidden_size=64, layers=2).config
    config.num_labels = 1
    torch.manual_seed(seed)
    model = prepare_module(LlamaForSequenceClassification(config), tokenizer)
    method = ProcessReward()
    optim = OptimParams(learning_rate=3e-3, total_steps=50, warmup_steps=5)
    trainer = LocalTrainer(model, method.loss, optim, token_budget=20_000)

    def batch(split, count, part):
        items, _ = build_solutions(Dataset(letters.solutions(count, part, split=split)), tokenizer)
        return prepared(method, items)

    def measured():
        found = trainer.evaluate(batch("heldout", 200, seed))
        return found | method.measured(found)

    assert measured()["first_error_f1"] < 0.5
    whole = letters.solutions(32 * 50, seed)
    for step in range(50):
        items, _ = build_solutions(Dataset(whole[32 * step : 32 * (step + 1)]), tokenizer)
        trainer.forward_backward(prepared(method, items))
        trainer.optim_step()
    assert measured()["first_error_f1"] > 0.8


def test_scores_elsewhere_do_not_matter():
    method = ProcessReward()
    batch = prepared(method)
    found = [method.loss(Outputs(scalar_T=outputs(batch, fill)), batch) for fill in (7.0, -math.inf)]
    torch.testing.assert_close(found[0].loss_T, found[1].loss_T)
    assert all(torch.equal(x, found[1].metrics_T[name]) for name, x in found[0].metrics_T.items())
