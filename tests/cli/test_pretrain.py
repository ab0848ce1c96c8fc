"""Continued pre-training as a command: it learns, goes on where it stopped, and refuses what text has no use for."""

import json

import pytest
import torch
from helpers.runs import arguments, write_inputs
from safetensors.torch import load_file

from tandem.cli.main import main
from tandem.data import windows
from tandem.training.trainer import LocalTrainer

STEPS = 6


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(windows, "MARK_EVERY", 4)
    return tmp_path


def test_a_run_that_is_stopped_goes_on_with_the_next_window(folder, monkeypatch):
    argv = [*arguments("pretrain"), "--steps", str(STEPS), "--save-every", "1"]
    assert main([*argv, "--out", "whole"]) == 0
    lines = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"] - 0.1
    assert (folder / "whole" / "windows.jsonl").read_text().count("\n") >= 3

    calls, step = 0, LocalTrainer.forward_backward

    def stopping(self, batch):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(LocalTrainer, "forward_backward", stopping)
    assert main([*argv, "--out", "stopped"]) == 130
    assert main([*argv, "--out", "stopped", "--resume"]) == 0
    whole, stopped = (load_file(f"{out}/model/model.safetensors") for out in ("whole", "stopped"))
    assert all(torch.equal(stopped[name], x) for name, x in whole.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-samples", "3"], "--max-samples: text is read as one stream, not as rows"),
        (["--condition", "a"], "--condition: text is read as one stream"),
        (["--max-eval-samples", "3"], "--max-eval-samples: text is read as one stream"),
        (["--epochs", "1"], "--epochs: how many windows a text has is not known before it is read; give --steps"),
        (["--max-length", "1"], "max_length: a window needs 2 tokens"),
        (["--aggregation", "sequence"], "--aggregation: has no effect"),
        (["--data", "demos.jsonl"], "demos.jsonl:1: no column 'text'; columns present: 'prompt'"),
        (["--input-key", "body"], "texts.jsonl:1: no column 'body'"),
    ],
)
def test_what_text_has_no_use_for_is_refused(folder, capsys, flags, message):
    argv = [] if "--epochs" in flags else ["--steps", "1"]
    command, *given = arguments("pretrain")
    for flag, value in zip(given[::2], given[1::2], strict=True):
        argv += [] if flag in flags else [flag, value]
    assert main([command, *argv, "--out", "never", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "never").exists()


@pytest.mark.parametrize("method", ["pretrain", "distill"])
def test_a_model_is_measured_afterwards_as_its_run_measured_it(folder, method):
    command, *given = arguments(method)
    assert main([command, *given, "--steps", "1", "--out", "run"]) == 0
    last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    kept = {"--data", "--teacher", "--max-length"}
    flags = [word for pair in zip(given[::2], given[1::2], strict=True) if pair[0] in kept for word in pair]
    assert main(["eval", method, "--model", "run/model", *flags, "--out", "measured"]) == 0
    found = json.loads((folder / "measured" / "evaluation.json").read_text())
    assert found["loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
