"""What a column of a file or table may hold, and the check of it: a value at a time, or an Arrow column at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gist_fast.runtime.errors import InputError, nearest, shown


@dataclass(frozen=True)
class Column:
    """One column to read."""

    source: str
    """Its name in the file."""
    target: str
    """Its name in the result."""
    kind: Literal["text", "text or nothing", "id", "vector", "number"] = "text"
    """Texts must say something, unless nothing (an empty text, a null) may stand there, which becomes an empty text;
    ids may be whole numbers, and become texts; vectors are lists of numbers; numbers are finite, and may be written as
    text, as in a CSV file."""


def check_table(
    table: pa.Table,
    columns: Sequence[Column],
    where: str,
    first_row: int = 1,
    widths: dict[str, int] | None = None,
) -> pa.Table:
    """The chosen columns of a table that is already Arrow, checked: for Parquet files and datasets.

    Args:
        where: what to call the table in an error.
        first_row: the number of its first row.
        widths: of the embeddings in the rows before, by column; those that are new are added.
    """
    widths = {} if widths is None else widths
    arrays: dict[str, Any] = {}
    for column in columns:
        array = table.column(column.source)
        if column.kind == "vector":
            arrays[column.target] = _checked_vectors(array, column, where, first_row, widths)
            continue
        if column.kind == "number":
            values = enumerate(array.to_pylist(), first_row)
            numbers = [as_number(value, column, f"{where}: row {row}") for row, value in values]
            arrays[column.target] = pa.array(numbers, type=pa.float64())
            continue
        if pa.types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        if column.kind == "id" and pa.types.is_integer(array.type):
            array = array.cast(pa.string())
        if column.kind == "text or nothing":
            # A column of nulls alone has no type yet.
            array = pc.fill_null(array.cast(pa.string()) if pa.types.is_null(array.type) else array, "")
        if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
            value = array[0].as_py() if len(array) else None
            raise InputError(
                f"{where}: column {column.source!r} holds {array.type}, not text (the first value is {shown(value)}); "
                "name a column of texts."
            )
        if column.kind == "text or nothing":
            arrays[column.target] = array
            continue
        # The first null, empty or blank text.
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(array)), 0)
        row = pc.index(pc.fill_null(blank, True), True).as_py()
        if row >= 0:
            raise wrong_value(f"{where}: row {first_row + row}", column, array[row].as_py())
        arrays[column.target] = array
    return pa.table(arrays)


def as_number(value: Any, column: Column, at: str) -> float:
    """A value as a finite number; `at` is where it stands."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Python's own underscores (1_000) are no way to write a number in a file.
    if plain or (isinstance(value, str) and "_" not in value):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                return number
    raise wrong_value(at, column, value)


def wrong_value(at: str, column: Column, value: Any) -> InputError:
    """The error for a value that a column of that kind cannot hold."""
    empty = isinstance(value, str) and (not value.strip() or column.kind != "number")
    wanted = {"id": "a text or a whole number", "number": "a finite number"}.get(column.kind, "a text")
    return InputError(
        f"{at}, column {column.source!r}: is {'empty' if empty else shown(value)}; {wanted} is needed there, so mend "
        "or remove that row."
    )


def no_column(where: object, wanted: str, like: str, names: Sequence[str], hint: str = "") -> InputError:
    """The error for a column that is not among `names`; the one that is most like `like` is said."""
    there = ", ".join(map(repr, names)) or "none"
    return InputError(f"{where}: no column {wanted}{nearest(like, names)}; it has {there}.{hint}")


def check_once(where: str, columns: list[str]) -> None:
    """Refuse a column that is named for two roles."""
    for column in columns:
        if columns.count(column) > 1:
            raise InputError(f"{where}: columns: {column!r} is named for more than one role.")


def _checked_vectors(
    array: pa.ChunkedArray, column: Column, where: str, first_row: int, widths: dict[str, int]
) -> pa.ChunkedArray:
    kind = array.type
    lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise InputError(f"{where}: column {column.source!r} holds {kind}, not embeddings (lists of numbers).")

    def at(row: int) -> str:
        return f"{where}: row {row}, column {column.source!r}"

    for chunk in array.chunks:
        if chunk.null_count:
            raise InputError(f"{at(first_row + pc.index(chunk.is_null(), True).as_py())}: the embedding is missing.")
        lengths = pc.list_value_length(chunk).to_numpy(zero_copy_only=False)
        width = widths.setdefault(column.target, int(lengths[0])) if len(lengths) else 0
        if (lengths != width).any():
            row = int((lengths != width).argmax())
            raise InputError(
                f"{at(first_row + row)}: an embedding of {lengths[row]} numbers, where the rows before have {width}."
            )
        numbers = chunk.flatten()
        finite = np.isfinite(numbers.to_numpy(zero_copy_only=False).astype(np.float32, copy=False))
        if numbers.null_count or not finite.all():
            # A null among the numbers is NaN here.
            row = int(finite.argmin()) // width
            raise InputError(f"{at(first_row + row)}: an embedding with something in it that is no finite number.")
        first_row += len(chunk)
    return array
