"""Weights are taken whole: what a folder lacks is never made up, and what is wrong with it is said by name."""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers.models import make_module, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tandem.errors import UserError
from tandem.models.folder import quiet_transformers
from tandem.models.loading import load_causal, load_scalar, load_tokenizer
from tandem.models.proof.limits import limits_of, read_limits


def save(module, folder, **options):
    with quiet_transformers():
        module.save_pretrained(folder, **options)
        make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(make_module("llama"), tmp_path_factory.mktemp("weights") / "base")


@pytest.fixture
def changed(base, tmp_path):
    """A copy of the base model's folder whose tensors ``change`` has been at."""

    def make(change):
        folder = tmp_path / "changed"
        shutil.copytree(base, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def nan_in(name):
    def change(tensors):
        tensors[name].view(-1)[3] = math.nan

    return change


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(NORM), ["LlamaForCausalLM", f"lacks {NORM}"]),
        (lambda t: t.pop("lm_head.weight"), ["lacks lm_head.weight"]),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], ["lacks 9 tensors: ", "and 6 more"]),
        (lambda t: t.update(extra=torch.zeros(2)), ["holds extra, which the model has not"]),
        (lambda t: t.update({NORM: torch.ones(3)}), [f"holds {NORM} of shape (3,) where the model has (32,)"]),
        (lambda t: t.update({DOWN: t[DOWN].T.contiguous()}), [f"{DOWN} of shape (64, 32)", "(32, 64)"]),
        (nan_in(DOWN), ["not finite", DOWN]),
        (lambda t: t[DOWN].fill_(-math.inf), ["not finite", DOWN]),
    ],
)
def test_a_tensor_that_is_not_as_it_should_be_is_named(changed, change, parts):
    folder = changed(change)
    kinds = [load_causal] if "lm_head" in str(parts) else [load_causal, load_critic]
    for load in kinds:
        with pytest.raises(UserError) as caught:
            load(folder, device="cpu")
        for part in [str(folder), *(p.replace("CausalLM", "") for p in parts)]:
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def load_critic(folder, **options):
    return load_scalar(folder, new_head="zero", **options)


def test_a_shard_that_is_missing(tmp_path):
    folder = save(make_module("llama"), tmp_path / "shards", max_shard_size="20KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=lost.name):
        load_causal(folder, device="cpu")


class Code:
    def __reduce__(self):
        return os.mkdir, ("/tmp/weights-ran-code",)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: torch.save({NORM: Code()}, path), "torch refuses to read them; give safetensors"),
        (lambda path: torch.save([1, 2], path), "cannot load a causal language model"),
        (lambda path: path.write_bytes(b"rubbish"), "cannot load a causal language model"),
        (lambda path: path.write_bytes(b""), "cannot load a causal language model"),
    ],
)
def test_bin_weights_that_torch_refuses(base, tmp_path, write, words):
    folder = tmp_path / "bin"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    write(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=words) as caught:
        load_causal(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/weights-ran-code").exists()


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bloom"])
def test_what_transformers_writes_is_whole(tmp_path, name, caplog):
    """Tied and untied heads, and a head that a scalar model leaves out."""
    folder = save(make_module(name), tmp_path / "base")
    load_causal(folder, device="cpu")
    scalar = load_scalar(folder, new_head="random", seed=1, device="cpu")
    assert [r.getMessage() for r in caplog.records if "score" in r.getMessage()] == [
        f"{folder}: no 'score' head in it, so a new one starts at random numbers drawn from the seed"
    ]
    scalar.export(tmp_path / "rm")
    caplog.clear()
    load_scalar(tmp_path / "rm", new_head="refuse", device="cpu")
    assert not [r for r in caplog.records if "score" in r.getMessage()]


def test_tied_weights_are_not_missing(tmp_path):
    config = copy.deepcopy(make_module("llama").config)
    config.tie_word_embeddings = True
    folder = save(AutoModelForCausalLM.from_config(config), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    module = load_causal(folder, device="cpu").module
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_old_causal_masks_are_no_weights(tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    folder = save(AutoModelForCausalLM.from_config(config), tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_causal(folder, device="cpu")
    assert read_limits(folder).positions == 32


def test_a_reward_model_is_no_policy(base, tmp_path):
    with quiet_transformers():
        rm = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    folder = save(rm, tmp_path / "rm")
    with pytest.raises(UserError, match="LlamaForSequenceClassification, which is a reward model"):
        load_causal(folder, device="cpu")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks lm_head\.weight and holds score\.weight"):
        load_causal(folder, device="cpu")
    with quiet_transformers():
        two = save(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), tmp_path / "two")
    with pytest.raises(UserError, match=r"score\.weight of shape \(2, 32\) where the model has \(1, 32\)"):
        load_scalar(two, new_head="refuse", device="cpu")


def test_folders_that_are_nearly_right(base, tmp_path, monkeypatch):
    run = tmp_path / "own" / "sft"
    shutil.copytree(base, run / "model")
    with pytest.raises(UserError, match=r"sft: the folder of a run, not of a model; did you mean .*own/sft/model\?"):
        load_tokenizer(run)
    with pytest.raises(UserError, match=r"no model folder .*; did you mean .*own/sft\?"):
        load_tokenizer(tmp_path / "own" / "stf")
    shutil.rmtree(run / "model")
    (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match="a run that has not finished, so it holds no model yet"):
        load_tokenizer(run)
    step = run / "checkpoints" / "step_00000003"
    step.mkdir()
    (step / "manifest.json").touch()
    with pytest.raises(UserError, match=rf"a checkpoint of a run, not a model; 'tandem export --model {step} --out"):
        load_tokenizer(step)
    monkeypatch.setenv("HOME", str(base.parent))
    assert load_tokenizer("~/base").eos_token_id == 1
    assert read_limits("~/base").vocabulary == 64


LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16} | {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


@pytest.mark.parametrize(
    ("kind", "rope", "positions"),
    [
        ("llama", None, 128),
        ("llama", {"rope_type": "linear", "factor": 4.0}, 512),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, 128),
        ("llama", LLAMA_3, 128),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ("bloom", None, None),
    ],
)
def test_positions_of_a_config(kind, rope, positions):
    """Linear and Llama 3's as vLLM 0.32 derives them; YaRN for both ways of writing its config."""
    config = copy.deepcopy(make_module(kind).config)
    if rope is not None:
        config.rope_parameters = {"rope_theta": 10000.0, **rope}
    assert limits_of(config).positions == positions
    assert limits_of(config).vocabulary == 64
