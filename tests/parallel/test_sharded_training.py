"""Two workers over gloo train as one does: parameters, gradients, metrics, scores, checkpoints (law 2)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers.models import VOCABULARY, make_module, make_tokenizer
from helpers.ranks import run_ranks
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tandem.batch import Asks, Batch, Outputs, TokenLoss
from tandem.data.packing import pack, stamp_weights
from tandem.errors import NonFiniteError
from tandem.models.loading import prepare_module
from tandem.models.proof.shrunk import shrunken_config
from tandem.parallel.sharding import local, transformer_layers
from tandem.parallel.world import World
from tandem.training.optim import OptimParams
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer, MemoryParams
from tandem.types import Sequence

OPTIM = OptimParams(learning_rate=1e-4, total_steps=6, lr_schedule="linear", weight_decay=0.1, max_grad_norm=0.5)


def batch_of(count: int, seed: int) -> Batch:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(4, 24))]
        sampler = [0.0, *(rng.uniform(-5, -3) for _ in ids[1:])]
        rows.append(Sequence(token_ids=ids, trainable=[False, *[True] * (len(ids) - 1)], untruncated_logp=sampler))
    return stamp_weights(pack(rows), "token")


def loss(out: Outputs, batch: Batch) -> TokenLoss:
    assert out.logp_T is not None
    return TokenLoss(loss_T=-out.logp_T, metrics_T={"surprise": -out.logp_T})


def trainer_in(world: World, name: str, dtype: str = "float32", **memory: Any) -> LocalTrainer:
    model = prepare_module(make_module(name), make_tokenizer(), dtype=dtype)
    return LocalTrainer(model, loss, OPTIM, token_budget=40, world=world, memory=MemoryParams(**memory))


def train(world: World, name: str, steps: list[int], state: Any = None, options: Any = None) -> Any:
    """Steps of the given numbers of sequences: metrics of each, then score and state."""
    trainer = trainer_in(world, name, **(options or {}))
    if state is not None:
        trainer.load_state_dict(state)
    metrics = []
    for step, count in enumerate(steps):
        batch = batch_of(count, 10 * step + count)
        metrics.append(trainer.forward_backward(batch) | trainer.optim_step())
    held_out = batch_of(5, 99)
    score = trainer.score(held_out)
    return metrics, score.logp_T.detach().cpu(), trainer.evaluate(held_out), trainer.state_dict()


@pytest.mark.parametrize("kind", ["mamba", "qwen2", "mixtral"])
def test_layers_to_be_sharded_are_not_inside_one_another(kind):
    """Mamba names its blocks and the mixers in them as what must not be split."""
    config = shrunken_config(CONFIG_MAPPING[kind]())
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    layers = transformer_layers(module)
    assert len(layers) == config.num_hidden_layers
    inside = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    assert not inside & {id(layer) for layer in layers}


def assert_close(one: Any, two: Any, tolerance: float = 1e-6) -> None:
    metrics, score, evaluation, state = one
    for a, b in zip([*metrics, evaluation], [*two[0], two[2]], strict=True):
        assert a == pytest.approx(b, abs=tolerance, rel=1e-5)
    # A log-prob sums over all weights' differences, each below the tolerance.
    assert (score - two[1]).abs().max() < 5 * tolerance
    assert state["model"].keys() == two[3]["model"].keys()
    gradients, others = mean_gradients(state), mean_gradients(two[3])
    for name, value in state["model"].items():
        assert value.shape == two[3]["model"][name].shape
        assert (gradients[name] - others[name]).abs().max() < 1e-5 * gradients[name].abs().max() + 1e-9, name
        if "query_key_value.bias" in name:
            continue  # A key's bias shifts a row of attention scores: its gradient is rounding, which Adam blows up.
        differs = (value - two[3]["model"][name]).abs()
        # So it does with the rare weight whose gradient is of the size of its epsilon, 1e-8: that one moves by some of
        # a step's 1e-4. Of gradients, above, none differs.
        assert differs.max() < 10 * tolerance, name
        assert (differs >= tolerance).sum() <= differs.numel() / 2000, name
    assert state["version"] == two[3]["version"]


def mean_gradients(state: Any) -> dict[str, torch.Tensor]:
    """Adam's first moments by the names of the parameters: matrices come first in its state, as the optimizer's do."""
    values = state["model"]
    names = sorted(values, key=lambda name: values[name].ndim < 2)
    (adam,) = state["optimizer"]
    found = [adam["state"][i]["exp_avg"] for i in range(len(names))]
    assert [x.shape for x in found] == [values[name].shape for name in names]
    return dict(zip(names, found, strict=True))


# 7 sequences over micro-batches of 40 tokens: the ranks have unequally many. One sequence: one rank has none at all.
STEPS = [7, 1, 6]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("qwen2", {"keep_gathered": True}),
        ("gpt_neox", {"activation_checkpointing": True}),
        ("bloom", {"offload": "parameters"}),
        ("granite_scaled_logits", {"offload": "optimizer"}),
    ],
)
def test_two_workers_equal_one(name, options):
    one = train(World(), name, STEPS)
    first, second = run_ranks(train, 2, name, STEPS, None, options)
    assert_close(one, first)
    # Both ranks return the same, not each its own part.
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def test_three_workers_with_rows_that_do_not_divide():
    assert_close(train(World(), "llama", STEPS), run_ranks(train, 3, "llama", STEPS)[0])


def _train_on_groups(world: World, share: bool, options: Any) -> Any:
    """Gradient norms and parameters of steps on prompts with five answers each."""
    trainer = trainer_in(world, "llama", **options)
    norms = []
    for step in range(3):
        rng = random.Random(step)
        rows = []
        for _ in range(4):
            prompt = [rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(3, 12))]
            for _ in range(5):
                own = [rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(1, 9))]
                rows.append(Sequence(token_ids=prompt + own, trainable=[False] * len(prompt) + [True] * len(own)))
        batch = stamp_weights(pack(rows), "sequence")
        trainer.forward_backward(batch if share else batch.unshared())
        norms.append(trainer.optim_step()["grad_norm"])
    return norms, trainer.state_dict()["model"]


def test_shared_prompts_on_two_workers_equal_unshared_ones_on_one():
    norms, parameters = _train_on_groups(World(), False, {})
    checkpointed = {"activation_checkpointing": True}
    for found in (_train_on_groups(World(), True, checkpointed), *run_ranks(_train_on_groups, 2, True, {})):
        assert found[0] == pytest.approx(norms, rel=1e-5)
        for name, value in found[1].items():
            if value is not None:
                assert (value - parameters[name]).abs().max() < 1e-6, name


def test_activation_checkpointing_and_offload_do_not_change_one_process():
    plain = train(World(), "llama", STEPS)
    for options in ({"activation_checkpointing": True}, {"offload": "optimizer"}):
        assert_close(plain, train(World(), "llama", STEPS, None, options), tolerance=1e-7)


def test_a_checkpoint_goes_from_two_workers_to_one_and_back():
    unbroken = train(World(), "llama", [7, 1, 6, 3])
    for before, after in ((2, 1), (1, 2)):
        state = run_ranks(train, before, "llama", [7, 1])[0][3]
        resumed = run_ranks(_resume, after, "llama", state)[0]
        for name, value in unbroken[3]["model"].items():
            assert (value - resumed["model"][name]).abs().max() < 1e-6, name
        assert resumed["version"] == 4


def _resume(world: World, name: str, state: Any) -> Any:
    trainer = trainer_in(world, name)
    trainer.load_state_dict(state)
    for step, count in ((2, 6), (3, 3)):
        trainer.forward_backward(batch_of(count, 10 * step + count))
        trainer.optim_step()
    return trainer.state_dict()


def test_bfloat16_computes_low_and_keeps_float32_weights():
    exact = train(World(), "llama", STEPS)
    one = train(World(), "llama", STEPS, None, {"dtype": "bfloat16"})
    two = run_ranks(train, 2, "llama", STEPS, None, {"dtype": "bfloat16"})[0]
    for result in (one, two):
        assert {v.dtype for v in result[3]["model"].values()} == {torch.float32}
        gaps = [(v - exact[3]["model"][k]).abs().max().item() for k, v in result[3]["model"].items()]
        # Adam moves a weight by about the learning rate a step, whatever the gradient: some signs differ in bfloat16.
        assert 0 < max(gaps) < 4 * OPTIM.learning_rate


def test_every_rank_hears_of_a_loss_that_is_not_finite():
    assert run_ranks(_train_into_nan, 2) == [True, True]


def slices(trainer: LocalTrainer) -> dict[str, torch.Tensor]:
    return {name: local(weight.detach()).clone() for name, weight in trainer.weights.items()}


def _train_into_nan(world: World) -> bool:
    trainer = trainer_in(world, "llama")
    before = slices(trainer)
    batch = batch_of(7, 3)
    batch.weight_T[int(batch.bounds[3]) + 1] = float("nan")
    try:
        trainer.forward_backward(batch)
    except NonFiniteError as error:
        after = slices(trainer)
        trainer.forward_backward(batch_of(7, 4))
        trainer.optim_step()
        return "not finite" in str(error) and all(torch.equal(before[k], after[k]) for k in before)
    return False


def test_scorers_are_sharded_too():
    expected = _score(World())
    for found in run_ranks(_score, 2):
        assert (found - expected).abs().max() < 1e-5


def _score(world: World) -> torch.Tensor:
    model = prepare_module(make_module("llama"), make_tokenizer())
    scorer = LocalScorer(model, token_budget=30, asks=Asks(temperature=0.7), world=world)
    value = scorer.score(batch_of(6, 5)).logp_T
    assert value is not None
    return value
