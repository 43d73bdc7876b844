"""Files of texts to Arrow tables: ``.jsonl``, ``.csv``, ``.tsv`` (each also ``.gz``) and ``.parquet``.

Nothing is guessed: a cell of a CSV file is the text that stands there, so ``1e5``, ``NA`` and ``null`` stay texts. In
CSV a cell may stand in double quotes; in TSV a double quote is a character like any other, unless asked for. Rows
are checked as they are read, chunk by chunk, because only then can an error name the line; at no time do more than
`CHUNK_ROWS` rows exist as Python objects. A file is read whole (`read_file`), or a chunk at a time (`read_chunks`).
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import itertools
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gist_fast.data.column_checks import LARGEST, Column, as_number, check_list, check_table, late_column, wrong_value
from gist_fast.runtime.errors import InputError, first_line, nearest_file, shown

logger = logging.getLogger(__name__)

CHUNK_ROWS = 8192
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
MAX_CELL = 2**31 - 1

Choose = Callable[[list[str]], Sequence[Column]]
"""From the names that a file has to the columns that are wanted; raises `InputError` where it lacks one."""


def suffix_of(path: Path | str) -> str | None:
    """The suffix in `SUFFIXES` that `path` ends with, or None."""
    name = str(path).lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)


def read_file(path: Path, choose: Choose, quoting: bool | None = None) -> pa.Table:
    """The chosen columns of a file, each value checked.

    Args:
        quoting: whether a cell may stand in double quotes; None: in CSV it may, in TSV it may not.

    Raises:
        InputError: naming the file, and the row (the first is 1), line and column where there is one.
    """
    return pa.concat_tables(read_chunks(path, choose, quoting))


def read_chunks(path: Path, choose: Choose, quoting: bool | None = None) -> Iterator[pa.Table]:
    """The same, a chunk of at most `CHUNK_ROWS` rows at a time, all of one schema; at least one row in all.

    Raises:
        InputError: as `read_file`, when the wrong row is met.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise InputError(f"{path}: unknown kind of file; it must end in one of {', '.join(SUFFIXES)}.")
    delimiter = "\t" if suffix.startswith(".tsv") else "," if suffix.startswith(".csv") else None
    if quoting is not None and delimiter is None:
        raise quoting_elsewhere(path, quoting)
    if not path.exists():
        hint = nearest_file(path) if path.parent.is_dir() else f" (nor is there a folder {str(path.parent)!r})"
        raise InputError(f"{path}: no such file{hint}.")
    if not path.is_file():
        raise InputError(f"{path}: is not a file.")
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path, choose)
            return
        with gzip.open(path, "rb") if suffix.endswith(".gz") else path.open("rb") as stream:
            if delimiter is None:
                yield from _read_jsonl(path, stream, choose)
            else:
                quoted = delimiter == "," if quoting is None else quoting
                cells = (_quoted_cells if quoted else _plain_cells)(path, stream, delimiter)
                yield from _read_delimited(path, cells, choose, quoted)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file ({first_line(error)}); write it again.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or first_line(error)}).") from error


def quoting_elsewhere(where: object, quoting: bool) -> InputError:
    """The error for `quoting` of a source that has no cells."""
    return InputError(f"{where}: quoting={quoting}: only .csv and .tsv files have quoted cells; leave it out.")


def _read_parquet(path: Path, choose: Choose) -> Iterator[pa.Table]:
    import pyarrow.parquet as pq

    first_row, widths = 1, dict[str, int]()
    try:
        with pq.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            columns = _chosen(path, names, choose)
            there = [column.source for column in columns if column.source in names]
            for batch in file.iter_batches(CHUNK_ROWS, columns=there):
                table = check_table(pa.Table.from_batches([batch]), columns, str(path), first_row, widths)
                first_row += table.num_rows
                yield table
    # A broken name of a column, of a damaged file, is the last.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({first_line(error)}).") from error
    if first_row == 1:
        raise _empty(path)


def _read_jsonl(path: Path, stream: Iterable[bytes], choose: Choose) -> Iterator[pa.Table]:
    records = _records(path, stream)
    first = next(records, None)
    if first is None:
        raise _empty(path)
    names = dict.fromkeys(first[1])
    columns = [c.holding(isinstance(first[1].get(c.source), list)) for c in choose(list(names))]
    targets = {column.target for column in columns}

    def rows() -> Iterator[tuple[int, list[Any]]]:
        for row, (line, record) in enumerate(itertools.chain([first], records), 1):
            if not record.keys() <= names.keys():
                # Keys that come late: the rows before lack a column that would have been taken.
                names.update(dict.fromkeys(record))
                for column in choose(list(names)):
                    if column.target not in targets:
                        without, brings = f"row 1 (line {first[0]})", f"row {row} (line {line})"
                        raise late_column(path, without, column.source, brings)
            for column in columns:
                if column.source not in record and column.kind != "text or nothing":
                    raise InputError(
                        f"{path}: row {row} (line {line}) has no {column.source!r}, as the first row has; it has "
                        f"{', '.join(map(repr, record)) or 'nothing'}."
                    )
            yield line, [record.get(column.source) for column in columns]

    return _checked_chunks(path, columns, rows())


def _records(path: Path, stream: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The object of each line that is not blank, with the line's number."""
    for number, text in _lines(path, stream):
        if not text.strip():
            continue
        try:
            record = json.loads(text, object_pairs_hook=_distinct_keys)
        # Not only JSONDecodeError: Python refuses integers of more than 4,300 digits.
        except (ValueError, RecursionError) as error:
            if text.lstrip().startswith("["):
                raise InputError(f"{path}: line {number}: {_ONE_OBJECT}") from error
            problem = getattr(error, "msg", first_line(error))
            raise InputError(
                f"{path}: line {number} is not a whole JSON object ({problem}): {shown(text.strip())}; "
                "mend or remove that line."
            ) from error
        if not isinstance(record, dict):
            raise InputError(f"{path}: line {number}: {_ONE_OBJECT}")
        yield number, record


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return record


_ONE_OBJECT = 'one JSON object a line is needed, as in {"anchor": "...", "positive": "..."}.'


def _read_delimited(
    path: Path, cells: Iterator[tuple[int, list[str]]], choose: Choose, quoted: bool
) -> Iterator[pa.Table]:
    with _long_cells():
        header = next(cells, None)
    if header is None:
        raise _empty(path)
    if not quoted and (name := next(filter(_stands_in_quotes, header[1]), None)):
        raise InputError(f"{path}: the column {name} stands in quotes, and they are read as text; {_SET_QUOTING}")
    names = header[1]
    columns = _chosen(path, names, choose)
    for column in columns:
        if column.kind == "vector":
            raise InputError(f"{path}: {column.source!r}: embeddings need a .jsonl or .parquet file.")
    places = [names.index(column.source) if column.source in names else None for column in columns]

    hint = "quote cells that hold the separator." if quoted else _SET_QUOTING
    told = quoted

    def rows() -> Iterator[tuple[int, list[str]]]:
        nonlocal told
        for row, (line, values) in enumerate(cells, 1):
            if len(values) != len(names):
                raise InputError(
                    f"{path}: row {row} (line {line}) has {len(values)} {'cell' if len(values) == 1 else 'cells'}, the "
                    f"header {len(names)}; {hint}"
                )
            if not told and any(map(_stands_in_quotes, values)):
                told = True
                logger.warning(
                    "%s: row %d (line %d): a cell stands in double quotes, and they are read as text; %s",
                    path,
                    row,
                    line,
                    _SET_QUOTING,
                )
            yield line, ["" if place is None else values[place] for place in places]

    return _checked_chunks(path, columns, rows())


def _checked_chunks(
    path: Path, columns: Sequence[Column], rows: Iterator[tuple[int, Sequence[Any]]]
) -> Iterator[pa.Table]:
    """Rows of values in the order of `columns`, each with its line, as tables of at most `CHUNK_ROWS` rows."""
    types = {"vector": pa.list_(pa.float32()), "number": pa.float64(), "texts": pa.list_(pa.string())}
    schema = pa.schema([(column.target, types.get(column.kind, pa.string())) for column in columns])
    numbered, widths, empty = enumerate(rows, 1), dict[str, int](), True
    while True:
        chunk = []
        with _long_cells():
            for row, (line, values) in itertools.islice(numbered, CHUNK_ROWS):
                at = f"{path}: row {row} (line {line})"
                pairs = zip(columns, values, strict=True)
                chunk.append([_checked(column, value, at, widths) for column, value in pairs])
        if not chunk:
            break
        empty = False
        yield pa.table(list(zip(*chunk, strict=True)), schema=schema)
    if empty:
        raise _empty(path)


def _checked(column: Column, value: Any, at: str, widths: dict[str, int]) -> Any:
    """A value as Arrow takes it; `widths` are those of the embeddings in the rows before, by column."""
    if column.kind == "vector":
        at = f"{at}, column {column.source!r}"
        if not isinstance(value, list) or not value or not all(type(x) in (int, float) for x in value):
            raise InputError(f"{at}: expected a list of numbers, got {shown(value)}.")
        for number in value:
            if not abs(number) <= LARGEST:
                raise InputError(
                    f"{at}: an embedding with {shown(number)} in it; finite numbers of float32 are needed."
                )
        width = widths.setdefault(column.target, len(value))
        if len(value) != width:
            raise InputError(f"{at}: an embedding of {len(value)} numbers, where the rows before have {width}.")
        return np.array(value, dtype=np.float32)
    if column.kind == "number":
        return as_number(value, column, at)
    if column.kind == "texts":
        check_list(value, column, at)
        return [_checked(replace(column, kind="text"), text, at, widths) for text in value]
    if column.kind == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if column.kind == "text or nothing" and (value is None or (isinstance(value, str) and not value.strip())):
        return ""
    if not isinstance(value, str) or not value or value.isspace():
        raise wrong_value(at, column, value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{at}, column {column.source!r}: half of a surrogate pair at character {error.start}, which is no text; "
            "write the character whole."
        ) from error
    return value


_SET_QUOTING = "if the file's cells are quoted as in CSV, set quoting: true."


def _stands_in_quotes(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


def _plain_cells(path: Path, stream: Iterable[bytes], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """`_quoted_cells` of a file in which a quote is a character like any other, and each line is a row."""
    for line, text in _lines(path, stream):
        if row := text.removesuffix("\n").removesuffix("\r"):
            yield line, row.split(delimiter)


def _quoted_cells(path: Path, stream: Iterable[bytes], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, the header among them, each with the line that it starts on."""
    texts = (text for _, text in _lines(path, stream))
    # strict: an unclosed quote would otherwise swallow the rest of the file as one cell.
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            problem = "a \\r stands outside quotes" if "new-line" in str(error) else error
            raise InputError(
                f"{path}: the row that starts on line {line} is not well-formed ({problem}); a cell that holds a "
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
        if number == 1:
            _check_start(path, line)
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: line {number}: byte {error.start + 1} (0x{error.object[error.start]:02x}) is not UTF-8; "
                "write the file as UTF-8."
            ) from error


def _check_start(path: Path, line: bytes) -> None:
    """Refuse by the first line what is no UTF-8 with line ends that are known here."""
    problem = ""
    if line[:2] == b"\x1f\x8b":
        problem = "is compressed with gzip; its name must end in .gz"
    elif line[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in line[:4]:
        problem = "is UTF-16 or UTF-32; write the file as UTF-8"
    elif not line.endswith(b"\n") and b"\r" in line.rstrip():
        problem = "ends its lines with \\r alone; write the file with \\n"
    if problem:
        raise InputError(f"{path}: {problem}.")


def _empty(where: Path) -> InputError:
    return InputError(f"{where}: holds no rows; at least one is needed.")


def _chosen(path: Path, names: list[str], choose: Choose) -> Sequence[Column]:
    """The columns that are wanted; their names must differ, those of others need not."""
    columns = choose(list(dict.fromkeys(names)))
    for column in columns:
        if (count := names.count(column.source)) > 1:
            raise InputError(f"{path}: {count} columns are called {column.source!r}; names must differ.")
    return columns
