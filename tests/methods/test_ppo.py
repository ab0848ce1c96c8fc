"""PPO step by step against plain Python loops and OpenRLHF's numbers."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from helpers.batches import scalar_outputs, seen_batch, unseen_by
from helpers.sampled_step import make_step

from tandem.batch import Outputs
from tandem.config import with_keys
from tandem.data.packing import pack
from tandem.errors import UserError
from tandem.methods.ppo import PPO
from tandem.types import Sequence


@pytest.fixture
def step():
    return make_step(0)


def one_segment(reward=1.0, prompt=1, **fields):
    """A batch of one segment: a prompt token, then all trainable. Fields are given for the trainable tokens."""
    n = len(next(iter(fields.values())))
    batch = pack([Sequence(token_ids=[0] * (prompt + n), trainable=[False] * prompt + [True] * n)])
    padded = {name: torch.tensor([0.0] * prompt + list(x), dtype=torch.float64) for name, x in fields.items()}
    seen = {name: padded.pop(name) for name in ("old_logp_T", "reference_logp_T", "old_value_T") if name in padded}
    return seen_batch(replace(batch, reward_S=torch.tensor([reward], dtype=torch.float64), **padded), **seen)


LOGP = [-0.5, -1.2, -0.3, -2.0, -0.9, -0.1]
REFERENCE = [-0.7, -1.0, -0.3, -1.2, -1.6, -1.9]


def test_the_reward_is_clipped_before_anything_is_added():
    # OpenRLHF 0.11.2 models/utils.compute_reward(r=12.5, kl_coef=0.05, clip ±10), float64. With gamma = 1, lam = 1 and
    # a critic that says 0, the returns are the rewards summed from the end.
    rewards = [-0.01, 0.01, 0.0, 0.04, -0.035, 9.91]
    batch = one_segment(12.5, old_logp_T=LOGP, reference_logp_T=REFERENCE, old_value_T=[0.0] * 6)
    ppo = PPO(lam=1.0, whiten_advantages=False)
    estimate = ppo.estimate([], batch, ppo.initial_state())
    expected = [math.fsum(rewards[t:]) for t in range(6)]
    assert estimate.batch.return_T[1:].tolist() == pytest.approx(expected, abs=1e-12)
    assert estimate.batch.advantage_T[1:].tolist() == pytest.approx(expected, abs=1e-12)
    assert estimate.metrics["reward_clip_fraction"] == 1.0
    assert estimate.metrics["kl"] == pytest.approx(1.7 / 6, abs=1e-12)
    assert estimate.metrics["kl_per_sequence"] == pytest.approx(1.7, abs=1e-12)
    assert estimate.metrics["reward_shaped"] == pytest.approx(math.fsum(rewards), abs=1e-12)


def test_an_outrageous_reward_moves_the_others_no_more_than_a_clipped_one(step):
    # Clipping after the baseline (here: whitening) lets one raw reward of a million crush all other advantages.
    step.groups[0].rollouts[0].reward = 1e6
    ppo = PPO()
    outrageous = ppo.estimate(step.groups, step.batch(), ppo.initial_state()).batch.advantage_T
    step.groups[0].rollouts[0].reward = 10.0
    clipped = ppo.estimate(step.groups, step.batch(), ppo.initial_state()).batch.advantage_T
    assert torch.equal(outrageous, clipped)


def test_estimate_against_loops(step):
    """Whole pipeline: normalize, clip, KL, GAE over trainable tokens, whitening, adaptive coefficient."""
    batch = step.batch()
    batch = seen_batch(batch, reference_logp_T=batch.logp_by("reference") - 0.5 * batch.trainable_T)
    k1_T = batch.proximal_logp_T - batch.logp_by("reference")
    kl = k1_T.sum().item() / batch.segments
    target = kl / 1.1  # An error of 0.1: inside the clip of ±0.2.
    ppo = with_keys(
        PPO(), gamma=0.98, lam=0.9, normalize_rewards=True, reward_clip=1.0, kl_target=target, kl_horizon=100
    )
    estimate = ppo.estimate(step.groups, batch, ppo.initial_state())

    raw = batch.reward_S.tolist()
    mean, std = statistics.fmean(raw), statistics.stdev(raw)
    advantages, sequence_kls = [], []
    for s, score in enumerate(raw):
        a, b = batch.bounds[s].item(), batch.bounds[s + 1].item()
        at = [t for t in range(a, b) if batch.trainable_T[t]]
        k1 = k1_T[at].tolist()
        reward = [-0.05 * x for x in k1]
        reward[-1] += min(max((score - mean) / (std + 1e-8), -1.0), 1.0)
        value = batch.values_by("critic")[at].tolist()
        delta = [r + 0.98 * (value[i + 1] if i + 1 < len(at) else 0.0) - value[i] for i, r in enumerate(reward)]
        advantages += [sum((0.98 * 0.9) ** (j - i) * delta[j] for j in range(i, len(at))) for i in range(len(at))]
        sequence_kls.append(math.fsum(k1))
    centre, spread = statistics.fmean(advantages), statistics.pstdev(advantages)
    expected = [(x - centre) / spread for x in advantages]
    got = estimate.batch.advantage_T[batch.trainable_T]
    assert got.tolist() == pytest.approx(expected, abs=1e-9)

    assert estimate.batch.state == {"kl_coef": 0.05}
    assert estimate.state["kl_coef"] == pytest.approx(0.05 * (1 + 0.1 * len(raw) / 100), rel=1e-12)
    assert estimate.metrics["kl_per_sequence"] == pytest.approx(statistics.fmean(sequence_kls), abs=1e-12)
    assert estimate.metrics["advantage_mean"] == pytest.approx(centre, abs=1e-12)
    assert estimate.metrics["advantage_std"] == pytest.approx(spread, abs=1e-12)


@pytest.mark.parametrize(
    ("knobs", "policy", "critic"),
    [
        ({"critic_lam": 1.0}, lambda n: 0.95, lambda n: 1.0),
        ({"lam_alpha": 0.4}, lambda n: max(0.0, 1 - 1 / (0.4 * n)), None),
        ({"lam_alpha": 0.4, "critic_lam": 0.9}, lambda n: max(0.0, 1 - 1 / (0.4 * n)), lambda n: 0.9),
    ],
)
def test_policy_and_critic_have_lambdas_of_their_own(step, knobs, policy, critic):
    """Decoupled GAE (VC-PPO) with lambda by length (VAPO), against loops in float64; no KL and no whitening."""
    batch = step.batch()
    ppo = with_keys(PPO(), gamma=0.98, kl="none", whiten_advantages=False, **knobs)
    estimate = ppo.estimate(step.groups, batch, ppo.initial_state())
    advantages, returns, lengths = [], [], set()
    for s, score in enumerate(batch.reward_S.tolist()):
        at = [t for t in range(batch.bounds[s], batch.bounds[s + 1]) if batch.trainable_T[t]]
        lengths.add(len(at))
        value = batch.values_by("critic")[at].tolist()
        delta = [
            score * (i + 1 == len(at)) + 0.98 * (value[i + 1] if i + 1 < len(at) else 0.0) - value[i]
            for i in range(len(at))
        ]
        for name, found in (("policy", advantages), ("critic", returns)):
            lam = (critic if name == "critic" and critic else policy)(len(at))
            gaes = [sum((0.98 * lam) ** (j - i) * delta[j] for j in range(i, len(at))) for i in range(len(at))]
            found += gaes if name == "policy" else [a + v for a, v in zip(gaes, value, strict=True)]
    assert len(lengths) > 1
    mask = batch.trainable_T
    assert estimate.batch.advantage_T[mask].tolist() == pytest.approx(advantages, abs=1e-9)
    assert estimate.batch.return_T[mask].tolist() == pytest.approx(returns, abs=1e-9)


def test_a_lambda_that_would_do_nothing_is_refused():
    with pytest.raises(UserError, match="lam: has no effect with lam_alpha"):
        PPO(lam=0.9, lam_alpha=0.05)
    for knobs in ({"lam_alpha": 0.0}, {"critic_lam": 1.5}, {"critic_warmup_steps": -1}):
        with pytest.raises(UserError, match=next(iter(knobs))):
            with_keys(PPO(), **knobs)


def test_the_first_steps_train_the_critic_alone_and_leave_the_kl_coefficient(step):
    ppo = with_keys(PPO(), critic_warmup_steps=2, kl_target=1e-3)
    state, trained, coefs = ppo.initial_state(), [], []
    for _ in range(4):
        trained.append(ppo.trains(state))
        state = ppo.estimate(step.groups, step.batch(), state).state
        coefs.append(state["kl_coef"])
    assert trained == [("critic",), ("critic",), ("actor", "critic"), ("actor", "critic")]
    assert coefs[0] == coefs[1] == 0.05
    assert len({*coefs}) == 3
    ppo.check(3)
    with pytest.raises(UserError, match="critic_warmup_steps: 2, and the run has 2 steps"):
        ppo.check(2)


def test_running_normalization_remembers_across_steps():
    ppo = PPO(normalize_rewards=True)
    state, seen = ppo.initial_state(), []
    for seed in range(3):
        step = make_step(seed)
        seen += step.batch().reward_S.tolist()
        estimate = ppo.estimate(step.groups, step.batch(), state)
        state = estimate.state
    assert all(isinstance(x, float) for x in state.values())
    assert state["reward_count"] == len(seen)
    assert estimate.metrics["reward_running_mean"] == pytest.approx(statistics.fmean(seen), abs=1e-12)
    assert estimate.metrics["reward_running_std"] == pytest.approx(statistics.stdev(seen), abs=1e-12)


def test_equal_rewards_and_a_perfect_critic_teach_nothing():
    batch = one_segment(1.0, old_logp_T=LOGP, reference_logp_T=LOGP, old_value_T=[1.0] * 6)
    ppo = PPO()
    assert ppo.estimate([], batch, ppo.initial_state()).batch.advantage_T.tolist() == [0.0] * 7


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_rounding_is_not_whitened_to_a_signal(reward):
    """A constant reward, a critic that says it, a policy that is the reference: all but for bfloat16's rounding."""
    g = torch.Generator().manual_seed(0)

    def rounded(x_N):
        return (x_N + 0.003 * torch.randn(200, generator=g)).bfloat16().float()

    logp_N = -3 * torch.rand(200, generator=g)
    batch = one_segment(
        reward,
        old_logp_T=rounded(logp_N).tolist(),
        reference_logp_T=rounded(logp_N).tolist(),
        old_value_T=rounded(torch.full((200,), reward)).tolist() if reward else [0.0] * 200,
    )
    # With lam = 1 a constant reward is the same return everywhere.
    ppo = PPO(lam=1.0)
    estimate = ppo.estimate([], batch, ppo.initial_state())
    assert estimate.metrics["advantage_std"] > 1e-3
    assert estimate.batch.advantage_T[1:].std() < 0.25
    # As much of a signal is whole, in whatever unit rewards are.
    for unit in (1e-4, 1.0):
        values = [unit * x for x in torch.randn(200, generator=g).tolist()]
        batch = one_segment(unit * reward, old_logp_T=[0.0] * 200, reference_logp_T=[0.0] * 200, old_value_T=values)
        advantage_T = ppo.estimate([], batch, ppo.initial_state()).batch.advantage_T
        assert advantage_T[1:].std(correction=0).item() == pytest.approx(1.0, abs=1e-6)


def test_kl_has_one_place(step):
    batch = step.batch()
    far = seen_batch(batch, reference_logp_T=batch.logp_by("reference") - 3.0 * batch.trainable_T)

    def estimated(ppo, batch):
        return ppo.estimate(step.groups, batch, ppo.initial_state()).batch

    in_loss = with_keys(PPO(), kl="loss", whiten_advantages=False)
    assert torch.equal(estimated(in_loss, far).advantage_T, estimated(in_loss, batch).advantage_T)
    in_reward = with_keys(PPO(), kl="reward", whiten_advantages=False)
    assert not torch.equal(estimated(in_reward, far).advantage_T, estimated(in_reward, batch).advantage_T)
    a, b = (estimated(in_reward, x) for x in (batch, far))
    b = replace(b, advantage_T=a.advantage_T)
    assert torch.equal(in_reward.loss(step.outputs(a), a).loss_T, in_reward.loss(step.outputs(b), b).loss_T)

    without = with_keys(PPO(), kl="none")
    assert [need.role for need in without.needs()] == ["critic"]
    assert torch.isfinite(estimated(without, unseen_by(batch, "reference")).advantage_T).all()


def test_loss_with_kl_and_entropy_bonus():
    advantage = [1.0, -0.5, 2.0, -1.5, 0.8, -0.6]
    batch = one_segment(
        old_logp_T=REFERENCE, reference_logp_T=[-0.6, -1.1, -0.5, -1.7, -1.0, -0.4], advantage_T=advantage
    )
    batch = replace(batch, state={"kl_coef": 0.04})
    logp_T = torch.tensor([0.0, *LOGP], dtype=torch.float64)
    entropy_T = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    out = Outputs(logp_T=logp_T, entropy_T=entropy_T)
    # TRL 1.16 grpo_trainer's per-token loss (epsilon 0.2, beta 0.04, use_bias_correction_kl False) in float64 on these
    # log-probs and advantages.
    surrogate_and_kl = [
        -1.1998065032785616,
        0.40957221326201687,
        -1.9992507698768807,
        1.2019943523030403,
        -0.9598065032785615,
        3.6314212074750354,
    ]
    loss_T = with_keys(PPO(), kl="loss", kl_estimator="k3", entropy_coef=0.1).loss(out, batch).loss_T
    expected = [x - 0.1 * (i + 1) for i, x in enumerate(surrogate_and_kl)]
    assert loss_T[0] == 0
    assert loss_T[1:].tolist() == pytest.approx(expected, abs=1e-12)


def test_loss_gradcheck(step):
    ppo = with_keys(PPO(), kl="loss", entropy_coef=0.1, dual_clip=2.0)
    batch = ppo.estimate(step.groups, step.batch(), ppo.initial_state()).batch.select([0, 1])
    logp = step.theta[batch.token_ids_T].detach().requires_grad_()
    value = step.omega[batch.token_ids_T].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ppo.loss(Outputs(logp_T=x, entropy_T=x.square()), batch).loss_T, (logp,))
    assert torch.autograd.gradcheck(lambda v: ppo.value_loss(scalar_outputs(v), batch).loss_T, (value,))


def test_metrics_of_the_losses():
    batch = one_segment(
        old_logp_T=REFERENCE, advantage_T=[1.0, -0.5, 2.0, -1.5, 0.8, -0.6], old_value_T=[0.0] * 6, return_T=[1.0] * 6
    )
    logp_T = torch.tensor([0.0, *LOGP], dtype=torch.float64)
    metrics = with_keys(PPO(), kl="none", clip_high=0.28).loss(Outputs(logp_T=logp_T), batch).metrics_T
    mean = {name: value_T[1:].mean().item() for name, value_T in metrics.items()}
    # OpenRLHF 0.11.2 PolicyLoss(0.2, 0.28): loss 0.16563, clip_ratio 1/3.
    assert mean["policy_loss"] == pytest.approx(0.1656251828377647, abs=1e-12)
    assert mean["clip_fraction"] == pytest.approx(1 / 3)
    ratios = [math.exp(a - b) for a, b in zip(LOGP, REFERENCE, strict=True)]
    assert mean["ratio"] == pytest.approx(statistics.fmean(ratios), abs=1e-12)
    # Schulman: KL(old || new) is about (ratio - 1) - log ratio.
    assert mean["approx_kl"] == pytest.approx(statistics.fmean(r - 1 - math.log(r) for r in ratios), abs=1e-12)
    assert "entropy" not in metrics
    # The same with dual_clip=3: its last token's loss is 3 * 0.6.
    dual = with_keys(PPO(), kl="none", clip_high=0.28, dual_clip=3.0).loss(Outputs(logp_T=logp_T), batch)
    assert dual.loss_T[-1].item() == pytest.approx(1.8, abs=1e-12)
    value_T = torch.tensor([0.0, 0.9, 0.9, 0.1, 0.1, -0.1, 1.0], dtype=torch.float64)
    of_critic = PPO().value_loss(scalar_outputs(value_T), batch).metrics_T
    assert of_critic["value_clip_fraction"][1:].tolist() == [1, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"dual_clip": 1.0}, "dual_clip: expected more than 1, got 1.0"),
        ({"kl_target": 0.0}, "kl_target: expected more than 0, got 0.0"),
        ({"lam": 1.5}, "lam: expected from 0 to 1, got 1.5"),
        ({"kl_coef": float("nan")}, "kl_coef: expected 0 or more, got nan"),
        ({"kl_target": 6.0, "kl": "none"}, "kl_target: there is no KL"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target: there is no KL"),
    ],
)
def test_impossible_knobs(knobs, message):
    with pytest.raises(UserError, match=message):
        with_keys(PPO(), **knobs)


def test_what_is_missing_is_named(step):
    ppo = PPO()
    for role in ("critic", "reference"):
        with pytest.raises(ValueError, match=f"the {role} has not seen the batch"):
            ppo.estimate(step.groups, unseen_by(step.batch(), role), ppo.initial_state())
    with pytest.raises(ValueError, match="reward_S"):
        ppo.estimate(step.groups, replace(step.batch(), reward_S=None), ppo.initial_state())


def test_the_floor_of_whitening_adds_rounding_up_by_the_lambda_of_the_advantages():
    """By another one it would be too low for long answers: theirs is near 1 with lam_alpha, and more terms add up."""
    n = 40
    batch = one_segment(0.0, old_logp_T=[-2.0] * n, reference_logp_T=[-2.0] * n, old_value_T=[0.0] * n)
    adaptive, equal = PPO(lam_alpha=0.5), PPO(lam=1 - 1 / (0.5 * n))
    state, zero_T = adaptive.initial_state(), torch.zeros(n + 1, dtype=torch.float64)
    floor = adaptive._rounding(batch, state, zero_T)
    assert floor == pytest.approx(equal._rounding(batch, state, zero_T), rel=1e-9) != 0
