"""A run that trains adapters: what it writes, what ``tandem export`` makes of that, and who may go on with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.models import make_module
from helpers.runs import arguments, unevaluated, write_inputs
from safetensors.torch import load_file

from tandem.cli.main import main
from tandem.models.loading import load_scalar
from tandem.runs.lines import read_metrics

STEPS = ["--steps", "2", "--save-every", "1", "--lora.rank", "4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*arguments("sft"), "--out", "run", *STEPS]) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(made, monkeypatch):
    monkeypatch.chdir(made)


def export(*words):
    return main(["export", *words, "--overwrite"])


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_a_run_writes_adapters_and_export_a_whole_model_of_them(made):
    before = {path.name: path.read_bytes() for path in Path("base").iterdir()}
    assert {path.name for path in Path("run/model").glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert json.loads(Path("run/model/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        made / "base"
    )
    assert export("--model", "run", "--out", "whole") == 0
    assert export("--model", "run/checkpoints/step_00000002", "--out", "same") == 0
    assert export("--model", "run", "--step", "2", "--no-merge", "--out", "apart") == 0
    base, whole, same = map(weights, ("base", "whole", "same"))
    assert whole.keys() == base.keys() == same.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(same[name], tensor, rtol=0, atol=1e-6)
        assert torch.equal(tensor, base[name]) == (not name.endswith("_proj.weight")), name
    apart, written = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("apart", "run/model"))
    assert all(torch.equal(apart[name], tensor) for name, tensor in written.items())
    assert {path.name: path.read_bytes() for path in Path("base").iterdir()} == before


def test_what_was_trained_is_used_and_trained_on_like_any_model(made):
    words = ["--data", "prompts.jsonl", "--max-new-tokens", "4", "--temperature", "0"]
    assert export("--model", "run", "--out", "merged") == 0
    for model, out in (("run/model", "answers"), ("merged", "again")):
        assert main(["generate", "--model", model, "--out", out, *words]) == 0
    lines = [Path(f"{folder}/samples.jsonl").read_text() for folder in ("answers", "again")]
    assert lines[0] == lines[1]
    argv = [*arguments("rm"), "--out", "rm", "--steps", "1"]
    argv[argv.index("base")] = "run/model"
    assert main(argv) == 0
    about = json.loads(Path("rm/model/adapter_config.json").read_text())
    assert (about["task_type"], about["modules_to_save"], about["r"]) == ("SEQ_CLS", ["score"], 4)
    assert main(["score", "--reward-model", "rm/model", "--data", "pairs.jsonl", "--out", "scored"]) == 0
    assert main(["eval", "rm", "--model", "rm/model", "--data", "pairs.jsonl", "--out", "measured"]) == 0
    # A critic that is trained whole begins with the reward model, its adapters merged.
    argv = [*unevaluated(arguments("ppo")), "--out", "whole_critic", "--steps", "1", "--reward-model", "rm/model"]
    assert main(argv) == 0
    assert read_metrics(Path("whole_critic/metrics.jsonl"))[-1]["critic_grad_norm"] > 0
    measured = []
    for model in ("run/model", "merged"):
        assert main(["eval", "sft", "--model", model, "--data", "demos.jsonl", "--out", f"{model}-measured"]) == 0
        measured.append(json.loads(Path(f"{model}-measured/evaluation.json").read_text())["loss"])
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_run_says_where_its_adapters_hold_less_than_its_data_say(capsys, rank):
    """40 demonstrations of 19 tokens and an end; rank 1 on two layers of 32 x 32 is 128 numbers, of 2 bits each."""
    data = Path("long.jsonl")
    data.write_text("".join(json.dumps({"prompt": "a=", "completion": "b" * 19}) + "\n" for _ in range(40)))
    argv = [*unevaluated(arguments("sft")), "--out", f"rank_{rank}", "--steps", "1", "--lora.rank", str(rank)]
    argv[argv.index("demos.jsonl")] = str(data)
    assert main([*argv, "--lora.targets", "o_proj"]) == 0
    line = "lora.rank: the adapters hold about 2 x 0.000128M bits and the data say about 0.0008M"
    assert (line in "".join(capsys.readouterr())) == (rank == 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "run/checkpoints/step_00000001", "--base", "other"], "trained on another base"),
        (["--model", "run/model", "--base", "other"], "a folder of adapters, which names its own"),
        (["--model", "run/model", "--no-merge"], "a folder of adapters already"),
        (["--model", "run/model", "--role", "critic"], "role: run/model is one model"),
        (["--model", "run", "--role", "critic"], "holds no part 'critic' but actor"),
    ],
)
def test_what_does_not_fit_is_refused(capsys, words, message):
    if not Path("other").exists():
        make_module("llama", seed=7).save_pretrained("other")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            Path(f"other/{name}").write_bytes(Path(f"base/{name}").read_bytes())
    assert export(*words, "--out", "out") == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_critic_on_the_policys_base_is_written_from_a_checkpoint(made, capsys):
    argv = [*unevaluated(arguments("ppo")), "--out", "ppo", *STEPS, "--lora.share-critic"]
    assert main(argv) == 0
    assert "in adapters on" in (said := "".join(capsys.readouterr()))
    assert "of the policy's own" in said
    assert export("--model", "ppo", "--role", "critic", "--out", "critic") == 0
    assert export("--model", "ppo", "--step", "2", "--role", "critic", "--no-merge", "--out", "critic_apart") == 0
    whole, apart = (load_scalar(folder, new_head="refuse", device="cpu") for folder in ("critic", "critic_apart"))
    trained = torch.load("ppo/checkpoints/step_00000002/critic.pt", weights_only=True)["model"]
    assert torch.equal(whole.module.score.weight, trained["score.weight"])
    assert trained["score.weight"].any()
    policy = weights("base")
    moved = 0
    for (name, one), (_, two) in zip(whole.module.named_parameters(), apart.module.named_parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
        moved += name in policy and not torch.equal(one, policy[name])
    assert moved == sum(name.endswith("_proj.weight") for name in policy)
