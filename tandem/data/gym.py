"""Tasks of reasoning-gym as rows: each with its entry, which their own checker reads (``--reward reasoning-gym``)."""

from __future__ import annotations

import difflib
from typing import Any
from urllib.parse import parse_qs

from tandem.errors import UserError, first_line
from tandem.lazy import extra

PREFIX = "reasoning-gym:"
SIZE, SEED = 1000, 0
"""1000 rows drawn from seed 0, unless the source says otherwise."""


def is_gym(source: str) -> bool:
    """Whether a source names tasks of reasoning-gym."""
    return source.startswith(PREFIX)


def gym_rows(source: str) -> list[dict[str, Any]]:
    """``reasoning-gym:NAME`` or ``reasoning-gym:NAME?size=500&seed=1`` as rows: prompt, task and entry.

    Raises UserError where there is no such task, an argument is none of its config's, or the package is missing.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    given = parse_qs(query, keep_blank_values=True)
    reasoning_gym = extra("reasoning_gym", f"{source}: the tasks are those", "envs")
    if name not in (tasks := reasoning_gym.factory.DATASETS):
        near = difflib.get_close_matches(name, tasks, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{source}: reasoning-gym has no task {name!r}{hint}")
    try:
        options = {key: int(values[-1]) for key, values in ({"size": [SIZE], "seed": [SEED]} | given).items()}
        entries = list(reasoning_gym.create_dataset(name, **options))
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{source}: {first_line(error)}; arguments are whole numbers of the task's config") from error
    return [{"prompt": entry["question"], "task": name, "entry": entry} for entry in entries]
