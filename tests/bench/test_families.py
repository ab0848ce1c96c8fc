"""The table of families: its lines are what is found of their models, each against one sequence at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import families

BUILT_DIFFERENTLY = (
    "gemma2", "gemma3", "gemma3n", "phi3", "phi4-mini", "olmo", "olmo2", "granite", "smollm3", "glm4", "starcoder2",
    "cohere2", "gpt-neox", "gpt2", "gpt-oss", "ministral3", "qwen3-moe", "deepseek-v2", "deepseek-v3", "hunyuan",
    "nemotron-h", "falcon-h1", "qwen3.5", "gemma4", "gemma4-e", "gemma4-moe",
)  # fmt: skip
"""Between them they have everything that is read of a layer, and a state."""
SLOWER = {
    "llama4", "nemotron", "stablelm", "opt", "bloom",
    "deepseek-v3.2", "glm5", "minicpm3", "kimi-linear", "zamba", "recurrent-gemma",
    "rwkv",
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT_DIFFERENTLY)
def test_what_the_table_says_holds(name: str) -> None:
    family = families.NAMES[name]
    found = families.look(family)
    assert found.holds, found
    assert max(found.logp_gap, found.sampler_gap) < 5e-5
    assert families.line_of(family, found) in families.table_of(families.PAGE.read_text())


def test_every_family_has_a_line() -> None:
    lines = families.table_of(families.PAGE.read_text()).removeprefix(families.HEADING).splitlines()
    heads = [f"| {family.models} | {family.kind} |" for family in families.FAMILIES]
    assert len(lines) == len(heads)
    assert all(line.startswith(head) for line, head in zip(lines, heads, strict=True))
    slower = {family.name for family, line in zip(families.FAMILIES, lines, strict=True) if "| fused |" not in line}
    assert slower == SLOWER


def test_rates_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rates.json"
    monkeypatch.setattr(
        sys, "argv",
        ["families.py", "--device", "cpu", "--only", "qwen2", "mixtral", "--samples", "2", "--new-tokens", "3",
         "--repeats", "1", "--prompt-tokens", "4", "--train", "--train-tokens", "64", "--json", str(file)],
    )  # fmt: skip
    families.main()
    first, mixtral = json.loads(file.read_text())["rows"]
    assert first["tokens"] == 6
    assert first["of_qwen2"] == first["trained_of_qwen2"] == 1
    assert mixtral["trained_of_qwen2"] == mixtral["trained_tokens_per_second"] / first["trained_tokens_per_second"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_all_weights_but_an_embedding_that_is_no_head(tied: bool) -> None:
    module = families.NAMES["qwen2"].module(families.TINY | {"tie_word_embeddings": tied})
    numbers = sum(p.numel() for p in module.parameters())
    table = module.get_input_embeddings().weight.numel()
    assert families._weight_bytes(module) == 2 * (numbers if tied else numbers - table)
