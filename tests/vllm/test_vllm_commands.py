"""Commands that train nothing, with vLLM: the doctor's checks, and samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.broken_engines import deaf_engine
from helpers.shared_ray import cluster_address
from test_vllm_runs import SPLIT, at_inputs, inputs

from tandem.assembly import wiring
from tandem.cli.main import main

__all__ = ["at_inputs", "cluster_address", "inputs"]


def test_doctor(capsys):
    assert main(["doctor", "--engine.kind", "vllm", "--max-slots", "32", "--engine.max-length", "64"]) == 0
    said = capsys.readouterr().out
    assert "it changed" in said
    assert "as before" in said
    assert "checks passed" in said


@pytest.mark.usefixtures("helpers_importable")
def test_doctor_notices_an_engine_that_pushes_do_not_reach(monkeypatch, capsys):
    monkeypatch.setattr(wiring, "vllm_engine", deaf_engine)
    argv = ["doctor", "--engine.kind", "vllm", "--max-slots", "32", "--engine.max-length", "64"]
    assert main([*argv, "--engine.no-check-weights"]) == 2
    said = capsys.readouterr()
    assert "pushes do not reach it" in said.err
    assert "it changed" not in said.out


@pytest.mark.parametrize("placement", [(), SPLIT], ids=["here", "apart"])
def test_a_command_that_trains_nothing_samples_with_vllm(placement, tmp_path):
    """Greedily, what the live engine samples; nothing was ever pushed to it."""
    words = ["generate", "--model", "base", "--data", "prompts.jsonl", "--max-new-tokens", "5", "--temperature", "0"]
    texts = {}
    for kind, options in (("live", ()), ("vllm", placement)):
        out = str(tmp_path / kind)
        assert main([*words, "--engine.kind", kind, "--engine.max-length", "32", "--out", out, *options]) == 0
        texts[kind] = [json.loads(line)["completion"] for line in Path(out, "samples.jsonl").read_text().splitlines()]
    assert len(texts["live"]) == 40
    assert texts["vllm"] == texts["live"]
