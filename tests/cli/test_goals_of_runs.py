"""A run keeps its best model and stops early, and does both alike when it is killed on the way, by a real SIGKILL."""

import json
import shutil
import signal

import pytest
from helpers.runs import arguments, run, unevaluated

from tandem.runs.goals import ABOUT, BEST_MODEL, Best, read_best, write_about
from tandem.runs.lines import read_lines, read_metrics
from tandem.whole import remove_folder, replace_folder, replaced, restore_folder

# A learning rate at which the held-out loss goes down, and then up and down.
SFT = [*unevaluated(arguments("sft", learning_rate="0.1", lr_schedule="constant")), "--eval-data", "demos.jsonl",
       "--eval-every", "1", "--steps", "12", "--keep-best", "eval/loss", "--keep", "1", "--patience", "3"]  # fmt: skip


def left(folder):
    """What a run has left: all that the goals decide."""
    lines = [
        {k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per"))}
        for line in read_metrics(folder / "metrics.jsonl")
    ]
    models = [(folder / name / "model.safetensors").read_bytes() for name in ("best", "model")]
    finish = [line for line in read_lines(folder / "events.jsonl") if line["event"] == "finish"][-1]
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return lines, models, json.loads((folder / "best" / "best.json").read_text()), finish["stopped"], checkpoints


@pytest.fixture(scope="module")
def whole(inputs):
    code, output = run(inputs, [*SFT, "--save-every", "1", "--out", "whole"])
    assert code == 0, output
    return output


def test_the_best_model_and_its_checkpoint_stay_and_patience_ends_the_run(inputs, whole, tandem):
    lines, models, best, stopped, checkpoints = left(inputs / "whole")
    losses = [line["eval/loss"] for line in lines]
    step = losses.index(min(losses))
    assert 0 < step == len(losses) - 4, losses
    assert best == {"step": step, "metric": "eval/loss", "value": losses[step]}
    assert stopped == f"eval/loss has not got better than {min(losses):.6g} (step {step}) in 3 evaluations"
    assert f"stopped after step {step + 3}: {stopped}" in whole
    assert f"The best one, of step {step} (eval/loss " in whole
    assert checkpoints == [f"step_{step:08d}", f"step_{step + 3:08d}"]
    assert models[0] != models[1]
    # The kept model is that of the step: a run of so many steps ends with it.
    argv = [*unevaluated(SFT[: SFT.index("--keep-best")])]
    argv[argv.index("--steps") + 1] = str(step)
    assert tandem(*argv, "--out", "short")[0] == 0
    assert (inputs / "short" / "model" / "model.safetensors").read_bytes() == models[0]


def test_a_run_killed_anywhere_keeps_the_same_best_and_stops_at_the_same_step(inputs, whole):
    # Only the best steps have checkpoints, and the last one: what is kept of either must be kept in the right order.
    argv = [*SFT, "--save-every", "100", "--out", "broken", "--resume"]
    # As a checkpoint gets its name, before the best model is replaced, between the two renames of that, in a save.
    faults = [("rename", 2), ("rename", 2), ("rename", 2), ("save", 1)]
    kills = 0
    for fault in faults:
        code, output = run(inputs, argv, fault=fault)
        assert code in (0, -signal.SIGKILL), output
        kills += code != 0
    assert kills == len(faults)
    code, output = run(inputs, argv)
    assert code == 0, output
    assert left(inputs / "broken") == left(inputs / "whole")
    assert not [path.name for path in (inputs / "broken").glob(".*") if path.name != ".tandem-run"]


def test_a_run_that_has_met_its_goals_is_done_until_they_change(inputs, whole, tandem):
    shutil.copytree(inputs / "whole", inputs / "again")
    code, said, _ = tandem(*SFT, "--save-every", "1", "--out", "again", "--resume")
    assert (code, "nothing is left to resume: eval/loss has not got better" in said) == (0, True)
    longer = [*SFT, "--save-every", "1", "--out", "again", "--resume", "--stop-when", "eval/loss<2.36"]
    longer[longer.index("--patience") + 1] = "9"
    assert tandem(*longer)[0] == 0
    lines, _, best, stopped, _ = left(inputs / "again")
    assert lines[:6] == left(inputs / "whole")[0]
    assert [line["step"] for line in lines if line["eval/loss"] < 2.36] == [best["step"]] == [len(lines) - 1]
    assert stopped == f"eval/loss is {best['value']:.6g} (< 2.36)"
    code, _, error = tandem(*[w.replace("eval/loss", "+eval/loss") for w in SFT], "--out", "again", "--resume")
    assert code == 2
    assert "keep_best" in error


def test_a_best_model_of_a_step_that_is_done_again_is_removed(inputs, whole, tandem):
    """Its checkpoint was moved away by hand: the run goes on from an earlier one, or the beginning."""
    shutil.copytree(inputs / "whole", inputs / "earlier")
    for name in ("checkpoints", "model"):
        shutil.rmtree(inputs / "earlier" / name)
    code, said, _ = tandem(*SFT, "--save-every", "1", "--out", "earlier", "--resume")
    assert code == 0
    assert "which comes again: it is removed" in said
    assert left(inputs / "earlier") == left(inputs / "whole")


def test_without_checkpoints_the_best_model_alone_is_kept(inputs, whole, tandem):
    at = SFT.index("--keep")
    assert tandem(*SFT[:at], *SFT[at + 2 :], "--save-every", "0", "--out", "unsaved")[0] == 0
    for name in ("best/model.safetensors", "best/best.json", "model/model.safetensors"):
        assert (inputs / "unsaved" / name).read_bytes() == (inputs / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        (
            "sft",
            ["--keep-best", "eval/acuracy"],
            "--keep-best: whether more or less of eval/acuracy is better is not kn",
        ),
        (
            "sft",
            ["--keep-best", "eval/accuracy"],
            "error: keep_best: no evaluation of this run has eval/accuracy; they have ev",
        ),
        ("sft", ["--keep-best", "loss"], "--keep-best: expected a held-out metric, eval/..., got loss"),
        (
            "sft",
            ["--stop-when", "eval/loss"],
            "--stop-when: expected a held-out metric and its bound, as eval/reward>=0.9",
        ),
        (
            "sft",
            ["--stop-when", "eval/los<1"],
            "error: stop_when: no evaluation of this run has eval/los; they have eval/loss",
        ),
        ("sft", ["--patience", "2"], "--patience: has no effect without --keep-best"),
        (
            "grpo",
            ["--keep-best", "eval/pass@2"],
            "error: keep_best: no evaluation of this run has eval/pass@2; they have eval/",
        ),
        (
            "grpo",
            ["--stop-when", "eval/reward/wrong>1"],
            "error: stop_when: no evaluation of this run has eval/reward/wrong; th",
        ),
    ],
)
def test_an_unknown_metric_is_one_line_at_the_start(inputs, tandem, method, flags, message):
    out = inputs / "refused"
    code, said, error = tandem(*arguments(method), "--steps", "2", "--out", out, *flags)
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
    assert f"{method.upper()} 1/2" not in said
    # Known before anything is loaded, but for what only an evaluation can tell.
    late = "no evaluation" in message and "pass@" not in message
    assert out.exists() is late
    shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("set_name", ["b", "c"])
def test_a_goal_names_one_of_the_sets(inputs, tandem, set_name):
    argv = [*unevaluated(arguments("sft")), "--eval-data", "a=demos.jsonl", "b=demos.jsonl", "--steps", "1"]
    code, _, error = tandem(*argv, "--out", inputs / f"set-{set_name}", "--keep-best", f"eval/{set_name}/loss")
    assert code == (0 if set_name == "b" else 2)
    assert ("expected a held-out metric, eval/a/... or eval/b/..., got eval/c/loss" in error) is (set_name == "c")


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_replaced_folder_is_the_old_or_the_new_one(tmp_path, moment):
    old, new = tmp_path / "best", tmp_path / ".best-partial"
    for path in (old, new):
        path.mkdir()
        (path / "is").write_text(path.name)
    if moment == "after":
        replace_folder(new, old)
    elif moment == "between":
        old.rename(replaced(old))
    restore_folder(old)
    assert (old / "is").read_text() == (".best-partial" if moment == "after" else "best")
    assert not replaced(old).exists()


def test_a_kill_amid_the_removal_of_a_best_model_leaves_none(tmp_path, monkeypatch):
    """Not one that says no more of which step it is, which the next start would refuse."""
    best = tmp_path / BEST_MODEL
    best.mkdir()
    (best / "model.safetensors").touch()
    write_about(best, Best(step=4, metric="eval/loss", value=1.0))

    def killed(folder, **_):
        if folder.exists():
            (folder / ABOUT).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(best)
    assert read_best(tmp_path) is None
    best.mkdir()
    remove_folder(best)
    assert [*tmp_path.iterdir()] == []
