"""Evaluations of several sets: names, one version of the weights, and no trace of them in what is trained."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import arguments, unevaluated, write_inputs

from tandem.assembly.configs.evaluation_sections import named_sets
from tandem.errors import RunFailure, UserError
from tandem.methods.pretrain import Pretrain
from tandem.rollout.evaluate import HeldOutRows, HeldOutSamples
from tandem.rollout.judging import Judge
from tandem.rollout.prepare import Preparation
from tandem.rollout.sampling import requests_of
from tandem.runs.lines import read_metrics
from tandem.types import Completion, Prompt, SamplingParams, Sequence


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    write_inputs(folder)
    for name in ("demos", "pairs", "prompts"):
        rows = (folder / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}-few.jsonl").write_text("".join(rows[3:9]))
    return folder


@pytest.mark.parametrize(
    ("given", "sets"),
    [
        ([], {}),
        (["a/b.jsonl"], {"": "a/b.jsonl"}),
        (["math=a/b.jsonl"], {"math": "a/b.jsonl"}),
        (["a/b.jsonl", "x=c.parquet"], {"b": "a/b.jsonl", "x": "c.parquet"}),
        (["openai/gsm8k", "json@./data/"], {"gsm8k": "openai/gsm8k", "data": "json@./data/"}),
        (["a/x=1/b.jsonl"], {"": "a/x=1/b.jsonl"}),
        (["a*.jsonl", "b.jsonl"], {"a_": "a*.jsonl", "b": "b.jsonl"}),
    ],
)
def test_names_of_held_out_sets(given, sets):
    assert named_sets(given) == sets


@pytest.mark.parametrize("given", [["a/b.jsonl", "c/b.jsonl"], ["x=a.jsonl", "x=b.jsonl"], ["x=b.jsonl", "x.json"]])
def test_two_sets_of_one_name_are_refused(given):
    with pytest.raises(UserError, match=r"^eval_data: two sets are named '.'; give each a name of its own"):
        named_sets(given)


class Versions:
    """An engine whose samples come from the given versions of its weights, one after another."""

    ended = 0

    def __init__(self, versions):
        self.versions = iter(versions)

    def generate(self, requests):
        def completion(request):
            low, high = next(self.versions)
            return [Completion(token_ids=[1], behaviour_logp=[0.0], untruncated_logp=[0.0], stop="eos",
                               versions=[(low, 0), (high, 1)]) for _ in request.seeds]  # fmt: skip

        return [completion(request) for request in requests]


class Ones:
    name = "ones"

    def score(self, batch):
        return [1.0] * len(batch.rollouts)


def measured(versions, **sets):
    held_out = HeldOutSamples(
        sets={
            name: [Prompt(prompt_id=f"{i}", prompt="", token_ids=(1,)) for i in range(n)] for name, n in sets.items()
        },
        engine=Versions(versions),
        params=SamplingParams(),
        samples_per_prompt=2,
        judge=Judge(rewards=(Ones(),), weights=(1.0,)),
        success=1.0,
        prepare=SimpleNamespace(),
        seed=0,
    )
    return held_out(7, lambda *_, **__: torch.no_grad())


def test_every_set_has_its_own_samples_and_names():
    found = measured([(3, 3)] * 5, a=2, b=3)
    assert {name: len(groups) for name, groups in found.groups.items()} == {"a": 2, "b": 3}
    assert found.metrics["eval/a/reward"] == found.metrics["eval/b/pass@2"] == 1.0
    assert {name.split("/")[1] for name in found.metrics} == {"a", "b"}


@pytest.mark.parametrize("versions", [[(3, 3), (4, 4)], [(3, 4), (4, 4)], [(3, 3), (3, 4)]])
def test_samples_of_two_versions_are_no_evaluation(versions):
    with pytest.raises(RunFailure, match="the evaluation after step 7 has samples of weights that had seen 3 to 4"):
        measured(versions, a=1, b=1)


def test_draws_are_the_same_at_every_evaluation_and_none_of_trainings():
    asked = []

    class Asked(Versions):
        def generate(self, requests):
            asked.append([request.seeds for request in requests])
            return super().generate(requests)

    held_out = HeldOutSamples(
        sets={"": (prompts := [Prompt(prompt_id=f"{i}", prompt="", token_ids=(1,)) for i in range(3)])},
        engine=Asked([(0, 0)] * 6),
        params=SamplingParams(),
        samples_per_prompt=2,
        judge=Judge(rewards=(Ones(),), weights=(1.0,)),
        success=None,
        prepare=SimpleNamespace(),
        seed=5,
    )
    for step in (1, 2):
        held_out(step, lambda *_, **__: torch.no_grad())
    first, second = ({seed for seeds in of_call for seed in seeds} for of_call in asked)
    assert first == second
    assert len(first) == 6
    for step in (1, 2):
        of_step = requests_of(prompts, SamplingParams(), samples_per_prompt=2, seed=5, step=step)
        assert first.isdisjoint(seed for request in of_step for seed in request.seeds)


def test_a_corpus_is_measured_by_its_tokens_however_many_windows_go_together():
    texts = [[1, 2, 3], [3, 4, 5], [5, 90]]

    def losses(verb, batch):
        return {"loss": batch.token_ids_T[batch.trainable_T].double().mean().item()}

    for together in (1, 2, 3):
        held_out = HeldOutRows(
            sets={"": map(Sequence.read, texts)},
            actor=SimpleNamespace(call=losses),
            prepare=Preparation(method=Pretrain(), models={}),
            at_a_time=together,
        )
        found = held_out(1, lambda *_, **__: torch.no_grad()).metrics
        assert found == pytest.approx({"eval/loss": (2 + 3 + 4 + 5 + 90) / 5})


def trained(folder):
    lines = [
        {k: v for k, v in line.items() if not k.startswith(("eval/", "seconds", "tokens_per"))}
        for line in read_metrics(folder / "metrics.jsonl")
        if line["step"]
    ]
    return lines, (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_evaluating_leaves_no_trace_in_training(tandem, inputs, method):
    data = {"sft": "demos", "grpo": "prompts"}[method]
    argv = [*unevaluated(arguments(method)), "--steps", "3"]
    often = ["--eval-data", f"few={data}-few.jsonl", f"{data}.jsonl", "--eval-every", "1"]
    if method == "grpo":
        often += ["--eval-samples", "3", "--eval-temperature", "0.5", "--eval-success", "0.1"]
    assert tandem(*argv, "--out", f"{method}-never")[0] == 0
    code, stdout, _ = tandem(*argv, *often, "--out", f"{method}-often")
    assert code == 0
    assert ("eval/few/pass@1 " in stdout) == (method == "grpo")
    assert trained(inputs / f"{method}-often") == trained(inputs / f"{method}-never")
    lines = read_metrics(inputs / f"{method}-often" / "metrics.jsonl")
    measure = {"sft": "loss", "grpo": "pass@2_se"}[method]
    for line in lines:
        assert {f"eval/few/{measure}", f"eval/{data}/{measure}"} <= line.keys()
    if method == "grpo":
        rollouts = [
            json.loads(line) for line in (inputs / f"{method}-often" / "rollouts.jsonl").read_text().splitlines()
        ]
        held_out = [line for line in rollouts if line["held_out"]]
        assert {line["eval_set"] for line in held_out} == {"few", "prompts"}
        assert {len(line["samples"]) for line in held_out} == {3}


def test_a_set_measures_the_same_alone_and_beside_others(tandem, inputs):
    argv = [*unevaluated(arguments("grpo")), "--steps", "1", "--eval-samples", "2"]
    assert tandem(*argv, "--eval-data", "prompts-few.jsonl", "--out", "alone")[0] == 0
    assert tandem(*argv, "--eval-data", "a=prompts.jsonl", "few=prompts-few.jsonl", "--out", "beside")[0] == 0
    alone, beside = (read_metrics(inputs / name / "metrics.jsonl") for name in ("alone", "beside"))
    for before, after in zip(alone, beside, strict=True):
        own = {name: value for name, value in before.items() if name.startswith("eval/")}
        assert own == {name: after[name.replace("eval/", "eval/few/")] for name in own}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval-data", "a=prompts.jsonl", "b=none.jsonl"], "none.jsonl"),
        (["--eval-data", "a=prompts.jsonl", "b=pairs.jsonl"], "pairs.jsonl"),
        (
            ["--eval-data", "prompts.jsonl", "--eval-samples", "2", "--eval-temperature", "0"],
            "--eval-samples: at --eval-",
        ),
        (["--eval-samples", "2"], "--eval-samples: has no effect without --eval-data"),
        (["--eval-data", "prompts.jsonl", "prompts.jsonl"], "--eval-data: two sets are named 'prompts'"),
    ],
)
def test_wrong_held_out_data_is_one_line(tandem, inputs, flags, message):
    code, _, error = tandem(*unevaluated(arguments("grpo")), "--steps", "1", "--out", "wrong", *flags)
    assert code == 2
    assert error.startswith("tandem: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (inputs / "wrong").exists()
