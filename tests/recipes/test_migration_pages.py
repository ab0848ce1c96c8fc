"""docs/from-*.md: each flag of theirs stands there, and each flag of ours that stands there is one of its command."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from helpers.commands import config_class

from tandem.cli.main import COMMANDS
from tandem.config import _keys_of
from tandem.flags import flag_of

ROOT = Path(__file__).parents[2]
THEIRS = json.loads(Path(__file__).with_name("their_flags.json").read_text())
"""Read off the sources of the versions that it names with a script: ``add_argument`` calls, fields of dataclasses."""
PAGES = {
    "from-openrlhf.md": {flag for flags in THEIRS["openrlhf"]["flags"].values() for flag in flags},
    "from-trl.md": {name for fields in THEIRS["trl"]["fields"].values() for name in fields},
}


@cache
def flags(command: str) -> set[str]:
    """Those of a command of ours; of a true-or-false key its negation, too."""
    keys = _keys_of(config_class(command))
    negated = {f"--no-{flag_of(name)[2:]}" for name, key in keys.items() if key.annotation is bool}
    return {flag_of(name) for name in keys} | negated


def rows(text: str):
    """(commands of the heading, cells) of each row of each table below a heading that names commands."""
    commands: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            commands = re.findall(r"`([\w-]+)`", line)
        elif line.startswith("|") and commands and not set(line) <= set("|- "):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            if cells[0] != "theirs":
                yield commands, cells


def unknown(commands: list[str], cells: list[str]) -> list[str]:
    """Commands and flags of ours in a row that do not exist."""
    found = []
    for span in re.findall(r"`([^`]+)`", " ".join(cells[1:])):
        words = span.split()
        if words[0] == "tandem" and words[1:]:
            named = [words[1]]
            found += [span] if words[1] not in COMMANDS else []
        else:
            named = commands
        given = [word for word in words if word.startswith("--")]
        found += [span for name in named if name in COMMANDS for flag in given if flag not in flags(name)]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_each_of_their_flags_has_a_row(page):
    lines = list(rows((ROOT / "docs" / page).read_text()))
    named = [name for _, cells in lines for name in re.findall(r"`([^`]+)`", cells[0])]
    assert PAGES[page] - set(named) == set()
    assert set(named) - PAGES[page] == set()
    assert all(len(cells) in (2, 3) and cells[1] for _, cells in lines)


@pytest.mark.parametrize("page", PAGES)
def test_each_flag_of_ours_exists_in_the_command_it_names(page):
    text = (ROOT / "docs" / page).read_text()
    wrong = [(cells[0], span) for commands, cells in rows(text) for span in unknown(commands, cells)]
    assert wrong == []
    assert set(re.findall(r"`tandem ([a-z][\w-]*)", text)) <= COMMANDS.keys()
    assert {command for commands, _ in rows(text) for command in commands} <= COMMANDS.keys()


def test_a_wrong_row_is_noticed():
    assert unknown(["sft", "rm"], ["`a`", "`--batch-size 3`, `tandem ppo --gamma`"]) == []
    assert unknown(["sft", "ppo"], ["`a`", "`--gamma`"]) == ["--gamma"]
    assert unknown(["sft"], ["`a`", "`tandem ppq --gamma`"]) == ["tandem ppq --gamma"]
    assert unknown(["sft"], ["`a`", "", "see `tandem sft --gamma`"]) == ["tandem sft --gamma"]
