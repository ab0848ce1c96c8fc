"""A loop's sampler on real vLLM: each rank has one in a child process, fed by its pushes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.models import make_tokenizer
from helpers.vllm_models import make_model, reference_logp, save
from torch.distributed.fsdp import fully_shard

from tandem.errors import UserError, WorkerDied
from tandem.own_loop.sampler import Sampler
from tandem.parallel.world import World
from tandem.sync.check import WeightMismatch
from tandem.types import SamplingParams

PROMPTS: list[Any] = ["hello", [5, 6, 7], "a=1;"]
SAMPLING = SamplingParams(max_new_tokens=12, temperature=1.0)
DEADLINE_S = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(make_model("llama", seed=0, tied=True), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def alone(folder: str) -> Iterator[Sampler]:
    """Of one process, with the weights of ``trained()``; the last test breaks it."""
    with Sampler(folder, engine="vllm", max_slots=4) as sampler:
        sampler.update(trained(), 1)
        yield sampler


def trained(seed: int = 1) -> Any:
    return make_model("llama", seed=seed, tied=True)


def greedy(module: Any, prompt: Any) -> str:
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt])
    done = module.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=1, pad_token_id=0)
    return tokenizer.decode(done[0, ids.shape[1] :], skip_special_tokens=True)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_rank(folder):
    with Sampler(folder, engine="vllm", max_slots=8, seed=3, sleep=True) as sampler:
        pid = sampler.engine.child.process.pid
        for seed in (1, 2):
            module = trained(seed).train()
            assert sampler.update(module, seed) is True
            assert sampler.update(module, seed) is False
            texts = sampler.generate(PROMPTS, max_new_tokens=16, temperature=0)
            assert texts == [greedy(trained(seed), prompt) for prompt in PROMPTS]
            # It slept since, and so gets its weights once more.
            assert not sampler.engine.filled
            (first, _), *_ = sampler.completions([[5, 6, 7]], SAMPLING, n=2)
            assert first.behaviour_logp == pytest.approx(
                reference_logp(trained(seed), [5, 6, 7], first.token_ids), abs=1e-4
            )
            assert first.version_min == seed
            assert all(m.training for m in module.modules())
        with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj\.bias"):
            sampler.update(make_model("qwen2", seed=1, tied=True), 3)
        sampler.update(trained(), 3)
        with pytest.raises(UserError, match="temperature is 5"):
            sampler.generate(["hello"], temperature=5)
        assert runs(pid)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match=rf"the vLLM engine \(pid {pid}\) died in .*killed by SIGKILL"):
            sampler.generate(["hello"])
        with pytest.raises(WorkerDied, match="the vLLM engine"):
            sampler.update(trained(), 4)
    assert not runs(pid)


def on_a_rank(world: World, folder: str) -> Any:
    """Samples of a sharded model; then rank 1's vLLM is killed. Texts, what was said, and the child's pid."""
    module = trained()
    for layer in module.model.layers:
        fully_shard(layer)
    fully_shard(module)
    with Sampler(folder, engine="vllm", max_slots=4) as sampler:
        sampler.update(module, 1)
        texts = sampler.generate(PROMPTS, max_new_tokens=16, temperature=0)
        tokens = [c.token_ids for group in sampler.completions(PROMPTS, SAMPLING, n=2) for c in group]
        pid = sampler.engine.child.process.pid
        if world.rank == 1:
            os.kill(pid, signal.SIGKILL)
        try:
            sampler.generate(PROMPTS)
            said = ""
        except UserError as error:
            said = f"{type(error).__name__}: {error}"
    return texts, tokens, said, pid


def test_two_ranks(folder, alone, monkeypatch):
    monkeypatch.setattr(ranks, "DEADLINE_S", DEADLINE_S)
    first, second = ranks.run_ranks(on_a_rank, 2, folder)
    assert first[:3] == second[:3]
    assert first[0] == [greedy(trained(), prompt) for prompt in PROMPTS]
    assert first[2].startswith(f"WorkerDied: rank 1: the vLLM engine of rank 1 (pid {second[3]}) died in ")
    assert not runs(first[3])
    assert not runs(second[3])
    assert first[1] == [c.token_ids for group in alone.completions(PROMPTS, SAMPLING, n=2) for c in group]


def test_weights_that_do_not_arrive_are_noticed(alone):
    assert alone.generate(PROMPTS, max_new_tokens=16, temperature=0)
    push, source = alone.engine.push, alone.engine.source
    # The embedding of the first update is sent once more.
    fill, stale = source.gatherer.fill, dict(trained().named_parameters())["model.embed_tokens.weight"].detach()

    def filled(wanted: Any) -> None:
        fill(wanted)
        for name, tensor in wanted:
            if name == "model.embed_tokens.weight":
                tensor.copy_(stale)

    source.gatherer.fill = filled
    with pytest.raises(WeightMismatch, match=r"does not hold the trainer's model\.embed_tokens"):
        alone.update(trained(2), 2)
    assert push.check.pushes == 1
    with pytest.raises(UserError, match=r"call update\(model, step\) first"):
        alone.generate(["hello"])
