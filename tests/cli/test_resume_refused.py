"""What a resumed run may not do without a word: be another run, read other inputs, count other steps, start anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.runs import arguments, write_inputs
from safetensors.torch import load_file, save_file

from tandem.cli.main import main
from tandem.seeds import DRAWS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two steps of GRPO with a helper beside its reward, of GRPO with another seed, of PPO and of SFT."""
    folder = tmp_path_factory.mktemp("refused")
    write_inputs(folder)
    (folder / "share.py").write_text("def share(a, b):\n    return sum(x == y for x, y in zip(a, b)) / 4\n")
    (folder / "check.py").write_text(
        "import share\n"
        "def right(prompts, completions, answer):\n"
        "    return [share.share(c, a) + len(set(c)) / 100 for c, a in zip(completions, answer)]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*GRPO, "--out", "grpo", "--steps", "2"]) == 0
        assert main([*with_(GRPO, seed=4), "--out", "grpo-4", "--steps", "2"]) == 0
        assert main([*constant("ppo"), "--out", "ppo", "--steps", "2"]) == 0
        assert main([*arguments("sft"), "--out", "sft", "--steps", "2"]) == 0
    return folder


def constant(method):
    return [*with_(arguments(method), lr_schedule="constant"), "--save-every", "1"]


def with_(argv, **changes):
    """The arguments with the values of some flags replaced."""
    argv = list(argv)
    for name, value in changes.items():
        argv[argv.index("--" + name.replace("_", "-")) + 1] = str(value)
    return argv


GRPO = [*constant("grpo"), "--kl-coef", "0.01"]
ON = [*GRPO, "--out", "grpo", "--steps", "3", "--resume"]


@pytest.fixture
def tandem(runs, tmp_path, monkeypatch, capsys):
    """Runs a command in a copy of the runs' folder. Returns (exit code, standard error, standard output)."""
    shutil.copytree(runs, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")

    def call(*argv):
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return code, captured.err, captured.out

    return call


def refused(result, *parts):
    code, err, _ = result
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    for part in parts:
        assert part in err, err


def contents(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def events(folder):
    return [json.loads(line) for line in Path(folder, "events.jsonl").read_text().splitlines()]


def steps(folder):
    return [json.loads(line)["step"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("other", "part"), [("ppo", "method PPO, not GRPO"), ("grpo-4", "seed 4, not 3"), ("grpo-3", "id ")]
)
def test_a_checkpoint_of_another_run(tandem, other, part):
    if other == "grpo-3":  # the same command in another folder is another run
        assert tandem(*GRPO, "--out", other, "--steps", "2")[0] == 0
    shutil.rmtree("grpo/checkpoints")
    shutil.copytree(f"{other}/checkpoints", "grpo/checkpoints")
    refused(tandem(*ON), "grpo/checkpoints/step_00000002", "another run", part)


def test_a_folder_of_another_method(tandem):
    refused(tandem(*constant("rm"), "--out", "grpo", "--steps", "3", "--resume"), "holds a run of GRPO, not of reward")


def test_a_run_whose_identity_is_lost(tandem):
    Path("grpo/run.json").unlink()
    refused(tandem(*ON), "grpo/run.json", "--overwrite")


def test_a_run_that_another_version_began(tandem):
    identity = json.loads(Path("grpo/run.json").read_text())
    assert identity["draws"] == DRAWS
    began = [("Tandem 0.0.9", {"version": "0.0.9", "draws": 1}), ("an earlier Tandem", {})]
    for whose, said in began:
        of_run = {name: value for name, value in identity.items() if name not in ("version", "draws")}
        Path("grpo/run.json").write_text(json.dumps(of_run | said))
        before = contents("grpo")
        refused(tandem(*ON), f"grpo: begun by {whose}", "tandem export --model grpo --out NEW")
        assert contents("grpo") == before
    # What the line advises is so.
    assert tandem("export", "--model", "grpo", "--out", "NEW")[0] == 0
    assert Path("NEW/model.safetensors").exists()


def test_a_run_whose_bound_was_another_says_so_and_goes_on_with_it(tandem):
    """sequence_tis cut off at 5 where it was given no bound, and does at 2."""
    identity, config = Path("grpo/run.json"), Path("grpo/config.yaml")
    identity.write_text(json.dumps(json.loads(identity.read_text()) | {"draws": 2}))
    config.write_text(config.read_text().replace("correction: none", "correction: sequence_tis"))
    now = [*ON, "--old-logp", "trainer", "--correction", "sequence_tis", "--dry-run"]
    config.write_text(config.read_text().replace("old_logp: sampler", "old_logp: trainer"))
    refused(tandem(*now), "grpo/config.yaml: correction_high, which is not given, is 2 for sequence_tis", "was 5")
    config.write_text(config.read_text().replace("correction_high: null", "correction_high: 5.0"))
    refused(tandem(*now), "correction_high (5.0 there, null now)")
    assert tandem(*now, "--correction-high", "5")[0] == 0


def test_keys_that_an_earlier_version_did_not_have_or_had(tandem):
    config = Path("grpo/config.yaml")
    kept = [
        line for line in config.read_text().splitlines() if not line.startswith(("aux_loss_coef:", "max_grad_norm:"))
    ]
    config.write_text("\n".join([*kept, "lora.dropout: 0.0"]))
    refused(tandem(*ON), "grpo/config.yaml: this Tandem", "has no lora.dropout (0.0 there); take it out")
    config.write_text("\n".join(kept))
    refused(tandem(*ON, "--max-grad-norm", "0.5"), "max_grad_norm (1.0 there, 0.5 now); ")
    assert tandem(*ON)[0] == 0  # keys that are new have their defaults
    [event] = [event for event in events("grpo") if event["event"] == "config"]
    assert event["changed"] == {"steps": [2, 3]}


def append_row(name):
    with Path(name).open("a") as file:
        file.write(json.dumps({"prompt": "zz=", "answer": "zz"}) + "\n")


def scale_weights():
    save_file({k: 1.01 * v for k, v in load_file("base/model.safetensors").items()}, "base/model.safetensors")


def change(file):
    Path(file).write_text(Path(file).read_text() + "\n# or 5\n")


@pytest.mark.parametrize(
    ("changing", "kind", "names"),
    [
        (lambda: append_row("prompts.jsonl"), "data", ["data prompts.jsonl", "eval_data prompts.jsonl"]),
        (lambda: change("check.py"), "reward", ["reward check.py:right"]),
        (lambda: change("share.py"), "reward", ["reward check.py:right: share.py"]),
        (scale_weights, "model", ["model base: model.safetensors"]),
        (lambda: change("base/config.json") or trim("base/config.json"), "model", ["model base: config.json"]),
    ],
    ids=["data", "reward", "helper", "weights", "model's config"],
)
def test_changed_inputs(tandem, changing, kind, names):
    before = contents("grpo")
    changing()
    refused(tandem(*ON), "grpo: ", " changed since the run began", f"--accept-changed {kind}", *names)
    other = "model" if kind == "data" else "data"
    refused(tandem(*ON, "--accept-changed", other), " ".join(sorted([kind, other])))
    assert contents("grpo") == before
    code, err, _ = tandem(*ON, "--accept-changed", kind, other)
    assert code == 0, err
    [accepted] = [event for event in events("grpo") if event["event"] == "accept_changed"]
    assert (accepted["what"], accepted["changed"]) == (kind, names)
    assert steps("grpo") == [0, 1, 2, 3]
    # Accepted once: the run is now one of the changed inputs.
    assert tandem(*with_(ON, steps=4))[0] == 0


def trim(file):
    """Valid JSON again, and yet another file."""
    Path(file).write_text(Path(file).read_text().removesuffix("\n# or 5\n") + "\n\n")


def test_rows_written_another_way_are_the_same(tandem):
    rows = [json.loads(line) for line in Path("prompts.jsonl").read_text().splitlines()]
    Path("prompts.jsonl").write_text("\n\n".join(json.dumps(row, separators=(" ,", " : ")) for row in rows))
    assert tandem(*ON)[0] == 0


def test_changes_are_accepted_of_a_resumed_run_only(tandem):
    refused(tandem(*GRPO, "--out", "new", "--steps", "1", "--accept-changed", "data"), "--accept-changed: ", "--resume")
    refused(tandem(*ON, "--accept-changed", "date"), "--accept-changed", "data, reward, model")


def test_steps(tandem):
    refused(tandem(*with_(ON, steps=1)), "steps: 1", "grpo", "has done 2 already")
    code, err, out = tandem(*ON)
    assert code == 0, err
    assert "3 steps now; what is done was done for 2 steps, and so was the warmup" in out
    assert steps("grpo") == [0, 1, 2, 3]
    [event] = [event for event in events("grpo") if event["event"] == "config"]
    assert event["changed"] == {"steps": [2, 3]}
    # A falling learning rate would have fallen otherwise in the steps that are done.
    sft = [*arguments("sft"), "--out", "sft", "--resume", "--steps"]
    refused(tandem(*sft, "3"), "steps (2 there, 3 now: its linear learning rate falls to 0 at the last step)")
    refused(tandem(*with_(sft, batch_size=9), "2"), "batch_size (7 there, 9 now)")


def test_nothing_of_a_finished_run_is_done_again(tandem):
    before = contents("sft")
    code, err, out = tandem(*arguments("sft"), "--out", "sft", "--steps", "2", "--resume")
    assert code == 0, err
    assert "sft/model" in out
    assert contents("sft") == before
    # Killed inside its export, a run has all its steps and yet no model.
    shutil.rmtree("sft/model")
    assert tandem(*arguments("sft"), "--out", "sft", "--steps", "2", "--resume")[0] == 0
    assert contents("sft/model") == {path: data for path, data in before.items() if "model" in path.parts}


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_corrected_command_takes_the_place_of_a_run_that_did_nothing(tandem, flags):
    Path("wrong.py").write_text("def right(prompts, completions):\n    raise KeyError('answer')\n")
    argv = [*GRPO, "--steps", "1", "--out", "corrected"]
    for flag in ("--eval-data", "--eval-every"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    assert tandem(*with_(argv, reward="wrong.py:right"), "--reward-deadline", "2")[0] == 75
    assert Path("corrected/config.yaml").exists()
    code, err, out = tandem(*with_(argv, kl_coef=0.02), *flags)
    assert code == 0, err
    assert "corrected: in place of a run that had done no step" in out
    assert steps("corrected") == [1]
    assert "KeyError" in json.dumps(events("corrected"))
    # One that has done a step stays.
    shutil.rmtree("corrected/checkpoints")
    shutil.rmtree("corrected/model")
    refused(tandem(*argv), "already holds a run")
