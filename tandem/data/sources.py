"""What ``--data`` names, one source of rows or several with their weights, and what their columns are called.

Nothing is read here.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from string import Formatter

from tandem.data.gym import is_gym
from tandem.errors import UserError
from tandem.keys import A_TEXT, Checked, must, needs

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
"""Endings of files of rows."""
TYPES = {"json": (".jsonl", ".json"), "csv": (".csv",), "parquet": (".parquet",), "arrow": (".arrow",)}
"""What stands before the ``@`` of ``json@FOLDER``, and the files of the folder that it means."""


@dataclass(frozen=True)
class DataSource:
    """One of the sources of a dataset, and its weight against the others."""

    name: str
    weight: Fraction | None = None

    @property
    def has_splits(self) -> bool:
        """Whether it may have splits: a file has none, nor have several that a pattern names."""
        return not (self.name.endswith(SUFFIXES) or is_pattern(self.name) or is_gym(self.name))


def parse_sources(text: str) -> list[DataSource]:
    """The sources that ``--data`` names. Raises UserError for a weight that is none, or that some have and some not.

    What exists as a file or folder is one source, whatever its name has in it.
    """
    names = [text] if _exists(text) else [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"{text}: a comma with no source beside it")
    sources = [_parse_source(name) for name in names]
    weighed = [one for one in sources if one.weight is not None]
    if weighed and len(sources) == 1 and not is_local(sources[0].name):
        return [DataSource(text)]  # a dataset on the hub with a config that is a number
    if weighed and len(sources) == 1:
        raise UserError(f"{text}: the weight of the only source has no effect; leave it out")
    if weighed and len(weighed) < len(sources):
        bare = next(one.name for one in sources if one.weight is None)
        raise UserError(f"{bare}: the other sources have weights and it has none; give all of them one, or none")
    meant: dict[str, str] = {}
    for one in sources:
        if (before := meant.get(_meant(one.name))) is not None:
            again = one.name if before == one.name else f"{before} and {one.name}"
            raise UserError(f"{again}: named twice among the sources; give it a larger weight instead")
        meant[_meant(one.name)] = one.name
    return sources


def unweighted_sources(key: str, text: str) -> list[DataSource]:
    """As ``parse_sources``, of rows that are all read. Raises UserError, which names the key, also for a weight."""
    try:
        sources = parse_sources(text)
        for one in sources:
            if one.weight is not None:
                raise UserError(f"{one.name} has a weight, and here each of its rows is read once; leave it out")
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    return sources


def _parse_source(text: str) -> DataSource:
    name, colon, weight = text.rpartition(":")
    drive = re.fullmatch("[A-Za-z]", name) is not None and weight.startswith(("\\", "/"))
    if not colon or drive or _exists(text):
        return DataSource(text)
    try:
        number = float(weight)
    except ValueError:
        if not is_local(name):
            return DataSource(text)  # a dataset on the hub with its config
        raise UserError(f"{text}: the weight {weight!r} is no number") from None
    if not 0 < number < math.inf:
        raise UserError(f"{text}: a weight must be a finite number above 0, not {weight}")
    return DataSource(name, Fraction(weight))


def is_pattern(name: str) -> bool:
    """Whether a name stands for the files that match it."""
    return any(character in name for character in "*?[")


def is_local(name: str) -> bool:
    """Whether a name is meant as a file or a folder here, be it there or not."""
    local = Path(name).suffix in SUFFIXES or name.startswith((".", "/", "~")) or is_pattern(name) or _exists(name)
    if local or name.count("/") > 1 or name.partition("@")[0] in TYPES:
        return True
    return re.match(r"[A-Za-z]:[\\/]", name) is not None


def _meant(name: str) -> str:
    """One name for all the names of a file or folder; of anything else its own."""
    kind, at, folder = name.rpartition("@")
    if at and kind in TYPES:
        return kind + at + os.path.realpath(os.path.expanduser(folder))
    return os.path.realpath(os.path.expanduser(name)) if is_local(name) else name


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))


NAMES = {
    "input_key": "prompt",
    "output_key": "completion",
    "chosen_key": "chosen",
    "rejected_key": "rejected",
    "label_key": "label",
}
"""The column that each key names another one for."""
A_COLUMN = must("the name of a column", bool)
A_FRAME = must("a text with one {}", lambda text: text.count("{}") == 1)


@dataclass(frozen=True, kw_only=True)
class Columns(Checked):
    """How a dataset's rows become those of a kind (``formats.COLUMNS``). None: as they are."""

    input_key: str | None = field(default=None, metadata=A_COLUMN)
    """Column of the prompt; of demonstrations without a completion, of the messages or the text. None: as TRL names
    them."""
    output_key: str | None = field(
        default=None, metadata=A_COLUMN | needs(("part", "demonstrations", "unpaired", "steps"))
    )
    """Column of the completion, or of the steps. None: 'completion', 'completions'."""
    chosen_key: str | None = field(default=None, metadata=A_COLUMN | needs(("part", "preferences", "unpaired")))
    """Column of the better answer. None: 'chosen'."""
    rejected_key: str | None = field(default=None, metadata=A_COLUMN | needs(("part", "preferences", "unpaired")))
    """Column of the worse answer. None: 'rejected'."""
    label_key: str | None = field(default=None, metadata=A_COLUMN | needs(("part", "unpaired", "steps", "samples")))
    """Column of the label: what a method learns from, or, for samples, what reward functions get as 'label'. None:
    'label', and 'labels' of steps."""
    condition: str | None = field(default=None, metadata=A_TEXT)
    """Put behind each prompt: a text with columns of the row in braces, as '\\nReward: {reward:.1f}' (conditional SFT).
    \\n is a line break."""
    input_template: str | None = field(default=None, metadata=A_FRAME)
    """Put around a prompt that is text, as 'User: {}\\nAssistant: '. \\n is a line break."""
    apply_chat_template: bool = False
    """Make turns of texts: the user's of a prompt, the assistant's of an answer."""
    system: str | None = field(default=None, metadata=A_TEXT)
    """System message of the conversations that have none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition is not None:
            parse_condition(self.condition)


def parse_condition(text: str) -> list[tuple[str, str | None, str]]:
    """The template as (text, column or None, format) one after the other. Raises UserError where it is none."""
    try:
        parts = list(Formatter().parse(text.replace("\\n", "\n").replace("\\t", "\t")))
    except ValueError as error:
        raise UserError(f"condition: {text!r} is no template: {error}") from error
    for _, column, spec, conversion in parts:
        if column is not None and (not column.isidentifier() or conversion or "{" in (spec or "")):
            raise UserError(f"condition: {{{column}}} names no column; give a column of the rows, as in {{reward:.1f}}")
    return [(before, column, spec or "") for before, column, spec, _ in parts]
