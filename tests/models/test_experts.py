"""Mixtures of experts in training: the routers' loss against transformers' own, its law, and routers in float32."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine_models import tokenizer
from helpers.ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tandem.batch import Outputs, TokenLoss
from tandem.cli.main import main
from tandem.data.packing import pack, stamp_weights
from tandem.errors import UserError
from tandem.models.forward import Ask, forward, hidden_states
from tandem.models.loading import prepare_module
from tandem.models.routers import routers_of
from tandem.models.shrunk import shrunken_config
from tandem.parallel.world import World
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalScorer, LocalTrainer, MemoryParams
from tandem.types import Sequence

LENGTHS = (23, 5, 40, 17)
COEF = 0.3


def module_of(kind: str, auto: Any = AutoModelForCausalLM, **keys: Any) -> Any:
    """A small model whose routers have opinions."""
    config = shrunken_config(CONFIG_MAPPING[kind]())
    for name, value in keys.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    module = auto.from_config(config).eval()
    with torch.no_grad():
        for router in routers_of(module):
            router.weight.normal_(std=0.5)
    return module


def rows() -> list[Sequence]:
    """The first and the third begin alike: what they share goes through once."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(2, 90, (n,), generator=generator).tolist() for n in LENGTHS]
    ids[2][:12] = ids[0][:12]
    return [Sequence(token_ids=x, trainable=[False] * min(12, len(x) - 1) + [True] * max(len(x) - 12, 1)) for x in ids]


def surprise(out: Outputs, batch: Any) -> TokenLoss:
    return TokenLoss(loss_T=-out.logp_T)


def trainer_of(module: Any, coef: float = COEF, world: World | None = None, **options: Any) -> LocalTrainer:
    memory = MemoryParams(**options.pop("memory", {}))
    optim = OptimParams(learning_rate=1e-3, total_steps=9, aux_loss_coef=coef)
    budget = options.pop("token_budget", 4096)
    model = prepare_module(module, tokenizer(), **options)
    return LocalTrainer(model, surprise, optim, token_budget=budget, world=world, memory=memory)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "jamba"])
def test_the_loss_and_its_gradient_are_transformers_own_of_one_sequence_at_a_time(kind: str) -> None:
    """In float64, but for the sums that transformers makes in float32. With the key that made every load fail."""
    module = module_of(kind, output_router_logits=True).double()
    module.set_experts_implementation("eager")  # grouped products have no float64
    model = prepare_module(module, tokenizer())
    batch = stamp_weights(pack(rows()), "token").to("cpu")
    balance_S = forward(model, batch, Ask(balance=True)).balance_S
    assert balance_S is not None
    (balance_S * batch.share_S).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    module.zero_grad()
    module.set_attn_implementation("eager")
    own = [module(input_ids=torch.tensor([r.token_ids]), output_router_logits=True).aux_loss for r in rows()]
    assert balance_S.tolist() == pytest.approx([loss.item() for loss in own], rel=1e-5)
    assert balance_S.std() > 0.005
    torch.stack(own).mean().backward()
    expected = {name: p.grad for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert found.keys() == expected.keys()
    assert any("gate" in name or "router" in name for name in found)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 2e-6 * gradient.abs().max() + 2e-7, name


def gradients(trainer: LocalTrainer, batch: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    metrics = trainer.forward_backward(batch)
    return metrics, {name: w.grad.clone() for name, w in trainer.weights.items() if w.grad is not None}


def test_law_3_of_the_routers_loss() -> None:
    """Micro-batches, their order, prompts that are shared or not, and padding change nothing."""
    batch = stamp_weights(pack(rows()), "sequence")
    whole, wanted = gradients(trainer_of(module_of("mixtral")), batch)
    without, plain = gradients(trainer_of(module_of("mixtral"), coef=0.0), batch)
    assert "aux_loss" not in without
    assert whole["loss"] == pytest.approx(without["loss"], abs=1e-6)
    assert any((wanted[name] - plain[name]).abs().max() > 1e-3 for name in wanted)
    cuts = {
        "one by one": ({"token_budget": 1}, batch),
        "backwards": ({"token_budget": 60}, batch.select([3, 2, 1, 0])),
        "unshared": ({}, batch.unshared()),
        "checkpointed": ({"memory": {"activation_checkpointing": True}}, batch),
    }
    for name, (options, cut) in cuts.items():
        metrics, found = gradients(trainer_of(module_of("mixtral"), **options), cut)
        assert metrics["aux_loss"] == pytest.approx(whole["aux_loss"], abs=1e-5), name
        for parameter, gradient in wanted.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=2e-6, msg=name)
    apart = trainer_of(module_of("mixtral"))
    apart.model.turning = 20  # longer sequences go through by themselves, in another order
    assert gradients(apart, batch)[0]["aux_loss"] == pytest.approx(whole["aux_loss"], abs=1e-5)
    balance_S = forward(apart.model, batch.to("cpu"), Ask(balance=True)).balance_S
    apart.model.turning = None
    torch.testing.assert_close(balance_S, forward(apart.model, batch.to("cpu"), Ask(balance=True)).balance_S)
    padded = trainer_of(module_of("mixtral"))
    padded.model.packed = False
    padded.model.module.set_attn_implementation("eager")
    metrics, found = gradients(padded, batch)
    assert metrics["aux_loss"] == pytest.approx(whole["aux_loss"], abs=1e-5)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=2e-6)


def _two_steps(world: World) -> Any:
    trainer, metrics = trainer_of(module_of("mixtral"), world=world, token_budget=45), []
    for count in (4, 1):
        batch = stamp_weights(pack(rows()[:count]), "token")
        metrics.append(trainer.forward_backward(batch) | trainer.optim_step())
    return metrics


def test_two_workers_equal_one() -> None:
    """Loss, norm of the gradient, and what follows; one has nothing in the second step, and adds nothing to it."""
    found, metrics = run_ranks(_two_steps, 2), _two_steps(World())
    assert found[0] == found[1]
    for one, two in zip(metrics, found[0], strict=True):
        assert two == pytest.approx(one, abs=2e-5)
    assert metrics[0]["grad_norm"] > 0.1


def test_a_reward_model_has_it_too() -> None:
    module = module_of("mixtral", AutoModelForSequenceClassification, num_labels=1, pad_token_id=0)
    model = prepare_module(module, tokenizer())
    out = forward(model, pack(rows()).to("cpu"), Ask(balance=True))
    assert out.balance_S is not None
    assert out.scalar_T is not None
    assert len(out.balance_S) == len(LENGTHS)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_a_model_without_it_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"aux_loss_coef: \w+ForCausalLM has no experts that are balanced by a loss"):
        trainer_of(module_of(kind))
    module_of(kind).config.save_pretrained(tmp_path)
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    argv = ["sft", "--model", str(tmp_path), "--data", str(tmp_path / "d.jsonl"), "--steps", "1", "--dry-run"]
    assert main([*argv, "--out", str(tmp_path / "o"), "--aux-loss-coef", "0.1"]) == 2
    assert "has no experts that are balanced by a loss" in capsys.readouterr().err


def test_a_config_that_asks_for_router_logits_keeps_the_key(tmp_path: Path) -> None:
    model = prepare_module(module_of("qwen3_moe", output_router_logits=True), tokenizer())
    assert model.packed
    model.export(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["output_router_logits"]
    assert not model.module.config.output_router_logits
    other = prepare_module(module_of("qwen3_moe"), tokenizer())
    other.export(tmp_path)
    assert not json.loads((tmp_path / "config.json").read_text()).get("output_router_logits")


def test_a_trainer_in_bfloat16_routes_as_a_scorer_does() -> None:
    trainer = trainer_of(module_of("qwen3_moe"), 0.0, dtype="bfloat16")
    model = prepare_module(module_of("qwen3_moe"), tokenizer(), dtype="bfloat16")
    found, wanted = (one.score(pack(rows())).logp_T for one in (trainer, LocalScorer(model, token_budget=4096)))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_routers_of_a_model_in_bfloat16_compute_in_float32(kind: str) -> None:
    """From the same parameters; what is trained, and the rest of the layer, stays in bfloat16."""
    model = prepare_module(module_of(kind), tokenizer(), dtype="bfloat16")
    model.compute_in(torch.bfloat16)
    assert model.module.config._experts_implementation == "grouped_mm"
    router = routers_of(model.module)[0]
    seen: list[tuple[Any, ...]] = []
    router.register_forward_hook(lambda part, given, found: seen.append((given[0], found)))
    out = hidden_states(model, pack(rows()).to("cpu"))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert router.weight.dtype == router.weight.grad.dtype == torch.bfloat16
    assert router.weight.grad.any()
    x, found = seen[0]
    assert x.dtype == torch.bfloat16
    exact = router.narrow.forward(replaced(router), x.float())
    rounded = router.narrow.forward(router, x)
    for y, want in zip(found, exact, strict=True):
        assert torch.equal(y, want)
        assert y.dtype in (torch.float32, torch.int64)
    if kind != "deepseek_v3":  # whose own is in float32 already
        assert not all(torch.equal(y.float(), want.float()) for y, want in zip(rounded, exact, strict=True))


def replaced(router: torch.nn.Module) -> torch.nn.Module:
    """A copy with float32 parameters."""
    plain = copy.copy(router)
    plain._parameters = {n: None if p is None else torch.nn.Parameter(p.float()) for n, p in router._parameters.items()}
    return plain


def test_a_model_in_float32_is_left_as_it_is() -> None:
    model = prepare_module(module_of("mixtral"), tokenizer())
    model.compute_in(torch.float32)
    assert not any(hasattr(router, "narrow") for router in routers_of(model.module))
