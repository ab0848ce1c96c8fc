"""The commands of README.md and docs/methods.md run as printed, in a copy of recipes/, for 2 steps of a small model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import code_blocks, command_lines
from helpers.models import make_module, make_tokenizer
from helpers.undrawn import draw_nothing

from tandem.cli.main import main
from tandem.methods.table import SAMPLES

ROOT = Path(__file__).parents[2]
README, PAGE = (command_lines(code_blocks((ROOT / name).read_text())) for name in ("README.md", "docs/methods.md"))
RUNS = [words for words in README if "--steps" in words]
GRADED = "def graded(completion_ids, **columns):\n    return [sum(ids) % 97 / 97 for ids in completion_ids]\n"
SAMPLED = ("generate", "sample")
ROWS = 24
SHORT = {"--max-new-tokens": "4", "--prompts-per-step": "2", "--samples-per-prompt": "2"}
SMALL = SHORT | {"--steps": "2", "--overlong-length": "4", "--overlong-buffer": "2"}
SMALL |= {"--batch-size": "4", "--max-length": "64"}


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A copy of the folder, in which a hub's models are a small one on the disk, and files have their first rows."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path / "recipes")
    for file in Path().glob("*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:ROWS]))
    module = make_module("llama")
    module.config.max_position_embeddings = 1024  # rotary ones, of which there is no table
    module.save_pretrained("base")
    make_tokenizer().save_pretrained("base")
    Path("graded.py").write_text(GRADED)
    for corpus in ("corpus", "heldout"):
        Path(corpus).mkdir()
        Path(corpus, "text.jsonl").write_text(json.dumps({"text": "plain text, " * 40}) + "\n")
    row = {"input": "Add 1 to 2. It is 3. ки\nTwice that is 7. ки", "label": ["+", "-"]}
    Path("shepherd.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path / "recipes"


def shortened(words):
    """The line with a local model, few steps and small ones.

    A model with random weights answers nothing right, and DAPO ends where all samples of a prompt are equally wrong.
    """
    changed = ["base" if word.startswith("Qwen/") else word for word in words]
    if words[0] == "dapo":
        changed[changed.index("check.py:right")] = "graded.py:graded"
    changed = [SMALL.get(before, word) for before, word in zip(["", *changed], changed, strict=False)]
    if words[0] in SAMPLED:
        more = {name: value for name, value in SHORT.items() if name != "--prompts-per-step"}
    else:
        more = {"--steps": "2", "--model": "base"} | (SHORT if words[0] in SAMPLES else {"--batch-size": "4"})
    return changed + [word for flag, value in more.items() if flag not in changed for word in (flag, value)]


@pytest.mark.draws
def test_each_method_of_the_readme_runs_after_the_one_before(recipes, monkeypatch):
    assert [words[0] for words in RUNS] == ["sft", "rm", "ppo", "grpo"]
    for words in [*RUNS, ["grpo", "--config", "grpo.yaml", "--out", "runs/from-yaml"]]:
        assert main(shortened(words)) == 0
        out = Path(words[words.index("--out") + 1])
        assert (out / "model/config.json").is_file()
        assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    # Drawing takes a third of such a run; what there is to draw is looked at in all of them.
    draw_nothing(monkeypatch)
    for words in PAGE:
        if "--steps" in words:
            assert main(shortened(words)) == 0
            out = Path(words[words.index("--out") + 1])
            assert (out / "model/config.json").is_file()
            assert (out / "curves.png").is_file()
        elif words[0] in SAMPLED and "--out" in words:
            assert main(shortened(words)) == 0
            assert Path(words[words.index("--out") + 1], "samples.jsonl").is_file()
    again = [*README[[w[:2] for w in README].index(["ppo", "--config"])]]
    assert main(again) == 0
    first, second = (
        [json.loads(line) for line in (recipes / "runs" / name / "metrics.jsonl").open()] for name in ("ppo", "again")
    )
    assert [line["reward"] for line in first] == [line["reward"] for line in second]


def test_files_say_what_readme_says_of_them():
    rows = {name: [json.loads(line) for line in (ROOT / "recipes" / f"{name}.jsonl").open()]
            for name in ("demos", "pairs", "labelled", "prompts", "heldout")}  # fmt: skip
    assert {name: len(lines) for name, lines in rows.items()} == {
        "demos": 256, "pairs": 256, "labelled": 256, "prompts": 256, "heldout": 64,
    }  # fmt: skip
    prompts = [row["prompt"] for lines in rows.values() for row in lines]
    assert len(set(prompts)) == len(prompts)
    assert all(row["chosen"] != row["rejected"] for row in rows["pairs"])
