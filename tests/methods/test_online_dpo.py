"""Online DPO: which samples make a pair, what ties do, and at which temperature policy and reference are compared."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers.models import make_module, make_tokenizer
from safetensors.torch import load_file

from tandem.assembly.configs.methods import class_over, read_config
from tandem.assembly.configs.replay import ReplayConfig
from tandem.batch import Outputs
from tandem.cli.main import main
from tandem.config import load_config
from tandem.data.packing import pack_pairs, stamp
from tandem.errors import UserError
from tandem.methods.online_dpo import OnlineDPO
from tandem.models.loading import prepare_module
from tandem.rollout.prepare import Preparation
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer
from tandem.types import Group, Prompt, Rollout
from tandem.workers.homes import seat_of


def rollout(index, reward, length=2, stop="eos"):
    ids = [2, 3, *(10 + (7 * index + i) % 50 for i in range(length))]
    return Rollout(
        prompt_id="p", sample_index=index, token_ids=ids, prompt_length=2, trainable=[False] * 2 + [True] * length,
        behaviour_logp=[0.0] * len(ids), untruncated_logp=[0.0] * len(ids), stop=stop, reward=reward,
    )  # fmt: skip


def group(*rewards):
    """A reward of "error" is that of a sample that failed, which would be the best one."""
    rollouts = [
        rollout(i, 99.0 if reward == "error" else reward, 1 + i, "error" if reward == "error" else "eos")
        for i, reward in enumerate(rewards)
    ]
    return Group(prompt=Prompt(prompt_id="p", prompt="", token_ids=(2, 3)), rollouts=rollouts)


@pytest.mark.parametrize(
    ("rewards", "best", "worst"),
    [
        ((0.5, 1.0, 0.0, 0.7), 1, 2),
        ((0.0, 1.0, 1.0, 0.0), 1, 0),
        ((-3.0, -1.0), 1, 0),
        ((None, 0.2, "error", 0.3, None), 3, 1),
        ((0.4, 0.4, 0.4), 0, 0),
    ],
)
def test_the_best_usable_sample_is_preferred_to_the_worst(rewards, best, worst):
    made = group(*rewards)
    (pair,) = OnlineDPO().examples(made)
    assert (pair.chosen.token_ids, pair.chosen.trainable) == (
        made.rollouts[best].token_ids, made.rollouts[best].trainable,
    )  # fmt: skip
    assert pair.rejected.token_ids == made.rollouts[worst].token_ids
    assert pair.margin == pytest.approx(rewards[best] - rewards[worst])


@pytest.mark.parametrize("rewards", [(None, 1.0), (1.0,), ("error", 0.3), (None, None)])
def test_fewer_than_two_usable_samples_are_no_pair(rewards):
    assert list(OnlineDPO().examples(group(*rewards))) == []


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_a_tie_has_no_gradient_and_stays_in_the_mean(loss_type):
    """Also where rounding has made the two copies of the same sample different."""
    method = OnlineDPO(loss_type=loss_type)
    groups = [group(1.0, 0.0), group(0.5, 0.5), group(None, 0.3), group(0.0, 2.0)]
    batch = pack_pairs([pair for g in groups for pair in method.examples(g)])
    generator = torch.Generator().manual_seed(0)
    logp_T, reference_T = torch.randn(2, batch.tokens, generator=generator, dtype=torch.float64) * batch.trainable_T
    # Of the pair that is a tie, the policy likes the first copy better.
    logp_T = logp_T + 5 * (batch.segment_T == 2) * batch.trainable_T
    batch = replace(batch, seen={"reference": Outputs(logp_T=reference_T)})
    estimate = method.estimate(groups, batch, method.initial_state())
    assert estimate.metrics == {"equal_reward_groups": pytest.approx(1 / 3)}
    batch = stamp(estimate.batch, "token")
    leaf_T = logp_T.clone().requires_grad_()
    token_loss = method.loss(Outputs(logp_T=leaf_T), batch)
    (token_loss.loss_T * batch.weight_T).sum().backward()
    tied_T = batch.segment_T // 2 == 1
    assert leaf_T.grad[tied_T].abs().max() == 0
    ratio_S = torch.stack([(logp_T - reference_T)[batch.segment_T == s].sum() for s in range(6)])
    if loss_type == "ipo":
        ratio_S = ratio_S / torch.tensor([batch.trainable_T[batch.segment_T == s].sum() for s in range(6)])
    expected = 0.0
    for pair in (0, 2):
        x = (ratio_S[2 * pair] - ratio_S[2 * pair + 1]).item()
        expected += (x - 5) ** 2 / 3 if loss_type == "ipo" else math.log(1 + math.exp(-0.1 * x)) / 3
    assert (token_loss.loss_T * batch.weight_T).sum().item() == pytest.approx(expected, abs=1e-6)  # weights: float32
    assert token_loss.metrics_T["accuracy"][tied_T].max() == 0


def test_minibatches_and_epochs_hold_pairs_and_nothing_is_taken_for_a_ratio():
    scorer = LocalScorer(prepare_module(make_module("llama"), make_tokenizer()), token_budget=100)
    seats = {"reference": seat_of(scorer)}
    groups = [group(float(i), 0.0, 0.5) for i in range(1, 6)]
    prepare = Preparation(method=OnlineDPO(), models=seats, old_logp="trainer", epochs=2, minibatches=2, seed=1)
    prepared = prepare(groups, {}, 1)
    assert "sampler_gap_max" not in prepared.metrics
    minibatches = list(prepared)
    assert [batch.units for batch in minibatches] == [3, 2, 3, 2]
    for epoch in (minibatches[:2], minibatches[2:]):
        assert sorted(i for batch in epoch for i in batch.margin_S[0::2].tolist()) == [1.0, 2.0, 3.0, 4.0, 5.0]
    for batch in minibatches:
        assert not batch.on_policy
        assert set(batch.seen) == {"reference"}
        assert batch.weight_T.sum().item() == pytest.approx(1.0)


def test_truncated_samples_of_vllm_need_no_other_log_probs():
    keys = {"model": "m", "data": "d.jsonl", "reward": "r.py:f", "out": "o", "steps": 1, "top_p": 0.9}
    read_config("online-dpo", engine__kind="vllm", **keys)
    with pytest.raises(UserError, match="old_logp: vLLM reports truncated log-probs only"):
        read_config("grpo", engine__kind="vllm", **keys)
    # What compares the sampler's with the trainer's has nothing to compare.
    for key, value in ({"correction": "token_tis"} | {"ess_floor": 0.5}).items():
        compared = keys | {"old_logp": "trainer", key: value}
        with pytest.raises(
            UserError, match=f"--{key.replace('_', '-')}: vLLM reports truncated log-probs only, and none to compare"
        ):
            read_config("grpo", engine__kind="vllm", **compared)
        read_config("grpo", **compared)
    read_config("grpo", engine__kind="vllm", **keys, old_logp="trainer")


@pytest.mark.parametrize(
    ("flags", "key"),
    [((), "old_logp"), (("--old-logp", "trainer", "--ess-floor", "0.5"), "ess-floor"),
     (("--old-logp", "trainer", "--correction", "geo"), "correction"), (("--old-logp", "trainer"), None)],
)  # fmt: skip
def test_a_replay_of_truncated_samples_of_vllm_compares_them_with_nothing_either(flags, key):
    argv = ["--model", "m", "--data", "d.jsonl", "--reward", "r.py:f", "--out", "o", "--steps", "1", "--replayed", "r"]
    argv += ["--engine.kind", "vllm", "--top-p", "0.9", *flags]
    with pytest.raises(UserError, match=f"{key}: vLLM reports") if key else nullcontext():
        load_config(class_over(ReplayConfig, "grpo"), argv)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command on a small model with a reward; returns the metrics of its steps."""
    monkeypatch.chdir(tmp_path)
    make_module("llama").save_pretrained("base")
    make_tokenizer().save_pretrained("base")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "cde", "f")))
    (tmp_path / "check.py").write_text(
        "def one(prompts, completions):\n    return [1.0] * len(prompts)\n"
        "def total(prompts, completion_ids):\n    return [float(sum(ids)) for ids in completion_ids]\n"
    )

    def call(reward, *flags):
        argv = ["online-dpo", "--model", "base", "--data", "prompts.jsonl", "--reward", f"check.py:{reward}",
                "--prompts-per-step", "3", "--samples-per-prompt", "4", "--max-new-tokens", "6", "--steps", "2",
                "--learning-rate", "1e-3", "--out", "run", *flags]  # fmt: skip
        assert main(argv) == 0
        return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    return call


def test_a_run_whose_groups_are_all_ties_moves_nothing(run):
    lines = run("one")
    assert [(line["loss"], line["grad_norm"], line["equal_reward_groups"]) for line in lines] == [(0.0, 0.0, 1.0)] * 2
    before, after = (load_file(f"{folder}/model.safetensors") for folder in ("base", "run/model"))
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_policy_and_reference_are_at_the_sampling_temperature(run, monkeypatch):
    """And the reference stays what the policy was at the start."""
    batches = []
    whole = LocalTrainer.forward_backward

    def watched(self, batch):
        metrics = whole(self, batch)
        batches.append((batch, metrics))
        return metrics

    monkeypatch.setattr(LocalTrainer, "forward_backward", watched)
    lines = run("total", "--temperature", "0.6")
    module = make_module("llama").double()
    assert len(batches) == 2
    for step, (batch, metrics) in enumerate(batches):
        expected_T = torch.zeros(batch.tokens, dtype=torch.float64)
        for start, end in zip(batch.bounds[:-1].tolist(), batch.bounds[1:].tolist(), strict=True):
            ids = batch.token_ids_T[start:end]
            with torch.no_grad():
                log_p = (module(input_ids=ids[None]).logits[0] / 0.6).log_softmax(-1)
            for t in range(1, len(ids)):
                expected_T[start + t] = log_p[t - 1, ids[t]] * batch.trainable_T[start + t]
        reference_T = batch.seen["reference"].logp_T.double()
        torch.testing.assert_close(reference_T, expected_T, rtol=0, atol=1e-4)
        by_segment = torch.stack([part.sum() for part in expected_T.split(batch.lengths)])
        moved = [metrics["chosen_logp"] - by_segment[0::2].mean(), metrics["rejected_logp"] - by_segment[1::2].mean()]
        # In the first step the policy is the reference; in the second it has moved.
        assert (max(map(abs, moved)) < 1e-4) == (step == 0)
    assert [line["equal_reward_groups"] for line in lines] == [0.0, 0.0]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
