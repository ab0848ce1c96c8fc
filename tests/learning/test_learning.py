"""Each method learns: what a user cares about rises on rows that were never trained on, for several seeds."""

import json
from typing import get_args

import pytest

from tandem.cli.main import main
from tandem.data.packing import pack_pairs
from tandem.data.tokenize import preference_pair
from tandem.functional.preference import PreferenceLoss
from tandem.methods.dpo import of_answers
from tandem.models.loading import load_causal
from tandem.tasks import letters, tiny
from tandem.training.scorer import LocalScorer

SEEDS = [0, 1]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def base(folder, seed):
    tiny.build_model(seed, hidden_size=64, layers=2).save_pretrained(folder / "base")
    tiny.build_tokenizer().save_pretrained(folder / "base")
    return str(folder / "base")


def run(out, *argv):
    assert main([*map(str, argv), "--out", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(name.startswith("eval/") for name in line)]


@pytest.mark.parametrize("seed", SEEDS)
def test_sft(tmp_path, seed):
    data = write_rows(tmp_path / "train.jsonl", letters.demonstrations(2000, seed))
    held_out = write_rows(tmp_path / "heldout.jsonl", letters.demonstrations(200, seed, split="heldout"))
    lines = run(
        tmp_path / "run", "sft", "--model", base(tmp_path, seed), "--data", data, "--eval-data", held_out,
        "--steps", 40, "--batch-size", 64, "--learning-rate", 3e-3, "--seed", seed,
    )  # fmt: skip
    # 13 tokens: a model that knows nothing is at ln 13 = 2.56 nats, one that knows which letters come at about 1.8.
    assert lines[0]["eval/loss"] > 2.4
    assert lines[-1]["eval/loss"] < 1.6


def test_grpo_with_adapters_on_a_base_in_4_bits(tmp_path):
    """Over the base in full the same run goes from 0.19 to 0.51 (seed 1); with seed 2 it is 0.25 to 0.46."""
    pytest.importorskip("bitsandbytes")
    rows = letters.demonstrations(3000, 1)
    demos = write_rows(tmp_path / "demos.jsonl", rows)
    prompts, held_out = (
        write_rows(tmp_path / f"{split}.jsonl", [{"prompt": p} for p in letters.prompts(count, 1, split=split)])
        for split, count in (("train", 2000), ("heldout", 100))
    )
    common = ["--learning-rate", 3e-3, "--save-every", 0]
    assert main([*map(str, [
        "sft", "--model", base(tmp_path, 1), "--data", demos, "--steps", 60, "--batch-size", 64, *common,
        "--seed", 1, "--out", tmp_path / "sft",
    ])]) == 0  # fmt: skip
    lines = run(
        tmp_path / "grpo", "grpo", "--model", tmp_path / "sft" / "model", "--data", prompts, "--eval-data", held_out,
        "--reward", f"{letters.__file__}:reward", "--steps", 30, "--prompts-per-step", 16, "--samples-per-prompt", 8,
        "--max-new-tokens", 8, "--seed", 11, "--lora.rank", 8, "--lora.quantize", "nf4", *common,
    )  # fmt: skip
    assert lines[-1]["eval/reward"] > lines[0]["eval/reward"] + 0.12


def pairs(count, seed, split):
    prompts = letters.prompts(count, seed, split=split)
    rows = [{"prompt": p, "chosen": letters.answer(p), "rejected": p[-2::-1]} for p in prompts]
    return [row for row in rows if row["chosen"] != row["rejected"]]


@pytest.mark.parametrize("method", ["sft", "rm"])
def test_what_a_user_must_give_is_enough_to_learn(tmp_path, method):
    """0.74M parameters, of which each can move by 2e-5 (SFT) or 1e-5 a step. With 1e-6 nothing could be seen."""
    rows = [
        letters.demonstrations(count, 0, split=split) if method == "sft" else pairs(count, 0, split)
        for count, split in ((1500, "train"), (200, "heldout"))
    ]
    data, held_out = (write_rows(tmp_path / f"{i}.jsonl", part) for i, part in enumerate(rows))
    tiny.build_model(0).save_pretrained(tmp_path / "base")
    tiny.build_tokenizer().save_pretrained(tmp_path / "base")
    model = str(tmp_path / "base")
    lines = run(tmp_path / "run", method, "--model", model, "--data", data, "--eval-data", held_out, "--steps", 50)
    first, last = lines[0], lines[-1]
    if method == "sft":
        assert last["eval/loss"] < first["eval/loss"] - 0.4
    else:
        assert last["eval/accuracy"] > max(0.7, first["eval/accuracy"] + 0.1)


@pytest.mark.parametrize("seed", SEEDS)
def test_reward_model(tmp_path, seed):
    """Right answers against the same letters in the order of the prompt: sorted or not is what it must see."""
    lines = run(
        tmp_path / "run", "rm", "--model", base(tmp_path, seed),
        "--data", write_rows(tmp_path / "train.jsonl", pairs(2000, seed, "train")),
        "--eval-data", write_rows(tmp_path / "heldout.jsonl", pairs(200, seed, "heldout")),
        "--steps", 60, "--batch-size", 32, "--learning-rate", 3e-3, "--seed", seed,
    )  # fmt: skip
    assert 0.2 < lines[0]["eval/accuracy"] < 0.8
    assert lines[-1]["eval/accuracy"] > 0.95


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", [*(f"dpo --loss-type {kind}" for kind in get_args(PreferenceLoss)), "kto"])
def test_preferences(tmp_path, seed, method):
    """The same comparisons, of a policy that says either answer as often at first; for KTO each answer with a label."""
    rows = {split: pairs(count, seed, split) for split, count in (("train", 400), ("heldout", 100))}
    files = {split: write_rows(tmp_path / f"{split}.jsonl", part) for split, part in rows.items()}
    lines = run(
        tmp_path / "run", *method.split(), "--model", base(tmp_path, seed), "--data", files["train"], "--eval-data",
        files["heldout"], "--eval-every", 0, "--steps", 16, "--batch-size", 24, "--learning-rate", 3e-3, "--seed",
        seed, "--save-every", 0,
    )  # fmt: skip
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]
    assert lines[-1]["eval/accuracy"] > 0.9
    before, after = (answer_logp(tmp_path / folder, rows["heldout"]) for folder in ("base", "run/model"))
    better_S = after - before
    assert (better_S[0::2] > better_S[1::2]).float().mean() > 0.95


def answer_logp(folder, rows):
    """Of the chosen and the rejected answers, in turn."""
    model = load_causal(folder, device="cpu")
    batch = pack_pairs([preference_pair(row, model.tokenizer) for row in rows])
    return of_answers(batch, LocalScorer(model, token_budget=4096).score(batch).logp_T)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("method", "knobs"),
    [("ppo", ["--kl-coef", 0.001]), ("grpo", ["--kl-coef", 0.001]), ("online-dpo", [])],
)
def test_online(tmp_path, seed, method, knobs):
    """From random weights: answer with letters of the prompt."""
    (tmp_path / "check.py").write_text(
        "def of_the_prompt(prompts, completions):\n"
        "    return [sum(c in p for c in text) / 10 for p, text in zip(prompts, completions)]\n"
    )
    rows = [{"prompt": p} for p in letters.prompts(500, seed)]
    held_out = [{"prompt": p} for p in letters.prompts(100, seed, split="heldout")]
    lines = run(
        tmp_path / "run", method, "--model", base(tmp_path, seed),
        "--data", write_rows(tmp_path / "prompts.jsonl", rows),
        "--eval-data", write_rows(tmp_path / "heldout.jsonl", held_out),
        "--reward", f"{tmp_path}/check.py:of_the_prompt", "--seed", seed, *knobs,
        "--steps", 25, "--prompts-per-step", 16, "--samples-per-prompt", 8, "--max-new-tokens", 10,
        "--learning-rate", 2e-3, "--minibatches", 2,
    )  # fmt: skip
    # A token drawn at random is a letter of the prompt one time in three, and the first end-of-sequence ends it. Of 100
    # samples the mean is off by 0.02.
    assert lines[0]["eval/reward"] < 0.4
    assert lines[-1]["eval/reward"] > lines[0]["eval/reward"] + 0.2


@pytest.mark.parametrize("seed", SEEDS)
def test_distillation(tmp_path, seed):
    """A student that has seen 30 batches of right answers learns from a teacher that has seen 70, without a reward."""
    writers = letters.Writers(careful=1.0, hurried=0.0)
    demonstrations = write_rows(tmp_path / "train.jsonl", letters.demonstrations(4000, seed, writers=writers))
    prompts, held_out = (
        write_rows(
            tmp_path / f"{split}-prompts.jsonl", [{"prompt": p} for p in letters.prompts(count, seed, split=split)]
        )
        for split, count in (("train", 1000), ("heldout", 200))
    )
    student, teacher = tmp_path / "student" / "model", tmp_path / "teacher" / "model"
    common = ["--seed", seed, "--save-every", 0]
    for model, start, steps in ((student, base(tmp_path, seed), 30), (teacher, student, 40)):
        run(
            model.parent, "sft", "--model", start, "--data", demonstrations, "--steps", steps,
            "--batch-size", 64, "--learning-rate", 3e-3, *common,
        )  # fmt: skip
    lines = run(
        tmp_path / "run", "opd", "--model", student, "--teacher", teacher, "--data", prompts,
        "--eval-data", held_out, "--eval-reward", "tandem.tasks.letters:reward", "--eval-every", 0,
        "--steps", 25, "--prompts-per-step", 64, "--samples-per-prompt", 1, "--max-new-tokens", 10,
        "--learning-rate", 1e-3, *common,
    )  # fmt: skip
    assert lines[-1]["eval/reward"] > lines[0]["eval/reward"] + 0.1
    assert lines[-1]["teacher_kl"] < 1.2
