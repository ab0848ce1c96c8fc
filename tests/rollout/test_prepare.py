"""Judged groups into minibatches: who is left out, what the weights say, and that order and packing do not matter."""

import pytest
import torch
from helpers.models import make_module, make_tokenizer

from tandem.batch import Asks
from tandem.config import with_keys
from tandem.engines.live.engine import LiveEngine
from tandem.errors import RunFailure, UserError
from tandem.methods.dr_grpo import DrGRPO
from tandem.methods.grpo import GRPO
from tandem.methods.ppo import PPO
from tandem.models.loading import load_scalar, prepare_module
from tandem.rewards.function import FunctionReward
from tandem.rollout.judging import Judge
from tandem.rollout.measure import rollout_metrics
from tandem.rollout.prepare import Preparation, sampler_gap
from tandem.rollout.sampling import sample_groups
from tandem.training.scorer import LocalScorer
from tandem.types import Prompt, SamplingParams
from tandem.workers.homes import seat_of

SAMPLING = SamplingParams(max_new_tokens=6, temperature=0.8)


@pytest.fixture(scope="module")
def model():
    return prepare_module(make_module("llama"), make_tokenizer())


def make_prompts(model, texts=("ab", "cde", "f")):
    return [
        Prompt(prompt_id=f"p{i}", prompt=t, token_ids=tuple(model.tokenizer(t)["input_ids"]), columns={"goal": i})
        for i, t in enumerate(texts)
    ]


def sample(model, step=1, samples=4, sampling=SAMPLING, **kwargs):
    engine = LiveEngine(model.module, model.tokenizer)
    return sample_groups(engine, make_prompts(model), sampling, samples_per_prompt=samples, seed=0, step=step, **kwargs)


def judged(groups, function):
    Judge(rewards=(FunctionReward(function),), weights=(1.0,))(groups)
    return groups


def length_reward(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def test_a_sample_depends_on_seed_step_prompt_and_index_only(model):
    first, again, later = sample(model), sample(model), sample(model, step=2)
    ids = [[r.token_ids for g in groups for r in g.rollouts] for groups in (first, again, later)]
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]
    for group in first:
        for rollout in group.rollouts:
            n = len(rollout.token_ids)
            assert rollout.token_ids[: rollout.prompt_length] == list(group.prompt.token_ids)
            assert rollout.trainable == [False] * rollout.prompt_length + [True] * (n - rollout.prompt_length)
            assert len(rollout.behaviour_logp) == len(rollout.untruncated_logp) == n


def test_rewards_get_columns_and_none_leaves_a_sample_out_of_the_baseline(model):
    seen = {}

    def every_other(prompts, completions, goal):
        seen.update(prompts=prompts, goal=goal)
        return [None if i % 2 else float(i) for i in range(len(prompts))]

    groups = judged(sample(model), every_other)
    assert seen["goal"] == [0] * 4 + [1] * 4 + [2] * 4
    assert seen["prompts"] == ["ab"] * 4 + ["cde"] * 4 + ["f"] * 4
    assert [len(g.usable) for g in groups] == [2, 2, 2]
    assert rollout_metrics(groups)["left_out"] == 6
    prepared = Preparation(method=GRPO(normalize="none"), models={})(groups, {}, 1)
    assert prepared.batch.segments == 6
    # Rewards 0 and 2 in the first group, 4 and 6, 8 and 10: minus one and plus one against each group's mean.
    first_token_advantage = prepared.batch.advantage_T[prepared.batch.last_S].tolist()
    assert first_token_advantage == [-1.0, 1.0] * 3
    # Of a sample the same for all tokens, so the mean is that; none where it is not trained on.
    assert [r.advantage for g in groups for r in g.usable] == [-1.0, 1.0] * 3
    of_each = prepared.batch.advantage_T.split(prepared.batch.lengths)
    assert [list(r.advantages) for g in groups for r in g.usable] == [x_T.tolist() for x_T in of_each]
    assert all(r.advantage is None for g in groups for r in g.rollouts if not r.usable)


def test_a_step_without_a_reward_is_refused(model):
    with pytest.raises(UserError, match=r"reward 'nobody' left out \(None\) every one of 12 samples"):
        judged(sample(model), nobody)
    groups = sample(model)
    for rollout in (r for group in groups for r in group.rollouts):
        rollout.stop, rollout.error = "error", "no room in the cache"
    with pytest.raises(RunFailure, match="no sample could be drawn: no room in the cache"):
        judged(groups, length_reward)


def test_samples_that_nothing_judges_are_usable_and_say_nothing_of_rewards(model):
    groups = sample(model)
    Judge(rewards=(), weights=())(groups)
    assert {r.reward for g in groups for r in g.usable} == {0.0}
    assert sum(len(g.usable) for g in groups) == 12
    found = rollout_metrics(groups, judged=False)
    assert not [name for name in found if name.startswith("reward")]
    judged_ones = rollout_metrics(groups)
    assert found == {name: value for name, value in judged_ones.items() if not name.startswith("reward")}
    assert judged_ones["reward"] == 0


def test_a_group_without_a_reward_is_no_fault_beside_others(model):
    """As one that came in the place of a group that was passed over: judged alone, and checked with all of the step."""
    judge = Judge(rewards=(FunctionReward(nobody),), weights=(1.0,))
    others, alone = judged(sample(model), length_reward), sample(model)[:1]
    judge.fill(alone)
    judge.check([*others, *alone])
    with pytest.raises(UserError, match=r"reward 'nobody' left out \(None\) every one of 4 samples"):
        judge.check(alone)


def test_items_without_anything_to_train_on_are_refused(model):
    prepare = Preparation(method=GRPO(), models={})
    with pytest.raises(UserError, match="GRPO: none of the 3 items of the step can be trained on"):
        prepare(sample(model), {}, 1)


def nobody(prompts, completions):
    return [None] * len(prompts)


def test_minibatches_hold_every_sequence_once_an_epoch_and_weights_sum_to_one(model):
    groups = judged(sample(model), length_reward)
    prepared = Preparation(method=GRPO(), models={}, epochs=2, minibatches=5, seed=3)(groups, {}, 7)
    batches = list(prepared)
    assert len(batches) == 10
    for epoch in (batches[:5], batches[5:]):
        assert sorted(i for b in epoch for i in b.index_S.tolist()) == list(range(12))
    assert batches[0].index_S.tolist() != batches[5].index_S.tolist()
    for batch in batches:
        assert batch.weight_T.sum().item() == pytest.approx(1.0)
    again = Preparation(method=GRPO(), models={}, epochs=2, minibatches=5, seed=3)(groups, {}, 7)
    assert all(torch.equal(a.index_S, b.index_S) for a, b in zip(batches, again, strict=True))
    later = Preparation(method=GRPO(), models={}, epochs=2, minibatches=5, seed=3)(groups, {}, 8)
    assert any(not torch.equal(a.index_S, b.index_S) for a, b in zip(batches, later, strict=True))


def test_a_constant_length_is_the_most_that_may_be_sampled(model):
    """Dr.GRPO's, whatever the lengths of the step's samples and prompts."""
    groups = judged(sample(model), length_reward)
    (batch,) = Preparation(method=DrGRPO(), models={}, max_new_tokens=6)(groups, {}, 1)
    assert batch.weight_T[batch.trainable_T].tolist() == pytest.approx([1 / (12 * 6)] * int(batch.trainable_T.sum()))


def test_more_minibatches_than_sequences(model):
    groups = judged(sample(model, samples=1), length_reward)
    prepared = Preparation(method=GRPO(), models={}, minibatches=50)(groups, {}, 1)
    assert [b.segments for b in prepared] == [1, 1, 1]


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.2}])
def test_law_4_sampler_and_trainer_agree(model, truncation):
    """Also under truncation: ratios are taken against the untruncated log-probs (REFERENCE stumble 6)."""
    sampling = SamplingParams(max_new_tokens=6, temperature=0.8, **truncation)
    groups = judged(sample(model, sampling=sampling), length_reward)
    scorer = LocalScorer(model, token_budget=40, asks=Asks(temperature=0.8))
    prepare = Preparation(method=GRPO(), models={"actor": seat_of(scorer)}, old_logp="trainer", minibatches=2)
    prepared = prepare(groups, {}, 1)
    assert prepared.metrics["sampler_gap_max"] < 1e-4
    assert sampler_gap(prepared.batch)["sampler_gap_mean"] < 1e-5
    if truncation:
        drawn = [x for g in groups for r in g.rollouts for x in r.behaviour_logp]
        full = [x for g in groups for r in g.rollouts for x in r.untruncated_logp]
        assert sum(drawn) > sum(full) + 1


def test_ppo_gets_what_it_needs(model, tmp_path):
    groups = judged(sample(model), length_reward)
    scorer = LocalScorer(model, token_budget=100, asks=Asks(temperature=0.8))

    make_module("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    critic = LocalScorer(load_scalar(tmp_path, new_head="zero", device="cpu"), token_budget=100)
    method = PPO(whiten_advantages=False, lam=1.0)
    models = {"reference": seat_of(scorer), "critic": seat_of(critic)}
    prepared = Preparation(method=method, models=models)(groups, method.initial_state(), 1)
    # The reference is the sampler itself, so the KL is rounding and every token's return is the length of its answer.
    lengths = torch.tensor([float(len(r.completion_ids)) for g in groups for r in g.rollouts])
    batch = prepared.batch
    want = lengths[batch.segment_T] * batch.trainable_T
    torch.testing.assert_close(batch.advantage_T, want, atol=1e-4, rtol=0)
    assert abs(prepared.metrics["kl"]) < 1e-5


def test_a_token_that_a_models_embedding_lacks_is_named(model):
    """A policy's may be filled up further than another model's, and samples such a token now and then."""
    scorer = LocalScorer(model, token_budget=100)
    with pytest.raises(UserError, match=r"token id 64, and its embedding has 64 rows: .* the tokenizer 61 tokens;"):
        scorer.logprobs([[1, 2], [3, 64, 5]])


@pytest.mark.parametrize(
    ("method", "cut", "saved"),
    [
        (GRPO(), {}, True),
        (GRPO(), {"epochs": 2}, False),
        (GRPO(), {"minibatches": 2}, False),
        (with_keys(GRPO(), kl_coef=0.1), {}, False),
    ],
)
def test_a_forward_is_saved_only_where_the_trained_one_is_the_same(model, method, cut, saved):
    groups = judged(sample(model), length_reward)
    seat = seat_of(LocalScorer(model, token_budget=100, asks=Asks(temperature=0.8)))
    prepare = Preparation(method=method, models={"reference": seat, "actor": seat}, old_logp="trainer", **cut)
    batch = prepare(groups, method.initial_state(), 1).batch
    assert batch.on_policy == saved
    assert ("actor" not in batch.seen) == saved
