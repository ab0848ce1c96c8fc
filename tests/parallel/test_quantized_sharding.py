"""A base in few bits on two workers over gloo: they train as one does, and their engines sample from its very codes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.models import make_module, make_tokenizer
from helpers.ranks import run_ranks
from test_sharded_training import OPTIM, batch_of, loss

from tandem.assembly.configs.sections import ModelSection
from tandem.assembly.models import Replicas, replica_engine
from tandem.models.loading import load_causal
from tandem.models.lora.adapters import AdapterParams
from tandem.models.quantized.layers import quantized_in
from tandem.parallel.sharding import local
from tandem.parallel.world import World
from tandem.sync.check import WeightMismatch, require_equal
from tandem.training.trainer import LocalTrainer, MemoryParams
from tandem.training.views import View
from tandem.workers.process import Site

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")
ROWS = [[5, 9, 13, 2, 7, 40, 8], [8, 3, 22, 61]]
LAST = "model.layers.1.mlp.down_proj.base_layer"
# Of one sequence one rank has no tokens at all.
STEPS = [7, 1, 6]


@dataclass
class Found:
    """What a rank saw of one kind of base."""

    metrics: list[dict[str, float]]
    state: dict[str, Any]
    view: torch.Tensor
    bytes: int
    """Of this rank's codes."""
    sharded: list[str]
    """Names of the parameters of which it has slices."""
    broken: list[str]
    """What should be equal bit for bit, and is not."""
    gap: float
    """Between what an engine of this process gives and the trainer, in nats."""
    moved: float
    """What steps have changed of log-probs, in nats."""
    caught: str
    """What is said of an engine on other codes."""


def trainer_in(world: World, folder: Path, kind: str, seed: int = 0) -> LocalTrainer:
    params = AdapterParams(rank=4, quantize=kind, seed=seed)  # type: ignore[arg-type]
    model = load_causal(folder, device="cpu", adapters=params)
    optim = replace(OPTIM, ema_decay=0.9, learning_rate=1e-3)
    return LocalTrainer(model, loss, optim, token_budget=40, world=world, memory=MemoryParams())


def step(trainer: LocalTrainer, number: int) -> dict[str, float]:
    batch = batch_of(STEPS[number], 10 * number)
    return trainer.forward_backward(batch) | trainer.optim_step()


def differing(one: Any, two: Any, where: str = "") -> list[str]:
    """Where two nests of tensors differ by any bit."""
    if isinstance(one, dict):
        return [x for key in one for x in differing(one[key], two[key], f"{where}.{key}")]
    if isinstance(one, list):
        return [x for i, (a, b) in enumerate(zip(one, two, strict=True)) for x in differing(a, b, f"{where}.{i}")]
    same = torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
    return [] if same else [where]


def laws(world: World, folder: Path, kind: str) -> Found:
    trainer = trainer_in(world, folder, kind)
    view = View(trainer, temperature=1.0)
    layers = quantized_in(trainer.model.module)
    codes = {name: layer.weight.clone() for name, layer in layers.items()}
    first = trainer.logprobs(ROWS)
    metrics = [step(trainer, 0)]
    state = [copy.deepcopy(trainer.state_dict())]
    metrics += [step(trainer, 1), step(trainer, 2)]
    whole = trainer.state_dict()

    # A run that was stopped after its first step, over as many workers.
    if world.size > 1:
        dist.broadcast_object_list(state, group=world.group)
    again = trainer_in(world, folder, kind, seed=9)
    again.load_state_dict(state[0])
    step(again, 1), step(again, 2)
    broken = differing(whole, again.state_dict())

    # An engine beside it samples from the same codes, and pushes bring the adapters.
    site = Site(world, {"actor": trainer})
    site.roles["engine"] = engine = replica_engine(
        site,
        ModelSection(model=str(folder), device="cpu"),
        {"max_slots": 4},
        adapters=AdapterParams(rank=4, quantize=kind, seed=3),  # type: ignore[arg-type]
    )
    theirs, seen = quantized_in(engine.model.module), view.score(batch_of(5, 99)).logp_T
    assert seen is not None
    for name, layer in theirs.items():
        tensors = [(x.coded.codes, *x.coded.scales) for x in (layer, layers[name])]
        broken += [name for a, b in zip(*tensors, strict=True) if a.data_ptr() != b.data_ptr()]
    replicas = Replicas(site)
    replicas.push(check=False)
    sums, found = replicas.push(check=True)
    require_equal("the engine", sums, engine.held(), found)
    own = trainer.logprobs(ROWS)
    gap = largest(own, engine.logprobs(ROWS))
    broken += [name for name, layer in layers.items() if not torch.equal(layer.weight, codes[name])]

    theirs[LAST].weight.copy_(theirs[LAST].weight.flip(0))
    caught = ""
    try:
        require_equal("the engine", sums, engine.held(), list(engine.sums.now().values()))
    except WeightMismatch as error:
        caught = str(error)
    return Found(
        metrics=metrics,
        state=whole,
        view=seen,
        bytes=sum(layer.bytes for layer in layers.values()),
        sharded=[name for name, p in trainer.parameters.items() if local(p) is not p],
        broken=broken,
        gap=gap,
        moved=largest(first, own),
        caught=caught,
    )


def both(world: World, folder: Path) -> list[Found]:
    return [laws(world, folder, kind) for kind in ("nf4", "fp8")]


def largest(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_two_workers_train_as_one_does_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    make_module("qwen2").save_pretrained(tmp_path)  # linear layers with biases among them
    make_tokenizer().save_pretrained(tmp_path)
    ranks = run_ranks(both, 2, tmp_path)
    for one, *two in zip(both(World(), tmp_path), *ranks, strict=True):
        assert not one.sharded
        assert one.moved > 0.01
        for rank in two:
            assert not rank.broken
            assert rank.gap < 1e-5
            assert "does not hold the trainer's model.layers.1.mlp.down_proj" in rank.caught
            assert rank.metrics == two[0].metrics
            for a, b in zip(one.metrics, rank.metrics, strict=True):
                assert a == pytest.approx(b, abs=1e-6, rel=1e-5)
            assert (one.view - rank.view).abs().max() < 1e-5
            # The base is whole on every rank, and nothing else is.
            assert rank.bytes == one.bytes
            assert f"{LAST}.weight" not in rank.sharded
            assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.base_layer.bias"} < {*rank.sharded}
        state = two[0].state
        assert state["adapters"] == one.state["adapters"]
        for part in ("model", "ema"):
            assert all(".lora_" in name for name in state[part])
            for name, value in one.state[part].items():
                assert (value - state[part][name]).abs().max() < 1e-5, name
