"""Files of JSON lines: appended to one line at a time, read back, and cut after a step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.errors import RunFailure, UserError


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line and hands it to the operating system. NaN and infinities, which JSON lacks, become null,
    and what JSON has no type for (a date, an image) its text.

    Raises RunFailure where the file cannot be written.
    """
    line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, default=str)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise RunFailure(
            f"{path}: cannot be written: {error.strerror}; put that right and go on with --resume"
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every record, in order; none where the file does not exist.

    A last line that a kill tore off is left out. Raises UserError naming any other line that is not a JSON object.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate([*lines, last] if last else lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number > len(lines):
                break
            raise UserError(f"{path}:{number}: not a JSON line: {error}; remove that line") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: not a JSON object; remove that line")
        records.append(record)
    return records


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a ``metrics.jsonl``, each with its ``step``; null is read as NaN."""
    return [{name: math.nan if value is None else value for name, value in r.items()} for r in read_lines(path)]


def keep_until(path: Path, step: int | None = None) -> None:
    """Drops a torn last line and, where ``step`` is given, the records of later steps. The file is never half there."""
    records = read_lines(path)
    kept = [r for r in records if step is None or r.get("step", step) <= step]
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept)
    if path.exists() and text.encode() != path.read_bytes():
        write_aside(path, text)


def write_aside(path: Path, text: str) -> None:
    """Writes a file in one rename: whoever reads the path sees the old text or the new one."""
    aside = path.with_name(f".{path.name}-partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
