"""Files of texts to Arrow tables: ``.jsonl``, ``.csv``, ``.tsv`` (each also ``.gz``) and ``.parquet``.

Nothing is guessed: a cell of a CSV file is the text that stands there, so ``1e5``, ``NA`` and ``null`` stay texts. Rows
are checked as they are read, chunk by chunk, because only then can an error name the line; at no time do more than
`CHUNK_ROWS` rows exist as Python objects. A file is read whole (`read_file`), or a chunk at a time (`read_chunks`).
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gist_fast.data.column_checks import Column, as_number, check_table, wrong_value
from gist_fast.runtime.errors import InputError, first_line, nearest_file, shown

CHUNK_ROWS = 8192
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
MAX_CELL = 2**31 - 1

Choose = Callable[[list[str]], Sequence[Column]]
"""From the names that a file has to the columns that are wanted; raises `InputError` where it lacks one."""


def suffix_of(path: Path | str) -> str | None:
    """The suffix in `SUFFIXES` that `path` ends with, or None."""
    name = str(path).lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)


def read_file(path: Path, choose: Choose) -> pa.Table:
    """The chosen columns of a file, each value checked.

    Raises:
        InputError: naming the file, and the row (the first is 1), line and column where there is one.
    """
    return pa.concat_tables(read_chunks(path, choose))


def read_chunks(path: Path, choose: Choose) -> Iterator[pa.Table]:
    """The same, a chunk of at most `CHUNK_ROWS` rows at a time, all of one schema; at least one row in all.

    Raises:
        InputError: as `read_file`, when the wrong row is met.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise InputError(f"{path}: unknown kind of file; it must end in one of {', '.join(SUFFIXES)}.")
    if not path.exists():
        raise InputError(f"{path}: no such file{_like_it(path)}.")
    if not path.is_file():
        raise InputError(f"{path}: is not a file.")
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path, choose)
            return
        with gzip.open(path, "rb") if suffix.endswith(".gz") else path.open("rb") as stream:
            if suffix.startswith(".jsonl"):
                yield from _read_jsonl(path, stream, choose)
            else:
                yield from _read_delimited(path, stream, choose, "\t" if suffix.startswith(".tsv") else ",")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file ({first_line(error)}); write it again.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or first_line(error)}).") from error


def _read_parquet(path: Path, choose: Choose) -> Iterator[pa.Table]:
    import pyarrow.parquet as pq

    first_row, widths = 1, dict[str, int]()
    try:
        with pq.ParquetFile(path) as file:
            columns = choose(_distinct(path, list(file.schema_arrow.names)))
            for batch in file.iter_batches(CHUNK_ROWS, columns=[column.source for column in columns]):
                table = check_table(pa.Table.from_batches([batch]), columns, str(path), first_row, widths)
                first_row += table.num_rows
                yield table
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({first_line(error)}).") from error
    if first_row == 1:
        raise _empty(path)


@dataclass
class _Chunks:
    """Rows gathered into Arrow arrays, a chunk at a time."""

    path: Path
    columns: Sequence[Column]

    def __post_init__(self) -> None:
        self.rows = 0
        self.widths: dict[str, int] = {}
        self.values: list[list[Any]] = [[] for _ in self.columns]

    def add(self, values: Sequence[Any], line: int) -> None:
        """Check and keep one row, its values in the order of `columns`."""
        self.rows += 1
        for column, value, kept in zip(self.columns, values, self.values, strict=True):
            kept.append(self._checked(column, value, line))

    @property
    def whole(self) -> bool:
        """Whether it is time to take the rows."""
        return len(self.values[0]) >= CHUNK_ROWS

    def take(self) -> pa.Table:
        """The rows kept since the last time."""
        arrays = {}
        for column, kept in zip(self.columns, self.values, strict=True):
            kinds = {"vector": pa.list_(pa.float32()), "number": pa.float64()}
            arrays[column.target] = pa.array(kept, type=kinds.get(column.kind, pa.string()))
            kept.clear()
        return pa.table(arrays)

    def rest(self) -> Iterator[pa.Table]:
        """The last rows, where there are any."""
        if not self.rows:
            raise _empty(self.path)
        if self.values[0]:
            yield self.take()

    def _checked(self, column: Column, value: Any, line: int) -> Any:
        if column.kind == "vector":
            return self._checked_vector(column, value, line)
        if column.kind == "number":
            return as_number(value, column, self._at(line))
        if column.kind == "id" and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value and not value.isspace():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{self._at(line)}, column {column.source!r}: half of a surrogate pair at character {error.start}, "
                    "which is no text; write the character whole."
                ) from error
            return value
        raise wrong_value(self._at(line), column, value)

    def _checked_vector(self, column: Column, value: Any, line: int) -> Any:
        at = f"{self._at(line)}, column {column.source!r}"
        if not isinstance(value, list) or not value or not all(type(x) in (int, float) for x in value):
            raise InputError(f"{at}: expected a list of numbers, got {shown(value)}.")
        if not all(map(math.isfinite, value)):
            raise InputError(f"{at}: an embedding with {next(x for x in value if not math.isfinite(x))} in it.")
        width = self.widths.setdefault(column.target, len(value))
        if len(value) != width:
            raise InputError(f"{at}: an embedding of {len(value)} numbers, where the rows before have {width}.")
        return value

    def _at(self, line: int) -> str:
        return f"{self.path}: row {self.rows} (line {line})"


def _read_jsonl(path: Path, stream: Iterable[bytes], choose: Choose) -> Iterator[pa.Table]:
    chunks, names = None, []
    for number, text in _lines(path, stream):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            if text.lstrip().startswith("["):
                raise InputError(f"{path}: line {number}: {_ONE_OBJECT}") from error
            problem = getattr(error, "msg", first_line(error))
            raise InputError(
                f"{path}: line {number} is not a whole JSON object ({problem}): {shown(text.strip())}; "
                "mend or remove that line."
            ) from error
        if not isinstance(record, dict):
            raise InputError(f"{path}: line {number}: {_ONE_OBJECT}")
        if chunks is None:
            names = list(record)
            chunks = _Chunks(path, choose(names))
        try:
            values = [record[column.source] for column in chunks.columns]
        except KeyError as error:
            raise InputError(
                f"{path}: row {chunks.rows + 1} (line {number}) has no {error.args[0]!r}, as the first row has; it has "
                f"{', '.join(map(repr, record)) or 'nothing'}."
            ) from error
        chunks.add(values, number)
        if chunks.whole:
            yield chunks.take()
    if chunks is None:
        raise _empty(path)
    yield from chunks.rest()


_ONE_OBJECT = 'one JSON object a line is needed, as in {"anchor": "...", "positive": "..."}.'


def _read_delimited(path: Path, stream: Iterable[bytes], choose: Choose, delimiter: str) -> Iterator[pa.Table]:
    rows = _cells(path, stream, delimiter)
    with _long_cells():
        header = next(rows, None)
    if header is None:
        raise _empty(path)
    names = _distinct(path, header[1])
    columns = choose(names)
    for column in columns:
        if column.kind == "vector":
            raise InputError(f"{path}: {column.source!r}: embeddings need a .jsonl or .parquet file.")
    chunks = _Chunks(path, columns)
    places = [names.index(column.source) for column in columns]
    while True:
        with _long_cells():
            for line, cells in itertools.islice(rows, CHUNK_ROWS):
                if len(cells) != len(names):
                    raise InputError(
                        f"{path}: row {chunks.rows + 1} (line {line}) has {len(cells)} "
                        f"{'cell' if len(cells) == 1 else 'cells'}, the header {len(names)}; quote cells "
                        "that hold the separator."
                    )
                chunks.add([cells[place] for place in places], line)
        if not chunks.whole:
            yield from chunks.rest()
            return
        yield chunks.take()


def _cells(path: Path, stream: Iterable[bytes], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, the header among them, each with the line that it starts on."""
    texts = (text for _, text in _lines(path, stream))
    # strict: an unclosed quote would otherwise swallow the rest of the file as one cell.
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{path}: the row that starts on line {line} is not well-formed ({error}); a cell that holds a "
                'quote, a line break or the separator stands in double quotes, its own quotes doubled ("").'
            ) from error
        if cells is None:
            return
        if cells:
            yield line, cells


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module refuses cells over 128 kB, and holds that limit for the whole process."""
    before = csv.field_size_limit(MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _lines(path: Path, stream: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """Numbered lines, their ends kept. Cut at ``\\n`` only: texts may hold the other line ends of Unicode."""
    for number, line in enumerate(stream, 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: line {number}: byte {error.start + 1} (0x{error.object[error.start]:02x}) is not UTF-8; "
                "write the file as UTF-8."
            ) from error


def _empty(where: Path) -> InputError:
    return InputError(f"{where}: holds no rows; at least one is needed.")


def _distinct(path: Path, names: list[str]) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: {names.count(name)} columns are called {name!r}; names must differ.")
    return names


def _like_it(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor is there a folder {str(path.parent)!r})"
    return nearest_file(path)
