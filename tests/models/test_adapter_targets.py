"""Adapters on embeddings, heads and stacked experts: at zero, trained, written, merged, against peft and float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from helpers.family_models import made
from helpers.models import _COMMON, make_module, make_tokenizer
from helpers.ranks import run_ranks
from helpers.targets import ROWS, TARGETS, batch_of_rows, make_bases, train, trainer_of
from safetensors.torch import load_file

from tandem.errors import UserError
from tandem.functional.logprobs import Added, chunked_head
from tandem.kernels.logprob import HeadShape
from tandem.models.forward import forward
from tandem.models.loading import load_causal
from tandem.models.lora.adapters import AdapterParams, put_adapters, put_saved
from tandem.models.lora.pairs import adapted, pairs_of, showing
from tandem.models.lora.targets import targets_of
from tandem.models.moe.experts import is_stack
from tandem.parallel.sharding import unsharded
from tandem.parallel.world import World
from tandem.training.optim import hidden_matrices
from tandem.training.scorer import LocalScorer
from tandem.training.views import View

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


def logp_of(scorer):
    return scorer.score(batch_of_rows()).logp_T


def peft_logp(base, folder):
    """Of the packed rows by transformers and peft alone, one row at a time."""
    module = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
    found = []
    for ids in ROWS:
        with torch.no_grad():
            logp = module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found += [0.0, *(logp[i - 1, ids[i]].item() for i in range(1, len(ids)))]
    return torch.tensor(found)


@pytest.mark.parametrize(("kind", "targets"), TARGETS)
def test_at_zero_they_are_the_base_bit_for_bit_and_trained_they_are_what_peft_computes(bases, tmp_path, kind, targets):
    base = bases[kind]
    alone = logp_of(LocalScorer(load_causal(base, device="cpu"), token_budget=40))
    trainer = trainer_of(base, AdapterParams(rank=4, alpha=6.0, targets=targets))
    view = View(trainer, temperature=1.0)
    assert torch.equal(logp_of(trainer), alone)
    train(trainer)
    found = logp_of(trainer)
    assert (found - alone).abs().max() > 1e-2
    assert torch.equal(logp_of(view), alone)
    trainer.export(tmp_path / "out")
    torch.testing.assert_close(found, peft_logp(base, tmp_path / "out"), rtol=0, atol=2e-5)
    module = load_causal(base, device="cpu").module
    state = trainer.state_dict()
    put_saved(module, state["adapters"], str(base), state["model"])
    assert {name: p.tolist() for name, p in module.named_parameters()} == {
        name: p.tolist() for name, p in trainer.model.module.named_parameters()
    }
    # Read back to be trained on, and merged.
    again = trainer_of(tmp_path / "out", AdapterParams(folder=str(tmp_path / "out")))
    assert torch.equal(logp_of(again), found)
    merged = load_causal(tmp_path / "out", device="cpu")
    assert not adapted(merged.module)
    torch.testing.assert_close(logp_of(LocalScorer(merged, token_budget=40)), found, rtol=0, atol=2e-5)
    weights = trainer.policy.merged()
    parameters = dict(merged.module.named_parameters())
    assert list(weights) == list(parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(weights[name], parameter, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_compute_what_pefts_own_forward_does_with_its_gradient(bases, kind):
    def gradients(slow):
        model = load_causal(bases[kind], adapters=AdapterParams(rank=4, targets=("experts",)), device="cpu")
        if slow:
            for part in [part for part in model.module.modules() if is_stack(part)]:
                part.__class__ = peft.tuners.lora.ParamWrapper
        with showing(model.module):
            logp_T = forward(model, batch_of_rows()).logp_T
            logp_T.sum().backward()
            return logp_T.detach(), {n: p.grad.clone() for n, p in model.module.named_parameters() if p.requires_grad}

    (found, mine), (wanted, theirs) = gradients(False), gradients(True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_experts_with_adapters_and_routers_in_float32_are_pickled_and_copied(bases):
    model = load_causal(bases["qwen3_moe"], adapters=AdapterParams(rank=4, targets=("experts",)), device="cpu")
    module = model.module
    model.compute_in(torch.bfloat16)
    ours = {type(part).__name__ for part in module.modules() if type(part).__module__.startswith("tandem.models.")}
    assert ours == {"ParamWrapper", "Qwen3MoeTopKRouter"}
    ids = torch.arange(2, 20)[None]
    for again in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert [type(part) for part in again.modules()] == [type(part) for part in module.modules()]
        with showing(again), showing(module):
            assert torch.equal(again(input_ids=ids).logits, module(input_ids=ids).logits)


def test_a_folder_that_peft_has_written_is_trained_on(bases, tmp_path):
    """With ranks and alphas by layer, and the embedding that peft writes beside its adapters, which must be the
    base's own."""
    module = transformers.AutoModelForCausalLM.from_pretrained(bases["qwen3_moe"])
    config = peft.LoraConfig(
        r=2, target_modules=["embed_tokens", "q_proj", "lm_head"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"], task_type="CAUSAL_LM",
        base_model_name_or_path=str(bases["qwen3_moe"]), init_lora_weights=False,
        rank_pattern={"embed_tokens": 3, "layers.1.self_attn.q_proj": 1}, alpha_pattern={"q_proj": 20, "lm_head": 3},
    )  # fmt: skip
    theirs = peft.get_peft_model(module, config)
    theirs.save_pretrained(tmp_path)
    assert any(
        name.endswith("embed_tokens.base_layer.weight") for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    found = logp_of(trainer_of(tmp_path, AdapterParams(folder=str(tmp_path))))
    torch.testing.assert_close(found, peft_logp(bases["qwen3_moe"], tmp_path), rtol=0, atol=5e-5)
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.base_layer.weight += 1
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"embed_tokens.base_layer.weight is another than the base's"):
        trainer_of(tmp_path, AdapterParams(folder=str(tmp_path)))


@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_heads_adapters_are_added_chunk_by_chunk_with_their_gradient(cap):
    generator = torch.Generator().manual_seed(0)
    tokens, width, rank, words = 11, 6, 3, 9

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    hidden, inner, up = drawn(tokens, width), drawn(tokens, rank), drawn(words, rank)
    head = torch.nn.Linear(width, words).double()
    target = torch.randint(words, (tokens,), generator=generator)
    inputs = (hidden, inner, up, head.weight, head.bias)
    shape = HeadShape(1.0, cap)
    wanted = []
    for t in range(tokens):
        logits = head.weight @ hidden[t] + head.bias + up @ inner[t]
        logp = ((logits if cap is None else cap * torch.tanh(logits / cap)) / 0.7).log_softmax(0)
        wanted.append(torch.stack((logp[target[t]], -(logp.exp() * logp).sum())))
    wanted = torch.stack(wanted)
    factor = drawn(tokens, 2).detach()
    truth = torch.autograd.grad((wanted * factor).sum(), inputs)
    hooked = torch.nn.Linear(width, words).double()
    hooked.load_state_dict(head.state_dict())
    # A head with a hook is called as it is.
    hooked.register_forward_hook(lambda *_: None)
    for one in (head, hooked):
        leaves = (hidden, inner, up, one.weight, one.bias)
        out = chunked_head(one, hidden, target, temperature=0.7, chunk_tokens=4, entropy=True, entropy_grad=True,
                           shape=shape, added=Added(inner, up))  # fmt: skip
        found = torch.stack((out.logp_N, out.entropy_N), dim=1)
        torch.testing.assert_close(found, wanted)
        for mine, theirs in zip(torch.autograd.grad((found * factor).sum(), leaves), truth, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_what_is_shown_to_a_trial_matters_and_is_taken_back(bases):
    model = load_causal(
        bases["qwen3_moe"], adapters=AdapterParams(rank=4, targets=("all-linear", "experts")), device="cpu"
    )
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.module.named_parameters()}
    pairs = pairs_of(model.module)
    with showing(model.module):
        parameters = dict(model.module.named_parameters())
        for pair in pairs.values():
            up, down = pair.factors(parameters[pair.a], parameters[pair.b])
            share = (pair.scale * up @ down).norm() / parameters[pair.parameter].norm()
            assert 0.3 < share < 0.8
    for name, parameter in model.module.named_parameters():
        assert (parameter.data_ptr(), parameter.tolist()) == (before[name][0], before[name][1].tolist())


def test_a_folder_with_adapters_on_a_tied_embedding_is_not_merged_into_the_head(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_COMMON, tie_word_embeddings=True)
    module = transformers.AutoModelForCausalLM.from_config(config)
    module.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        peft.get_peft_model(module, peft.LoraConfig(target_modules=["embed_tokens"])).save_pretrained(
            tmp_path / "adapters"
        )
    for params in (None, AdapterParams(folder=str(tmp_path / "adapters"))):
        with pytest.raises(UserError, match="the model's head is its embedding"):
            load_causal(tmp_path / "adapters", adapters=params, device="cpu")


def test_muon_is_not_for_embeddings_and_stacked_experts(bases):
    model = load_causal(
        bases["qwen3_moe"], adapters=AdapterParams(targets=("q_proj", "embed_tokens", "experts")), device="cpu"
    )
    found = hidden_matrices(model.module)
    assert {name.split(".")[-3] for name in found if ".lora_" in name} == {"lora_A", "lora_B"}
    assert all("q_proj" in name for name in found if ".lora_" in name)


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("tied", {"targets": ("embed_tokens",)}, "the model's head is its embedding"),
        ("tied", {"targets": ("all-linear", "lm_head")}, "the model's head is its embedding"),
        (
            "llama",
            {"targets": ("experts",)},
            "has no layer experts that adapters can be put on; those it has: down_proj",
        ),
        ("llama", {"targets": ("nothing",)}, "those it has: down_proj.*embed_tokens, lm_head"),
        ("llama", {"targets": ("embed_tokens",), "dora": True}, r"lora.dora: is of linear layers, and .* embed_tokens"),
        ("qwen3_moe", {"targets": ("experts",), "dora": True}, "lora.dora: is of linear layers"),
        (
            "gpt2",
            {"dora": True},
            r"lora.dora: is of layers that are stored as \[out, in\], and GPT2.* c_(attn|fc|proj)",
        ),
        ("llama", {"rank": 33}, r"lora.rank: 33 is more than .* have: down_proj \(32\), gate_proj \(32\), k_proj \(16"),
        ("qwen3_moe", {"targets": ("experts",), "rank": 33}, r"experts.down_proj \(16\), experts.gate_up_proj \(32"),
    ],
)
def test_what_cannot_have_adapters_is_refused(bases, kind, params, message):
    module = make_module("llama")
    if kind == "tied":
        module.lm_head.weight = module.model.embed_tokens.weight
    if kind in ("qwen3_moe", "gpt2"):
        module = transformers.AutoModelForCausalLM.from_pretrained(bases[kind])
    with pytest.raises(UserError, match=message):
        put_adapters(module, AdapterParams(**{"rank": 2} | params), "base")


def test_layers_that_peft_takes_for_experts_have_no_dora():
    module = made("glm5")
    with pytest.raises(
        UserError, match=r"takes down_proj, gate_proj, up_proj of GlmMoeDsa.* or give --lora\.targets kv"
    ):
        targets_of(module, ("all-linear",), 2, dora=True)
    assert targets_of(module, ("o_proj", "q_b_proj"), 2, dora=True) == (["o_proj", "q_b_proj"], [])


def test_a_rank_that_is_low_for_some_targets_alone_is_said(caplog):
    put_adapters(make_module("llama"), AdapterParams(rank=16, targets=("q_proj", "k_proj")), "base")
    assert not caplog.text
    put_adapters(make_module("llama"), AdapterParams(rank=17, targets=("q_proj", "k_proj")), "base")
    assert (
        "lora.rank: 17 is more than the matrices of some targets have, which is no low rank: k_proj (16)" in caplog.text
    )


def test_a_model_beside_the_policy_may_lack_its_head(bases):
    config = transformers.AutoConfig.from_pretrained(bases["llama"], num_labels=1)
    module = transformers.AutoModelForSequenceClassification.from_config(config)
    found = put_adapters(module, AdapterParams(rank=2, targets=("q_proj", "lm_head"), beside=True), "base")
    assert {name.split(".")[-4] for name in found.trained if "lora" in name} == {"q_proj"}


@pytest.mark.parametrize(
    ("kind", "targets", "wanted"),
    [
        ("qwen3_moe", ("q_proj", "experts.down_proj"), {"self_attn.q_proj", "mlp.experts"}),
        ("llama", (r".*layers\.1\.(self_attn|mlp)\.(q|up)_proj",), {"self_attn.q_proj", "mlp.up_proj"}),
    ],
)
def test_a_critic_has_them_where_the_policys_folder_of_peft_does(bases, kind, targets, wanted):
    config = transformers.AutoConfig.from_pretrained(bases[kind], num_labels=1)
    module = transformers.AutoModelForSequenceClassification.from_config(config)
    put_adapters(module, AdapterParams(rank=2, targets=targets, beside=True), "base")
    assert {".".join(name.split(".")[3:]) for name in adapted(module)} == wanted
    stacks = [layer.parameter_name for layer in adapted(module).values() if is_stack(layer)]
    assert set(stacks) == ({"down_proj"} if "experts.down_proj" in targets else set())


def sharded(world, base):
    """Log-probs and folded weights of adapters that have been trained, in a world of that size."""
    params = AdapterParams(rank=4, targets=("all-linear", "experts", "embed_tokens", "lm_head"))
    trainer = trainer_of(base, params, world=world)
    train(trainer, 1)
    weights = trainer.policy.merged()
    return logp_of(trainer), {name: unsharded(weights[name]).clone() for name in pairs_of(trainer.model.module)}


def test_two_workers_train_and_fold_them_as_one_does(bases):
    wanted_T, whole = sharded(World(), bases["qwen3_moe"])
    for logp_T, weights in run_ranks(sharded, 2, bases["qwen3_moe"]):
        torch.testing.assert_close(logp_T, wanted_T, rtol=0, atol=2e-5)
        for name, weight in whole.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)
