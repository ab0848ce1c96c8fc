"""A model that also sees on vLLM's CPU build: its text half takes the pushes, and no part that sees is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.seeing import make_seeing, save_seeing
from helpers.vllm_models import Pusher, covered, reference_logp, wrong_tensors

from tandem.engines.vllm.engine import VLLMEngine
from tandem.engines.vllm.setup import VLLMParams
from tandem.models.loading import load_causal

pytest.importorskip("torchvision")  # vLLM's classes of models that see are made with it


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "qwen3_vl_moe"])
def test_pushes_reach_the_text_half(family: str, tmp_path: Path) -> None:
    # vLLM's attention on CPUs takes no smaller heads than 32.
    save_seeing(make_seeing(family, wide=True), tmp_path / "base")
    model = load_causal(tmp_path / "base", device="cpu")
    # As Tandem writes it: experts that transformers has written the other way round vLLM does not read.
    model.export(tmp_path / "out")
    module = model.module
    parameters = dict(module.named_parameters())
    engine = VLLMEngine(VLLMParams(model=str(tmp_path / "out"), dtype="float32", max_slots=2, max_length=64))
    try:
        sequence = list(range(5, 45))
        assert engine.logprobs([sequence])[0] == pytest.approx(reference_logp(module, sequence[:1], sequence[1:]), 1e-4)
        pusher = Pusher.connect(engine, parameters)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        sums = pusher.push(1)
        assert engine.logprobs([sequence])[0] == pytest.approx(reference_logp(module, sequence[:1], sequence[1:]), 1e-4)
        assert not wrong_tensors(engine, sums)
        # On CPUs experts are packed, and the log-probs alone show them.
        assert covered(engine) == {name for name in sums if ".experts." not in name}
        pusher.close()
    finally:
        engine.close()
