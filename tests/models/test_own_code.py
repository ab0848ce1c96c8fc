"""A model that brings Python code of its own: it is run where that is allowed, all the way, and nowhere else."""

import json

import pytest
import transformers.dynamic_module_utils as own_modules
from helpers.models import make_module, make_tokenizer
from helpers.runs import write_inputs

import tandem
from tandem.cli.main import main

CODE = """
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

class OwnConfig(LlamaConfig):
    model_type = "tandems_own"

class OwnBase(LlamaModel):
    config_class = OwnConfig

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnScores(LlamaForSequenceClassification):
    config_class = OwnConfig

AutoModel.register(OwnConfig, OwnBase)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of such a model, ``own``, beside data and a reward."""
    monkeypatch.setattr(own_modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    folder = tmp_path / "own"
    make_module("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "own_code.py").write_text(CODE)
    classes = {"Config": "OwnConfig", "ModelForCausalLM": "OwnModel", "ModelForSequenceClassification": "OwnScores"}
    auto = {f"Auto{name}": f"own_code.{kind}" for name, kind in classes.items()}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "tandems_own", "auto_map": auto}))
    return folder


def test_a_model_with_code_of_its_own_is_trained_and_judges(own):
    about = {"model": "own", "device": "cpu", "steps": 1, "trust_remote_code": True, "save_every": "0"}
    tandem.run(tandem.read_config("rm", data="pairs.jsonl", out="rm", batch_size=2, **about))
    judge = {"reward_model": "rm/model", "prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 2}
    adapters = {"lora__rank": 2, "critic": "own"}
    tandem.run(tandem.read_config("ppo", data="prompts.jsonl", out="ppo", **judge, **adapters, **about))
    for command in (
        "generate --model ppo/model --data prompts.jsonl --out samples --max-new-tokens 2 --device cpu",
        "export --model ppo --out merged",
        "data pairs.jsonl --model own",
    ):
        assert main([*command.split(), "--trust-remote-code"]) == 0


def test_it_is_not_run_where_nobody_said_so(own, capsys):
    words = "sft --model own --data demos.jsonl --out run --steps 1 --device cpu"
    assert main(words.split()) == 2
    assert "own: it comes with Python code of its own" in (said := capsys.readouterr().err)
    assert said.endswith("read it, and give --trust-remote-code\n")
    assert not (own.parent / "modules" / "transformers_modules").exists()


@pytest.mark.parametrize("lacks", ["AutoModel", "AutoModelForSequenceClassification"])
def test_code_without_a_class_that_a_reward_model_needs_is_said(own, capsys, lacks):
    if lacks == "AutoModel":
        (own / "own_code.py").write_text(CODE.replace("AutoModel.register(OwnConfig, OwnBase)", ""))
    else:
        config = json.loads((own / "config.json").read_text())
        del config["auto_map"][lacks]
        (own / "config.json").write_text(json.dumps(config))
    words = "rm --model own --data pairs.jsonl --out run --steps 1 --device cpu --trust-remote-code --dry-run"
    assert main(words.split()) == 2
    assert f"add {lacks}.register(OwnConfig, CLASS) to the code" in capsys.readouterr().err
