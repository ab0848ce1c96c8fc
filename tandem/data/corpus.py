"""Text that is read as it is needed: files of any size as documents in shards, of which only one is open at a time."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from tandem.data.files import opened_parquet
from tandem.data.rows import Row, files_of, open_dataset, require_column
from tandem.data.sources import parse_sources
from tandem.errors import UserError, first_line, kind_of

SHARD_BYTES = 1 << 16
"""65,536 bytes of a .jsonl file are a shard: some ten thousand tokens, which stay in the order of the file."""
SHARD_ROWS = 64
"""Rows of a dataset that lies in memory-mapped tables, a shard."""
ANYWHERE = (".jsonl", ".parquet", ".arrow")
"""Endings of files that can be read from any place on."""


class Shards(ABC):
    """One file or dataset, in shards."""

    name: str
    shards: int
    fingerprint = ""
    """What tells its content apart, where it is no file."""

    @abstractmethod
    def rows(self, shard: int) -> Iterator[tuple[int, Row]]:
        """The rows of a shard, each with what ``where`` tells its place by."""

    def where(self, place: int) -> str:
        return f"{self.name} row {place}"


class Corpus:
    """The documents of ``--data``: strings in a column of its rows. Nothing is read before it is asked for.

    Raises UserError for what is missing, or cannot be read from any place on.
    """

    def __init__(self, source: str, *, split: str = "train", column: str = "text") -> None:
        self.source, self.column = source, column
        self.parts: list[Shards] = []
        for one in parse_sources(source):
            if one.weight is not None:
                raise UserError(f"{one.name}: text is read as one stream, so a weight has no effect; leave it out")
            files = files_of(one.name, split)
            self.parts += (
                [_Table(open_dataset(one.name, split), one.name, column)]
                if files is None
                else [_part(file, column) for file in files]
            )
        self._starts = list(accumulate((part.shards for part in self.parts), initial=0))

    @property
    def shards(self) -> int:
        return self._starts[-1]

    @property
    def bytes(self) -> int:
        """Bytes in the files; 0 for a dataset that is no file."""
        return sum(Path(part.name).stat().st_size for part in self.parts if Path(part.name).is_file())

    def documents(self, shard: int) -> Iterator[str]:
        """The texts of a shard, in order. Raises UserError, naming file and line, for a row that has none."""
        number = bisect_right(self._starts, shard) - 1
        part = self.parts[number]
        for place, row in part.rows(shard - self._starts[number]):
            try:
                require_column(row, self.column)
                text = row[self.column]
                if not isinstance(text, str):
                    raise UserError(f"column {self.column!r} must be a string, not {kind_of(text)}")
            except UserError as error:
                raise UserError(f"{part.where(place)}: {error}") from error
            yield text


def _part(file: Path, column: str) -> Shards:
    if file.suffix not in ANYWHERE:
        raise UserError(
            f"{file}: text is read as it is needed from {', '.join(ANYWHERE)} files, not from {file.suffix!r}; write "
            "one row a line, as .jsonl"
        )
    if file.suffix == ".jsonl":
        return _Lines(file)
    if file.suffix == ".parquet":
        return _RowGroups(file, column)
    return _Table(open_dataset(str(file), ""), str(file), column)


class _Lines(Shards):
    """A .jsonl file. A shard has the lines that begin in its stretch of bytes, so that nobody has to count lines."""

    def __init__(self, file: Path) -> None:
        self.name = str(file)
        try:
            self.shards = -(-file.stat().st_size // SHARD_BYTES)
            file.open("rb").close()
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
        if not self.shards:
            raise UserError(f"{file}: the dataset is empty; it needs at least one row")

    def rows(self, shard: int) -> Iterator[tuple[int, Row]]:
        start, end = shard * SHARD_BYTES, (shard + 1) * SHARD_BYTES
        try:
            with open(self.name, "rb") as file:
                if start:
                    file.seek(start - 1)
                    start += len(file.readline()) - 1
                while start < end and (line := file.readline()):
                    if line.strip():
                        yield start, self._row(line, start)
                    start += len(line)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {error.strerror}") from error

    def where(self, place: int) -> str:
        with open(self.name, "rb") as file:
            before = sum(file.read(min(1 << 20, place - at)).count(b"\n") for at in range(0, place, 1 << 20))
        return f"{self.name}:{before + 1}"

    def _row(self, line: bytes, start: int) -> Row:
        try:
            row = json.loads(line.decode("utf-8-sig" if not start else "utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(start)}: not UTF-8 (byte 0x{line[error.start]:02x})") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where(start)}: malformed JSON: {first_line(error)}") from error
        if not isinstance(row, dict):
            raise UserError(f"{self.where(start)}: a row must be a JSON object, not {kind_of(row)}")
        return row


class _RowGroups(Shards):
    """A .parquet file, a row group a shard, of which a few rows are read at a time."""

    def __init__(self, file: Path, column: str) -> None:
        self.name, self.column = str(file), column
        with opened_parquet(file) as opened:
            self.shards, names = opened.num_row_groups, opened.schema_arrow.names
        _require(names, column, self.name)

    def rows(self, shard: int) -> Iterator[tuple[int, Row]]:
        with opened_parquet(Path(self.name)) as opened:
            place = sum(opened.metadata.row_group(number).num_rows for number in range(shard))
            for batch in opened.iter_batches(SHARD_ROWS, row_groups=[shard], columns=[self.column]):
                for row in batch.to_pylist():
                    place += 1
                    yield place, row


class _Table(Shards):
    """A dataset of the ``datasets`` library, whose tables are memory-mapped."""

    def __init__(self, dataset: Any, name: str, column: str) -> None:
        _require(dataset.column_names, column, name)
        self.name, self.dataset = name, dataset.select_columns([column])
        self.shards, self.fingerprint = -(-len(dataset) // SHARD_ROWS), str(dataset._fingerprint)

    def rows(self, shard: int) -> Iterator[tuple[int, Row]]:
        first = shard * SHARD_ROWS
        for place in range(first, min(first + SHARD_ROWS, len(self.dataset))):
            yield place + 1, self.dataset[place]


def _require(names: list[str], column: str, where: str) -> None:
    if column not in names:
        raise UserError(f"{where}: no column {column!r}; columns present: {', '.join(map(repr, names)) or 'none'}")
