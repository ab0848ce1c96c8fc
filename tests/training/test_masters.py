"""bfloat16 parameters with float32 masters: nothing is lost to rounding, and the sampler reads them in place."""

from __future__ import annotations

import pytest
import torch
from helpers.models import VOCABULARY, make_module, make_tokenizer
from safetensors.torch import load_file

from tandem.batch import Batch, TokenLoss
from tandem.data.packing import pack, stamp_weights
from tandem.engines.live.engine import LiveEngine
from tandem.models.loading import prepare_module
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.types import Request, SamplingParams, Sequence


def negative_logp(out, batch):
    return TokenLoss(loss_T=-out.logp_T)


def trainer_of(learning_rate: float, token_budget: int = 1000, name: str = "llama") -> LocalTrainer:
    model = prepare_module(make_module(name), make_tokenizer(), dtype="bfloat16")
    optim = OptimParams(learning_rate=learning_rate, total_steps=100)
    return LocalTrainer(model, negative_logp, optim, token_budget=token_budget)


def batch_of(count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, VOCABULARY, (12,), generator=generator).tolist() for _ in range(count)]
    return stamp_weights(pack([Sequence(token_ids=i, trainable=[False] + [True] * 11) for i in ids]), "token")


def test_steps_below_the_rounding_of_bfloat16_add_up():
    trainer = trainer_of(learning_rate=1e-5)
    name, parameter = next((n, p) for n, p in trainer.parameters.items() if n.endswith("input_layernorm.weight"))
    before = parameter.detach().clone()  # 1.0, of which bfloat16 tells apart steps of 2**-7
    for _ in range(20):
        trainer.forward_backward(batch_of())
        trainer.optim_step()
    moved = (trainer.weights[name] - before.float()).abs()
    assert torch.equal(parameter, before)
    assert 1e-4 < moved.max() < 1e-3


def test_parameters_are_the_masters_rounded_and_stay_where_they_are():
    trainer = trainer_of(learning_rate=1e-2)
    places = {name: p.data_ptr() for name, p in trainer.parameters.items()}
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.forward_backward(batch_of())
    trainer.optim_step()
    assert {name: p.data_ptr() for name, p in trainer.parameters.items()} == places
    for name, p in trainer.parameters.items():
        assert torch.equal(p, trainer.weights[name].bfloat16())
    assert any(not torch.equal(p, before[name]) for name, p in trainer.parameters.items())


def test_micro_batches_add_up_in_float32():
    norms = []
    for budget in (1000, 12):
        trainer = trainer_of(learning_rate=1e-3, token_budget=budget)
        trainer.forward_backward(batch_of(8))
        assert all(w.grad is not None and w.grad.dtype == torch.float32 for w in trainer.weights.values())
        assert all(p.grad is None for p in trainer.parameters.values())
        norms.append(trainer.optim_step()["grad_norm"])
    # Each micro-batch's gradient is rounded once; the sum is not.
    assert abs(norms[0] - norms[1]) < 0.01 * norms[0]


def test_the_engine_samples_from_the_very_parameters_of_the_last_step():
    trainer = trainer_of(learning_rate=1e-2)
    engine = LiveEngine(trainer.model.module, trainer.model.tokenizer, version=lambda: trainer.version)
    assert {p.data_ptr() for p in engine.module.parameters()} == {p.data_ptr() for p in trainer.parameters.values()}
    requests = [Request(prompt_ids=(5, 6, 7), seeds=(1, 2), sampling=SamplingParams(max_new_tokens=8))]
    for step in range(3):
        completions = engine.generate(requests)[0]
        rows = trainer.logprobs([[5, 6, 7, *c.token_ids] for c in completions])
        for completion, row in zip(completions, rows, strict=True):
            assert completion.version_min == completion.version_max == step
            gaps = [abs(a - b) for a, b in zip(completion.untruncated_logp, row[2:], strict=True)]
            # Logits of about 10 have steps of 1/16 in bfloat16.
            assert max(gaps) < 0.25
        trainer.forward_backward(batch_of())
        trainer.optim_step()
        moved = trainer.logprobs([[5, 6, 7, *c.token_ids] for c in completions])
        assert max(abs(a - b) for x, y in zip(rows, moved, strict=True) for a, b in zip(x, y, strict=True)) > 0.5


def test_a_checkpoint_of_bfloat16_goes_on_bit_for_bit():
    def run(trainer: LocalTrainer, steps: int) -> None:
        for _ in range(steps):
            trainer.forward_backward(batch_of())
            trainer.optim_step()

    unbroken, first = trainer_of(1e-3), trainer_of(1e-3)
    run(unbroken, 4)
    run(first, 2)
    second = trainer_of(1e-3)
    second.load_state_dict(first.state_dict())
    run(second, 2)
    for name, weight in unbroken.weights.items():
        assert torch.equal(weight, second.weights[name])
        assert torch.equal(unbroken.parameters[name], second.parameters[name])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("token_budget", [1000, 25])
def test_the_heads_gradient_gathers_in_its_master_with_the_embeddings(tied, token_budget):
    """Against a float32 trainer of the same (rounded) weights."""
    trainers = []
    for dtype in ("bfloat16", "float32"):
        module = make_module("llama")
        if tied:
            module.config.tie_word_embeddings = True
            module.tie_weights()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.bfloat16())
        model = prepare_module(module, make_tokenizer(), dtype=dtype)
        optim = OptimParams(learning_rate=1e-3, total_steps=10)
        trainers.append(LocalTrainer(model, negative_logp, optim, token_budget=token_budget))
        trainers[-1].forward_backward(batch_of())
    low, exact = (trainer.weights for trainer in trainers)
    assert ("lm_head.weight" in low) != tied
    assert all(p.grad is None for p in trainers[0].parameters.values())
    for name, weight in exact.items():
        assert low[name].grad.dtype == torch.float32
        # Rounding through two layers of bfloat16.
        assert (low[name].grad - weight.grad).norm() < 0.05 * weight.grad.norm() + 1e-6, name


def partly_frozen(dtype: str, frozen: tuple[str, ...]) -> LocalTrainer:
    """Starts from weights that bfloat16 can hold."""
    module = make_module("llama")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(parameter.bfloat16())
            parameter.requires_grad_(not any(part in name for part in frozen))
    model = prepare_module(module, make_tokenizer(), dtype=dtype)
    return LocalTrainer(model, negative_logp, OptimParams(learning_rate=1e-3, total_steps=10), token_budget=25)


@pytest.mark.parametrize("frozen", [("embed_tokens", "lm_head"), ("layers.0",), ("norm",), ("proj",)])
def test_frozen_parameters_stay_and_the_others_learn_as_in_float32(frozen, tmp_path):
    low, exact = (partly_frozen(dtype, frozen) for dtype in ("bfloat16", "float32"))
    before = {name: weight.detach().float().clone() for name, weight in low.weights.items()}
    for trainer in (low, exact):
        trainer.forward_backward(batch_of())
    for name, weight in exact.weights.items():
        if any(part in name for part in frozen):
            assert low.weights[name].grad is None
        else:
            # Rounding through two layers of bfloat16.
            assert (low.weights[name].grad - weight.grad).norm() < 0.05 * weight.grad.norm() + 1e-6, name
    low.optim_step()
    low.export(tmp_path)
    exported = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    for name, tensor in exported.items():
        assert torch.equal(tensor, before[name]) == any(part in name for part in frozen), name
    again = partly_frozen("bfloat16", frozen)
    again.load_state_dict(low.state_dict())
    assert again.evaluate(batch_of()) == low.evaluate(batch_of())
