"""The running average of the weights: its formula, in float32 whatever is computed with, resumed, written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from helpers.models import make_module, make_tokenizer
from helpers.runs import arguments, write_inputs
from safetensors.torch import load_file
from test_optimizers import train, trainer_of

import tandem
from tandem.cli.main import main
from tandem.errors import UserError
from tandem.models.loading import prepare_module
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_formulas_after_each_optimizer_step(dtype):
    trainer = trainer_of("adamw", dtype=dtype, ema_decay=0.9, offload="optimizer")
    expected = {name: w.detach().double() for name, w in trainer.weights.items()}
    for step in range(4):
        train(trainer, range(step, step + 1))
        expected = {n: 0.9 * x + 0.1 * trainer.weights[n].detach().double() for n, x in expected.items()}
    for name, average in trainer.ema.items():
        assert average.dtype == torch.float32
        assert (average.double() - expected[name]).abs().max() < 5e-7  # of weights up to 1, rounded 4 times
        assert not torch.equal(average, trainer.weights[name])


def test_it_changes_nothing_of_the_training_and_is_resumed_bit_for_bit():
    plain, unbroken, first, resumed = (trainer_of("adamw", ema_decay=decay) for decay in (None, 0.8, 0.8, 0.8))
    assert train(plain, range(4)) == train(unbroken, range(4))
    train(first, range(2))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    train(resumed, range(2, 4))
    for name, average in unbroken.ema.items():
        assert torch.equal(average, resumed.ema[name])
        assert torch.equal(unbroken.weights[name], plain.weights[name])


def test_what_is_frozen_is_not_averaged(tmp_path):
    module = make_module("llama")
    module.model.embed_tokens.weight.requires_grad_(False)
    optim = OptimParams(learning_rate=1e-2, total_steps=9, ema_decay=0.5)
    trainer = LocalTrainer(prepare_module(module, make_tokenizer()), trainer_of("adamw").loss, optim, token_budget=64)
    train(trainer, range(2))
    assert "model.embed_tokens.weight" not in trainer.ema
    for name in ("plain", "ema", "again"):
        trainer.export(tmp_path / name)
        trainer.swap_average()
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "again")}) == 1
    trainer.swap_average()
    averaged, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("ema", "plain"))
    assert averaged.keys() == plain.keys()
    for name, value in averaged.items():
        assert torch.equal(value, trainer.ema.get(name, plain[name]))


def test_a_run_writes_it_beside_its_model_and_a_checkpoint_has_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    argv = [*arguments("sft"), "--steps", "2", "--save-every", "1", "--out", "run"]
    assert main([*argv, "--ema-decay", "0.5"]) == 0
    assert "The running average of its weights is in run/model-ema" in capsys.readouterr().out
    weights = [load_file(f"{folder}/model.safetensors") for folder in ("base", "run/model", "run/model-ema")]
    steps = [torch.load(f"run/checkpoints/step_0000000{s}/actor.pt", weights_only=True) for s in (1, 2)]
    for name, average in weights[2].items():
        start, first, second = weights[0][name], steps[0]["model"][name], weights[1][name]
        torch.testing.assert_close(average, 0.25 * start + 0.25 * first + 0.5 * second, rtol=0, atol=1e-6)
    assert json.loads(Path("run/model-ema/config.json").read_text()) == json.loads(
        Path("run/model/config.json").read_text()
    )
    assert main(["export", "--model", "run/checkpoints/step_00000002", "--ema", "--out", "exported"]) == 0
    assert all(torch.equal(x, weights[2][name]) for name, x in load_file("exported/model.safetensors").items())
    assert main(["export", "--model", "run/model", "--ema", "--out", "other"]) == 2
    assert "ema: run/model is no checkpoint" in capsys.readouterr().err
    # Begun anew without one, nothing of it is left.
    assert main([*argv, "--overwrite"]) == 0
    assert not Path("run/model-ema").exists()
    assert main(["export", "--model", "run", "--step", "2", "--ema", "--out", "other"]) == 2
    assert "keeps no running average" in capsys.readouterr().err
    for decay in (0, 1):
        with pytest.raises(UserError, match="ema-decay: expected more than 0 and below 1"):
            tandem.read_config("sft", model="m", data="d.jsonl", out="o", steps=1, ema_decay=decay)
