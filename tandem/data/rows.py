"""Dataset rows from local files or the hub, as plain dicts that remember where they stand."""

from __future__ import annotations

import difflib
import glob
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tandem.errors import UserError, first_line

Row = dict[str, Any]
Place = tuple[str, int]
"""A file (or hub split) and the line in it (the row, where there are no lines), from 1."""

_SUFFIXES = (".jsonl", ".json", ".parquet")
_GAP = re.compile(r"\s*")


class Dataset:
    """A dataset in memory. ``dataset[i]`` is a plain dict, ``dataset.where(i)`` says where it was read.

    >>> Dataset([{"prompt": "2+2="}], source="my list").where(0)
    'my list row 1'
    """

    def __init__(self, rows: list[Row], *, source: str = "data", places: list[Place] | None = None) -> None:
        self.source = source
        self._rows = rows
        self._places = places if places is not None else [(source, n) for n in range(1, len(rows) + 1)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def where(self, index: int) -> str:
        """``FILE:LINE`` for JSON, ``FILE row N`` for what has no lines."""
        name, number = self._places[index]
        return f"{name}:{number}" if name.endswith((".jsonl", ".json")) else f"{name} row {number}"

    def select(self, indices: Iterable[int]) -> Dataset:
        """The rows at these indices, which keep their places."""
        chosen = list(indices)
        return Dataset([self._rows[i] for i in chosen], source=self.source, places=[self._places[i] for i in chosen])

    @contextmanager
    def at(self, index: int) -> Iterator[Row]:
        """Hands out row ``index``; a UserError raised meanwhile gets the row's place put in front."""
        try:
            yield self._rows[index]
        except UserError as error:
            raise UserError(f"{self.where(index)}: {error}") from error


def load_rows(source: str, *, split: str = "train") -> Dataset:
    """Reads ``source``, the first of these that it is.

    - a .jsonl, .json or .parquet file, or a glob of them: taken whole, whatever ``split`` says;
    - a folder written by ``datasets.save_to_disk``;
    - a folder of files: those whose names begin with ``split``, or all where no name begins with a split;
    - a name on the Hugging Face hub, ``owner/name`` or ``owner/name:config``.

    Raises UserError for what is missing, unreadable, malformed or empty.
    """
    path = Path(source).expanduser()
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        rows = _read_saved_dataset(path, split)
    elif path.is_dir():
        rows = _read_files(_files_of_split(path, split), source)
    elif path.is_file():
        rows = _read_files([path], source)
    elif any(character in source for character in "*?["):
        rows = _read_files([Path(p) for p in sorted(glob.glob(str(path), recursive=True))], source)
    elif path.suffix in _SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such file{_nearest_file(path)}")
    else:
        rows = _read_hub(source, split)
    if not len(rows):
        raise UserError(f"{source}: the dataset is empty; it needs at least one row")
    return rows


def require_column(row: Row, column: str) -> None:
    """Raises UserError where the row lacks the column, and names those it has."""
    if row.get(column) is None:
        present = ", ".join(repr(name) for name, value in row.items() if value is not None)
        raise UserError(f"no column {column!r}; columns present: {present or 'none'}")


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _files_of_split(folder: Path, split: str) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES)
    if not files:
        raise UserError(f"{folder}: the folder holds no .jsonl, .json or .parquet file")
    named = [p for p in files if _begins_with_split(p, split)]
    if named:
        return named
    if any(_begins_with_split(p, name) for p in files for name in ("train", "validation", "test")):
        raise UserError(f"{folder}: no file for the split {split!r}; files present: {', '.join(p.name for p in files)}")
    return files


def _begins_with_split(file: Path, split: str) -> bool:
    return re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", file.name) is not None


def _read_files(files: list[Path], source: str) -> Dataset:
    if not files:
        raise UserError(f"{source}: no file matches")
    rows: list[Row] = []
    places: list[Place] = []
    for file in files:
        if file.suffix not in _SUFFIXES:
            raise UserError(f"{file}: a dataset file ends in .jsonl, .json or .parquet, not in {file.suffix!r}")
        readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
        for number, row in readers[file.suffix](file):
            if not isinstance(row, dict):
                raise UserError(f"{file}:{number}: a row must be a JSON object, not a {type(row).__name__}")
            rows.append(row)
            places.append((str(file), number))
    return Dataset(rows, source=source, places=places)


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
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                at = error.lineno if isinstance(error, json.JSONDecodeError) else line
                raise UserError(f"{file}:{at}: malformed JSON: {_json_fault(error)}") from error
            yield line, value
            position = skip_gap(position)
            if array and text.startswith(",", position):
                position = skip_gap(position + 1)
            elif array and not text.startswith("]", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        if array and skip_gap(position + 1) < len(text):
            raise json.JSONDecodeError("Extra data after the array", text, position + 1)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: malformed JSON: {_json_fault(error)}") from error


def _json_fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else first_line(error)


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file: {first_line(error)}") from error
    yield from enumerate(table.to_pylist(), start=1)


def _read_saved_dataset(folder: Path, split: str) -> Dataset:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a readable saved dataset: {first_line(error)}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"{folder}: no split {split!r}; splits present: {', '.join(map(repr, dataset))}")
        dataset = dataset[split]
    return Dataset(dataset.to_list(), source=str(folder))


def _read_hub(source: str, split: str) -> Dataset:
    import datasets

    name, _, config = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{source}: no such file, and not loadable as a hub dataset (split {split!r}): {first_line(error)}"
        ) from error
    return Dataset(dataset.to_list(), source=f"{source}[{split}]")
