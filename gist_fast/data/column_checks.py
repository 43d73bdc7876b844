"""What a column of a file or table may hold, and the check of it: a value at a time, or an Arrow column at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gist_fast.data.lists import is_list
from gist_fast.data.names import NO_TEXT
from gist_fast.runtime.errors import InputError, nearest, shown


@dataclass(frozen=True)
class Column:
    """One column to read."""

    source: str
    """Its name in the file."""
    target: str
    """Its name in the result."""
    kind: Literal["text", "texts", "text or nothing", "id", "vector", "number"] = "text"
    """Texts must say something, unless nothing (an empty text, a null, no such column) may stand there, which becomes
    an empty text; ids may be whole numbers, and become texts; vectors are lists of numbers; numbers may be of any type,
    or written as text, as in a CSV file; ``texts`` are lists of texts."""
    least: int | None = None
    """If not None, a column of texts may hold lists of them, of at least so many."""

    may_miss: bool = False
    """Whether `NO_TEXT` may stand in the place of a text."""

    def holding(self, lists: bool) -> Column:
        """The same, for a column that is known to hold lists, or not."""
        return replace(self, kind="texts") if lists and self.least is not None else self


MOST_NAMES = 30
"""How many of a file's columns an error lists."""
LARGEST = float(np.finfo(np.float32).max)
"""The largest number that may stand in a column: training and evaluators compute in float32."""


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
        if column.kind == "text or nothing" and column.source not in table.column_names:
            arrays[column.target] = pa.repeat("", table.num_rows)
            continue
        array = _decoded(table.column(column.source))
        if column.least is not None and is_list(array.type):
            arrays[column.target] = _checked_lists(array, column, where, first_row)
            continue
        if column.kind == "vector":
            arrays[column.target] = _checked_vectors(array, column, where, first_row, widths)
            continue
        if column.kind == "number":
            values = enumerate(array.to_pylist(), first_row)
            numbers = [as_number(value, column, f"{where}: row {row}") for row, value in values]
            arrays[column.target] = pa.array(numbers, type=pa.float64())
            continue
        # A column of nulls alone has a type of its own.
        if pa.types.is_null(array.type) or (column.kind == "id" and pa.types.is_integer(array.type)):
            array = array.cast(pa.string())
        if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
            wanted = "text or whole numbers" if column.kind == "id" else "text"
            # Of a stream only the types are known at first.
            first = f" (the first value is {shown(array[0].as_py())})" if len(array) else ""
            raise InputError(
                f"{where}: column {column.source!r} holds {array.type}, not {wanted}{first}; name a column of texts."
            )
        _refuse_broken(array, column, where, first_row)
        if column.kind == "text or nothing":
            arrays[column.target] = pc.fill_null(array, "")
            continue
        # The first null, empty or blank text.
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(array)), 0)
        if column.may_miss:
            blank = pc.and_(blank, pc.not_equal(array, NO_TEXT))
        row = pc.index(pc.fill_null(blank, True), True).as_py()
        if row >= 0:
            raise wrong_value(f"{where}: row {first_row + row}", column, array[row].as_py())
        arrays[column.target] = array
    return pa.table(arrays)


def as_number(value: Any, column: Column, at: str) -> float:
    """A value as a number, whatever the format made of it; `at` is where it stands.

    A number is a whole number, a decimal, a truth value (1 or 0), or a text that says one of these: the same column is
    ``1``, ``1.0``, ``Decimal("1")``, ``True``, ``"1"`` or ``"True"``, depending on what wrote the file.
    """
    written = value.strip().lower() if isinstance(value, str) else None
    if written in ("true", "false"):
        return float(written == "true")
    # Python's own underscores (1_000) are no way to write a number in a file.
    if isinstance(value, (bool, int, float, Decimal)) or (written is not None and "_" not in written):
        with contextlib.suppress(ValueError, OverflowError):
            # Not true of NaN either.
            if abs(number := float(value)) <= LARGEST:
                return number
    raise wrong_value(at, column, value)


def wrong_value(at: str, column: Column, value: Any) -> InputError:
    """The error for a value that a column of that kind cannot hold."""
    empty = isinstance(value, str) and (not value.strip() or column.kind != "number")
    wanted = {"id": "a text or a whole number", "number": "a finite number"}.get(column.kind, "a text")
    if column.kind == "number" and isinstance(value, (int, float)) and abs(value) < math.inf:
        wanted = f"a number of at most {LARGEST:.4g}"
    return InputError(
        f"{at}, column {column.source!r}: is {'empty' if empty else shown(value)}; {wanted} is needed there, so mend "
        "or remove that row."
    )


def no_column(where: object, wanted: str, like: str, names: Sequence[str], hint: str = "") -> InputError:
    """The error for a column that is not among `names`; the one that is most like `like` is said."""
    # The first row of a file without a header may be long, and many.
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    there = (", ".join(map(shown, names[:MOST_NAMES])) or "none") + more
    return InputError(f"{where}: no column {wanted}{nearest(like, names)}; it has {there}.{hint}")


def late_column(where: object, without: str, column: str, brings: str) -> InputError:
    """The error for a column that one row lacks and a later one brings."""
    return InputError(f"{where}: {without} has no {column!r}, which {brings} has; give it in every row, or in none.")


def check_once(where: str, columns: list[str]) -> None:
    """Refuse a column that is named for two roles."""
    for column in columns:
        if columns.count(column) > 1:
            raise InputError(f"{where}: columns: {column!r} is named for more than one role.")


def _refuse_broken(array: pa.ChunkedArray, column: Column, where: str, first_row: int) -> None:
    """Refuse bytes that are no text, which Arrow takes as they come and Python refuses only when they are read."""
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        binary = pa.large_binary() if pa.types.is_large_string(array.type) else pa.binary()
        for row, value in enumerate(array.cast(binary).to_pylist(), first_row):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{where}: row {row}, column {column.source!r}: byte {error.start + 1} "
                    f"(0x{error.object[error.start]:02x}) is not UTF-8; write the texts as UTF-8."
                ) from error
        raise


def check_list(value: Any, column: Column, at: str) -> None:
    """Refuse what is no list of so many texts; `at` is where it stands."""
    if not isinstance(value, list):
        raise InputError(f"{at}, column {column.source!r}: is {shown(value)}; a list of texts is needed, as before.")
    if len(value) < (column.least or 0):
        raise InputError(f"{at}, column {column.source!r}: is an empty list; {column.least} text at least is needed.")


def _checked_lists(array: pa.ChunkedArray, column: Column, where: str, first_row: int) -> pa.ChunkedArray:
    one = replace(column, kind="text")
    for row, value in enumerate(array.to_pylist(), first_row):
        at = f"{where}: row {row}"
        check_list(value, column, at)
        for text in value:
            if not isinstance(text, str) or not text.strip():
                raise wrong_value(at, one, text)
    return array.cast(pa.list_(pa.string()))


def _decoded(array: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same values in the plainest type: no dictionary, no views, which few functions of Arrow take."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return pa.chunked_array(
            [
                pa.DictionaryArray.from_arrays(chunk.indices, _viewless(chunk.dictionary)).dictionary_decode()
                for chunk in array.chunks
            ],
            type=pa.string() if pa.types.is_string_view(kind.value_type) else kind.value_type,
        )
    return _viewless(array)


def _viewless(array: Any) -> Any:
    return array.cast(pa.string()) if pa.types.is_string_view(array.type) else array


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
        if len(lengths) and not width:
            raise InputError(f"{at(first_row)}: an embedding of no numbers.")
        if (lengths != width).any():
            row = int((lengths != width).argmax())
            raise InputError(
                f"{at(first_row + row)}: an embedding of {lengths[row]} numbers, where the rows before have {width}."
            )
        numbers = chunk.flatten()
        with np.errstate(over="ignore"):
            finite = np.isfinite(numbers.to_numpy(zero_copy_only=False).astype(np.float32, copy=False))
        if numbers.null_count or not finite.all():
            # A null among the numbers is NaN here.
            row = int(finite.argmin()) // width
            raise InputError(f"{at(first_row + row)}: an embedding with something in it that is no finite number.")
        first_row += len(chunk)
    return array
