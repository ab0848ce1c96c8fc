"""A prompt that goes through a model once for all its samples: the same numbers and gradients as many times over."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from helpers.models import VOCABULARY, make_module, make_tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config

from tandem.data.packing import pack, pack_pairs, pack_rollouts, stamp_weights
from tandem.models.forward import forward
from tandem.models.loading import load_scalar, prepare_module
from tandem.models.sharing import sharing_of
from tandem.parallel.shares import shares
from tandem.parallel.world import World
from tandem.types import PreferencePair, Rollout, Sequence

MODELS = ["llama", "qwen2_sliding", "gpt_neox", "mistral_sliding", "granite_scaled_logits"]


def model_of(name):
    if name != "qwen2_sliding":
        return prepare_module(make_module(name), make_tokenizer())
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=128, use_sliding_window=True, sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return prepare_module(AutoModelForCausalLM.from_config(config).eval(), make_tokenizer())


def rollouts_of(seed, samples=(4, 1, 7, 2, 3), prompt=(2, 40), completion=(1, 40)):
    """Groups of that many samples, prompts and completions of lengths between those."""
    rng = random.Random(seed)

    def tokens(low, high):
        return [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(low, high))]

    rollouts = []
    for number, count in enumerate(samples):
        prompt_ids = tokens(*prompt)
        for i in range(count):
            own = tokens(*completion)
            trainable = [False] * len(prompt_ids) + [rng.random() < 0.8 for _ in own[:-1]] + [True]
            zeros = [0.0] * len(trainable)
            rollouts.append(
                Rollout(
                    prompt_id=f"p{number}", sample_index=i, token_ids=prompt_ids + own, prompt_length=len(prompt_ids),
                    trainable=trainable, behaviour_logp=zeros, untruncated_logp=zeros, stop="eos", reward=0.0,
                )
            )  # fmt: skip
    return rollouts


def batch_of(seed, **options):
    batch = stamp_weights(pack_rollouts(rollouts_of(seed, **options)), "sequence")
    generator = torch.Generator().manual_seed(seed)
    return replace(batch, advantage_T=torch.randn(batch.tokens, generator=generator))


def through(batch):
    """Tokens that go through a model."""
    sharing = sharing_of(batch)
    return batch.tokens if sharing is None else len(sharing.kept_U)


def step(model, batch, token_budget=10_000):
    """Loss, log-probs and entropies in the order of the batch's rows, and gradients, over micro-batches."""
    model.module.zero_grad()
    logp_T, entropy_T, total = torch.zeros(batch.tokens).double(), torch.zeros(batch.tokens).double(), 0.0
    for share in shares(batch, token_budget, World()):
        micro = share.batch.to("cpu")
        out = forward(model, micro, temperature=0.7, entropy_gradient=True)
        loss = ((out.logp_T * micro.advantage_T + 0.1 * out.entropy_T) * micro.weight_T).sum()
        loss.backward()
        places = batch.tokens_of(share.units)
        logp_T[places], entropy_T[places] = out.logp_T.detach().double(), out.entropy_T.detach().double()
        total += loss.item()
    return total, logp_T, entropy_T, {name: p.grad.double() for name, p in model.module.named_parameters()}


def assert_same(found, want, tolerance):
    assert found[0] == pytest.approx(want[0], abs=tolerance)
    for a, b in zip(found[1:3], want[1:3], strict=True):
        torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=0)
    for name, gradient in want[3].items():
        scale = max(gradient.abs().max().item(), 1.0)
        torch.testing.assert_close(found[3][name], gradient, atol=tolerance * scale, rtol=0, msg=name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_the_same_numbers_and_gradients_as_without(name, seed):
    """But for rounding: in float32, and in float64 where the module computes all in it."""
    model, tolerance = model_of(name), 1e-6
    if name == "gpt_neox":
        model.module.double()
        tolerance = 1e-12
    assert model.packed
    batch = batch_of(seed)
    want = step(model, batch.unshared())
    order = torch.randperm(batch.units, generator=torch.Generator().manual_seed(seed)).tolist()
    assert through(batch) < 0.8 * batch.tokens
    for variant, budget in ((batch, 10_000), (batch, 150), (batch.select(order), 90), (batch, 1)):
        back = torch.empty(batch.tokens, dtype=torch.int64)
        places = torch.arange(batch.tokens) if variant is batch else batch.tokens_of(order)
        back[places] = torch.arange(batch.tokens)
        loss, logp_T, entropy_T, gradients = step(model, variant, budget)
        assert_same((loss, logp_T[back], entropy_T[back], gradients), want, tolerance)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_values_and_scores(tmp_path, name):
    make_module(name).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = load_scalar(tmp_path, new_head="random", seed=3, device="cpu")
    model.module.double()
    batch = batch_of(0)
    results = []
    for variant in (batch, batch.unshared()):
        model.module.zero_grad()
        out = forward(model, variant)
        value_T, score_S = variant.values(out), variant.scores(out)
        ((value_T * batch.advantage_T).sum() + score_S.square().sum()).backward()
        results.append([value_T.detach(), score_S.detach(), *(p.grad for p in model.module.parameters())])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)


def test_what_a_model_sees():
    """Each prompt once, with the positions that its tokens have in every sample."""
    model, seen = model_of("llama"), {}
    rollouts = rollouts_of(0, samples=(3, 2))
    batch = pack_rollouts([rollouts[i] for i in (3, 0, 1, 4, 2)])
    handle = model.module.model.register_forward_pre_hook(
        lambda module, arguments, options: seen.update(options), with_kwargs=True
    )
    forward(model, batch)
    handle.remove()
    first, second = rollouts[0].prompt_length, rollouts[3].prompt_length
    ids, positions = [], []
    for i, dropped in ((3, 0), (0, 0), (1, first), (4, second), (2, first)):
        ids += rollouts[i].token_ids[dropped:]
        positions += range(dropped, len(rollouts[i].token_ids))
    assert seen["input_ids"][0].tolist() == ids
    assert seen["position_ids"][0].tolist() == positions


def test_one_sample_a_prompt_changes_nothing_bit_for_bit():
    batch = batch_of(0, samples=(1,) * 9)
    assert sharing_of(batch) is None
    for name in ("llama", "qwen2_sliding"):
        found, want = step(model_of(name), batch), step(model_of(name), batch.unshared())
        assert found[0] == want[0]
        assert torch.equal(found[1], want[1])
        assert all(torch.equal(found[3][n], g) for n, g in want[3].items())


def test_a_padded_model_sees_every_token():
    model = prepare_module(make_module("bloom"), make_tokenizer())
    assert not model.packed
    batch = batch_of(0)
    assert torch.equal(step(model, batch, 10_000)[1], step(model, batch.unshared(), 10_000)[1])


def test_prompts_are_told_apart_by_their_tokens():
    rows = [[5, 6, 7, 8], [5, 6, 9], [5, 7, 7, 8], [5, 6, 7], [5, 6, *[9] * 80]]
    batch = pack([Sequence(token_ids=ids, trainable=[False, False] + [True] * (len(ids) - 2)) for ids in rows])
    # The last one's prompt is too small a part of it.
    assert batch.prefix_S.tolist() == [2, 2, 2, 2, 0]
    assert batch.group_S.tolist() == [0, 0, 1, 0, 2]
    chosen = batch.select([4, 3, 2, 0])
    assert (chosen.prefix_S.tolist(), chosen.group_S.tolist()) == ([0, 2, 2, 2], [2, 0, 1, 0])
    assert through(chosen) == chosen.tokens - 2


def test_a_micro_batch_in_which_none_begin_alike_takes_the_way_of_the_others_and_gives_the_same_bits():
    batch = batch_of(0, samples=(3, 3))
    lone = batch.select([0, 4])
    sharing = sharing_of(lone)
    assert torch.equal(sharing.kept_U, torch.arange(lone.tokens))
    assert min(*sharing.sharers_Pn.shape, *sharing.shared_P.shape) == 2
    assert all(0 not in x.stride() for x in vars(sharing).values()), "pinned memory takes no expanded tensor"
    model = model_of("llama")
    found, want = step(model, lone), step(model, lone.unshared())
    assert found[0] == want[0]
    assert torch.equal(found[1], want[1])
    assert torch.equal(found[2], want[2])
    assert all(torch.equal(found[3][name], gradient) for name, gradient in want[3].items())


def test_a_step_in_which_none_begin_alike_shares_nothing():
    assert sharing_of(batch_of(0, samples=(1, 1, 1))) is None


def test_nothing_but_a_prompt_keeps_a_token_of_its_own():
    batch = pack([Sequence(token_ids=[5, 6, 7], trainable=[False] * 3) for _ in range(3)])
    assert batch.prefix_S.tolist() == [2, 2, 2]
    assert through(batch) == 5


def test_a_pair_shares_its_prompt():
    def answer(*ids):
        return Sequence(token_ids=[5, 6, 7, *ids], trainable=[False] * 3 + [True] * len(ids))

    batch = pack_pairs([PreferencePair(chosen=answer(8, 9), rejected=answer(8)) for _ in range(2)])
    assert through(batch) == batch.tokens - 9
    assert through(batch.select([1])) == 6
    model = model_of("llama")
    with torch.no_grad():
        found, want = forward(model, batch).logp_T, forward(model, batch.unshared()).logp_T
    torch.testing.assert_close(found, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_budget_counts_what_goes_through(ranks):
    batch = batch_of(1, samples=(8,) * 6)
    shuffled = batch.select(torch.randperm(batch.units, generator=torch.Generator().manual_seed(0)).tolist())
    for variant in (batch, shuffled):
        parts = [list(shares(variant, 250, World(rank=rank, size=ranks))) for rank in range(ranks)]
        done = [share for part in parts for share in part if share.units]
        assert sorted(unit for share in done for unit in share.units) == list(range(batch.units))
        assert all(through(share.batch) <= 250 for share in done)
        assert any(share.batch.tokens > 250 for share in done)
        # Prompts stay with their samples: in one micro-batch, but for those that two meet in.
        whole = through(batch) + sum(len(part) for part in parts) * 40
        assert sum(through(share.batch) for share in done) < whole
