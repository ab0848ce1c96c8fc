"""Every bench runs in its small form on a CPU, checks that the work was equal, and says which peer is not there."""

import importlib
import json
import subprocess
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from helpers.runs import forked
from safetensors.torch import save_file

from tandem.models.loading import load_causal
from tandem.models.quantized.layers import quantized_in

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a bench's systems one by one, all in this process: the rows that came, and those that are errors."""
    monkeypatch.syspath_prepend(str(BENCH))

    def rows(name, systems, *argv):
        found = []
        for system in systems:
            file = tmp_path / f"{system}.json"
            options = ["--device", "cpu", "--json", file, "--only", system, *argv]
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
            importlib.import_module(name).main()
            found += json.loads(file.read_text())["rows"]
        return [row for row in found if "error" not in row], [row for row in found if "error" in row]

    return rows


def trl_is_missing():
    try:
        version("trl")
    except PackageNotFoundError:
        return True
    return False


def test_sampling(run, tmp_path):
    trace = tmp_path / "trace.json"
    rows, failed = run(
        "sampling", ["live", "generate", "check"], "--size", "tiny", "--repeats", 1, "--batches", 8, "--new-tokens", 8,
        "--prompt-tokens", 4, "--skewed-samples", 12, "--slots", 4, "--skewed-max", 16, "--samples-per-prompt", 2,
        "--check-samples", 2, "--profile", trace,
    )  # fmt: skip
    assert not failed
    live = {row["case"]: row for row in rows if row["system"] == "live"}
    assert live["equal 8"]["tokens"] == 64
    assert live["slots"]["tokens"] == 96
    # Random ends: some samples end early, and none may be longer than asked for.
    assert 12 <= live["skewed"]["tokens"] < 192
    assert {row["cache"] for row in rows if row["system"] == "generate"} == {"dynamic", "static"}
    (check,) = (row for row in rows if row["system"] == "check")
    assert check["gap_max"] < 1e-4
    assert check["greedy_equal"] == 1
    assert json.loads(trace.read_text())["traceEvents"]


def test_unequal_work_is_an_error(run):
    sampling = importlib.import_module("sampling")
    case = sampling.Case(name="equal 2", samples=2, slots=2, new_tokens=3)
    with pytest.raises(RuntimeError, match="2 samples of 2 to 3 tokens"):
        sampling.row_of(None, "live", case, {"seconds": 1.0}, [3, 2])


def test_rl_step(run, tmp_path):
    rows, failed = run(
        "rl_step", ["tandem", "trl-generate"], "--size", "tiny", "--prompts", 2, "--samples", 4, "--new-tokens", 8,
        "--prompt-tokens", 4, "--steps", 2, "--skip", 1, "--trl-batch", 4, "--profile", tmp_path / "trace.json",
    )  # fmt: skip
    systems = {row["system"]: row for row in rows}
    # A sample of the random model ends early one time in 512 tokens.
    assert all(48 <= row["completion_tokens"] <= 64 for row in rows)
    assert len(systems["tandem"]["steps"]) == 4, "two steps more, for the trace"
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    if trl_is_missing():
        assert [row["error"] for row in failed] == ["ImportError: trl is not installed here"]


def test_a_folder_in_4_bits_is_one_that_is_trained_on(run, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    models, rl_step = map(importlib.import_module, ("models", "rl_step"))
    model = load_causal(models.write_4bit_folder("tiny", tmp_path, dtype=torch.float32), device="cpu")
    layers = quantized_in(model.module)
    assert len(layers) == 3 * 7
    for layer in layers.values():
        assert layer.dequantized().std().item() == pytest.approx(model.module.config.initializer_range, rel=0.05)
    assert model.module.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.module.model.norm.weight == 1).all()
    with pytest.raises(SystemExit):
        rl_step.parse(["--device", "cpu", "--quantize", "nf4"])
    assert "give --lora" in capsys.readouterr().err


def test_phases_of_an_rl_step(run):
    rl_step = importlib.import_module("rl_step")
    options = rl_step.parse(["--device", "cpu", "--size", "tiny", "--steps", "3", "--skip", "1"])
    step = {f"seconds_{phase}": 1.0 for phase in rl_step.PHASES}
    step |= {"seconds": 4.0, "sampled_tokens": 8.0, "memory_gb_sampling": 1.0, "memory_gb_training": 2.0}
    row = rl_step.tandem_row(options, [step | {"seconds": 9.0, "memory_gb_training": 3.0}, step, step])
    assert row["seconds"] == 4.0
    assert row["peak_gb_of"] == {"sampling": 1.0, "training": 3.0}
    assert row["peak_gb"] == 3.0


def test_training(run, tmp_path):
    rows, failed = run(
        "training", ["packed", "sft-tandem", "sft-trl-pack-sdpa", "gradients"], "--size", "tiny", "--token-budget", 256,
        "--accumulate", 2, "--sequence", 64, "--repeats", 1, "--warm", 1, "--sft-sequences", 8, "--sft-batch", 4,
        "--profile", tmp_path / "trace.json",
    )  # fmt: skip
    systems = {row["system"]: row for row in rows}
    assert systems["packed"]["tokens"] == 512
    assert systems["gradients"]["gradient_error"] < 1e-5
    assert len(systems["sft-tandem"]["every_second"]) == 2
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    if trl_is_missing():
        assert [row["error"] for row in failed] == ["ImportError: trl is not installed here"]


def test_preference(run):
    rows, failed = run(
        "preference", ["dpo-tandem", "rm-tandem", "kto-tandem", "dpo-trl-4"], "--size", "tiny", "--token-budget", 256,
        "--pairs", 12, "--batch", 4, "--warm", 1,
    )  # fmt: skip
    systems = {row["system"]: row for row in rows}
    assert len({tuple(row["tokens_of_steps"]) for name, row in systems.items() if name.endswith("tandem")}) == 1
    assert all(len(row["every_second"]) == 3 for row in rows)
    assert systems["kto-tandem"]["reference_tokens_per_second"] > 0
    if trl_is_missing():
        assert [row["error"] for row in failed] == ["ImportError: trl is not installed here"]
    preference = importlib.import_module("preference")
    with pytest.raises(RuntimeError, match="9 tokens were trained on instead of 10"):
        preference.require_equal(9, [{"prompt": "ab", "chosen": "c", "rejected": "ddd"}])


def test_memory(run):
    rows, failed = run("memory", ["chunked", "full", "phases"], "--size", "tiny", "--tokens", 65536, "--repeats", 1)
    chunked, full = rows
    logits = 65536 * 512 * 4 / 1e9
    # Full: logits, log-probs and a gradient of that size at least at one time. Chunks: a quarter of the tokens at once.
    assert full["peak_gb"] > 2.5 * logits
    assert chunked["peak_gb"] < 0.6 * full["peak_gb"]
    assert max(chunked["gap_max"], chunked["gradient_error"], full["gradient_error"]) < 1e-4
    assert [row["system"] for row in failed] == ["phases"]


@pytest.fixture
def forking(tmp_path, monkeypatch):
    """Commands that a bench starts are forked from a process that has imported everything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", partial(forked, start=subprocess.run))


@pytest.mark.usefixtures("forking")
def test_learning(run):
    rows, failed = run(
        "learning", ["plain"], "--seeds", 0, "--hidden", 32, "--layers", 1, "--sft-steps", 4, "--grpo-steps", 2,
        "--prompts", 4, "--held-out", 16,
    )  # fmt: skip
    assert not failed
    (plain,) = rows
    assert 1.0 < plain["sft_loss"] < 3.0
    assert len(plain["train_rewards"]) == 2
    assert "--compile off" in plain["commands"][0]


@pytest.mark.usefixtures("forking")
def test_parameters(tmp_path, monkeypatch, capsys):
    """A run equals itself; one bit of a tensor, a number of a series, a metric that is gone are differences."""
    monkeypatch.syspath_prepend(str(BENCH))
    parameters = importlib.import_module("parameters")
    file = tmp_path / "before.json"
    monkeypatch.setattr(sys, "argv", ["parameters.py", "--only", "sft-token", "--json", str(file)])
    assert parameters.main() == 0
    earlier = json.loads(file.read_text())
    (row,) = earlier["rows"]
    assert parameters.compare(earlier, [row]) == []
    assert len(row["metrics"]["loss"].split(", ")) == parameters.STEPS

    changed = row["metrics"] | {"loss": row["metrics"]["loss"].replace("1: 2.", "1: 7.", 1), "new": "1: 0.0"}
    del changed["grad_norm"]
    monkeypatch.setattr(parameters, "train", lambda *_: row | {"metrics": changed, "parameters": "0" * 64})
    monkeypatch.setattr(sys, "argv", [*sys.argv[:3], "--against", str(file)])
    assert parameters.main() == 1
    said = capsys.readouterr().out
    assert "sft-token: parameters\n" in said
    assert "sft-token: loss: step 1: 2." in said
    assert "sft-token: grad_norm: is gone" in said
    assert "0 of 1 configs" in said
    assert "new" not in said


def test_a_hash_of_tensors_sees_every_bit(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    parameters = importlib.import_module("parameters")
    tensors = {"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.ones(4)}
    hashes = []
    for i, changed in enumerate(
        (
            tensors,
            dict(reversed(tensors.items())),
            tensors | {"b": -tensors["b"]},
            tensors | {"a": torch.ones(2, 2)},
            {"b": tensors["b"], "c": tensors["a"]},
        )
    ):
        (tmp_path / str(i)).mkdir()
        save_file(changed, tmp_path / str(i) / "model.safetensors")
        hashes.append(parameters.hash_of_tensors(tmp_path / str(i)))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


def test_each_system_has_a_process_and_a_dead_one_is_a_row(tmp_path):
    file = tmp_path / "rows.json"
    argv = [
        "sampling.py", "--size", "tiny", "--device", "cpu", "--repeats", "1", "--cases", "2", "--batches", "2",
        "--new-tokens", "2", "--only", "live", "check", "--timeout", "0.2", "--json", str(file),
    ]  # fmt: skip
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=BENCH)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["system"] for row in rows] == ["live", "check"]
    assert all("not done after 0.2 s" in row["error"] for row in rows)


def test_adapters(run, monkeypatch):
    """Commands run in this process: what they print and when they end is not what is tested."""
    from tandem.cli.main import main

    monkeypatch.syspath_prepend(str(BENCH))
    adapters = importlib.import_module("adapters")

    def tandem(name, flags, words=()):
        argv = [name, *(word for key, value in flags.items() for word in (f"--{key}", str(value))), *words]
        assert main(argv) == 0
        return " ".join(argv)

    monkeypatch.setattr(adapters, "_tandem", tandem)
    rows, failed = run(
        "adapters", ["head"], "--seeds", 0, "--sweep-seeds", "--hidden", 64, "--layers", 1, "--sft-steps", 2,
        "--grpo-steps", 1, "--prompts", 2, "--held-out", 4, "--rank", 2, "--lora-rates", "2e-3",
    )  # fmt: skip
    assert not failed
    assert [(row["swept"], row["seed"], row["learning_rate"]) for row in rows] == [(False, 0, 2e-3)]
    assert "--lora.rank 2 --lora.targets all-linear lm_head" in rows[0]["command"]


def test_draws(run):
    rows, failed = run(
        "draws", ["race", "lookup", "gumbel"], "--vocabulary", 300, "--rows", 2, "--draws", 64, "--least", 0.001,
    )  # fmt: skip
    assert not failed
    assert [row["way"] for row in rows] == ["race", "lookup", "gumbel"]
    assert all(row["microseconds"] > 0 and row["draws"] == 64 and row["flips"] <= 3 for row in rows)
    assert all(0 < row["moved"] < 0.1 for row in rows)


def test_experts(run):
    pytest.importorskip("triton")
    rows, failed = run("experts", ["grouped", "few", "router", "sweep"], "--size", "tiny", "--layers", 1)
    assert not failed
    assert all(row["microseconds"] > 0 for row in rows)
    ways = ["grouped", "few", "place", "up", "gate", "down", "sum", "router", "router, plain"]
    ways += ["16x64, 3", "16x64, 4", "16x128, 3", "16x128, 4"]
    assert [row["way"] for row in rows] == ways
