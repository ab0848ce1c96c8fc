"""The documents say what is so: their command lines parse, their names exist, their tables are those of the project."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from helpers.commands import code_blocks, command_lines, parse

import tandem
from tandem.errors import UserError

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = [
    pytest.param(words, id=f"{document.name}:{' '.join(words)[:70]}")
    for document in DOCUMENTS
    if not document.name.startswith("from-")  # flags alone, without their values: test_migration_pages.py
    for words in command_lines(code_blocks(document.read_text()))
]


def without_config(words):
    """The line without the YAML file that only its reader has."""
    if "--config" not in words:
        return words
    at = words.index("--config")
    return words[:at] + words[at + 2 :]


@pytest.mark.parametrize("words", LINES)
def test_a_command_line_parses(words, monkeypatch, tmp_path):
    parse(without_config(words), monkeypatch, tmp_path)


def test_lines_are_found_where_they_stand():
    text = code_blocks("Say `tandem rm --help`.\n```\n$ tandem sft --model a \\\n   --steps 3   # why\n"
                       "torchrun -m tandem sft --lr 1    a remark\n```\n```python\ntandem x\n```\n")  # fmt: skip
    assert command_lines(text) == [
        ["sft", "--model", "a", "--steps", "3"], ["sft", "--lr", "1"], ["rm", "--help"],
    ]  # fmt: skip
    assert len(LINES) > 20
    # Flags are aligned after the short name there.
    assert ["rm", "--model"] in [line.values[0][:2] for line in LINES]


@pytest.mark.parametrize(
    ("line", "words"),
    [("sft --lerning-rate 1", "unknown flag"), ("grpo --placement.engine critic", "placement.engine"),
     ("launch", None), ("sfd --model a", None)],
)  # fmt: skip
def test_a_wrong_line_is_noticed(line, words, monkeypatch, tmp_path):
    with pytest.raises((UserError, AssertionError, pytest.fail.Exception), match=words):
        parse(line.split(), monkeypatch, tmp_path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_public_names_and_links_exist(document):
    text = document.read_text()
    for name in re.findall(r"(?<![\w./-])(?:tandem|td)\.([A-Z]\w+)", text):
        assert hasattr(tandem, name), f"tandem.{name}"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (document.parent / target).exists(), target


def test_the_table_of_rooms_is_the_allow_list():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    allowed: dict[str, set[str]] = {}
    for line in contract["ignore_imports"]:
        importer, imported = (side.removesuffix(".**").removeprefix("tandem.") for side in line.split(" -> "))
        # Everyone may import some modules, and the command line and assembly everything: the table says so in words.
        if importer not in ("tandem", "assembly", "cli", "__main__"):
            allowed.setdefault(importer, set()).add(imported)
    table = re.findall(r"^\| `([\w.]+)/?` \|.*\|([^|]*)\|$", (ROOT / "docs/architecture.md").read_text(), re.M)
    written = {
        room.removesuffix(".py"): set(filter(None, cell.strip().split(", "))) - {"types", "batch"}
        for room, cell in table
    }
    assert {room: rooms for room, rooms in written.items() if rooms - {"everything", "everything but cli"}} == allowed
    folders = {path.parent.name for path in (ROOT / "tandem").glob("*/__init__.py")} - {"assembly", "cli"}
    assert folders <= written.keys()
