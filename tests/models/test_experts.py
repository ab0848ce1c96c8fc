"""Mixtures of experts in training: the routers' loss against transformers' own, its law, and routers in float32."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine_models import tokenizer
from helpers.family_models import families
from helpers.ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tandem.batch import Asks, Outputs, TokenLoss
from tandem.cli.main import main
from tandem.data.packing import pack, stamp_weights
from tandem.engines.live.replica import ReplicaEngine
from tandem.errors import NonFiniteError, UserError
from tandem.functional.balance import load_violation
from tandem.models.forward import forward, hidden_states
from tandem.models.loading import prepare_module
from tandem.models.lora.adapters import AdapterParams, put_adapters
from tandem.models.lora.pairs import adapted
from tandem.models.moe.experts import IMPLEMENTATION
from tandem.models.moe.routers import correction_biases, routers_of
from tandem.models.proof.probe import LOW_PRECISION_TOLERANCE, gap_of
from tandem.models.proof.shrunk import shrunken_config, trained_size
from tandem.models.quantized.layers import quantize_module
from tandem.parallel.world import World
from tandem.sync.check import WeightMismatch, require_equal
from tandem.sync.source import WeightSource
from tandem.training.optim import OptimParams
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer, MemoryParams
from tandem.types import Sequence

LENGTHS = (23, 5, 40, 17)
COEF = 0.3
SPEED = 0.01
WITHOUT_DEFAULTS: dict[str, dict[str, int]] = {"hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2}}


def module_of(kind: str, auto: Any = AutoModelForCausalLM, **keys: Any) -> Any:
    """A small model whose routers have opinions."""
    config = shrunken_config(CONFIG_MAPPING[kind](**WITHOUT_DEFAULTS.get(kind, {})))
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


def trainer_of(
    module: Any, coef: float = COEF, world: World | None = None, speed: float = 0.0, **options: Any
) -> LocalTrainer:
    memory = MemoryParams(**options.pop("memory", {}))
    optim = OptimParams(learning_rate=1e-3, total_steps=9, aux_loss_coef=coef, bias_update_speed=speed)
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
    balance_S = forward(model, batch, Asks(balance=True)).balance_S
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
    apart = trainer_of(module_of("mixtral"), coef=0.0)
    balance_S = forward(apart.model, batch.to("cpu"), Asks(balance=True)).balance_S
    assert balance_S is not None
    (balance_S * batch.share_S).sum().backward()
    added = {name: w.grad for name, w in apart.weights.items() if w.grad is not None}
    assert any(gradient.abs().max() > 1e-3 for gradient in added.values())
    for name, gradient in wanted.items():  # the coefficient's share of it, and no more
        torch.testing.assert_close(gradient, plain[name] + COEF * added.get(name, 0.0), rtol=0, atol=2e-6, msg=name)
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
    balance_S = forward(apart.model, batch.to("cpu"), Asks(balance=True)).balance_S
    apart.model.turning = None
    torch.testing.assert_close(balance_S, forward(apart.model, batch.to("cpu"), Asks(balance=True)).balance_S)
    padded = trainer_of(module_of("mixtral"))
    padded.model.packed = False
    padded.model.module.set_attn_implementation("eager")
    metrics, found = gradients(padded, batch)
    assert metrics["aux_loss"] == pytest.approx(whole["aux_loss"], abs=1e-5)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=2e-6)


def _two_steps(world: World) -> Any:
    """With the routers' loss, and, of a model with biases, with steps of theirs."""
    metrics, biases = [], []
    for trainer in (
        trainer_of(module_of("mixtral"), world=world, token_budget=45),
        trainer_of(module_of("deepseek_v3"), 0.0, world, SPEED, token_budget=45),
    ):
        for count in (4, 1):
            batch = stamp_weights(pack(rows()[:count]), "token")
            metrics.append(trainer.forward_backward(batch) | trainer.optim_step())
            biases += [b.tolist() for b in correction_biases(trainer.model.module).values()]
    return metrics, biases


def test_two_workers_equal_one() -> None:
    """Loss, norm of the gradient, and what follows; one has nothing in the second step, and adds nothing to it."""
    found, (metrics, biases) = run_ranks(_two_steps, 2), _two_steps(World())
    assert found[0] == found[1]
    for one, two in zip(metrics, found[0][0], strict=True):
        assert two == pytest.approx(one, abs=2e-5)
    assert metrics[0]["grad_norm"] > 0.1
    assert found[0][1] == biases
    assert sum(abs(b) for bias in biases for b in bias) > 5 * SPEED


def biased(seed: int = 0, experts: int = 8, **keys: Any) -> Any:
    """DeepSeek V3 with routers that have favourites."""
    keys = {"num_local_experts": experts, "n_routed_experts": experts, "num_experts_per_tok": 2} | keys
    module = module_of("deepseek_v3", **keys)
    generator = torch.Generator().manual_seed(seed)
    for bias in correction_biases(module).values():
        bias.copy_(0.3 * torch.randn(len(bias), generator=generator))
    return module


def loads_by_loops(module: Any, sequences: list[Sequence]) -> list[list[int]]:
    """What transformers' own routers pick of one sequence at a time, in float32."""
    plain, counts = copy.deepcopy(module), []
    plain.set_attn_implementation("eager")
    for router in routers_of(plain):
        counts.append([0] * router.num_experts)

        def count(part: Any, given: Any, found: Any, own: list[int] = counts[-1]) -> None:
            for expert in found[-1].flatten().tolist():
                own[expert] += 1

        router.register_forward_hook(count)
    with torch.no_grad():
        for row in sequences:
            plain(input_ids=torch.tensor([row.token_ids]))
    return counts


def test_biases_take_a_step_against_the_load_however_the_batch_is_cut() -> None:
    """The rule of arXiv:2408.15664, algorithm 1, by loops over what transformers' routers pick, and law 3 of it."""
    batch = stamp_weights(pack(rows()), "sequence")
    loads = loads_by_loops(biased(), rows())
    before = [bias.tolist() for bias in correction_biases(biased()).values()]
    expected = []
    for bias, load in zip(before, loads, strict=True):
        mean = sum(load) / len(load)
        expected.append([b + SPEED * ((x < mean) - (x > mean)) for b, x in zip(bias, load, strict=True)])
    assert sum(map(sum, loads)) == len(loads) * 2 * sum(LENGTHS)
    violation = sum(max(load) * len(load) / sum(load) - 1 for load in loads) / len(loads)
    cuts: dict[str, tuple[dict[str, Any], Any]] = {
        "whole": ({}, batch),
        "one by one": ({"token_budget": 1}, batch),
        "backwards": ({"token_budget": 60}, batch.select([3, 2, 1, 0])),
        "unshared": ({}, batch.unshared()),
        "checkpointed": ({"memory": {"activation_checkpointing": True}}, batch),
        "accumulated": ({}, None),
        "apart": ({}, batch),
        "padded": ({}, batch),
    }
    for name, (options, cut) in cuts.items():
        trainer = trainer_of(biased(), 0.0, speed=SPEED, **options)
        if name == "apart":
            trainer.model.turning = 20
        if name == "padded":
            trainer.model.packed = False
            trainer.model.module.set_attn_implementation("eager")
        trainer.evaluate(batch)  # counts for nothing
        for part in [cut] if cut is not None else [batch.select([0, 2]), batch.select([1, 3])]:
            trainer.forward_backward(part)
        metrics = trainer.optim_step()
        assert metrics["load_violation"] == pytest.approx(violation), name
        for bias, wanted in zip(correction_biases(trainer.model.module).values(), expected, strict=True):
            assert bias.tolist() == pytest.approx(wanted, abs=1e-7), name


def test_a_step_that_is_not_taken_leaves_no_load_behind() -> None:
    trainer, batch = trainer_of(biased(), 0.0, speed=SPEED), stamp_weights(pack(rows()), "token")
    trainer.loss = lambda out, batch: TokenLoss(loss_T=-out.logp_T * float("nan"))
    with pytest.raises(NonFiniteError):
        trainer.forward_backward(batch)
    trainer.loss = surprise
    few = stamp_weights(pack(rows()[:1]), "token")
    trainer.forward_backward(few)
    fresh = trainer_of(biased(), 0.0, speed=SPEED)
    fresh.forward_backward(few)
    assert trainer.optim_step() == fresh.optim_step()


def test_biases_spread_the_load_of_a_model_that_learns() -> None:
    """Over held-out rows, whose load nobody has counted; without steps of the biases it stays as it is."""
    ids = torch.randint(2, 90, (24, 30), generator=torch.Generator().manual_seed(5)).tolist()
    data = [Sequence(token_ids=x, trainable=[False] + [True] * 29) for x in ids]
    left, losses = {}, {}
    for speed in (0.0, 0.02):
        trainer = trainer_of(biased(), 0.0, speed=speed)
        for _ in range(30):
            metrics = trainer.forward_backward(stamp_weights(pack(data[:16]), "token"))
            trainer.optim_step()
        losses[speed] = metrics["loss"]
        left[speed] = load_violation(torch.tensor(loads_by_loops(trainer.model.module, data[16:])))
    assert left[0.0] > 1.0
    assert left[0.02] < 0.35 * left[0.0]
    assert losses[0.02] < losses[0.0] + 0.05


def test_biases_are_kept_and_exported_and_followed(tmp_path: Path) -> None:
    """A trainer that goes on from a checkpoint, a folder, and a reference that becomes the policy."""
    batch = stamp_weights(pack(rows()), "token")
    first, second = (trainer_of(biased(seed), 0.0, speed=SPEED) for seed in (0, 1))
    reference = LocalScorer(prepare_module(biased(2), tokenizer()), token_budget=4096)
    for trainer in (first, first, second):
        trainer.forward_backward(batch)
        trainer.optim_step()
        if first.version == 2 and trainer is first:
            state = copy.deepcopy(first.state_dict())
    second.load_state_dict(state)
    for trainer in (first, second):
        trainer.forward_backward(batch)
        trainer.optim_step()
    here, there = (correction_biases(t.model.module) for t in (first, second))
    assert all(torch.equal(here[name], there[name]) for name in here)
    first.export(tmp_path)
    folder = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(here[name], b) for name, b in correction_biases(folder).items())
    began = {name: b.clone() for name, b in correction_biases(reference.model.module).items()}
    reference.follow(first.whole_weights(), 0.25, 3)
    kept = reference.state_dict()["model"]
    for name, bias in correction_biases(reference.model.module).items():
        torch.testing.assert_close(bias, 0.75 * began[name] + 0.25 * here[name])
        assert torch.equal(kept[name], bias)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_biases_travel_to_engines_in_float32_and_a_stale_one_is_found(kind: str) -> None:
    """Steps of 0.001 would be lost in bfloat16."""
    trainer = trainer_of(module_of(kind), 0.0, speed=0.001)
    engine = ReplicaEngine(prepare_module(module_of(kind), tokenizer(), dtype="bfloat16"), max_slots=2)
    for bias in trainer.model.picks.biases.values():
        bias.add_(1.0)
    trainer.forward_backward(stamp_weights(pack(rows()), "token"))
    trainer.optim_step()
    source = WeightSource(trainer.policy.merged(), torch.device("cpu"))
    specs = {spec.name: spec.dtype for spec in source.plan("bfloat16").tensors}
    assert {specs[name] for name in trainer.model.picks.biases} == {"float32"}
    assert set(specs.values()) == {"float32", "bfloat16"}
    sums = source.fill({name: p.data for name, p in engine.parameters.items()}, check=True)
    held, mine = engine.held(), correction_biases(engine.model.module)
    require_equal("after push 1 the engine", sums, held, engine.checksums())
    for name, bias in trainer.model.picks.biases.items():
        assert torch.equal(mine[name], bias)
        assert not torch.equal(bias, bias.bfloat16().float())
    name, stale = next(iter(mine.items()))
    stale[1] += 0.001
    with pytest.raises(WeightMismatch, match=f"does not hold the trainer's {name}"):
        require_equal("after push 1 the engine", sums, held, engine.checksums())


def test_biases_that_nobody_has_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="bias_update_speed: MixtralForCausalLM has no router with a bias"):
        trainer_of(module_of("mixtral"), 0.0, speed=SPEED)
    model, optim = (
        prepare_module(biased(), tokenizer()),
        OptimParams(learning_rate=1, total_steps=1, bias_update_speed=1),
    )
    with pytest.raises(UserError, match="compiled layers do not give what bias_update_speed needs"):
        LocalTrainer(model, surprise, optim, token_budget=9, compile="on")
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    argv = ["sft", "--model", str(tmp_path / "m"), "--data", str(tmp_path / "d.jsonl"), "--steps", "1", "--dry-run"]
    argv += ["--out", str(tmp_path / "o"), "--bias-update-speed", "0.001"]
    module_of("mixtral").config.save_pretrained(tmp_path / "m")
    assert main(argv) == 2
    assert "has no router with a bias for each expert" in capsys.readouterr().err
    assert main([*argv, "--lora.rank", "8"]) == 2
    assert "--bias-update-speed: has no effect" in capsys.readouterr().err


def test_a_reward_model_has_it_too() -> None:
    module = module_of("mixtral", AutoModelForSequenceClassification, num_labels=1, pad_token_id=0)
    model = prepare_module(module, tokenizer())
    out = forward(model, pack(rows()).to("cpu"), Asks(balance=True))
    assert out.balance_S is not None
    assert out.scalar_T is not None
    assert len(out.balance_S) == len(LENGTHS)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_a_model_without_it_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"aux_loss_coef: \w+ForCausalLM has no experts that are balanced by a loss"):
        trainer_of(module_of(kind))
    module_of(kind).config.save_pretrained(tmp_path / "m")
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    argv = ["sft", "--model", str(tmp_path / "m"), "--data", str(tmp_path / "d.jsonl"), "--steps", "1", "--dry-run"]
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


FLOAT32 = [
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "granitemoe",
    "deepseek_v3",
    "minimax_m2",
    "jamba",
    "hunyuan_v1_moe",
]


@pytest.mark.parametrize("kind", FLOAT32)
def test_routers_of_a_model_in_bfloat16_compute_in_float32(kind: str) -> None:
    """From the same parameters; what is trained, and the rest of the layer, stays in bfloat16."""
    model = prepare_module(module_of(kind), tokenizer(), dtype="bfloat16")
    model.compute_in(torch.bfloat16)
    assert model.module.config._experts_implementation == IMPLEMENTATION
    router = routers_of(model.module)[0]
    seen: list[tuple[Any, ...]] = []
    router.register_forward_hook(lambda part, given, found: seen.append((given, found)))
    out = hidden_states(model, pack(rows()).to("cpu"))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert router.weight.dtype == router.weight.grad.dtype == torch.bfloat16
    assert router.weight.grad.any()
    (x, *others), found = seen[0]
    assert x.dtype == torch.bfloat16
    exact = router.narrow.forward(replaced(router), x.float(), *others)
    rounded = router.narrow.forward(router, x, *others)
    for y, want in zip(found, exact, strict=True):
        assert torch.equal(y, want)
        assert y.dtype in (torch.float32, torch.int64)
    if kind != "deepseek_v3":  # whose own is in float32 already
        assert not all(torch.equal(y.float(), want.float()) for y, want in zip(rounded, exact, strict=True))


@pytest.mark.parametrize("kind", ["jamba", "hunyuan_v1_moe"])
def test_routers_that_are_linear_layers_have_no_adapters_and_all_their_bits(kind: str) -> None:
    module = module_of(kind)
    quantize_module(module, "fp8")
    put_adapters(module, AdapterParams(rank=2), "base")
    routers = routers_of(module)
    assert routers
    assert all(type(router) is torch.nn.Linear for router in routers)
    assert adapted(module)


def test_adapters_that_peft_puts_on_experts_instead_are_said(caplog: pytest.LogCaptureFixture) -> None:
    put_adapters(module_of("qwen3_moe"), AdapterParams(rank=2), "base")
    put_adapters(module_of("deepseek_v3"), AdapterParams(rank=2, targets=("q_a_proj", "experts")), "base")
    assert not caplog.text
    module = module_of("deepseek_v3")
    put_adapters(module, AdapterParams(rank=2), "base")
    assert {name.partition(".mlp.")[2] for name in adapted(module)} == {"", "experts", "experts.base_layer"}
    assert "these have adapters (down_proj and gate_up_proj)" in caplog.text


def replaced(router: torch.nn.Module) -> torch.nn.Module:
    """A copy with float32 parameters."""
    plain = copy.copy(router)
    plain._parameters = {n: None if p is None else torch.nn.Parameter(p.float()) for n, p in router._parameters.items()}
    return plain


def test_a_model_in_float32_is_left_as_it_is() -> None:
    model = prepare_module(module_of("mixtral"), tokenizer())
    model.compute_in(torch.float32)
    assert not any(hasattr(router, "narrow") for router in routers_of(model.module))


def test_a_tie_that_rounding_decides_is_no_fault_of_packing():
    """In 16 bits another expert now and then makes a row another, as transformers' own two ways do between them."""
    module = families.NAMES["mixtral"].module(families.TINY | {"num_hidden_layers": 8})
    trained_size(module)
    module = module.bfloat16()
    ids = torch.randint(2, 96, (1, 24), generator=torch.Generator().manual_seed(0))
    found = []
    for how in ("eager", "grouped_mm"):
        module.set_experts_implementation(how)
        with torch.no_grad():
            found.append(module(input_ids=ids, use_cache=False).logits[0])
    assert gap_of(*found) > LOW_PRECISION_TOLERANCE > gap_of(*found, most=True)
    assert prepare_module(module, tokenizer(), dtype="bfloat16").packed
