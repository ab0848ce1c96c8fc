"""What a person is told where vLLM cannot be started."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.vllm_models import make_model, save

from tandem.engines.vllm.engine import VLLMEngine
from tandem.engines.vllm.setup import VLLMParams, check_vllm, end_with_ranks, explained
from tandem.errors import RunFailure, UserError


@pytest.mark.parametrize("version", ["0.25.0", "0.25.1", "0.32.0+cpu", "0.29.0rc1"])
def test_versions_that_work(version):
    check_vllm(version)
    check_vllm()


@pytest.mark.parametrize("version", ["0.24.9", "0.33.0", "1.0.0", "0.6.3.post1"])
def test_other_versions_are_refused(version):
    with pytest.raises(UserError, match=rf"vLLM {version} is installed.*0\.25 to 0\.32.*pip install"):
        check_vllm(version)


def test_queries_of_latent_attention_are_turned_by_their_own_positions():
    """A slice of each head, as DeepSeek's are: vLLM's kernel for CPUs takes heads for tokens there."""
    check_vllm()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    from tandem.engines.vllm.plugin import register

    register()
    with set_current_vllm_config(VllmConfig()):
        rope = RotaryEmbedding(8, 8, 32, 10000.0, False, torch.float32)
    query, key = torch.randn(20, 2, 24)[..., 16:], torch.randn(20, 1, 8)
    angle = torch.arange(20.0)[:, None, None] / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones_like(angle), angle)
    wanted = [torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:2], 4, 2)) * turn) for x in (query, key)]
    for found, truth in zip(rope.forward_cpu(torch.arange(20), query.clone(), key.clone()), wanted, strict=True):
        torch.testing.assert_close(found.reshape(truth.shape), truth, atol=1e-5, rtol=1e-5)


@pytest.fixture
def folder(tmp_path):
    return save(make_model("llama", seed=0, tied=True), tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arguments": {"logprobs_mode": "raw_logits"}}, "'logprobs_mode' cannot be changed"),
        ({"arguments": {"max_model_len": 8}}, "is what Tandem calls 'max_length'"),
        ({"arguments": {"blok_size": 8}}, "no argument 'blok_size'"),
        ({"tensor_parallel": 3}, r"tensor_parallel is 3, and \S+ has 2 attention heads; set one that divides 2"),
        (
            {"arguments": {"kv_cache_memory_bytes": 100_000}, "max_length": 120},
            r"cache is too small for one sequence of max_length 12[01] .*needed",
        ),
        ({"max_length": 1000}, r"max_length is 1000, and \S+ has 128 positions; set at most 128"),
    ],
)
def test_settings_that_cannot_work(folder, options, words):
    with pytest.raises(UserError, match=words) as caught:
        VLLMEngine(VLLMParams(model=folder, **({"dtype": "float32", "max_slots": 2} | options)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["SidewaysForCausalLM"]}, "vLLM does not know the architecture .*SidewaysForCausalLM"),
        ({"model_type": "sideways"}, "model type of .* is unknown"),
    ],
)
def test_a_model_that_vllm_does_not_know(folder, tmp_path, changes, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=words) as caught:
        VLLMEngine(VLLMParams(model=folder, dtype="float32", max_slots=2))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        VLLMEngine(VLLMParams(model=str(tmp_path / "nowhere"), dtype="float32", max_slots=2))


def test_why_a_rank_did_not_start_is_told_though_vllm_only_logs_it(capfd):
    silent = RuntimeError("WorkerProc initialization failed due to an exception in a background process. See stack ...")
    params = VLLMParams(model="base", dtype="float32", max_slots=2, tensor_parallel=2)
    died = explained(silent, params)
    assert type(died) is RunFailure
    assert "base: one of its 2 ranks died (killed, crashed, or out of" in str(died)
    logged = "(Worker_TP1 pid=98) ERROR 11-30 04:13:17 [multiproc_executor.py:953]"
    os.write(1, f"{logged} Traceback (most recent call last):\n{logged}   File 'a.py', in load\n".encode())
    os.write(1, f"{logged}     error: int\n{logged} AssertionError: tried to load 5 of 128\n\n".encode())
    said = explained(silent, params)
    assert (type(said), str(said)) == (
        UserError,
        "vLLM cannot start with base: AssertionError: tried to load 5 of 128",
    )
    assert capfd.readouterr().out.endswith("of 128\n\n")


@pytest.mark.parametrize(("code", "how"), [(-9, "SIGKILL"), (3, "exit code 3"), (None, "exit code None")])
def test_a_call_that_fails_since_a_rank_has_died_is_not_answered_before_the_process_ends(
    monkeypatch, capsys, code, how
):
    """Also where vLLM has waited for the rank, and nobody else is told its code."""
    sentinel, alive = os.pipe()
    # Whoever waits for the rank is told late, so that the failed call is answered first where nothing holds it back.
    rank = SimpleNamespace(sentinel=sentinel, name="rank", pid=7, exitcode=code, join=lambda: time.sleep(0.1))
    executor = SimpleNamespace(workers=[SimpleNamespace(proc=rank)], is_failed=False, shutting_down=False)
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    after_failure = end_with_ranks(SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor)))
    after_failure()
    assert not codes  # a failure of its own
    os.close(alive)
    after_failure()
    assert codes == [1]
    assert f"vLLM's rank (pid 7) died ({how})" in capsys.readouterr().err
    os.close(sentinel)
