"""Files of JSON lines: appended to a few lines at a time, read back, and cut after a step or after a whole item."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tandem.errors import UserError
from tandem.whole import writing


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """``append_lines`` of one record."""
    append_lines(path, [record])


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds a line for each record and hands them to the operating system.

    NaN and infinities, which JSON lacks, become null, and what JSON has no type for (a date, an image) its text.
    Raises DiskFailure where the file cannot be written.
    """
    text = "".join(map(json_line, records))
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def json_line(record: Mapping[str, Any]) -> str:
    """The record as ``append_lines`` writes it. Half a surrogate pair, which UTF-8 lacks, is escaped as JSON does."""
    text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, default=str)
    return text.encode(errors="backslashreplace").decode() + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """``iterate_lines``, all of them."""
    return list(iterate_lines(path))


def iterate_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every record, in order; none where the file does not exist.

    A last line that a kill tore off is left out. Raises UserError naming any other line that is not a JSON object.
    """
    if path.exists():
        with path.open("rb") as file:
            yield from (record for record, _ in _records(file, path))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a ``metrics.jsonl``, each with its ``step``; null is read as NaN."""
    return [{name: math.nan if value is None else value for name, value in r.items()} for r in read_lines(path)]


def keep_until(path: Path, step: int | None = None, *, held_out: int | None = None) -> None:
    """Cuts off a torn last line and, where ``step`` is given, everything from the first record of a later step on.

    ``held_out``: the last step of which held-out records stay, where that is another one. Reads a line at a time: a
    file may be larger than memory.
    """
    if not path.exists():
        return
    end, whole = 0, True
    with path.open("rb+") as file:
        for record, line in _records(file, path):
            last = held_out if held_out is not None and record.get("held_out") else step
            if last is not None and record.get("step", last) > last:
                break
            end, whole = end + len(line), line.endswith(b"\n")
        file.truncate(end)
        if not whole:
            file.seek(end)
            file.write(b"\n")


def _records(file: IO[bytes], path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each record with its line, but for a last one that is torn. Raises UserError for a line that is no record."""
    for number, line in enumerate(file, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if not line.endswith(b"\n"):
                return
            raise UserError(f"{path}:{number}: not a JSON line: {error}; remove that line") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: not a JSON object; remove that line")
        yield record, line


def whole_lots(path: Path, ends: Seq[int]) -> tuple[int, int]:
    """How many lots of lines stand whole in a file, and how many bytes they have. ``ends``: lines after each of all."""
    if not path.exists():
        return 0, 0
    with path.open("rb") as file:
        lots = bisect_right(ends, sum(line.endswith(b"\n") for line in file))
        file.seek(0)
        return lots, sum(map(len, islice(file, ends[lots - 1]))) if lots else 0


def keep_lots(path: Path, ends: Seq[int], key: str, last: Seq[Any]) -> int:
    """Cuts off what a kill has torn; the number of lots that stay. The last line of each has its ``last`` as ``key``.

    Raises UserError where the last line that stays is another one.
    """
    lots, size = whole_lots(path, ends)
    if not lots:
        path.unlink(missing_ok=True)
        return 0
    line = ends[lots - 1]
    with path.open("rb+") as file:
        try:
            found = json.loads(next(islice(file, line - 1, None))).get(key)
        except (ValueError, AttributeError):
            found = None
        if found != last[lots - 1]:
            raise UserError(f"{path}:{line}: not the row that was written there; begin again with --overwrite")
        file.truncate(size)
    return lots


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
