"""Any Hugging Face causal LM goes through every command: packed ones, and one whose attention cannot be replaced."""

import json

import pytest
from helpers.models import make_module
from helpers.runs import arguments, write_inputs

from tandem.cli.main import main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("architectures")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt_neox", "mistral_sliding", "gemma2_softcap", "bloom"])
def test_every_command(inputs, monkeypatch, name):
    monkeypatch.chdir(inputs)
    make_module(name).save_pretrained("base")
    for method in ("sft", "rm", "ppo", "grpo"):
        extra = ["--reward-model", f"{name}-rm/model"] if method == "ppo" else []
        argv = [*arguments(method), *extra, "--steps", "2", "--out", f"{name}-{method}"]
        if method in ("ppo", "grpo"):
            argv += ["--old-logp", "trainer"]
        assert main(argv) == 0
        last = json.loads((inputs / f"{name}-{method}" / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["grad_norm"] > 0
        if method in ("ppo", "grpo"):
            # Law 4: the sampler's log-probs are the trainer's.
            assert last["sampler_gap_max"] < 1e-4


def test_bfloat16_states_its_gap(inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    make_module("llama").save_pretrained("base")
    argv = [*arguments("grpo"), "--steps", "2", "--dtype", "bfloat16", "--old-logp", "trainer", "--out", "low"]
    assert main(argv) == 0
    last = json.loads((inputs / "low" / "metrics.jsonl").read_text().splitlines()[-1])
    # bfloat16 keeps 8 bits: logits up to 4 are rounded by up to 2**-7, so log-probs may differ by twice that.
    # Above the float32 bound: that it really computed in bfloat16.
    assert 1e-4 < last["sampler_gap_max"] < 2**-6 * 2
