"""Finds the ``tandem`` command lines of documents and scripts, and parses each as the command itself would."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest

from tandem.cli import launch
from tandem.cli.main import COMMANDS
from tandem.config import _keys_of, load_config
from tandem.errors import UserError

ENDS = {"&&", "||", "|", ";", "&", ">", "2>&1"}


def command_lines(text: str) -> list[list[str]]:
    """The words after ``tandem`` of every command line, continued lines joined; what follows two spaces is a remark."""
    found = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if match := re.search(r"(?:^|[-\s$]\s?)tandem (?=[a-z][a-z-]*(?:\s|$))(.*)", line):
            # Two spaces before a flag only align the commands of a block.
            said = re.split(r"\s{2,}(?=[^\s-])|\s+#\s", match[1].rstrip())[0]
            words = shlex.split(said)
            ends = [i for i, word in enumerate(words) if word in ENDS]
            found.append(words[: ends[0]] if ends else words)
    return found


def code_blocks(markdown: str) -> str:
    """The fenced blocks that are no Python, and every `tandem ...` in running text, a line each."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", markdown, re.S | re.M)
    inline = re.findall(
        r"`((?:torchrun [^`]*-m )?tandem [^`]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.S | re.M)
    )
    return "\n".join(
        [block for language, block in blocks if language not in ("python", "py")]
        + [" ".join(i.split()) for i in inline]
    )


def config_class(command: str) -> Any:
    """The config that a command loads."""
    return COMMANDS[command].config_class(command)[0]


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch, folder: Any) -> None:
    """Raises where a command line is not one. A document may leave out what a real run must be given."""
    command, *argv = words
    assert command in COMMANDS, f"no command {command!r}"
    if command == "launch":
        # In a folder without the script its flags are read, and then it says that the script is not there.
        monkeypatch.chdir(folder)
        with pytest.raises(UserError, match="no file"):
            launch.run(argv)
        return
    if command == "replay" and argv and not argv[0].startswith("-"):
        # The run that a document names, as one of GRPO.
        argv[0] = str(folder)
        (folder / "run.json").write_text(json.dumps({"id": "", "method": "GRPO", "seed": 0, "inputs": {}}))
        (folder / "config.yaml").write_text("out: o\nsteps: 1\nmodel: m\ndata: d\nreward: [r.py:f]\n")
    if "--help" in argv:
        with pytest.raises(SystemExit):
            COMMANDS[command].read(command, argv)
        return
    cls, argv = COMMANDS[command].config_class(command, argv)
    load_config(cls, [*placeholders(cls, argv), *argv])


def placeholders(cls: Any, argv: list[str]) -> list[str]:
    """Values for required keys, for a line that names a config file or shows one key only."""
    keys = _keys_of(cls)
    given = {name: name for name, key in keys.items() if key.required} | {"steps": "1", "reward": "r.py:f"}
    flags = {word.partition("=")[0] for word in argv}
    if "--epochs" in flags:
        del given["steps"]
    return [w for name, v in given.items() if name in keys and f"--{name}" not in flags for w in (f"--{name}", v)]
