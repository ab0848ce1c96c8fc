"""Several reward models as one reward, and scores in standard deviations of the model's own rows."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from helpers.models import make_tokenizer
from helpers.runs import arguments, unevaluated, write_inputs
from transformers import AutoModelForSequenceClassification

from tandem.assembly.configs.sections import RewardSection
from tandem.batch import Outputs
from tandem.cli.main import main
from tandem.data.items import build_pairs
from tandem.data.rows import load_rows
from tandem.errors import UserError
from tandem.models.description import read_score_scale
from tandem.rewards.model import score_scale
from tandem.types import PreferencePair, ScoreScale, Sequence
from tandem.workers.homes import seat_of


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """With two reward models of different seeds, ``a`` and ``b``."""
    folder = tmp_path_factory.mktemp("ensemble")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, model in (("a", "base"), ("b", "teacher")):
            argv = arguments("rm")
            argv[argv.index("base")] = model
            argv += ["--keep-best=+eval/loss", "--ema-decay", "0.5"]
            assert main([*argv, "--steps", "2", "--out", name, "--save-every", "0"]) == 0
    return folder


@pytest.fixture(autouse=True)
def folder(inputs, monkeypatch):
    monkeypatch.chdir(inputs)


def config_of(name, model="model"):
    return json.loads(Path(name, model, "config.json").read_text())


@pytest.mark.parametrize("which", ["model", "model-ema", "best"])
def test_training_writes_the_scale_of_held_out_scores(which):
    """That of the very weights that are written; the best by the largest loss are those before the first step."""
    pairs, _ = build_pairs(load_rows("pairs.jsonl"), make_tokenizer())
    model = AutoModelForSequenceClassification.from_pretrained(f"a/{which}").eval()
    with torch.no_grad():
        scores = [
            model(input_ids=torch.tensor([s.token_ids])).logits.item()
            for pair in pairs
            for s in (pair.chosen, pair.rejected)
        ]
    assert config_of("a", which)["score_mean"] == pytest.approx(statistics.fmean(scores), abs=1e-5)
    assert config_of("a", which)["score_std"] == pytest.approx(statistics.pstdev(scores), abs=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_mean_of_two_counts_and_each_is_kept(normalize, tmp_path):
    argv = [word for word in unevaluated(arguments("grpo")) if word not in ("--reward", "check.py:right")]
    argv += ["--reward-model", "a/model", "--reward-model", "b/model", "--steps", "1", "--save-every", "0"]
    out = tmp_path / "run"
    assert main([*argv, "--out", str(out), *(["--normalize-scores"] if normalize else [])]) == 0
    prompts = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    models = [AutoModelForSequenceClassification.from_pretrained(f"{name}/model").eval() for name in "ab"]
    compared = 0
    for line in prompts:
        for sample in line["samples"]:
            ended = [1] if sample["stop"] == "eos" else []
            answer = make_tokenizer()(sample["completion"])["input_ids"] + ended
            if len(answer) != sample["length"]:
                continue  # It has special tokens, which its text has not.
            ids = make_tokenizer()(line["prompt"])["input_ids"] + answer
            compared += 1
            with torch.no_grad():
                scores = [model(input_ids=torch.tensor([ids])).logits.item() for model in models]
            if normalize:
                scores = [(s - config_of(n)["score_mean"]) / config_of(n)["score_std"]
                          for s, n in zip(scores, "ab", strict=True)]  # fmt: skip
            found = [sample["reward_parts"][part] for part in ("reward_model", "reward_model#2")]
            assert found == pytest.approx(scores, abs=1e-4)
            assert sample["reward"] == pytest.approx(statistics.fmean(scores), abs=1e-4)
    assert compared >= 5
    (metrics,) = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines() if json.loads(x)["step"] == 1]
    both = [metrics["reward/reward_model"], metrics["reward/reward_model#2"]]
    assert metrics["reward"] == pytest.approx(statistics.fmean(both), abs=1e-6)


def test_weights_of_functions_and_models():
    assert RewardSection(reward=("r.py:f",), reward_model=("a", "b")).weights == (1.0, 0.5, 0.5)
    assert RewardSection(reward_model=("a",)).weights == (1.0,)
    assert RewardSection(reward_model=("a", "b"), reward_weights=(3.0, 1.0)).weights == (3.0, 1.0)
    assert RewardSection(reward_model=("a", "b", "c")).models == {"reward": "a", "reward_2": "b", "reward_3": "c"}
    with pytest.raises(UserError, match="reward_weights: expected 2 weights"):
        RewardSection(reward_model=("a", "b"), reward_weights=(1.0,))


def test_a_model_whose_config_has_no_scale_is_refused(capsys, tmp_path):
    argv = [word for word in unevaluated(arguments("grpo")) if word not in ("--reward", "check.py:right")]
    bare = tmp_path / "bare"
    AutoModelForSequenceClassification.from_pretrained("a/model").save_pretrained(bare)
    make_tokenizer().save_pretrained(bare)
    config = json.loads((bare / "config.json").read_text())
    del config["score_mean"], config["score_std"]
    (bare / "config.json").write_text(json.dumps(config))
    argv += ["--reward-model", "a/model", str(bare), "--normalize-scores", "--steps", "1", "--out", "r", "--dry-run"]
    assert main(argv) == 2
    assert f"{bare}: its config.json has no score_mean and no score_std, as 'tandem rm'" in capsys.readouterr().err
    for wrong in (0.0, -1.0, "wide", float("inf")):
        (bare / "config.json").write_text(json.dumps(config | {"score_mean": 0.5, "score_std": wrong}))
        with pytest.raises(UserError, match="score_mean and score_std must be numbers"):
            read_score_scale(str(bare))


def test_equal_scores_and_no_numbers_have_no_scale():
    class Says:
        def __init__(self, *scores):
            self.scores = scores

        def score(self, batch):
            scalar_T = torch.zeros(batch.tokens)
            scalar_T[batch.last_S] = torch.tensor(self.scores)
            return Outputs(scalar_T=scalar_T)

    answer = Sequence(token_ids=[2, 3], trainable=[False, True])
    pair = PreferencePair(chosen=answer, rejected=answer)
    assert score_scale(seat_of(Says(1.0, 3.0)), [pair]) == ScoreScale(2.0, 1.0)
    for scores in ((2.0, 2.0), (1.0, float("nan"))):
        assert score_scale(seat_of(Says(*scores)), [pair]) is None
