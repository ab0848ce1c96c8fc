"""A run with a teacher: what it is refused for, before anything is loaded, and what it is without a reward."""

import json

import pytest
import torch
from helpers.models import ARCHITECTURES, make_tokenizer
from helpers.runs import arguments, write_inputs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tandem.cli.main import main
from tandem.tasks import tiny

OPD = [*arguments("opd"), "--steps", "2"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    write_inputs(folder)
    return folder


@pytest.fixture
def opd(inputs, monkeypatch, capsys):
    """Runs the command, with flags in place of others; returns (exit code, standard error, metrics of each step)."""
    monkeypatch.chdir(inputs)

    def call(out, *flags):
        given = dict(zip(OPD[1::2], OPD[2::2], strict=True)) | dict(zip(flags[::2], flags[1::2], strict=True))
        code = main(["opd", *(word for pair in given.items() for word in pair), "--out", out])
        file = inputs / out / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return code, capsys.readouterr().err, lines

    return call


def save_unloadable(folder, tokenizer, **config):
    """A teacher whose weights nobody could load."""
    described = ARCHITECTURES["llama"]()
    described.update(config)
    AutoModelForCausalLM.from_config(described).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"not at all")


def refused(opd, inputs, *flags):
    code, err, _ = opd("never", *flags)
    assert code == 2, err
    assert not (inputs / "never").exists()
    [line] = [line for line in err.splitlines() if line.startswith("tandem: error: ")]
    return line


def test_a_teacher_of_another_tokenizer_or_vocabulary_is_refused_before_it_is_loaded(opd, inputs):
    save_unloadable(inputs / "letters", tiny.build_tokenizer())
    assert "the teacher and the model have different tokenizers" in refused(opd, inputs, "--teacher", "letters")
    save_unloadable(inputs / "few", make_tokenizer(), vocab_size=40)
    line = refused(opd, inputs, "--teacher", "few")
    assert f"few: its embedding has 40 rows, and base may sample each of {len(make_tokenizer())} tokens" in line
    # More rows than tokens are padding, which sizes of a family have differently.
    save_unloadable(inputs / "padded", make_tokenizer(), vocab_size=len(make_tokenizer()))
    assert "rows" not in refused(opd, inputs, "--teacher", "padded")


def test_a_reward_that_counts_must_be_there_and_needs_groups(opd, inputs):
    assert "reward: nothing judges the samples; give --reward" in refused(opd, inputs, "--reward-coef", "1")
    mixed = ("--reward-coef", "1", "--reward", "check.py:right")
    assert "samples_per_prompt: on-policy" in refused(opd, inputs, *mixed, "--samples-per-prompt", "1")
    code, err, lines = opd("mixed", *mixed)
    assert code == 0, err
    assert {"reward", "teacher_kl", "reward/right"} <= lines[-1].keys()
    assert {"eval/reward"} == {"eval/reward", "eval/teacher_kl"} & lines[-1].keys()


def test_without_a_reward_no_metric_speaks_of_one(opd, inputs):
    code, err, lines = opd("unjudged", "--samples-per-prompt", "1", "--steps", "6", "--eval-every", "0")
    assert code == 0, err
    assert not [name for line in lines for name in line if "reward" in name]
    assert {"eval/teacher_kl", "eval/response_length", "eval/eos_share"} <= lines[-1].keys()
    assert "eval/teacher_kl" not in lines[1]
    events = [json.loads(line) for line in (inputs / "unjudged" / "events.jsonl").read_text().splitlines()]
    assert not [event for event in events if event["event"] == "note"]
    held_out = [json.loads(line) for line in (inputs / "unjudged" / "rollouts.jsonl").read_text().splitlines()]
    assert {s["advantage"] for line in held_out if line["held_out"] for s in line["samples"]} == {None}
    code, err, lines = opd("measured", "--eval-reward", "check.py:right")
    assert code == 0, err
    assert [name for name in lines[-1] if "reward" in name and not name.startswith("eval/")] == []
    assert "eval/reward" in lines[-1]


@pytest.mark.parametrize("old_logp", ["sampler", "trainer"])
def test_a_student_that_is_its_own_teacher_has_no_gradient(opd, inputs, old_logp):
    """None at all against the trainer's own log-probs; else that of what engine and trainer round differently."""
    flags = ("--teacher", "base", "--top-p", "0.7", "--samples-per-prompt", "1", "--old-logp", old_logp)
    code, err, (_, *lines) = opd(f"own-{old_logp}", *flags)
    assert code == 0, err
    if old_logp == "sampler":
        # Of the first step: Adam makes a step of any gradient, and moves the student away by a learning rate.
        assert abs(lines[0]["teacher_kl"]) < 1e-6
        assert lines[0]["grad_norm"] < 1e-4
        return
    assert [line[name] for line in lines for name in ("teacher_kl", "loss", "grad_norm")] == [0.0] * 6
    before, after = (load_file(inputs / f / "model.safetensors") for f in ("base", f"own-{old_logp}/model"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_teacher_of_its_own_has_much_to_say(opd, inputs):
    code, err, (_, *lines) = opd("other")
    assert code == 0, err
    assert min(line[name] for line in lines for name in ("teacher_kl", "grad_norm")) > 0.1
