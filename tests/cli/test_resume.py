"""Law 5: a run killed at any moment, several times, and resumed is the run that was left alone, bit for bit."""

import json
import os
import random
import signal
from functools import partial

import pytest
import torch
from helpers.runs import arguments, run, write_inputs
from helpers.runs import run as run_with_one

STEPS = 5
TIMINGS = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_inputs(folder)
    return folder


def metrics(run_folder):
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in lines]


def final_state(run_folder):
    checkpoint = run_folder / "checkpoints" / f"step_{STEPS:08d}"
    parts = {path.name: torch.load(path, weights_only=True) for path in sorted(checkpoint.glob("*.pt"))}
    return parts, json.loads((checkpoint / "state.json").read_text())


def assert_same(a, b, where="state"):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


CORES = os.cpu_count() or 1
MANY = 96
"""Prompts of steps that are large enough for torch to divide among threads."""
MORE = {
    "ppo": ["--critic-warmup-steps", "1", "--lam-alpha", "0.5", "--critic-lam", "1", "--reference-every", "2",
            "--lora.rank", "4", "--lora.share-critic"],
    "rm": ["--optimizer", "adafactor", "--ema-decay", "0.9"],
    "kto": ["--lora.rank", "4", "--lora.quantize", "nf4"],
    "online-dpo": ["--lora.rank", "4", "--reference-every", "2", "--reference-mix", "0.5"],
    "dpo": ["--optimizer", "muon", "--reference-every", "2", "--reference-mix", "0.3"],
    "grpo": ["--kl-coef", "0.1", "--kl-target", "0.05", "--kl-horizon", "50",
             "--old-logp", "trainer", "--correction", "token_tis"],
}  # fmt: skip
"""Flags of what else goes from step to step."""


@pytest.mark.parametrize(
    ("method", "threads", "prompts"),
    [*((m, 1, 6) for m in ("sft", "rm", "dpo", "kto", "ppo", "grpo", "online-dpo", "opd")), ("grpo", CORES, MANY)],
)
def test_killed_and_resumed_equals_unbroken(inputs, method, threads, prompts):
    """With the default number of threads too."""
    argv = [
        *arguments(method, prompts_per_step=prompts),
        "--steps",
        str(STEPS),
        "--save-every",
        "1",
        *MORE.get(method, []),
    ]
    run = partial(run_with_one, environment={"OMP_NUM_THREADS": str(threads)})
    name = f"{method}-{threads}-{prompts}"
    code, output = run(inputs, [*argv, "--out", f"{name}-whole"])
    assert code == 0, output

    broken = [*argv, "--out", f"{name}-broken", "--resume"]
    rng = random.Random(method)
    # Inside a save (a file half on the disk, a folder not renamed yet, an old one half removed), then at any moment.
    faults = [("fsync", 2), ("save", 4), ("rename", rng.randint(1, 3)), ("fsync", rng.randint(3, 9)), ("rename", 2)]
    later = [rng.uniform(0.1, 1.0) for _ in range(2)]
    if method not in ("sft", "ppo"):
        # A save is the same code for all, and is killed at each of its moments in tests/checkpoint.
        faults, later = faults[:3], later[:1]
    if prompts == MANY:
        # Where a run is killed has nothing to do with its threads: one kill, in the save of the third step.
        faults, later = [("rename", 3)], []
    kills = 0
    for fault in faults:
        code, output = run(inputs, broken, fault=fault)
        assert code in (0, -signal.SIGKILL), output
        kills += code == -signal.SIGKILL
    for kill_after in later:
        code, output = run(inputs, broken, kill_after=kill_after)
        assert code in (0, -signal.SIGKILL), output
    assert kills >= min(3, len(faults))
    code, output = run(inputs, broken)
    assert code == 0, output

    whole, resumed = inputs / f"{name}-whole", inputs / f"{name}-broken"
    assert [line["step"] for line in metrics(resumed)] == list(range(STEPS + 1))
    assert metrics(resumed) == metrics(whole)
    assert_same(final_state(resumed), final_state(whole))
    weights = "model/adapter_model.safetensors" if "--lora.rank" in argv else "model/model.safetensors"
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()


def test_ctrl_c_while_judging_loses_no_step(inputs):
    """Nor does a reward that draws from every global generator know that it was interrupted."""
    (inputs / "interrupting.py").write_text(
        "import os, pathlib, random, signal, numpy, torch\n"
        "def noisy(prompts, completions):\n"
        "    calls = pathlib.Path('calls.txt')\n"
        "    calls.write_text((calls.read_text() if calls.exists() else '') + '.')\n"
        "    if len(calls.read_text()) == 3 and os.environ.get('INTERRUPT'):\n"
        "        os.kill(os.getppid(), signal.SIGINT)\n"
        "    return [random.random() + numpy.random.rand() + torch.rand(()).item() for _ in prompts]\n"
    )
    argv = [*arguments("grpo"), "--steps", "4"]
    argv[argv.index("check.py:right")] = "interrupting.py:noisy"
    for flag in ("--eval-data", "--eval-every"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    code, output = run(inputs, [*argv, "--out", "calm"])
    assert code == 0, output
    (inputs / "calls.txt").unlink()
    code, output = run(inputs, [*argv, "--out", "interrupted"], environment={"INTERRUPT": "1"})
    assert code == 130, output
    assert "stopped in step 3; go on after step 2 with --resume" in output
    code, output = run(inputs, [*argv, "--out", "interrupted", "--resume"])
    assert code == 0, output
    assert metrics(inputs / "interrupted") == metrics(inputs / "calm")
    rewards = [line["reward"] for line in metrics(inputs / "calm")]
    assert len(set(rewards)) == 4


def test_a_config_file_repeats_a_run_with_the_same_numbers(inputs):
    argv = [*arguments("ppo"), "--steps", "2"]
    assert run(inputs, [*argv, "--out", "first"])[0] == 0
    code, output = run(inputs, ["ppo", "--config", "first/config.yaml", "--out", "second"])
    assert code == 0, output
    assert metrics(inputs / "first") == metrics(inputs / "second")


def test_another_seed_gives_other_numbers(inputs):
    argv = [*arguments("grpo"), "--steps", "1"]
    for seed in ("3", "4"):
        argv[argv.index("--seed") + 1] = seed
        code, output = run(inputs, [*argv, "--out", f"seed-{seed}"])
        assert code == 0, output
    assert metrics(inputs / "seed-3") != metrics(inputs / "seed-4")
