"""Each optimizer by name: against loops in float64 or torch's own, resumed bit for bit, on two workers as on one."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
from typing import Any

import pytest
import torch
import transformers
from helpers.models import ARCHITECTURES, VOCABULARY, make_module, make_tokenizer
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

import tandem
from tandem.batch import Batch, Outputs, TokenLoss
from tandem.data.packing import pack, stamp_weights
from tandem.errors import UserError
from tandem.models.loading import prepare_module
from tandem.parallel.sharding import unsharded
from tandem.parallel.world import World
from tandem.training.optim import OptimParams, build_optimizer, hidden_matrices
from tandem.training.trainer import LocalTrainer, MemoryParams
from tandem.types import Sequence

NAMES = ("adamw", "adamw8bit", "adafactor", "muon")
RATES = {"adamw": 1e-3, "adamw8bit": 1e-3, "adafactor": 1e-2, "muon": 1e-3}
STEPS = 4


def module_of() -> Any:
    """Large enough that bitsandbytes keeps the moments of its matrices in 8 bits: from 4096 numbers on."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=64, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def loss(out: Outputs, batch: Batch) -> TokenLoss:
    assert out.logp_T is not None
    return TokenLoss(loss_T=-out.logp_T)


def trainer_of(
    name: str, world: World | None = None, dtype: Any = "float32", offload: Any = "none", **optim: Any
) -> LocalTrainer:
    params = OptimParams(
        **{"learning_rate": RATES[name], "total_steps": 9, "optimizer": name, "weight_decay": 0.1} | optim
    )
    model = prepare_module(module_of(), make_tokenizer(), dtype=dtype)
    return LocalTrainer(model, loss, params, token_budget=64, world=world, memory=MemoryParams(offload=offload))


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in (12, 20, 7)]
    return stamp_weights(pack([Sequence(token_ids=i, trainable=[False] + [True] * (len(i) - 1)) for i in ids]), "token")


def train(trainer: LocalTrainer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(trainer.forward_backward(batch_of(step))["loss"])
        trainer.optim_step()
    return losses


def stepped(name: str, shape: tuple[int, ...], gradients: list[Tensor], **params: Any) -> tuple[Tensor, Tensor]:
    """A hidden parameter before and after steps with these gradients."""
    parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    before = parameter.detach().clone().double()
    optim = OptimParams(learning_rate=0.01, total_steps=9, optimizer=name, **params)  # type: ignore[arg-type]
    optimizer = build_optimizer({"w": parameter}, optim, hidden=["w"])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step(0.01)
    return before, parameter.detach().double()


def gradients_of(shape: tuple[int, ...], count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("shape", [(12, 7), (5, 9), (6,)])
def test_adafactor_is_the_papers(shape):
    """arXiv:1804.04235, algorithms 4 and 5, in float64: no first moment, clipped to 1, relative to weights."""
    x, found = stepped("adafactor", shape, gradients_of(shape), weight_decay=0.1)
    decay = 0.1 if len(shape) == 2 else 0.0
    rows = columns = full = 0.0
    for t, gradient in enumerate(gradients_of(shape), start=1):
        g, beta = gradient.double(), 1 - t**-0.8
        rate = min(0.01, 1 / math.sqrt(t))
        alpha = max(1e-3, x.square().mean().sqrt().item()) * rate
        x = x * (1 - 0.01 * decay)
        if len(shape) == 2:
            rows = beta * rows + (1 - beta) * g.square().mean(1, keepdim=True)
            columns = beta * columns + (1 - beta) * g.square().mean(0, keepdim=True)
            v = rows @ columns / rows.mean()
        else:
            v = full = beta * full + (1 - beta) * g.square()
        update = g / v.sqrt()
        x = x - alpha * update / max(1.0, update.square().mean().sqrt().item())
    assert (found - x).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(12, 7), (5, 9)])
def test_muon_steps_along_the_orthogonal_factor_with_the_size_of_adamw(shape):
    """Momentum 0.95 with Nesterov's look ahead, its singular values brought near 1, times 0.2 sqrt(max(shape)).

    In float64, with the polynomial x -> 3.4445 x - 4.775 x^3 + 2.0315 x^5 applied 5 times to the singular values.
    """
    x, found = stepped("muon", shape, gradients_of(shape), weight_decay=0.1)
    momentum = torch.zeros(shape, dtype=torch.float64)
    size = 0.2 * math.sqrt(max(shape))
    for gradient in gradients_of(shape):
        momentum = 0.95 * momentum + 0.05 * gradient.double()
        u, s, v = torch.linalg.svd(0.05 * gradient.double() + 0.95 * momentum, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        x = x * (1 - 0.01 * 0.1) - 0.01 * size * u @ torch.diag(s) @ v
    # The polynomial is computed in bfloat16, which rounds each of 15 products by up to 2^-9 of elements of at most 1.
    assert (found - x).abs().max() < 0.01 * size * 0.1


def test_adamw_in_8_bits_is_adamw_but_for_rounding():
    shape, gradients = (80, 64), gradients_of((80, 64), 6)
    x, low = stepped("adamw8bit", shape, gradients, weight_decay=0.1)
    _, exact = stepped("adamw", shape, gradients, weight_decay=0.1)
    m = v = torch.zeros(shape, dtype=torch.float64)
    for t, gradient in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * gradient.double(), 0.95 * v + 0.05 * gradient.double().square()
        x = x * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    assert (exact - x).abs().max() < 1e-6
    assert (low - x).abs().max() > 1e-4
    assert (low - x).square().mean().sqrt() < 0.05 * 0.01 * math.sqrt(6)


def test_what_each_keeps():
    """And so what it saves of AdamW's 8 bytes a number."""
    kept = {}
    for name in NAMES:
        trainer = trainer_of(name)
        train(trainer, range(1))
        parameters = sum(p.numel() for p in trainer.weights.values())
        kept[name] = sum(t.numel() * t.element_size() for t in trainer.optimizer.tensors()) / parameters
    assert kept["adamw"] == pytest.approx(8, rel=0.02)
    assert 2 < kept["adamw8bit"] < 6  # Of this small model's numbers a quarter stays in float32.
    assert kept["adafactor"] < 0.5
    assert 4 < kept["muon"] < 6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_muon_is_for_hidden_matrices(architecture):
    module = make_module(architecture)
    hidden = set(hidden_matrices(module))
    others = {name: p for name, p in module.named_parameters() if name not in hidden}
    matrices = {name for name, p in others.items() if p.ndim == 2}
    embeddings = {"transformer.word_embeddings.weight", "model.embed_tokens.weight", "gpt_neox.embed_in.weight"}
    assert matrices <= {*embeddings, "lm_head.weight", "embed_out.weight"}
    assert matrices & embeddings
    assert len(hidden) >= 8
    trainer = LocalTrainer(
        prepare_module(module, make_tokenizer()), loss, OptimParams(learning_rate=1.0, total_steps=1, optimizer="muon"),
        token_budget=64,
    )  # fmt: skip
    muon, adamw = (part.optimizer for part in trainer.optimizer.parts)
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert len(adamw.param_groups[0]["params"]) + len(adamw.param_groups[1]["params"]) == len(others)


def test_a_reward_models_head_is_adamws():
    torch.manual_seed(0)
    module = transformers.LlamaForSequenceClassification(ARCHITECTURES["llama"]())
    assert not any(name.startswith("score") or "embed" in name for name in hidden_matrices(module))
    assert hidden_matrices(module)


def test_muon_is_torchs_own_bit_for_bit():
    trainer = trainer_of("muon", max_grad_norm=math.inf)
    plain = copy.deepcopy(trainer.model.module)
    names = hidden_matrices(plain)
    rest = [p for name, p in plain.named_parameters() if name not in names]
    named = dict(plain.named_parameters())
    muon = torch.optim.Muon([named[n] for n in names], lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": [p for p in rest if p.ndim == n], "weight_decay": decay} for n, decay in ((2, 0.1), (1, 0.0))]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    for step in range(3):
        trainer.forward_backward(batch_of(step))
        for mine, theirs in zip(trainer.model.module.parameters(), plain.parameters(), strict=True):
            theirs.grad = mine.grad.clone()
        trainer.optim_step()
        muon.step()
        adamw.step()
    for mine, theirs in zip(trainer.model.module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_each_learns_and_resumes_bit_for_bit(name, dtype):
    options = {"dtype": dtype, "offload": "optimizer"}
    unbroken, first, resumed = (trainer_of(name, **options) for _ in range(3))
    losses = train(unbroken, range(STEPS))
    held_out = [unbroken.evaluate(batch_of(0))["loss"], trainer_of(name, **options).evaluate(batch_of(0))["loss"]]
    assert held_out[0] < held_out[1] - 0.01
    assert losses[: STEPS // 2] == train(first, range(STEPS // 2))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert losses[STEPS // 2 :] == train(resumed, range(STEPS // 2, STEPS))
    for mine, theirs in zip(unbroken.weights.values(), resumed.weights.values(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


def _alone(world: World, name: str) -> Tensor:
    """A parameter that is stepped with gradients that do not depend on the number of ranks."""
    found = []
    for shape in ((80, 64), (5, 9), (1, 7), (6,)):
        start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        parameter = nn.Parameter(start if world.mesh is None else distribute_tensor(start, world.mesh, [Shard(0)]))
        optim = OptimParams(learning_rate=0.01, total_steps=9, optimizer=name, weight_decay=0.1)  # type: ignore[arg-type]
        optimizer = build_optimizer({"w": parameter}, optim, hidden=["w"] if len(shape) == 2 else [], world=world)
        for gradient in gradients_of(shape):
            parameter.grad = gradient if world.mesh is None else distribute_tensor(gradient, world.mesh, [Shard(0)])
            optimizer.step(0.01)
        found.append(unsharded(parameter.detach()).flatten())
    return torch.cat(found)


def _train_all(world: World, pickled: bytes) -> dict[str, Any]:
    """For each optimizer, by what it is: the state in the middle of the steps, after them, and after the second half
    from a state that was given (where one was); and where given gradients lead."""
    found: dict[str, Any] = {}
    for name in NAMES[1:]:
        memory = "parameters" if name == "muon" and world.size > 1 else "optimizer"
        trainer = trainer_of(name, world, offload=memory, ema_decay=0.8)
        train(trainer, range(STEPS // 2))
        found[name] = {"half": copy.deepcopy(trainer.state_dict())}
        train(trainer, range(STEPS // 2, STEPS))
        found[name] |= {"whole": trainer.state_dict(), "alone": _alone(world, name)}
        if pickled:
            found[name]["resumed"] = _go_on(
                trainer_of(name, world, offload=memory, ema_decay=0.8), pickle.loads(pickled)[name]
            )
    return found


def _go_on(trainer: LocalTrainer, found: dict[str, Any]) -> Any:
    trainer.load_state_dict(found["half"])
    train(trainer, range(STEPS // 2, STEPS))
    return trainer.state_dict()


def test_two_workers_equal_one_and_checkpoints_go_between_them():
    one = _train_all(World(), b"")
    first, second = run_ranks(_train_all, 2, pickle.dumps(one))
    for name in NAMES[1:]:
        assert torch.equal(first[name]["alone"], one[name]["alone"])
        assert torch.equal(second[name]["alone"], one[name]["alone"])
        assert all(value is None for value in second[name]["whole"]["model"].values())
        wanted = one[name]["whole"]
        for found in (
            first[name]["whole"],
            first[name]["resumed"],
            _go_on(trainer_of(name, ema_decay=0.8), first[name]),
        ):
            for part, key in [(kind, name) for kind in ("model", "ema") for name in wanted[kind]]:
                # A sum over ranks rounds otherwise, and what has 8 bits then may fall on the other side: of a moment,
                # or of a matrix in Muon's products, which blow up small singular values.
                gap = (wanted[part][key] - found[part][key]).abs()
                assert gap.max() < 0.1 * RATES[name], (name, part, key)
                assert gap.mean() < 0.01 * RATES[name], (name, part, key)
            kept = [part["state"].keys() for part in found["optimizer"]]
            assert kept == [part["state"].keys() for part in wanted["optimizer"]]


def test_a_library_that_is_missing_is_said_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = tandem.read_config(
        "sft", model="nowhere", data="nowhere.jsonl", out=str(tmp_path / "o"), steps=1, optimizer="adamw8bit"
    )
    with pytest.raises(UserError, match=r"optimizer: adamw8bit .* pip install 'tandem-rlhf\[quant\]'"):
        tandem.run(config)
