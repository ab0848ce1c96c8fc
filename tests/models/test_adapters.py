"""Adapters on a model: what is trained, saved and read back, against peft itself; the base as a view."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import make_module, make_tokenizer
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, MambaConfig, ZambaConfig

from tandem.assembly.configs.methods import config_class
from tandem.batch import TokenLoss
from tandem.config import load_config
from tandem.data.packing import pack, stamp
from tandem.errors import UserError
from tandem.models.forward import hidden_states
from tandem.models.loading import load_causal, load_scalar
from tandem.models.lora.adapters import AdapterParams, merge_folder, put_adapters
from tandem.models.lora.pairs import NAME, adapted
from tandem.models.quantized.layers import quantize_module
from tandem.training.optim import OptimParams
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer
from tandem.training.views import View
from tandem.types import Sequence

peft = pytest.importorskip("peft")
ROWS = [[5, 9, 13, 2, 7, 30], [5, 9, 13, 40, 41], [8, 3, 22]]
KINDS = {"dora": {"dora": True, "targets": ("q_proj", "down_proj")}, "rslora": {"rslora": True}}
"""Plain ones are in test_adapter_targets.py."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_module("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def batch_of_rows(rows=ROWS):
    batch = pack([Sequence(token_ids=ids, trainable=[False] + [True] * (len(ids) - 1)) for ids in rows])
    return stamp(batch, "token")


def negative_logp(out, batch):
    return TokenLoss(loss_T=-out.logp_T * batch.trainable_T, metrics_T={})


def trainer_of(source, params, *, dtype="float32", loss=negative_logp, load=load_causal, **options):
    model = load(source, adapters=params, device="cpu", dtype=dtype, **options)
    return LocalTrainer(model, loss, OptimParams(learning_rate=3e-2, total_steps=9), token_budget=20)


def train(trainer, steps=2):
    for _ in range(steps):
        trainer.forward_backward(batch_of_rows())
        trainer.optim_step()


def logp_of(scorer):
    return scorer.score(batch_of_rows()).logp_T


def peft_logp(base, folder):
    """Of the packed rows by transformers and peft alone, one row at a time."""
    module = load_causal(base, device="cpu").module if isinstance(base, Path) else base
    module = peft.PeftModel.from_pretrained(module, folder)
    module.base_model.model.set_attn_implementation("eager")
    found = []
    for ids in ROWS:
        with torch.no_grad():
            logp = module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found += [0.0, *(logp[i - 1, ids[i]].item() for i in range(1, len(ids)))]
    return torch.tensor(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_at_zero_and_the_view_are_the_base_bit_for_bit(base, dtype):
    alone = logp_of(LocalScorer(load_causal(base, device="cpu", dtype=dtype), token_budget=20))
    trainer = trainer_of(base, AdapterParams(rank=4), dtype=dtype)
    view = View(trainer, temperature=1.0)
    assert torch.equal(logp_of(trainer), alone)
    train(trainer)
    assert not torch.allclose(logp_of(trainer), alone, atol=1e-2)
    assert torch.equal(logp_of(view), alone)
    assert not torch.equal(view.score(batch_of_rows(), 0.5).logp_T, alone)


@pytest.mark.parametrize(
    ("kind", "scale", "magnitudes"),
    [({}, 6 / 4, False), ({"rslora": True}, 6 / 2, False), ({"dora": True}, 6 / 4, True)],
)
def test_the_scale_is_alpha_over_the_rank_or_over_its_root(base, kind, scale, magnitudes):
    module = load_causal(base, device="cpu").module
    put_adapters(module, AdapterParams(rank=4, alpha=6.0, **kind), str(base))
    layers = adapted(module).values()
    assert {layer.scaling[NAME] for layer in layers} == {scale}
    assert any("magnitude" in name for name, _ in module.named_parameters()) == magnitudes


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_written_as_peft_reads_it(base, tmp_path, kind):
    trainer = trainer_of(base, AdapterParams(rank=4, alpha=6.0, **KINDS[kind]))
    train(trainer)
    trainer.export(tmp_path / "out")
    found = logp_of(trainer)
    torch.testing.assert_close(found, peft_logp(base, tmp_path / "out"), rtol=0, atol=2e-5)
    # Read back: to be trained on, the same bits; merged into the base, up to rounding.
    again = trainer_of(tmp_path / "out", AdapterParams(folder=str(tmp_path / "out")))
    assert torch.equal(logp_of(again), found)
    merged = load_causal(tmp_path / "out", device="cpu")
    assert not adapted(merged.module)
    torch.testing.assert_close(logp_of(LocalScorer(merged, token_budget=20)), found, rtol=0, atol=2e-5)
    weights = trainer.policy.merged()
    assert list(weights) == [name for name, _ in merged.module.named_parameters()]
    for name, parameter in merged.module.named_parameters():
        torch.testing.assert_close(weights[name], parameter, rtol=0, atol=1e-6)
    # A view of adapters that began with something keeps what they began with.
    view = View(again, temperature=1.0)
    train(again)
    assert torch.equal(logp_of(view), found)
    assert not torch.equal(logp_of(again), found)


def test_a_view_that_follows_is_the_formulas_mixture_of_adapters(base):
    """``mix policy + (1 - mix) view``, once after a step, at a temperature of its own; the policy stays as it is."""
    trainer = trainer_of(base, AdapterParams(rank=4))
    view = View(trainer, temperature=0.7, follows=True)
    expected = {name: weight.detach().double() for name, weight in trainer.weights.items()}
    for step, mix in ((1, 0.3), (2, 0.9)):
        train(trainer)
        for _ in range(2):
            view.follow(trainer.weights, mix, step)
        expected = {n: mix * w.detach().double() + (1 - mix) * expected[n] for n, w in trainer.weights.items()}
    own = logp_of(trainer)
    for name, mine in view.exact.items():
        assert (mine.double() - expected[name]).abs().max() < 1e-6, name
    assert (logp_of(view) - trainer.score(batch_of_rows(), 0.7).logp_T).abs().max() > 1e-3
    view.follow(trainer.weights, 1.0, 3)
    assert torch.equal(logp_of(view), trainer.score(batch_of_rows(), 0.7).logp_T)
    assert torch.equal(logp_of(trainer), own)


def test_nothing_but_adapters_has_a_gradient_an_optimizer_state_or_a_place_in_a_checkpoint(base):
    trainer = trainer_of(base, AdapterParams(rank=4), dtype="bfloat16")
    trainer.forward_backward(batch_of_rows())
    assert all(".lora_" in name for name in trainer.weights)
    for name, weight in trainer.masters.named.items():
        assert (weight.grad is not None) == (name in trainer.weights), name
        assert weight.dtype == (torch.float32 if name in trainer.weights else torch.bfloat16), name
    trainer.optim_step()
    state = trainer.state_dict()
    assert set(state["model"]) == set(trainer.weights)
    assert len(trainer.optimizer.state_dict()[0]["state"]) == len(trainer.weights)
    held = sum(x.numel() for x in state["model"].values())
    assert held < 0.5 * sum(p.numel() for p in trainer.model.module.parameters())


def test_a_checkpoint_goes_on_bit_for_bit_and_refuses_another_base(base, tmp_path):
    whole, first = (trainer_of(base, AdapterParams(rank=4)) for _ in range(2))
    train(whole, 4)
    train(first, 2)
    again = trainer_of(base, AdapterParams(rank=4, seed=9))
    again.load_state_dict(first.state_dict())
    train(again, 2)
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())
    make_module("llama", seed=5).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"trained on another base \(.*give the model that the run began with"):
        trainer_of(tmp_path, AdapterParams(rank=4)).load_state_dict(first.state_dict())


def test_where_they_start_follows_from_the_seed_and_the_layer(base):
    def starts(seed):
        torch.manual_seed(torch.seed() % 1000)
        return {n: w.clone() for n, w in trainer_of(base, AdapterParams(rank=4, seed=seed)).weights.items()}

    one, same, other = starts(1), starts(1), starts(2)
    for name, weight in one.items():
        assert torch.equal(weight, same[name])
        if "lora_B" in name:
            assert not weight.any()
        else:
            assert not torch.equal(weight, other[name])
            assert weight.abs().max() <= weight.shape[1] ** -0.5


def test_a_scalar_head_is_trained_whole_and_goes_along(base, tmp_path):
    def loss(out, batch):
        return TokenLoss(loss_T=(out.scalar_T - 1) ** 2 * batch.trainable_T, metrics_T={})

    options = {"loss": loss, "load": load_scalar, "new_head": "random"}
    trainer = trainer_of(base, AdapterParams(rank=4), **options)
    assert "score.weight" in trainer.weights
    train(trainer)
    trainer.export(tmp_path)
    found = trainer.score(batch_of_rows()).scalar_T
    merged = load_scalar(tmp_path, new_head="refuse", device="cpu")
    torch.testing.assert_close(LocalScorer(merged, token_budget=20).score(batch_of_rows()).scalar_T, found, rtol=0,
                               atol=2e-5)  # fmt: skip
    again = trainer_of(tmp_path, AdapterParams(folder=str(tmp_path)), **options | {"new_head": "refuse"})
    assert torch.equal(again.score(batch_of_rows()).scalar_T, found)
    with pytest.raises(UserError, match="reward model or a critic"):
        load_causal(tmp_path, device="cpu")


def test_a_critic_begins_with_a_policys_adapters_merged_beneath_its_own(base, tmp_path):
    policy = trainer_of(base, AdapterParams(rank=4))
    train(policy)
    policy.export(tmp_path)
    critic = load_scalar(tmp_path, new_head="zero", device="cpu", adapters=AdapterParams(rank=2))
    found, wanted = (hidden_states(model, batch_of_rows()) for model in (critic, policy.model))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert critic.adapters.base == str(tmp_path)


def test_a_folder_of_adapters_may_be_below_home(base, tmp_path, monkeypatch):
    trainer_of(base, AdapterParams(rank=4)).export(tmp_path / "out")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trainer_of("~/out", AdapterParams(folder="~/out")).policy.adapters.config.r == 4


def test_adapters_that_lack_some_are_not_merged_without_them(base, tmp_path):
    trainer_of(base, AdapterParams(rank=4)).export(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: x for name, x in load_file(path).items() if "layers.1.mlp.up_proj" not in name}, path)
    with pytest.raises(UserError, match=r"its adapters are not of its base: Found missing .*layers.1.mlp.up_proj"):
        load_causal(tmp_path, device="cpu")


def test_adapters_that_do_not_fit_or_are_half_there_are_not_merged(base, tmp_path):
    """Nor was the first told of in a line that said what, nor the second in a line at all."""
    trainer_of(base, AdapterParams(rank=4)).export(tmp_path)
    config, path = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text(config.read_text().replace('"r": 4', '"r": 2'))
    with pytest.raises(UserError, match=r"not of its base: Error\(s\) in loading .*: size mismatch for .*lora_A"):
        load_causal(tmp_path, device="cpu")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"adapter_model.safetensors: cannot be read: Error while deserializing"):
        merge_folder(load_causal(base, device="cpu").module, str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "kind IA3"),
        ({"base_model_name_or_path": None}, "does not name its base"),
        ({"r": "many"}, "not the config of LoRA adapters"),
        ({"base_model_name_or_path": "/nowhere/base"}, "adapters of /nowhere/base, which is no folder"),
        ({"bias": "all"}, "its adapters train bias besides pairs of matrices"),
        ({"r": 2}, "not adapters of this model"),
        ({"lora_bias": True}, "more than a pair of matrices on a linear layer"),
        ({"alora_invocation_tokens": [9]}, "more than a pair of matrices on a linear layer"),
        ({"target_modules": ["q_proj", "lm_head"], "use_dora": True}, "those of lm_head are more than"),
        ({"init_lora_weights": "pissa"}, "began with a part that peft took out of their base"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "has some of its layers several times"),
    ],
)
def test_a_folder_of_adapters_that_cannot_be_trained_on_is_refused(base, tmp_path, change, message):
    trainer_of(base, AdapterParams(rank=4)).export(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        trainer_of(tmp_path, AdapterParams(folder=str(tmp_path)))


def test_a_folder_of_adapters_knows_its_base(base, tmp_path, caplog):
    """As it is read to be trained on, or merged, also beneath a head of another kind."""
    trainer_of(base, AdapterParams(rank=4)).export(tmp_path / "own")
    module = load_causal(base, device="cpu").module
    with torch.no_grad():
        module.lm_head.weight[3, 5] += 1e-3
    module.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    shutil.copytree(tmp_path / "own", tmp_path / "moved")
    path = tmp_path / "moved" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "other")}))
    for folder, warned in ((str(tmp_path / "own"), 0), (str(tmp_path / "moved"), 3)):
        trainer_of(folder, AdapterParams(folder=folder))
        trainer_of(folder, AdapterParams(folder=folder, quantize="fp8"))
        load_causal(folder, device="cpu")
        load_scalar(folder, new_head="zero", device="cpu")  # without the head that differs
        assert caplog.text.count(f"{folder}: its adapters were trained beside other weights (") == warned


def test_a_revision_of_a_base_on_the_hub_is_said(base, tmp_path, monkeypatch, caplog):
    """What is read is the newest."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "models--org--x" / "refs").mkdir(parents=True)
    (tmp_path / "models--org--x" / "refs" / "main").write_text("c" * 40)
    shutil.copytree(base, tmp_path / "models--org--x" / "snapshots" / ("c" * 40))
    trainer_of(base, AdapterParams(rank=4)).export(tmp_path / "own")
    path = tmp_path / "own" / "adapter_config.json"
    for name, revision, said in ((str(base), "a1", False), ("org/x", "main", False), ("org/x", "a1", True)):
        found = {"base_model_name_or_path": name, "revision": revision}
        path.write_text(json.dumps(json.loads(path.read_text()) | found))
        load_causal(tmp_path / "own", device="cpu")
        assert ("its adapters are of org/x at revision a1" in caplog.text) is said


@pytest.mark.parametrize("began", ["pissa", "olora", "pissa_niter_4", "lora_ga"])
def test_what_peft_takes_out_of_a_base_is_merged_where_it_takes_out_the_same_again(base, tmp_path, began):
    trainer_of(base, AdapterParams(rank=4)).export(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": began}))
    if "_" in began:
        with pytest.raises(UserError, match="began with a part that peft took out of their base"):
            load_causal(tmp_path, device="cpu")
        return
    merged = LocalScorer(load_causal(tmp_path, device="cpu"), token_budget=20)
    torch.testing.assert_close(logp_of(merged), peft_logp(base, tmp_path), rtol=0, atol=2e-5)


def test_linear_layers_in_a_list_are_known_by_its_name():
    """Layers have numbers, too: adapters on one called 0 would be on whole layers."""
    config = Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=None, altup_num_inputs=2,
    )  # fmt: skip
    module = AutoModelForCausalLM.from_config(config)
    put_adapters(module, AdapterParams(rank=4), "base")
    on = {name.removeprefix("model.") for name in adapted(module)}
    assert {"altup_projections.0", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"} < on
    assert "layers.0" not in on


def test_the_config_takes_what_the_folder_has_and_ten_times_the_learning_rate(base, tmp_path):
    def config(method, *flags, model=base):
        data = ["--data", "d", "--out", "o", "--steps", "3", "--model", str(model)]
        return load_config(config_class(method), [*data, *flags])

    reward = ["--reward", "math"]
    assert config("grpo", *reward).optim.learning_rate == 1e-6
    assert config("grpo", *reward, "--lora.rank", "8").optim.learning_rate == 1e-5
    assert config("grpo", *reward, "--lora.rank", "8", "--learning-rate", "3e-6").optim.learning_rate == 3e-6
    critics = [config("ppo", *reward, *flags).models.learning_rate("critic") for flags in ([], ["--lora.rank", "8"])]
    assert critics[1] == pytest.approx(10 * critics[0])
    said = config("ppo", *reward, "--lora.rank", "8", "--critic-learning-rate", "3e-7").notes
    assert said == ["adapters: learning rate 1e-05, 10 x 1e-06, which is the whole model's"]
    said = config("ppo", *reward, "--lora.rank", "8").notes
    assert (
        said[1]
        == f"adapters of the critic: learning rate {critics[1]:g}, 10 x {critics[0]:g}, which is the whole model's"
    )
    trainer_of(base, AdapterParams(rank=4, alpha=6.0)).export(tmp_path)
    found = config("sft", model=tmp_path)
    assert (found.lora.rank, found.lora.alpha, "q_proj" in found.lora.targets) == (4, 6.0, True)
    assert found.optim.learning_rate == pytest.approx(10 * config("sft").optim.learning_rate)
    with pytest.raises(UserError, match=r"lora.rank: the adapters in .* have 4, got 8"):
        config("sft", "--lora.rank", "8", model=tmp_path)
    with pytest.raises(UserError, match="adapters begin at 0, where they would stay"):
        config("sft", "--lora.rank", "8", "--optimizer", "adafactor")
    for flags in (["--reference", "other"], ["--placement.reference", "1"]):
        with pytest.raises(UserError, match="follows them on the actor's own base"):
            config("dpo", "--lora.rank", "8", "--reference-every", "2", *flags)
    for flag, message in (("--lora.alpha", "has no effect without --lora.rank"), ("--lora.dropout", "unknown flag")):
        with pytest.raises(UserError, match=message):
            config("sft", flag, "0.5")


def test_models_with_states_get_the_adapters_that_peft_takes_or_a_line(caplog):
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 5, "use_mamba_kernels": False}
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**common, state_size=8))
    quantize_module(mamba, "fp8")
    put_adapters(mamba, AdapterParams(rank=4), "base")
    layers = {
        name.partition(".lora_A")[0].rpartition(".")[2] for name, p in mamba.named_parameters() if p.requires_grad
    }
    assert {"in_proj", "x_proj"} <= layers
    # Of these its code reads the weights, and adapters on dt_proj would never have a gradient.
    assert not {"out_proj", "dt_proj"} & layers
    assert "all-linear leaves out dt_proj and out_proj" in caplog.text
    mamba(torch.tensor([[5, 9, 13]])).logits.sum().backward()
    assert all(p.grad is not None for p in mamba.parameters() if p.requires_grad)
    zamba = ZambaConfig(**common, num_attention_heads=4, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8,
                        intermediate_size=48)  # fmt: skip
    with pytest.raises(UserError, match="has linear layers with weights in common"):
        put_adapters(AutoModelForCausalLM.from_config(zamba), AdapterParams(rank=4), "base")
