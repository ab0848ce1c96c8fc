"""Rows of one or several sources (files, folders, the hub), as plain dicts that remember where they stand."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from tandem.data.files import read_file
from tandem.data.gym import gym_rows, is_gym
from tandem.data.sources import SUFFIXES, TYPES, is_local, is_pattern, parse_sources
from tandem.errors import UserError, first_line, kind_of, nearest
from tandem.hub import asking_hub

Row = dict[str, Any]
Origin = tuple[str, int]
"""A file (or hub split) and the line in it (the row, where there are no lines), from 1."""

SPLITS = ("train", "validation", "test")
"""Names that tell which files of a folder belong to which split, beside the name asked for."""
_LINED = (".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class Part:
    """What a dataset has of one source: its name, and how many rows."""

    name: str
    rows: int
    weight: Fraction | None = None


class Dataset:
    """A dataset in memory. ``dataset[i]`` is a plain dict, ``dataset.where(i)`` says where it was read.

    ``parts`` are the sources that its rows come from, one after the other.

    >>> Dataset([{"prompt": "2+2="}], source="my list").where(0)
    'my list row 1'
    """

    def __init__(
        self, rows: list[Row], *, source: str = "data", origins: list[Origin] | None = None, parts: Iterable[Part] = ()
    ) -> None:
        self.source = source
        self._rows = rows
        self._origins = origins if origins is not None else [(source, n) for n in range(1, len(rows) + 1)]
        self.parts = tuple(parts) or (Part(source, len(rows)),)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def where(self, index: int) -> str:
        """``FILE:LINE`` for JSON and CSV, ``FILE row N`` for what has no lines."""
        name, number = self._origins[index]
        return f"{name}:{number}" if name.endswith(_LINED) else f"{name} row {number}"

    def head(self, count: int) -> Dataset:
        """The first ``count`` rows. Of one source."""
        return Dataset(self._rows[:count], source=self.source, origins=self._origins[:count])

    def mapped(self, change: Callable[[Row], Row]) -> Dataset:
        """Each row as ``change`` makes it, at its place."""
        rows = []
        for index in range(len(self)):
            with self.at(index) as row:
                rows.append(change(row))
        return Dataset(rows, source=self.source, origins=self._origins, parts=self.parts)

    @contextmanager
    def at(self, index: int) -> Iterator[Row]:
        """Hands out row ``index``; a UserError raised meanwhile gets the row's place put in front."""
        try:
            yield self._rows[index]
        except UserError as error:
            raise UserError(f"{self.where(index)}: {error}") from error

    @staticmethod
    def joined(datasets: list[Dataset], weights: list[Fraction | None], *, source: str) -> Dataset:
        """The rows of several, one after the other."""
        return Dataset(
            [row for one in datasets for row in one._rows],
            source=source,
            origins=[origin for one in datasets for origin in one._origins],
            parts=[Part(one.source, len(one), weight) for one, weight in zip(datasets, weights, strict=True)],
        )


def load_rows(source: str, *, split: str = "train", max_samples: int | None = None) -> Dataset:
    """Reads ``source``: one of these, or several with commas between them, each with ``:WEIGHT`` behind it or none.

    - a .jsonl, .json, .csv, .parquet or .arrow file, or a glob of them: taken whole, whatever ``split`` says;
    - a folder written by ``datasets.save_to_disk``;
    - a folder of files: those of ``split`` by their names or by a folder with that name, or all where no name says;
    - ``json@FOLDER`` (csv, parquet, arrow): the files of one type in a folder;
    - ``reasoning-gym:NAME``, ``reasoning-gym:NAME?size=500&seed=1`` (``tandem.data.gym``);
    - a name on the Hugging Face hub, ``owner/name``, ``owner/name:config`` or ``owner/name@folder``.

    Of each at most ``max_samples`` rows, the first ones. Raises UserError for what is missing, unreadable, malformed or
    empty, and for weights that are none.
    """
    sources = parse_sources(source)
    read = [_read_source(one.name, split) for one in sources]
    if max_samples is not None:
        read = [rows.head(max_samples) for rows in read]
    return read[0] if len(read) == 1 else Dataset.joined(read, [one.weight for one in sources], source=source)


def _read_source(source: str, split: str) -> Dataset:
    if is_gym(source):
        rows = Dataset(gym_rows(source), source=source)
    elif (files := files_of(source, split)) is not None:
        rows = _read_files(files, source)
    else:
        name = source if Path(source).expanduser().is_dir() else f"{source}[{split}]"
        rows = Dataset(open_dataset(source, split).to_list(), source=name)
    if not len(rows):
        raise UserError(f"{source}: the dataset is empty; it needs at least one row")
    return rows


def files_of(source: str, split: str) -> list[Path] | None:
    """The files that a source names. None where it is a folder that ``datasets`` has saved, or a name on the hub.

    Raises UserError for what is missing.
    """
    path = Path(source).expanduser()
    kind, at, folder = source.partition("@")
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return None
    if path.is_dir():
        return _files_of_split(path, split, SUFFIXES)
    if path.is_file():
        return [path]
    if at and kind in TYPES:
        inside = Path(folder).expanduser()
        if not folder or not inside.is_dir():
            raise UserError(f"{source}: no such folder as {folder or 'nothing'}")
        return _files_of_split(inside, split, TYPES[kind])
    if at and "/" not in kind and is_local(folder):
        raise UserError(f"{source}: {kind!r} is no type of files; those are {', '.join(TYPES)}")
    if is_pattern(source):
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise UserError(f"{source}: no file matches")
        return found
    if is_local(source):
        if path.exists():
            raise UserError(f"{source}: a pipe or a device, and rows are read more than once; write them into a file")
        raise UserError(f"{source}: no such file{nearest(path)}")
    return None


def require_column(row: Row, column: str) -> None:
    """Raises UserError where the row lacks the column, and names those it has."""
    if row.get(column) is None:
        raise UserError(f"no column {column!r}; columns {there(row, [column])}")


def there(row: Row, wanted: Iterable[str]) -> str:
    """``present: 'promt'``, and which of the columns that are ``wanted`` one of these may be meant as."""
    found = [name for name, value in row.items() if value is not None]
    near = ((name, difflib.get_close_matches(name, found, n=1, cutoff=0.75)) for name in wanted)
    hint = next((f"; did you mean {name!r} by {alike[0]!r}?" for name, alike in near if alike), "")
    return f"present: {present(row)}{hint}"


def present(row: Row) -> str:
    """The columns that a row has something in, for messages."""
    return ", ".join(repr(name) for name, value in row.items() if value is not None) or "none"


def _files_of_split(folder: Path, split: str, suffixes: tuple[str, ...]) -> list[Path]:
    """A split's files: those in a folder of its name, else those whose names say so, or all where no name does."""
    if (folder / split).is_dir():
        folder = folder / split
        split = ""
    files = sorted(p for p in folder.iterdir() if p.suffix in suffixes)
    if not files:
        raise UserError(f"{folder}: the folder holds no {' or '.join(suffixes)} file")
    splits = {file: _split_of(file.name, split) for file in files}
    if not split or not any(splits.values()):
        return files
    named = [file for file in files if splits[file] == split]
    if not named:
        raise UserError(f"{folder}: no file for the split {split!r}; files present: {', '.join(p.name for p in files)}")
    return named


def _split_of(name: str, split: str) -> str:
    """The split that a file's name has as one of its words: the first of those; nothing where it has none."""
    return next((word for word in re.split(r"[^A-Za-z0-9]+", name) if word in (split, *SPLITS)), "")


def _read_files(files: list[Path], source: str) -> Dataset:
    rows: list[Row] = []
    origins: list[Origin] = []
    for file in files:
        if file.suffix not in SUFFIXES:
            raise UserError(f"{file}: a dataset file ends in one of {', '.join(SUFFIXES)}, not in {file.suffix!r}")
        for number, row in read_file(file):
            if not isinstance(row, dict):
                raise UserError(f"{file}:{number}: a row must be a JSON object, not {kind_of(row)}")
            rows.append(row)
            origins.append((str(file), number))
    return Dataset(rows, source=source, origins=origins)


def open_dataset(source: str, split: str) -> Any:
    """A dataset of the ``datasets`` library, with its tables memory-mapped: of an .arrow file, of a folder that it has
    saved, or of a name on the hub. Raises UserError where there is none."""
    import datasets

    path, out_of_reach = Path(source).expanduser(), ""
    try:
        if path.is_file():
            return datasets.Dataset.from_file(str(path))
        if path.is_dir():
            dataset = datasets.load_from_disk(str(path))
        else:
            named, _, folder = source.partition("@")
            name, _, config = named.partition(":")
            with asking_hub() as out_of_reach:
                return datasets.load_dataset(name, config or None, split=split, data_dir=folder or None)
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        what = (
            "not a readable saved dataset"
            if path.exists()
            else f"no such file, none in the hub's cache, and {out_of_reach}"
            if out_of_reach
            else f"no such file, and not loadable as a hub dataset (split {split!r})"
        )
        raise UserError(f"{source}: {what}: {first_line(error)}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"{source}: no split {split!r}; splits present: {', '.join(map(repr, dataset))}")
        return dataset[split]
    return dataset
