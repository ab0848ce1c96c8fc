"""A run as a value: a config made in Python is the command's, and running it does what the command does."""

import json
import shlex
from typing import NamedTuple
from unittest import mock

import pytest
from helpers.runs import write_inputs

import tandem
from tandem.assembly import wiring
from tandem.assembly.configs.methods import config_class
from tandem.assembly.configs.role_sections import Placement, SamplingPlacement
from tandem.assembly.configs.sections import (
    ClusterSection,
    EngineSection,
    ModelSection,
    SamplingSection,
    ScheduleSection,
)
from tandem.assembly.models import load_models, require_engine
from tandem.assembly.placing import Homes
from tandem.assembly.wiring import Wiring
from tandem.config import dump_config, load_config
from tandem.engines.vllm.setup import in_full
from tandem.errors import UserError, WorkerDied
from tandem.futures import Later
from tandem.parallel.world import World
from tandem.roles import Seat
from tandem.workers.homes import Here
from tandem.workers.process import Site


@pytest.mark.parametrize(
    ("keys", "flags"),
    [
        ({"learning_rate": 1e-5, "betas": (0.9, 0.99)}, "--learning-rate 1e-5 --betas 0.9 0.99"),
        ({"reward": ["a.py:f", "b.py:g"], "reward_weights": [1, 0.5]}, "--reward a.py:f b.py:g --reward-weights 1 0.5"),
        ({"engine__kind": "vllm", "engine__sleep": False}, "--engine.kind vllm --engine.no-sleep"),
        ({"stop": ["--"], "top_p": 0.9}, "--stop=-- --top-p 0.9"),
        ({"dual_clip": None, "overwrite": True, "resume": False}, "--dual-clip none --overwrite"),
        ({"reference": "~/x", "kl_coef": -0.0 + 0.1}, "--reference ~/x --kl-coef 0.1"),
    ],
)
def test_keys_are_the_commands_flags(keys, flags):
    given = {"model": "m", "data": "d.jsonl", "out": "o", "steps": 3, "reward": "check.py:f"} | keys
    words = shlex.split("--model m --data d.jsonl --out o --steps 3 " + flags)
    words += [] if "--reward" in words else ["--reward", "check.py:f"]
    assert tandem.read_config("grpo", **given) == load_config(config_class("grpo"), words)


def test_files_come_first_and_keys_win(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("learning_rate: 1e-4\nbatch_size: 7\n")
    config = tandem.read_config("sft", file, model="m", data="d.jsonl", out="o", steps=1, batch_size=9)
    assert (config.optim.learning_rate, config.items_per_step) == (1e-4, 9)
    with pytest.raises(UserError, match=r"unknown flag --lerning-rate; did you mean --learning-rate\?"):
        tandem.read_config("sft", lerning_rate=1)
    with pytest.raises(UserError, match="no method 'sfd'; did you mean sft"):
        tandem.read_config("sfd", model="m")


def test_a_run_in_python_is_the_commands_run(tmp_path, monkeypatch, capsys):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    keys = {"model": "base", "steps": 2, "max_new_tokens": 5, "samples_per_prompt": 2, "prompts_per_step": 3}
    keys |= {"data": "prompts.jsonl", "reward": "check.py:right", "learning_rate": 1e-3}
    assert tandem.run(tandem.read_config("grpo", out="dry", dry_run=True, **keys)) is None
    assert "would use" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()
    config = tandem.read_config("grpo", out="one", **keys)
    model = tandem.run(config)
    assert model is not None
    assert model.resolve() == (tmp_path / "one" / "model").resolve()
    from tandem.cli.main import main

    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert main(["grpo", "--config", "again.yaml", "--out", "two"]) == 0
    assert (model / "model.safetensors").read_bytes() == (tmp_path / "two/model/model.safetensors").read_bytes()
    series = [(tmp_path / out / "metrics.jsonl").read_text().splitlines() for out in ("one", "two")]
    rewards = [[json.loads(line)["reward"] for line in lines] for lines in series]
    assert rewards[0] == rewards[1]
    with pytest.raises(UserError, match="--resume"):
        tandem.run(config)


def test_rows_that_are_likely_to_be_mistakes_are_said(tmp_path, monkeypatch, capsys):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "1+1=", "completion": "2", "answer": "2"}, {"prompt": "1+2=", "completion": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"model": "base", "steps": 2, "data": "rows.jsonl", "out": "o", "dry_run": True}
    tandem.run(tandem.read_config("grpo", reward="check.py:right", max_new_tokens=5, **keys))
    assert "rows.jsonl: 1 of 2 rows have no 'answer': reward 'right' gets None\n" in capsys.readouterr().out
    tandem.run(tandem.read_config("sft", **keys))
    assert "data: 1 of 2 rows have an empty answer: its end alone is learned\n" in capsys.readouterr().out


def test_a_clusters_address_is_no_matter_where_all_is_here(monkeypatch):
    """One file may serve a laptop and a cluster: nothing is asked of one that no role lives in."""
    monkeypatch.setattr("tandem.assembly.placing.require_ray", lambda **_: pytest.fail("Ray is asked"))
    cluster = ClusterSection(address="127.0.0.1:1")
    with Homes(ModelSection(model="m"), Placement(), cluster, EngineSection(), ["actor"]) as homes:
        assert homes.of("actor").at_once


def test_vllm_is_told_of_a_folder_in_few_bits_beside_what_else_it_is_told(tmp_path):
    """What the two say of one thing is refused before anything starts."""
    overrides = {"rope_theta": 5.0, "quantization_config": None}
    found = in_full({"enforce_eager": True, "hf_overrides": {"rope_theta": 5.0}})
    assert found == {"enforce_eager": True, "load_format": "dummy", "hf_overrides": overrides}
    few = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": few}))
    placement = SamplingPlacement(actor="1", engine="1")

    def check(model, **arguments):
        engine = EngineSection(kind="vllm", arguments=json.dumps(arguments))
        section = ModelSection(model=str(model), device="cpu")
        Homes(section, placement, ClusterSection(), engine, ["actor", "engine"]).check()

    check("m", load_format="dummy")
    for name, wrong in {
        "load_format": {"load_format": "auto"},
        "quantization": {"quantization": "bitsandbytes"},
        "quantization_config": {"hf_overrides": {"quantization_config": few}},
        "hf_overrides: expected an object": {"hf_overrides": "f"},
    }.items():
        with pytest.raises(UserError, match=rf"^engine\.arguments: {name}"):
            check(tmp_path, **wrong)


def test_an_engine_over_more_gpus_than_the_actor_has_is_refused_before_anything_starts():
    def check(actor: str, engine: str) -> None:
        parts = (SamplingPlacement(actor=actor, engine=engine), ClusterSection())
        section = EngineSection(kind="vllm", tensor_parallel=2)
        Homes(ModelSection(model="m", device="cpu"), *parts, section, ["actor", "engine"]).check()

    with pytest.raises(UserError, match=r"^engine\.tensor_parallel: 2 GPUs for one engine, and the actor has 1$"):
        check("1", "actor")
    check("2", "actor")


def test_arguments_that_are_not_vllms_alone_are_refused_before_anything_is_loaded():
    for name, words in {"seed": "what Tandem calls 'seed'", "max_loras": "Tandem depends on it"}.items():
        with pytest.raises(UserError, match=rf"^engine\.kind vllm: vLLM argument '{name}' .*{words}"):
            require_engine(EngineSection(kind="vllm", arguments=json.dumps({name: 1})))


class Described(NamedTuple):
    """A role that can say what it is, and nothing else."""

    describe: str


def test_models_of_several_processes_are_all_begun_before_any_is_waited_for():
    """They were loaded one after the other."""
    keys = {"model": "m", "data": "d.jsonl", "out": "o", "steps": 1, "reward_model": ["r"]}
    home, happened = Here(Site(World())), []

    def begin(role: str, build: object) -> Later[Seat]:
        def end() -> Seat:
            happened.append(f"wait for {role}")
            return home.place(role, lambda site: Described("loaded"))

        happened.append(f"begin {role}")
        return Later(end)

    roles = [*load_models(tandem.read_config("ppo", **keys), begin, 1)]
    assert {"actor", "critic", "reward"} <= {*roles}
    assert happened == [f"begin {role}" for role in roles] + [f"wait for {role}" for role in roles]


@pytest.mark.parametrize("kind", ["live", "vllm"])
@pytest.mark.parametrize(
    ("asked", "cache", "waits"),
    [({}, "keep", False), ({"stale_cache": "recompute"}, "recompute", False),
     ({"weights_change": "between-sequences"}, "keep", True)],
)  # fmt: skip
def test_engines_apart_are_told_what_becomes_of_samples_that_run(monkeypatch, kind, asked, cache, waits):
    """Without the processes: they are asked to build an engine, and pushes wait for its samples or do not."""
    group = mock.Mock(size=1, dead=lambda: [0])
    group.begin.return_value.group = group
    link = mock.Mock(return_value={"sync_seconds": 1.0}, transport="gloo", moving=None)
    link.again.return_value = {"sync_seconds": 4.0}
    for owner, name, found in ((Homes, "group", group), (Wiring, "_source", None), (Wiring, "_link", link)):
        monkeypatch.setattr(owner, name, lambda self, *_, found=found, **__: found)
    settled = lambda engine, push: lambda step: {"settling_seconds": 2.0} | push(step)  # noqa: E731
    monkeypatch.setattr(wiring, "between_sequences", settled)
    for name, what in {"quantized_kind": None, "base_of": "m", "with_tokenizer": None}.items():
        monkeypatch.setattr(wiring, name, lambda model, what=what: what)
    placement, section = SamplingPlacement(engine="1"), EngineSection(kind=kind)
    homes = Homes(ModelSection(model="m"), placement, ClusterSection(), section, ["actor", "engine"])
    homes.homes["actor"] = Here(Site(World()))
    schedule = ScheduleSection(max_lag=1, **asked)
    parts = {"homes": homes, "sampling": SamplingSection(), "seed": 0, "vocabulary": 9}
    wired = Wiring(**parts, schedule=schedule)
    wired.begin()
    group.begin.return_value.result.assert_not_called()
    engine = wired.engine({})
    builds = [call.args[1] for call in group.begin.call_args_list if call.args[0] == "engine"]
    assert len(builds) == 1
    # vLLM always computes them anew.
    assert builds[0].keywords.get("options", {}).get("stale_cache") == (cache if kind == "live" else None)
    assert engine.push(3) == {"sync_seconds": 1.0} | ({"settling_seconds": 2.0} if waits else {})
    link.assert_called_once_with(3)
    if kind == "vllm":
        # One that dies in a push is started again: what all get then waits for the samples of the others as well.
        link.side_effect = WorkerDied("engine rank 0 died")
        assert engine.push(4) == {"sync_seconds": 4.0} | ({"settling_seconds": 2.0} if waits else {})
        group.restart.assert_called_once_with(0)
