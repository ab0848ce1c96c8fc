"""Files of rows, by their kind: each read into rows, and the line (or row) where each begins."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tandem.errors import UserError, first_line

_GAP = re.compile(r"\s*")


def read_file(file: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a file, each with its line from 1 (its number, where a file has no lines).

    Raises UserError, with file and line, for what is unreadable or malformed.
    """
    return READERS[file.suffix](file)


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _decode(data: bytes, file: Path, number: int = 1) -> str:
    try:
        return data.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        raise UserError(f"{file}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8") from error


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    for number, data in enumerate(_read_bytes(file).split(b"\n"), start=1):
        line = _decode(data, file, number)
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: malformed JSON: {_json_fault(error)}") from error


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    """The elements of one array, or any number of values one after the other, each with the line it starts on."""
    text = _decode(_read_bytes(file), file)
    decoder = json.JSONDecoder()

    def skip_gap(start: int) -> int:
        match = _GAP.match(text, start)
        return match.end() if match else start

    position = skip_gap(0)
    array = text.startswith("[", position)
    position = skip_gap(position + array)
    line, counted = 1, 0
    try:
        while position < len(text) and not (array and text[position] == "]"):
            line, counted = line + text.count("\n", counted, position), position
            value, position = decoder.raw_decode(text, position)
            yield line, value
            position = skip_gap(position)
            if array and text.startswith(",", position):
                position = skip_gap(position + 1)
            elif array and not text.startswith("]", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        if array and skip_gap(position + 1) < len(text):
            raise json.JSONDecodeError("Extra data after the array", text, position + 1)
    except (ValueError, RecursionError) as error:
        at = error.lineno if isinstance(error, json.JSONDecodeError) else line
        raise UserError(f"{file}:{at}: malformed JSON: {_json_fault(error)}") from error


def _json_fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else first_line(error)


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    """Rows of text under the names in the first line; what would be a number elsewhere stays as it is written."""
    before = csv.field_size_limit(2**31 - 1)  # texts are longer than the 131072 characters it allows
    try:
        yield from _csv_rows(file, csv.reader(io.StringIO(_decode(_read_bytes(file), file), newline=""), strict=True))
    finally:
        csv.field_size_limit(before)


def _csv_rows(file: Path, reader: Any) -> Iterator[tuple[int, Any]]:
    names: list[str] = []
    begins = 1
    try:
        for values in reader:
            if not names:
                names = values
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise UserError(f"{file}:{begins}: the column {twice[0]!r} is named twice")
            elif values:
                if len(values) != len(names):
                    raise UserError(
                        f"{file}:{begins}: {len(values)} values for the {len(names)} columns of the first line; quote "
                        "a value that holds a comma"
                    )
                yield begins, dict(zip(names, values, strict=True))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}:{begins}: malformed CSV: {error}") from error


def _read_arrow(file: Path) -> Iterator[tuple[int, Any]]:
    import datasets
    import pyarrow

    try:
        rows = datasets.Dataset.from_file(str(file)).to_list()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable arrow file: {first_line(error)}") from error
    yield from enumerate(rows, start=1)


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    with opened_parquet(file) as opened:
        table = opened.read()
    yield from enumerate(table.to_pylist(), start=1)


@contextmanager
def opened_parquet(file: Path) -> Iterator[Any]:
    """A .parquet file (``pyarrow.parquet.ParquetFile``). Raises UserError for what cannot be read of it."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            yield opened
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file: {first_line(error)}") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".arrow": _read_arrow,
}
"""How a file with each suffix is read."""
