"""Wrong inputs: one line that names what is at fault, exit code 2, no traceback, no half-made run folder."""

import json
import math

import pytest
import torch
from helpers.runs import arguments, write_inputs

from tandem.cli.main import main
from tandem.models.folder import quiet_transformers
from tandem.tasks import tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    write_inputs(folder)
    return folder


@pytest.fixture
def tandem(inputs, monkeypatch, capsys):
    """Runs a command in the folder of the inputs; returns (exit code, standard error)."""
    monkeypatch.chdir(inputs)

    def call(*argv):
        code = main([str(word) for word in argv])
        return code, capsys.readouterr().err

    return call


SFT = ["sft", "--model", "base", "--data", "demos.jsonl", "--steps", "1"]
GRPO = [*arguments("grpo"), "--steps", "1"]


def write(inputs, name, text):
    (inputs / name).write_text(text)
    return name


def refused(tandem, inputs, argv, *parts):
    """Asserts a refusal whose one line holds every part."""
    out = inputs / "never"
    code, err = tandem(*argv, "--out", out)
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("tandem: error: ")
    for part in parts:
        assert part in lines[0], err
    assert not out.exists()


def with_(argv, **changes):
    """The arguments with flags replaced or added."""
    argv = list(argv)
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        if flag in argv:
            argv[argv.index(flag) + 1] = str(value)
        else:
            argv += [flag, str(value)]
    return argv


def test_missing_model(tandem, inputs):
    refused(tandem, inputs, with_(SFT, model="./nowhere"), "no model folder ./nowhere")


def test_names_that_are_too_long_and_files_that_are_none(tandem, inputs):
    refused(tandem, inputs, with_(SFT, model="m" * 300), "mmm...: no file may have so long a name")
    refused(tandem, inputs, with_(SFT, data="/dev/null"), "/dev/null: a pipe or a device")
    assert tandem(*SFT, "--out", "o" * 300)[0] == 2


def test_a_model_without_a_tokenizer(tandem, inputs):
    (inputs / "mute").mkdir()
    (inputs / "mute" / "config.json").write_bytes((inputs / "base" / "config.json").read_bytes())
    refused(tandem, inputs, with_(SFT, model="mute"), "mute: no tokenizer in it (tokenizer.json)")


def test_data_is_read_before_the_model_is_loaded(tandem, inputs):
    refused(tandem, inputs, with_(SFT, model="./nowhere", data="lost.jsonl"), "lost.jsonl")
    refused(tandem, inputs, with_(GRPO, model="./nowhere", data="lost.jsonl"), "lost.jsonl")


def test_text_that_the_tokenizer_cannot_encode(tandem, inputs):
    with quiet_transformers():
        tiny.build_model(0, hidden_size=64, layers=1).save_pretrained(inputs / "letters")
        tiny.build_tokenizer().save_pretrained(inputs / "letters")
    data = write(inputs, "unknown.jsonl", '{"prompt": "abc>", "completion": "xyz"}\n')
    refused(tandem, inputs, with_(SFT, model="letters", data=data), "unknown.jsonl:1", "cannot encode")


def test_malformed_json_line(tandem, inputs):
    data = write(inputs, "bad.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", completion}\n')
    refused(tandem, inputs, with_(SFT, data=data), "bad.jsonl:2")


def test_missing_column(tandem, inputs):
    data = write(inputs, "columns.jsonl", '{"question": "a", "response": "b"}\n')
    refused(tandem, inputs, with_(SFT, data=data), "columns.jsonl:1", "'question'", "'response'", "'prompt'")


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_column_that_a_reward_wants(tandem, inputs, flags):
    data = write(inputs, "no_answer.jsonl", '{"prompt": "a="}\n')
    wanted = "'right' wants the column 'answer', which no_answer.jsonl lacks"
    refused(tandem, inputs, [*with_(GRPO, data=data, eval_data=data), *flags], wanted)
    refused(tandem, inputs, [*with_(GRPO, eval_data=data), *flags], wanted)
    # Held-out samples may be judged by a reward of their own, which wants another one.
    write(inputs, "gold.py", "def gold(completions, truth):\n    return [0.0 for _ in completions]\n")
    gold = [*GRPO, "--eval-reward", "gold.py:gold", *flags]
    refused(tandem, inputs, gold, "'gold' wants the column 'truth', which prompts.jsonl lacks", "answer")


def test_a_row_without_a_column_that_others_have(tandem, inputs):
    """Whichever rows meet in a step: the function gets None for it."""
    rows = ['{"prompt": "a=", "answer": "a"}', *(f'{{"prompt": "{letter}="}}' for letter in "bcdefghijklm")]
    write(inputs, "some.py", "def some(completions, answer):\n    return [float(bool(a)) for a in answer]\n")
    data = write(inputs, "mixed.jsonl", "\n".join(rows))
    argv = with_(GRPO, data=data, eval_data=data, reward="some.py:some", prompts_per_step=1, steps=3)
    code, err = tandem(*argv, "--out", inputs / "mixed")
    assert code == 0, err


def test_empty_dataset(tandem, inputs):
    refused(tandem, inputs, with_(SFT, data=write(inputs, "empty.jsonl", "\n")), "empty.jsonl", "empty")


def test_unknown_keys_are_refused_with_the_nearest(tandem, inputs):
    refused(tandem, inputs, with_(SFT, learning_rat=1), "--learning-rat", "--learning-rate")
    config = write(inputs, "unknown.yaml", "seed: 1\nbatchsize: 3\n")
    refused(tandem, inputs, with_(SFT, config=config), "unknown.yaml:2", "batchsize", "batch_size")


def test_wrong_types_and_ranges(tandem, inputs):
    refused(tandem, inputs, with_(SFT, steps="many"), "--steps", "whole number", "'many'")
    config = write(inputs, "types.yaml", "learning_rate: fast\n")
    refused(tandem, inputs, with_(SFT, config=config), "types.yaml:1", "learning_rate", "number", "'fast'")
    refused(tandem, inputs, with_(GRPO, top_p="1.5"), "--top-p", "1.5")
    refused(tandem, inputs, with_(GRPO, temperature="0"), "temperature")
    refused(tandem, inputs, with_(GRPO, samples_per_prompt=1), "samples_per_prompt: GRPO compares", "2 or more")
    refused(tandem, inputs, with_(SFT, aggregation="constant"), "--aggregation", "token, sequence", "'constant'")
    ppo = [*arguments("ppo"), "--steps", "1"]
    refused(tandem, inputs, with_(ppo, kl_coef=0, kl_target=6), "--kl-target: there is no KL to steer", "kl_coef 0.0")


def test_missing_flag(tandem, inputs):
    refused(tandem, inputs, SFT[:3], "--data")
    refused(tandem, inputs, SFT[:5], "--steps", "--epochs")


def test_long_prompts(tandem, inputs):
    refused(tandem, inputs, with_(GRPO, max_length=4), "prompts.jsonl:1", "5 tokens", "limit of 4")
    code, err = tandem(*with_(GRPO, max_length=4, long_rows="truncate"), "--out", inputs / "cut")
    assert code == 0, err
    start = json.loads((inputs / "cut" / "events.jsonl").read_text().splitlines()[0])
    assert (start["truncated"], start["dropped"]) == (40, 0)
    refused(tandem, inputs, with_(GRPO, max_length=4, long_rows="drop"), "40 rows", "limit of 4")


def test_rows_beyond_the_model_s_positions(tandem, inputs):
    """The model has 128; a rotary one would be trained beyond them without a word."""
    data = write(
        inputs, "far.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "%s", "completion": "b"}\n' % ("a" * 127)
    )
    refused(tandem, inputs, with_(SFT, data=data), "far.jsonl:2", "129 tokens", "the 128 positions of base")
    data = write(inputs, "far.jsonl", '{"prompt": "%s", "answer": "b"}\n' % ("a" * 124))
    refused(tandem, inputs, with_(GRPO, data=data), "far.jsonl:1", "124 tokens and up to 5 new ones", "128 positions")
    refused(tandem, inputs, [*GRPO, "--engine.max-length", "9"], "prompts.jsonl:1", "9 positions of the engine")
    refused(tandem, inputs, with_(GRPO, max_new_tokens=128), "max_new_tokens: 128", "no room for a prompt")


def test_folders_that_hold_no_language_model(tandem, inputs):
    assert tandem("rm", *with_(SFT, data="pairs.jsonl", batch_size=2)[1:], "--out", inputs / "judge")[0] == 0
    refused(tandem, inputs, with_(SFT, model="judge"), "judge: the folder of a run", "did you mean judge/model?")
    refused(tandem, inputs, with_(SFT, model="judge/model"), "a LlamaForSequenceClassification", "reward model")


REWARDS = """
import math
def short(prompts, completions): return [0.0]
def nan(prompts, completions): return [0.0, math.nan] + [0.0] * (len(prompts) - 2)
def infinite(prompts, completions): return [math.inf] * len(prompts)
def text(prompts, completions): return ["good"] * len(prompts)
def some(prompts, completions): return [None if i % 3 == 0 else 1.0 for i in range(len(prompts))]
def none(prompts, completions): return [None] * len(prompts)
"""


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("short", ["18", "1"]),
        ("nan", ["sample 1", "nan"]),
        ("infinite", ["sample 0", "inf"]),
        ("text", ["sample 0", "type str"]),
    ],
)
def test_rewards_that_fail_name_the_sample(tandem, inputs, function, parts):
    write(inputs, "rewards.py", REWARDS)
    argv = with_(GRPO, reward=f"rewards.py:{function}")
    for flag in ("--eval-data", "--eval-every"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    code, err = tandem(*argv, "--out", inputs / f"reward-{function}")
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    for part in parts:
        assert part in err, err


def test_reward_functions_that_cannot_be_loaded(tandem, inputs):
    write(inputs, "rewards.py", REWARDS)
    refused(tandem, inputs, with_(GRPO, reward="rewards.py:nam"), "rewards.py", "nam", "nan")
    refused(tandem, inputs, with_(GRPO, reward="nowhere.py:f"), "nowhere.py")
    write(inputs, "broken.py", "import math\nx = = 1\n")
    refused(tandem, inputs, with_(GRPO, reward="broken.py:f"), "broken.py", "2")


def test_rewards_that_teach_nothing(tandem, inputs):
    """Samples left out are counted and said, and rewards that stay alike, once; where none is judged the run ends."""
    write(inputs, "rewards.py", REWARDS)
    for name, noted in (("some", [1, 5]), ("right", [])):
        out, file = inputs / f"taught-{name}", "rewards.py" if name == "some" else "check.py"
        assert tandem(*with_(GRPO, reward=f"{file}:{name}", steps=7), "--out", out)[0] == 0
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["left_out"] == (6 if name == "some" else 0)
        events = map(json.loads, (out / "events.jsonl").read_text().splitlines())
        assert [event["step"] for event in events if event["event"] == "note"] == noted
    code, err = tandem(*with_(GRPO, reward="rewards.py:none"), "--out", inputs / "taught-none")
    assert (code, "reward 'none' left out (None) every one of 40 samples" in err) == (2, True), err


def test_out_that_holds_a_run(tandem, inputs):
    out = inputs / "taken"
    assert tandem(*SFT, "--out", out)[0] == 0
    code, err = tandem(*SFT, "--out", out)
    assert code == 2
    assert "--resume" in err
    assert "--overwrite" in err
    assert tandem(*SFT, "--out", out, "--overwrite")[0] == 0
    stranger = inputs / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("years of work")
    assert tandem(*SFT, "--out", stranger, "--overwrite")[0] == 2
    assert (stranger / "thesis.txt").read_text() == "years of work"


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tandem, inputs, monkeypatch):
    """The real thing: a decay that makes the parameters, and so the next loss, overflow."""
    out = inputs / "diverged"
    argv = with_(SFT, steps=60, learning_rate=1, weight_decay="1e30", save_every=0, max_grad_norm="1e30")
    code, err = tandem(*argv, "--out", out)
    assert code == 2, err
    assert "not finite" in err
    assert "step " in err
    [checkpoint] = (out / "checkpoints").iterdir()
    assert str(checkpoint) in err
    state = torch.load(checkpoint / "actor.pt", weights_only=True)
    assert all(math.isfinite(p.abs().max()) for p in state["model"].values())
    assert not (out / "model").exists()
    resumed = with_(argv, steps=60)
    assert tandem(*resumed, "--out", out, "--resume")[0] == 2


def test_a_truncated_checkpoint_is_refused_by_name(tandem, inputs):
    out = inputs / "truncated"
    argv = with_(SFT, save_every=1)
    assert tandem(*argv, "--out", out)[0] == 0
    part = out / "checkpoints" / "step_00000001" / "actor.pt"
    part.write_bytes(part.read_bytes()[:1000])
    code, err = tandem(*with_(argv, steps=2), "--out", out, "--resume")
    assert code == 2
    assert "actor.pt" in err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--engine.kind", "vllm", "--engine.way", "slots"], ["engine.way", "--engine.kind live"]),
        (
            ["--engine.kind", "vllm", "--engine.kv-cache-dtype", "fp8"],
            ["--engine.kv-cache-dtype", "--engine.arguments '{"],
        ),
        (["--engine.kv-cache-dtype", "fp8"], ["kv_cache_dtype fp8", "by way slots", "take kv_cache_dtype auto"]),
    ],
)
def test_engine_keys_that_do_not_go_together(tandem, inputs, flags, parts):
    refused(tandem, inputs, [*GRPO, *flags], *parts)
