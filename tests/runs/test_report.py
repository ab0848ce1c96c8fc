"""What a run leaves to read when it ends: a summary of its lines, and their curves."""

import json
import math
import os
import signal

import matplotlib.image
import pytest
from helpers.runs import arguments, unevaluated
from matplotlib.figure import Figure

from tandem.assembly import sessions
from tandem.runs.curves import plot_curves
from tandem.runs.report import panels_of, write_report

pytestmark = pytest.mark.draws

RECORDS = [
    {"step": 0, "eval/reward": 0.1, "eval/pass@2": 0.2},
    {"step": 1, "reward": 0.2, "kl": 0.0, "seconds": 2.0, "seconds_sampling": 1.5, "tokens_per_second": 100.0},
    {"step": 2, "reward": 0.5, "kl": 0.1, "seconds": 1.0, "seconds_sampling": 0.25, "tokens_per_second": 400.0},
    {"step": 3, "reward": 0.3, "kl": math.nan, "seconds": 1.0, "tokens_per_second": 300.0, "eval/reward": 0.4},
]
EVENTS = [
    {"time": "2026-01-02T03:04:05.000+00:00", "event": "start", "title": "GRPO", "rows": 9, "kept": 8},
    {"time": "2026-01-02T03:04:15.000+00:00", "event": "note", "step": 2, "message": "rewards are alike"},
    {"time": "2026-01-02T03:05:06.000+00:00", "event": "finish", "step": 3, "stopped": "eval/reward is 0.4 (>= 0.4)"},
]


def folder_of(path, records=RECORDS, events=EVENTS):
    path.mkdir()
    for name, lines in (("metrics.jsonl", records), ("events.jsonl", events)):
        finite = [{k: None if v != v else v for k, v in line.items()} for line in lines]
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in finite))
    return path


def test_the_summary_has_what_a_person_asks_first(tmp_path):
    out = folder_of(tmp_path / "run")
    write_report(out, title="GRPO", leads=("reward", "kl"), ended="finished")
    text = (out / "summary.md").read_text()
    for line in (
        "# GRPO: 3 steps, finished early: eval/reward is 0.4 (>= 0.4)",
        "| reward | 0.2 | 0.5 (step 2) | 0.3 |",
        "| eval/reward | 0.1 | 0.4 (step 3) | 0.4 |",
        "| kl | 0 | 0 (step 1) | nan |",
        "| eval/pass@2 | 0.2 | 0.2 (step 0) | 0.2 |",
        "| sampling | 1.75 | 44% |",
        "| other | 2.25 | 56% |",
        "| all steps | 4 | 100% |",
        "225 tokens a second, over all steps.",
        "Data: 9 rows, 8 kept.",
        "Begun 2026-01-02T03:04:05 UTC; it took 1:01.",
        "- after step 2, note: rewards are alike",
    ):
        assert line in text.splitlines(), text


def test_the_curves_are_training_and_held_out_in_one_panel(tmp_path):
    panels = panels_of([*RECORDS, {"step": 4, "eval/a/kl": 1.0, "eval/b/kl": 2.0}], ("reward", "kl", "missing"))
    labels = {name: [label for label, *_ in curves] for name, curves in panels.items()}
    assert labels == {
        "reward": ["training", "held out"],
        "kl": ["training", "a", "b"],
        "pass@k, held out": ["pass@2"],
        "seconds of a step": ["seconds", "sampling"],
    }
    assert panels["reward"][1][1:] == ((0, 3), (0.1, 0.4))
    out = folder_of(tmp_path / "run")
    write_report(out, title="GRPO", leads=("reward", "kl"), ended="finished")
    picture = matplotlib.image.imread(out / "curves.png")
    assert picture.shape[1] > 1000
    assert picture[..., :3].std() > 0.02
    assert {path.name for path in out.iterdir()} == {"metrics.jsonl", "events.jsonl", "summary.md", "curves.png"}


def test_a_judge_of_held_out_samples_alone_is_named():
    records = [*RECORDS, {"step": 4, "eval/a/kl": 2.0}]
    panels = panels_of(records, ("reward", "kl"), "gold.py:right")
    labels = [label for lead in ("reward", "kl") for label, *_ in panels[lead]]
    assert labels == ["training", "held out (gold.py:right)", "training", "a"]


def test_no_legend_lies_on_a_curve(tmp_path, monkeypatch):
    """Of flat curves there is no corner that is free."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    names = ("seconds", "sampling", "scoring", "training", "sync", "evaluating", "held out (a_long_file.py:a_function)")
    flat = [(name, [1, 2, 3], [float(i)] * 3) for i, name in enumerate(names)]
    plot_curves(tmp_path / "curves.png", {"few": flat[:2], "more": flat[:5], "all": flat}, "run")
    (figure,) = drawn
    figure.canvas.draw()
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        highest = max(axes.transData.transform((1, line.get_ydata()[0]))[1] for line in axes.lines)
        assert legend.y0 > highest
        assert legend.x1 < axes.bbox.x1


def test_a_name_that_the_font_has_no_letters_of_is_drawn_without_a_word(tmp_path, recwarn):
    plot_curves(tmp_path / "curves.png", {"loss": [("", [0], [1.0])]}, "日本")
    assert (tmp_path / "curves.png").exists()
    assert not recwarn


def test_a_run_that_has_written_nothing_has_a_summary_and_no_picture(tmp_path):
    out = folder_of(tmp_path / "run", [], [])
    write_report(out, title="SFT", leads=("loss",), ended="ended by UserError: x")
    assert (out / "summary.md").read_text() == "# SFT: 0 steps, ended by UserError: x\n"
    assert not (out / "curves.png").exists()


def test_a_run_that_is_interrupted_and_resumed_is_reported_each_time(inputs, tandem, monkeypatch):
    argv = [*unevaluated(arguments("sft")), "--steps", "3", "--out", "run"]
    with monkeypatch.context() as patch:
        # Two of each step: this is the second step's first, before the step counts as reached.
        calls = iter(range(9))
        step = sessions.StepClock.metrics
        patch.setattr(
            sessions.StepClock,
            "metrics",
            lambda clock: (next(calls) == 2 and os.kill(os.getpid(), signal.SIGINT), step(clock))[1],
        )
        assert tandem(*argv)[0] == 130
    assert (inputs / "run" / "summary.md").read_text().startswith("# SFT: 1 steps, interrupted\n")
    (inputs / "run" / "curves.png").unlink()
    assert tandem(*argv, "--resume")[0] == 0
    assert (inputs / "run" / "summary.md").read_text().startswith("# SFT: 3 steps, finished\n")
    assert (inputs / "run" / "curves.png").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no font")])
def test_a_report_that_fails_is_said_and_changes_nothing(inputs, tandem, monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(sessions, "write_report", fails)
    out = f"unreported-{type(error).__name__}"
    code, said, _ = tandem(*unevaluated(arguments("sft")), "--steps", "1", "--out", out)
    assert code == 0
    assert f"{out}: its summary is not written: {error}" in said
    assert (inputs / out / "model" / "model.safetensors").exists()
