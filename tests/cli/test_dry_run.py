"""A plan finds what a run would stumble on, and neither loads weights nor starts Ray for it."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext

import pytest
import ray
import torch
from helpers.runs import arguments, unevaluated, write_inputs
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from tandem.cli.main import main
from tandem.errors import UserError
from tandem.models.proof.limits import model_config
from tandem.models.scalar import require_head


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Whose weights nobody could load."""
    folder = tmp_path_factory.mktemp("dry")
    write_inputs(folder)
    weights = load_file(folder / "base" / "model.safetensors")
    (folder / "base" / "model.safetensors").write_bytes(b"not at all")
    (folder / "numbers.txt").write_text(str(sum(tensor.numel() for tensor in weights.values())))
    return folder


@pytest.fixture
def plan(inputs, monkeypatch, capsys):
    """Runs a command with --dry-run; returns (exit code, standard error, standard output)."""
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(ray, "init", None)

    def call(*argv):
        before = sorted(inputs.rglob("*"))
        code = main([*argv, *([] if "--out" in argv else ["--out", "never"]), "--steps", "4", "--dry-run"])
        captured = capsys.readouterr()
        assert [path for path in sorted(inputs.rglob("*")) if "__pycache__" not in path.parts] == [
            path for path in before if "__pycache__" not in path.parts
        ]
        return code, captured.err, captured.out

    return call


def used(out):
    lines = out.partition("would use\n")[2].splitlines()
    return {line.split("  ")[1]: line.split("  ", 2)[2].strip() for line in lines if line.startswith("  ")}


@pytest.mark.parametrize("method", ["sft", "rm", "dpo", "ppo", "grpo", "online-dpo", "opd"])
@pytest.mark.parametrize("placement", [[], ["--placement.actor", str(len(os.sched_getaffinity(0)))]])
def test_a_plan_says_what_would_be_used(plan, inputs, method, placement):
    code, err, out = plan(*arguments(method), *placement)
    assert code == 0, err
    models = {role: text for role, text in used(out).items() if "parameters" in text}
    reference = {"reference"}
    beside = {"ppo": {"critic"} | reference, "dpo": reference, "online-dpo": reference, "opd": {"teacher"}}
    assert set(models) == {"model"} | beside.get(method, set())
    judged = "check.py:right" if "--reward" in arguments(method) else "none" if method == "opd" else None
    assert used(out).get("rewards") == judged
    size = int((inputs / "numbers.txt").read_text())
    if method != "rm":
        assert models["model"].startswith(f"LlamaForCausalLM, {size / 1e6:.2f}M parameters, cpu, float32")
    for scalar in ("model",) if method == "rm" else ("critic",) if method == "ppo" else ():
        assert models[scalar].startswith("LlamaForSequenceClassification, ")
    assert any("40 " in text for text in used(out).values())


def test_an_encoder_is_refused_by_its_config(plan, inputs, tmp_path):
    folder = tmp_path / "bert"
    shutil.copytree(inputs / "base", folder)
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.save_pretrained(folder)
    for method in ("sft", "rm"):
        code, err, _ = plan(*(str(folder) if word == "base" else word for word in arguments(method)))
        assert (code, err.count("\n")) == (2, 1)
        assert f"{folder}: what it says of a token depends on the tokens after it, as in BERT" in err
    config.is_decoder = True
    config.save_pretrained(folder)
    assert model_config(folder).is_decoder


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--placement.actor", "64"], ["placement: 64 CPUs are asked for (actor 64)", "would fit"]),
        (["--placement.actor", "1", "--placement.engine", "64"], ["(actor 1, engine 64)"]),
        (["--max-new-tokens", "126"], ["prompts.jsonl:1", "the 128 positions of base"]),
        (["--max-length", "4"], ["prompts.jsonl:1", "5 tokens"]),
        (["--offload", "parameters"], ["offload", "--placement.actor 1"]),
        (["--reward", "nowhere.py:f"], ["nowhere.py"]),
        (["--model", "nowhere"], ["nowhere"]),
        (["--model", "empty"], ["empty: holds a config and no weights"]),
        (["--lora.rank", "2", "--lora.targets", "nope"], ["lora.targets: LlamaForCausalLM has no layer nope"]),
        (["--out", "/proc/x"], ["/proc/x: cannot be written: /proc: "]),
    ],
)
def test_a_plan_finds_the_mistakes_of_a_run(plan, inputs, flags, parts):
    if "empty" in flags:
        shutil.copytree(inputs / "base", inputs / "empty")
        (inputs / "empty" / "model.safetensors").unlink()
    argv = arguments("grpo")
    if flags[0] in argv:
        del argv[argv.index(flags[0]) : argv.index(flags[0]) + 2]
    code, err, _ = plan(*argv, *flags)
    assert code == 2
    [line] = [line for line in err.splitlines() if line.startswith("tandem: error: ")]
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    "words",
    [
        [*unevaluated(arguments("ppo")), "--reward-model", "teacher", "--steps", "1"],
        ["sample", "--model", "base", "--data", "prompts.jsonl", "--reward-model", "teacher", "--max-new-tokens", "5"],
        ["eval", "rm", "--model", "teacher", "--data", "pairs.jsonl"],
        ["score", "--data", "demos.jsonl", "--reward-model", "teacher"],
    ],
    ids=lambda words: words[0],
)
def test_a_reward_model_without_a_head_is_refused_before_anything_is_loaded(inputs, monkeypatch, capsys, words):
    """Weights of the policy that cannot be read would be said otherwise."""
    monkeypatch.chdir(inputs)
    for more in ([], ["--dry-run"]):
        assert main([*words, "--out", "never", *more]) == 2
        assert capsys.readouterr().err.startswith("tandem: error: teacher: no trained 'score' head in it; give a rewa")


def test_heads_that_are_there_or_not_to_be_seen(inputs, tmp_path):
    base, head = tmp_path / "base", tmp_path / "rm"
    shutil.copytree(inputs / "teacher", base)
    shutil.copytree(base, head)
    save_file({"score.weight": torch.zeros(1, 32)}, head / "model-00002-of-00002.safetensors")
    for source in (head, inputs / "base", "a/name", tmp_path / "nowhere"):
        require_head(str(source))
    adapters = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(base)}
    for kind in ("CAUSAL_LM", "SEQ_CLS"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapters | {"task_type": kind}))
        with nullcontext() if kind == "SEQ_CLS" else pytest.raises(UserError, match="no trained 'score' head"):
            require_head(str(tmp_path))
