"""Compiled layers train as others do: in one process, sharded, and with activation checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import make_module, make_tokenizer
from helpers.ranks import run_ranks
from test_sharded_training import OPTIM, assert_close, batch_of, loss
from torch._dynamo.backends.debugging import aot_eager

from tandem.models.loading import prepare_module
from tandem.parallel.world import World
from tandem.training.trainer import LocalTrainer, MemoryParams

STEPS = [7, 6]


def train(world: World, compile: Any, memory: dict[str, Any]) -> Any:
    model = prepare_module(make_module("qwen2"), make_tokenizer())
    trainer = LocalTrainer(
        model, loss, OPTIM, token_budget=80, world=world, memory=MemoryParams(**memory), compile=compile
    )
    if trainer.model.blocks is not None:
        trainer.model.blocks.backend = of_constants
    metrics = []
    for step, count in enumerate(STEPS):
        batch = batch_of(count, 10 * step + count)
        metrics.append(trainer.forward_backward(batch) | trainer.optim_step())
    held_out = batch_of(5, 99)
    score = trainer.score(held_out)
    if compile == "on":
        # One that could not be compiled would say so, and go on.
        assert trainer.model.blocks.working
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        # With and without gradient, each for one segment or more.
        assert 0 < graphs <= 4, f"{graphs} graphs for two layers of a kind"
    return metrics, score.logp_T.detach().cpu(), trainer.evaluate(held_out), trainer.state_dict()


def of_constants(graph: Any, inputs: Any) -> Any:
    """Graphs with their backward, all but the C++ that inductor makes of them (tests/models has it).

    A layer's own numbers, as the size of its heads, are none of their inputs.
    """
    given = {node.name: node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"}
    numbers = [name for name, value in given.items() if name.startswith("l_self_") and not torch.is_tensor(value)]
    assert not numbers, f"variables of a graph: {numbers}"
    return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("memory", [{}, {"activation_checkpointing": True}])
def test_one_process(memory):
    assert_close(train(World(), "off", {}), train(World(), "on", memory))


def test_two_sharded_workers():
    memory = {"activation_checkpointing": True}
    assert_close(train(World(), "off", {}), run_ranks(train, 2, "on", memory)[0])
