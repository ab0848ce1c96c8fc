"""Adapters on a GPU, their base whole or in few bits: products, compiled training and captured sampling agree."""

from __future__ import annotations

import pytest
import torch
from helpers.adapter_steps import gaps_before_steps, live
from helpers.engine_models import tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from tandem.batch import TokenLoss
from tandem.kernels import quantized
from tandem.models.loading import load_causal
from tandem.models.lora.adapters import AdapterParams
from tandem.models.quantized.layers import quantized_in
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytest.importorskip("peft")
KINDS = ["nf4", "fp8"]


@pytest.fixture(autouse=True)
def library(request):
    if "nf4" in request.node.name:
        pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 64, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_weight_that_a_cpu_makes_whole(kind, rows, dtype):
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(640, 512, generator=generator)
    here, there = quantized.quantize(weight_OI, kind), quantized.quantize(weight_OI.cuda(), kind)
    # Rounding may take a number that lies between two to the other one.
    assert (here.codes.cpu() != there.codes.cpu()).float().mean() < 1e-3
    whole_OI = quantized.dequantize(there, torch.float32).double()
    x = torch.randn(rows, 512, generator=generator).to("cuda", dtype).requires_grad_()
    up = torch.randn(rows, 640, generator=generator).to("cuda", dtype)
    out = quantized.linear(x, there)
    out.backward(up)
    share = 1e-2 if dtype == torch.bfloat16 else 2e-3
    for found, exact in ((out, x.double() @ whole_OI.T), (x.grad, up.double() @ whole_OI)):
        assert (found.double() - exact).norm() < share * exact.norm()


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_captured_sampling_gives_the_log_probs_of_compiled_training_after_every_step(kind, tmp_path):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    params = AdapterParams(rank=8, quantize=kind)
    model = load_causal(tmp_path, adapters=params, device="cuda", dtype="bfloat16")
    assert len(quantized_in(model.module)) == (0 if kind == "none" else 3 * 7)

    def loss(out, batch):
        return TokenLoss(loss_T=-out.logp_T * batch.trainable_T, metrics_T={})

    optim = OptimParams(learning_rate=1e-2, total_steps=9)
    trainer = LocalTrainer(model, loss, optim, token_budget=4096, compile="on")
    engine = live(trainer)
    assert engine.way == "captured"
    assert engine.fitting.own_because == ""
    bases = []
    for own, without in gaps_before_steps(trainer, engine):
        assert own.max() < 0.15
        assert own.mean() < 0.01
        bases.append(without.mean())
    assert trainer.model.blocks.working
    assert bases[-1] > 5 * bases[0]
