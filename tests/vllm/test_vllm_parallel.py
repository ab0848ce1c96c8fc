"""Other engines: sharded over two worker processes, with biases and an untied head, bfloat16, one that fails."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.models import make_module
from helpers.vllm_faults import all_at_once, faults_seen
from helpers.vllm_models import Pusher, covered, make_model, reference_logp, save, wrong_tensors

from tandem.engines.vllm.adapters import room_of
from tandem.engines.vllm.engine import VLLMEngine
from tandem.engines.vllm.setup import VLLMParams
from tandem.errors import UserError
from tandem.models.lora.adapters import AdapterParams, put_adapters
from tandem.sync.plan import plan_of
from tandem.types import Request, SamplingParams

PROMPT = (5, 6, 7, 8)


def greatest_error(engine, module):
    request = Request(prompt_ids=PROMPT, seeds=(1, 2, 3), sampling=SamplingParams(max_new_tokens=16))
    errors = [
        abs(found - wanted)
        for completion in engine.generate([request])[0]
        for found, wanted in zip(
            completion.behaviour_logp, reference_logp(module, PROMPT, completion.token_ids), strict=True
        )
    ]
    assert len(errors) > 3
    return max(errors)


def adapted_model(seed):
    """With adapters that count for something, of scale 1."""
    module = make_model("qwen2", seed=seed, tied=False, kv_heads=2)
    put_adapters(module, AdapterParams(rank=4, alpha=4, seed=seed), "base")
    renew_adapters(module)
    return module


@torch.no_grad()
def renew_adapters(module):
    for name, parameter in module.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(torch.randn_like(parameter) * 0.3)


def test_two_tensor_parallel_ranks(tmp_path):
    """With adapters: at first beside the model, then alone."""
    pytest.importorskip("peft")
    module = make_model("qwen2", seed=0, tied=False, kv_heads=2)
    shared = set(os.listdir("/dev/shm"))
    other = adapted_model(1)
    adapters = {name: p for name, p in other.named_parameters() if ".lora_" in name}
    room = room_of(plan_of(adapters.items()))
    engine = VLLMEngine(
        VLLMParams(
            model=save(module, tmp_path), dtype="float32", max_slots=4, max_length=64, tensor_parallel=2, adapters=room
        )
    )
    try:
        for sent in (dict(other.named_parameters()), adapters):
            pusher = Pusher.connect(engine, sent, ranks=2)
            for version in (1, 2):
                renew_adapters(other)
                sums = pusher.push(version)
                assert greatest_error(engine, other) < 1e-4
                assert wrong_tensors(engine, sums) == []
            assert covered(engine) == set(sent)
            pusher.close()
        del (parameters := dict(other.named_parameters()))["model.norm.weight"]
        pusher = Pusher.connect(engine, parameters, ranks=2)
        with pytest.raises(UserError, match=r"^weight sync: .*model\.norm\.weight; is it the trainer's model\?$"):
            pusher.push(3)
        pusher.close()
        pusher = Pusher.connect(engine, dict(other.named_parameters()), ranks=2)
        assert wrong_tensors(engine, pusher.push(4)) == []
        assert all_at_once(faults_seen(pusher, "sender"))
        pusher.close()
    finally:
        engine.close()
    assert not multiprocessing.active_children()
    assert not [name for name in set(os.listdir("/dev/shm")) - shared if name.startswith("vllm_dist")]


def test_bfloat16_with_one_tensor_parallel_rank(tmp_path):
    """Weights travel as bfloat16 and arrive bit for bit; float32 would be rounded on the way in and not comparable."""
    module = make_model("qwen2", seed=0, tied=True)
    engine = VLLMEngine(VLLMParams(model=save(module, tmp_path), dtype="bfloat16", max_slots=4, max_length=64))
    try:
        other = make_model("qwen2", seed=1, tied=True)
        parameters = dict(other.named_parameters())
        pusher = Pusher.connect(engine, parameters, plan_of(parameters.items(), torch.bfloat16, bucket_bytes=1))
        sums = pusher.push(1)
        assert wrong_tensors(engine, sums) == []
        assert covered(engine) == set(parameters)
        # The model is made of large random weights, on which bfloat16 loses more than on a trained one.
        assert greatest_error(engine, other) < 0.5
        assert greatest_error(engine, module) > 1
        pusher.close()
        for end in ("sender", "engine"):
            pusher = Pusher.connect(engine, parameters, plan_of(parameters.items(), torch.bfloat16, bucket_bytes=1))
            assert all_at_once(faults_seen(pusher, end))
            pusher.close()
        pusher = Pusher.connect(engine, parameters)
        pusher.push(2)
        assert engine.checksums() == []
        pusher.close()
    finally:
        engine.close()


def test_a_step_that_fails_is_told_to_every_waiting_thread(tmp_path):
    """vLLM's attention on CPUs has no kernel for heads of 8, which shows at the first step."""
    engine = VLLMEngine(
        VLLMParams(model=save(make_module("llama"), tmp_path), dtype="float32", max_slots=4, max_length=32)
    )
    request = Request(prompt_ids=PROMPT, seeds=(1, 2, 3), sampling=SamplingParams(max_new_tokens=16))
    try:
        with ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(engine.generate, [request]) for _ in range(3)]
        for call in calls:
            with pytest.raises(RuntimeError, match="head_dim=8"):
                call.result()
        with pytest.raises(RuntimeError, match="head_dim=8"):
            engine.generate([request])
    finally:
        engine.close()
    with pytest.raises(UserError, match="closed"):
        engine.generate([request])
    with pytest.raises(UserError, match="closed"):
        engine.receive(1)
