"""A base in few bits: NF4 and FP8 against loops written here, what is trained on it, and what a folder of it gives."""

from __future__ import annotations

import bisect
import json
import math
import sys
import weakref
from itertools import pairwise

import pytest
import torch
import transformers
from helpers.models import bitsandbytes_folder, make_module, make_tokenizer
from safetensors.torch import load_file, save_file
from test_adapters import batch_of_rows, logp_of, negative_logp, peft_logp, train, trainer_of

from tandem.assembly.configs.methods import config_class
from tandem.assembly.models import require_trainable
from tandem.cli.main import main
from tandem.config import load_config
from tandem.errors import UserError
from tandem.kernels import quantized
from tandem.models.loading import load_causal, load_scalar, prepare_module
from tandem.models.lora.adapters import AdapterParams, put_saved
from tandem.models.lora.pairs import adapted
from tandem.models.policy import Merged
from tandem.models.quantized.layers import Quantized, dequantize_module, quantize_module, quantized_in
from tandem.parallel.world import World
from tandem.training.optim import OptimParams
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer
from tandem.training.views import View

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

# arXiv:2305.14314, appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_module("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_nf4_is_the_nearest_of_the_papers_values_in_blocks_of_64():
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(48, 96, generator=generator) * torch.logspace(-3, 1, 48)[:, None]
    coded = quantized.quantize(weight_OI, "nf4")
    found = quantized.dequantize(coded, torch.float32).flatten()
    flat = weight_OI.double().flatten().tolist()
    blocks = [flat[i : i + 64] for i in range(0, len(flat), 64)]
    largest = [max(map(abs, block)) for block in blocks]
    codes = coded.codes.flatten().tolist()
    nibbles = [nibble for byte in codes for nibble in (byte >> 4, byte & 15)]
    middles = [(a + b) / 2 for a, b in pairwise(NF4)]
    # Magnitudes, less their mean, as the nearest of 256 numbers times the largest magnitude of 256 of them.
    absmax, nested, table, mean = (x.double().flatten().tolist() for x in coded.scales)
    assert mean == [pytest.approx(sum(largest) / len(largest), rel=1e-5)]
    for b, block in enumerate(blocks):
        wanted = [bisect.bisect(middles, x / largest[b]) for x in block]
        assert nibbles[64 * b : 64 * b + 64] == wanted
        share = (largest[b] - mean[0]) / nested[b // 256]
        assert abs(table[int(absmax[b])] - share) <= min(abs(t - share) for t in table) + 1e-5
        scale = table[int(absmax[b])] * nested[b // 256] + mean[0]
        for i, code in enumerate(wanted):
            assert found[64 * b + i].item() == pytest.approx(NF4[code] * scale, rel=1e-5, abs=1e-7)
    # The largest gap between neighbours is 0.304, so that no number is further off than half of it, and the scale's.
    off = (found.double() - torch.tensor(flat, dtype=torch.float64)).abs().view(-1, 64).amax(dim=1)
    assert (off <= 0.16 * torch.tensor(largest) + torch.tensor(nested)[torch.arange(len(blocks)) // 256] / 64).all()


def test_fp8_is_the_nearest_of_e4m3s_numbers_row_by_row():
    weight_OI = torch.randn(12, 40, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 12)[:, None]
    weight_OI[3] = 0
    values = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
    values = sorted({sign * v for v in values if v <= 448 for sign in (-1, 1)})
    found = quantized.dequantize(quantized.quantize(weight_OI, "fp8"), torch.float32)
    for row, got in zip(weight_OI.double().tolist(), found.double().tolist(), strict=True):
        scale = 2.0 ** math.ceil(math.log2(max(map(abs, row)) / 448)) if any(row) else 0
        for x, y in zip(row, got, strict=True):
            nearest = min(abs(v * scale - x) for v in values) if scale else 0
            assert abs(y - x) <= nearest + 1e-6 * abs(x)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_and_its_gradient_are_those_of_the_dequantised_weight(kind, dtype):
    generator = torch.Generator().manual_seed(2)
    coded = quantized.quantize(torch.randn(40, 72, generator=generator), kind)
    whole_OI = quantized.dequantize(coded, dtype).double()
    x = torch.randn(2, 5, 72, generator=generator).to(dtype).requires_grad_()
    up = torch.randn(2, 5, 40, generator=generator).to(dtype)
    bias = torch.randn(40, generator=generator).to(dtype)
    out = quantized.linear(x, coded, bias)
    out.backward(up)
    # In bfloat16 the result is rounded once, with fp8 the scale too, and what it is compared with: 2^-9 at most each.
    share = 1e-6 if dtype == torch.float32 else 3 * 2**-9
    for found, exact in ((out, x.double() @ whole_OI.T + bias.double()), (x.grad, up.double() @ whole_OI)):
        assert (found.double() - exact).norm() < share * exact.norm()
    # What an engine without few bits is sent are the numbers that are multiplied by here, to the bit.
    assert torch.equal(quantized.linear(torch.eye(72, dtype=dtype), coded).T, quantized.dequantize(coded, dtype))
    compiled = torch.compile(lambda x: quantized.linear(x, coded, bias), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), out)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_a_base_that_was_quantised_as_it_was_read_is_the_same_as_one_that_was_so_afterwards(base, kind):
    model = load_causal(base, device="cpu", adapters=AdapterParams(rank=2, quantize=kind))
    layers = quantized_in(model.module)
    assert len(layers) == 14
    assert all(adapted(model.module)[name.removesuffix(".base_layer")] for name in layers)
    assert "lm_head" not in layers
    whole = load_causal(base, device="cpu").module
    sizes = [
        (x.numel(), q.bytes)
        for (n, q) in layers.items()
        for x in [whole.get_submodule(n.removesuffix(".base_layer")).weight]
    ]
    bits = 8 * sum(b for _, b in sizes) / sum(n for n, _ in sizes)
    # Narrow as these layers are, tables and rows' scales count.
    assert bits < (9 if kind == "fp8" else 40)
    quantize_module(whole, kind)
    for name, layer in layers.items():
        other = whole.get_submodule(name.removesuffix(".base_layer"))
        assert torch.equal(other.weight, layer.weight)
        assert other.total == layer.total
        assert torch.equal(other.dequantized(), layer.dequantized())
    assert not hasattr(model.module.config, "quantization_config")


def test_fp8_needs_no_library_and_nf4_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    weight_OI = torch.randn(4, 64)
    quantized.linear(torch.randn(2, 64), quantized.quantize(weight_OI, "fp8"))
    with pytest.raises(UserError, match=r"lora.quantize: .* bitsandbytes.*pip install 'tandem-rlhf\[quant\]'"):
        quantized.quantize(weight_OI, "nf4")


def test_what_is_no_linear_layer_stays_and_is_said(caplog):
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=16,
    )  # fmt: skip
    module = transformers.AutoModelForCausalLM.from_config(config)
    experts = {name: p.clone() for name, p in module.named_parameters() if "mlp" in name}
    quantize_module(module, "nf4")
    assert {name.rpartition(".")[2] for name in quantized_in(module)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(torch.equal(module.get_parameter(name), x) for name, x in experts.items())
    assert "25% of its numbers below the head are linear layers and in nf4; the others (stacked experts" in caplog.text
    gpt2 = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(UserError, match="GPT2LMHeadModel has no linear layers"):
        quantize_module(transformers.AutoModelForCausalLM.from_config(gpt2), "nf4")


def test_no_weight_is_whole_when_the_next_one_is_read(base, monkeypatch):
    taken, take = [], Quantized.take

    def watched(self, weight):
        assert not [one for one in taken if one() is not None]
        taken.append(weakref.ref(weight))
        take(self, weight)

    monkeypatch.setattr(Quantized, "take", watched)
    load_causal(base, device="cpu", adapters=AdapterParams(rank=2, quantize="nf4"))
    assert len(taken) == 14


def test_a_number_of_a_wide_layer_takes_4_13_bits():
    layer = Quantized(torch.nn.Linear(1024, 1024, bias=False), "nf4")
    layer.take(torch.randn(1024, 1024))
    assert 8 * (layer.bytes - 1024 - 4) / 1024**2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_adapters_are_folded_into_the_dequantised_weights(base, kind):
    trainer = trainer_of(base, AdapterParams(rank=4, quantize=kind))
    train(trainer)
    module = load_causal(base, device="cpu").module
    for name, weight in trainer.policy.merged().items():
        module.get_parameter(name).data = weight.detach().clone()
    folded = LocalScorer(prepare_module(module, make_tokenizer()), token_budget=20)
    torch.testing.assert_close(logp_of(folded), logp_of(trainer), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kind", "dtype"), [("nf4", "float32"), ("fp8", "float32"), ("nf4", "bfloat16")])
def test_adapters_at_zero_the_view_and_the_gradient_are_those_of_the_quantised_base(base, kind, dtype):
    alone = load_causal(base, device="cpu", dtype=dtype)
    plain = logp_of(LocalScorer(alone, token_budget=20))
    trainer = trainer_of(base, AdapterParams(rank=4, quantize=kind), dtype=dtype)
    view = View(trainer, temperature=1.0)
    first = logp_of(trainer)
    off = (first - plain).abs().max()
    assert 1e-3 < off < (0.3 if kind == "fp8" else 3)
    if dtype == "float32":
        quantize_module(alone.module, kind)
        assert torch.equal(first, logp_of(LocalScorer(alone, token_budget=20)))
        # The same adapters over the dequantised weights in float64. Where B is 0, A has no gradient.
        exact = trainer_of(base, AdapterParams(rank=4))
        for name, layer in quantized_in(trainer.model.module).items():
            exact.model.module.get_submodule(name).weight.data = layer.dequantized()
        exact.model.module.double()
        for t in (trainer, exact):
            for name, parameter in t.model.module.named_parameters():
                if "lora_B" in name:
                    parameter.data.fill_(0.01)
        trainer.forward_backward(batch_of_rows())
        exact.forward_backward(batch_of_rows())
        for name, weight in trainer.weights.items():
            torch.testing.assert_close(weight.grad.double(), exact.weights[name].grad.double(), rtol=1e-3, atol=1e-6)
        trainer.optimizer.zero_grad()
        for name, parameter in trainer.model.module.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
    before = {name: x.clone() for name, x in trainer.model.module.state_dict().items() if ".lora_" not in name}
    train(trainer)
    assert all(".lora_" in name for name in trainer.weights)
    for name, x in before.items():
        assert torch.equal(trainer.model.module.state_dict()[name], x), name
    assert not torch.allclose(logp_of(trainer), first, atol=1e-2)
    assert torch.equal(logp_of(view), first)


def test_a_checkpoint_goes_on_bit_for_bit_and_refuses_another_quantisation(base):
    def trainer(quantize, seed=0):
        return trainer_of(base, AdapterParams(rank=4, quantize=quantize, seed=seed))

    whole, first, again = trainer("nf4"), trainer("nf4"), trainer("nf4", seed=9)
    train(whole, 3)
    train(first, 1)
    state = first.state_dict()
    assert set(state["model"]) == set(first.weights)
    again.load_state_dict(state)
    train(again, 2)
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())
    # The sum is the folder's: that of the base in full.
    full = trainer("none")
    assert state["adapters"]["base_sum"] == full.policy.adapters.base_sum
    for other in (full, trainer("fp8")):
        with pytest.raises(UserError, match=r"lora.quantize: .*a base that is kept as nf4, and this one is kept as"):
            other.load_state_dict(state)
    with pytest.raises(UserError, match="kept as none, and this one is kept as nf4"):
        again.load_state_dict(full.state_dict())
    # What is exported is the folder's weights in full, with the adapters added.
    module, whole_module = (load_causal(base, device="cpu").module for _ in range(2))
    put_saved(module, state["adapters"], str(base), state["model"])
    found, name = Merged(module, dict(module.named_parameters())), "model.layers.0.mlp.up_proj"
    a, b = (state["model"][f"{name}.lora_{side}.default.weight"] for side in "AB")
    wanted = whole_module.get_submodule(name).weight + 32 / 4 * b @ a
    torch.testing.assert_close(found[f"{name}.weight"], wanted, rtol=0, atol=1e-6)


def test_a_whole_model_in_few_bits_is_not_trained_nor_offloaded(base):
    model = load_causal(base, device="cpu")
    quantize_module(model.module, "fp8")
    with pytest.raises(UserError, match="only adapters can be trained on them"):
        LocalTrainer(model, negative_logp, OptimParams(learning_rate=1e-3, total_steps=1), token_budget=20)
    with pytest.raises(UserError, match=r"offload: .* layers in few bits, which stay on their device"):
        model.shard(World(device=model.device), offload=True)


def test_what_was_trained_is_read_by_peft_on_the_same_quantised_base(base, tmp_path, caplog):
    trainer = trainer_of(base, AdapterParams(rank=4, quantize="nf4"))
    train(trainer)
    trainer.export(tmp_path)
    module = load_causal(base, device="cpu").module
    quantize_module(module, "nf4")
    dequantize_module(module)
    torch.testing.assert_close(logp_of(trainer), peft_logp(module, tmp_path), rtol=0, atol=2e-5)
    again = trainer_of(tmp_path, AdapterParams(folder=str(tmp_path), quantize="nf4"))
    assert torch.equal(logp_of(again), logp_of(trainer))
    assert config_of("sft", tmp_path).lora.quantize == "nf4"
    assert config_of("sft", tmp_path, "--lora.quantize", "none").quantized is None
    # A critic's base: the policy merged in full, and then in few bits.
    critic = load_scalar(tmp_path, new_head="zero", device="cpu", adapters=AdapterParams(rank=2, quantize="nf4"))
    assert len(quantized_in(critic.module)) == 14
    assert "its adapters were trained on a base in nf4, and are added to that base in full here" in caplog.text


def test_a_folder_in_bitsandbytes_4_bits_is_trained_on_as_it_is(base, tmp_path):
    pytest.importorskip("accelerate")
    folder = bitsandbytes_folder(base, tmp_path / "four")
    mine = trainer_of(base, AdapterParams(rank=4, quantize="nf4"))
    theirs = trainer_of(folder, AdapterParams(rank=4))
    assert theirs.policy.adapters.quantized == "nf4"
    assert torch.equal(logp_of(theirs), logp_of(mine))
    train(theirs)
    theirs.export(tmp_path / "out")
    with pytest.raises(UserError, match="trained on another base"):
        mine.load_state_dict(theirs.state_dict())
    # Whoever does not train on it may have it whole, with the adapters in it.
    merged = load_causal(tmp_path / "out", device="cpu")
    torch.testing.assert_close(logp_of(LocalScorer(merged, token_budget=20)), logp_of(theirs), rtol=0, atol=2e-5)
    assert not quantized_in(merged.module)
    assert main(["export", "--model", str(folder), "--out", str(tmp_path / "whole")]) == 0
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    for name, layer in quantized_in(mine.model.module).items():
        assert torch.equal(weights[f"{name.removesuffix('.base_layer')}.weight"], layer.dequantized())
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    with pytest.raises(UserError, match="are nf4 already, got fp8"):
        trainer_of(folder, AdapterParams(rank=4, quantize="fp8"))
    plain = trainer_of(bitsandbytes_folder(base, tmp_path / "plain", bnb_4bit_use_double_quant=False),
                       AdapterParams(rank=4))  # fmt: skip
    assert (logp_of(plain) - logp_of(mine)).abs().max() < 0.5
    eight = tmp_path / "eight"
    eight.mkdir()
    for path in folder.iterdir():
        (eight / path.name).write_bytes(path.read_bytes())
    config = json.loads((eight / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (eight / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its weights are quantised by gptq, .*give the model that it was made of"):
        trainer_of(eight, AdapterParams(rank=4))


@pytest.mark.parametrize("fault", ["nan", "lacks", "shape", "other shape"])
def test_a_damaged_folder_is_refused_though_it_is_quantised_as_it_is_read(base, tmp_path, fault):
    make_module("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.1.self_attn.k_proj.weight"
    tensors = load_file(path)
    if fault == "nan":
        tensors[name][3, 5] = float("nan")
    elif fault == "lacks":
        del tensors[name]
    else:
        name = name if fault == "shape" else "model.norm.weight"
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    message = {"nan": "NaN or infinity in", "lacks": "lacks"}.get(fault, r"holds .* of shape")
    with pytest.raises(UserError, match=rf"{message}.*{name}" if fault == "nan" else rf"{name}"):
        load_causal(tmp_path, device="cpu", adapters=AdapterParams(rank=4, quantize="nf4"))


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("sft", ["--lora.dora"], "lora.dora: the base is in few bits"),
        ("sft", ["--placement.actor", "1", "--offload", "parameters"], "offload: the base is in few bits"),
        ("ppo", ["--placement.reference", "1"], "its reference is the policy without adapters"),
    ],
)
def test_what_a_base_in_few_bits_cannot_do_is_refused(method, flags, message):
    with pytest.raises(UserError, match=message):
        config_of(method, "m", "--lora.rank", "8", "--lora.quantize", "nf4", *flags)


def test_without_adapters_the_key_of_a_file_is_passed_over(tmp_path):
    (tmp_path / "c.yaml").write_text("lora.quantize: nf4\nengine.kind: vllm\n")
    assert config_of("ppo", "m", "--config", str(tmp_path / "c.yaml")).quantized is None


def config_of(method, model, *flags):
    reward = ["--reward", "math"] if method == "ppo" else []
    words = ["--data", "d", "--out", "o", "--steps", "3", "--model", str(model), *reward]
    return load_config(config_class(method), [*words, *flags])


def test_a_scalar_model_of_a_class_that_transformers_lacks_is_in_few_bits_too(tmp_path):
    make_module("granite_scaled_logits").save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    folders = {"fp8": tmp_path / "whole", "none": bitsandbytes_folder(tmp_path / "whole", tmp_path / "four")}
    for quantize, folder in folders.items():
        critic = load_scalar(folder, new_head="zero", device="cpu", adapters=AdapterParams(rank=2, quantize=quantize))
        assert len(quantized_in(critic.module)) == 14
        assert critic.packed
        assert critic.adapters.quantized == {"fp8": "fp8", "none": "nf4"}[quantize]


def test_a_folder_in_4_bits_is_known_by_its_config(tmp_path):
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": about}))
    assert config_of("sft", tmp_path, "--lora.rank", "8").quantized == "nf4"
    with pytest.raises(UserError, match="only adapters can be trained on them"):
        config_of("sft", tmp_path)
    with pytest.raises(UserError, match="are nf4 already, got fp8"):
        config_of("sft", tmp_path, "--lora.rank", "8", "--lora.quantize", "fp8")


@pytest.mark.parametrize("library", ["bitsandbytes", "accelerate"])
def test_what_reads_a_frozen_folder_in_4_bits_is_asked_for_before_anything_is_loaded(tmp_path, monkeypatch, library):
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": about}))
    config = config_of("ppo", "m", "--reward-model", str(tmp_path))
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"{library}, .*pip install 'tandem-rlhf\[quant\]'"):
        require_trainable(config)
