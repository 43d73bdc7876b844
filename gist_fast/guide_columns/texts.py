"""Columns of texts read through Arrow, chunk by chunk: checked, digested, named by content, fetched by row.

A million rows are never a million Python strings at once: digests are taken of Arrow's own buffers, and texts become
strings a window at a time, when the guide reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
from datasets import Dataset

from gist_fast.data.names import holds_texts
from gist_fast.runtime.errors import InputError, shown

CHUNK_ROWS = 16384
KEY_BYTES = 16


class TextColumn:
    """One column of texts.

    Raises:
        ValueError: the column is of another type than text, or a row holds none.
    """

    def __init__(self, dataset: Dataset, name: str) -> None:
        self.name = name
        if not holds_texts(dataset, name):
            raise InputError(f"dataset: row 0, column {name!r}: expected a text, got {shown(dataset[0][name])}.")
        self._rows = dataset.select_columns([name]).with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def digest(self) -> str:
        """A digest of all texts in their order, whatever the chunks they lie in."""
        lengths, contents = (hashlib.blake2b(digest_size=KEY_BYTES) for _ in range(2))
        for offsets, data in self._buffers():
            # Lengths too, so that ("ab", "c") and ("a", "bc") differ.
            lengths.update(np.diff(offsets).astype("<i8").tobytes())
            contents.update(data[offsets[0] : offsets[-1]])
        return hashlib.blake2b(lengths.digest() + contents.digest(), digest_size=KEY_BYTES).hexdigest()

    def keys(self) -> tuple[pa.Array, np.ndarray]:
        """A digest of each text, `KEY_BYTES` wide and equal for equal texts, and its length in bytes."""
        keys, lengths = [], [np.zeros(0, np.int32)]
        for offsets, data in self._buffers():
            keys += [hashlib.blake2b(data[a:b], digest_size=KEY_BYTES).digest() for a, b in pairwise(offsets.tolist())]
            lengths.append(np.diff(offsets).astype(np.int32))
        return as_keys(b"".join(keys)), np.concatenate(lengths)

    def take(self, rows: Sequence[int]) -> list[str]:
        """The texts of these rows."""
        return self._rows[list(rows)][self.name].to_pylist()

    def _buffers(self) -> Iterator[tuple[np.ndarray, memoryview]]:
        """Arrow's offsets ``[rows + 1]`` of a chunk and the UTF-8 that they point into."""
        row = 0
        for table in self._rows.iter(batch_size=CHUNK_ROWS):
            for chunk in _few_chunks(table.column(self.name)):
                if chunk.null_count:
                    row += int(np.flatnonzero(chunk.is_null().to_numpy(zero_copy_only=False))[0])
                    raise InputError(f"dataset: row {row}, column {self.name!r}: expected a text, got None.")
                row += len(chunk)
                if pa.types.is_string_view(chunk.type):
                    chunk = chunk.cast(pa.string())
                wide = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
                _, offsets, data = chunk.buffers()
                if not len(chunk):
                    continue
                ends = np.frombuffer(offsets, wide)[chunk.offset : chunk.offset + len(chunk) + 1]
                yield ends, memoryview(data) if data is not None else memoryview(b"")


class DistinctTexts:
    """The distinct texts of several columns, numbered in the order of their first appearance."""

    def __init__(self, columns: Sequence[TextColumn]) -> None:
        self.columns = list(columns)
        keys, lengths = zip(*(column.keys() for column in columns), strict=True)
        encoded = pa.concat_arrays(keys).dictionary_encode()
        self.keys: pa.Array = encoded.dictionary
        """``[distinct]``."""
        numbers = encoded.indices.to_numpy()
        self._first = np.unique(numbers, return_index=True)[1]
        self.lengths = np.concatenate(lengths)[self._first]
        """Of each text, in bytes."""
        self._starts = np.cumsum([0, *map(len, columns)])
        self.rows = [numbers[a:b] for a, b in pairwise(self._starts)]
        """For each column, which distinct text each row holds."""

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, numbers: np.ndarray) -> list[str]:
        """The texts of these numbers."""
        places = self._first[numbers]
        owners = np.searchsorted(self._starts, places, side="right") - 1
        texts: list[str] = [""] * len(numbers)
        for k in np.unique(owners):
            own = np.flatnonzero(owners == k)
            found = self.columns[k].take((places[own] - self._starts[k]).tolist())
            for place, text in zip(own.tolist(), found, strict=True):
                texts[place] = text
        return texts

    def where(self, number: int) -> str:
        """How an error names a distinct text: row and column of its first appearance, and how it begins."""
        place = int(self._first[number])
        k = int(np.searchsorted(self._starts, place, side="right")) - 1
        row, column = place - int(self._starts[k]), self.columns[k]
        return f"dataset: row {row}, column {column.name!r} ({shown(column.take([row])[0])})"


def _few_chunks(column: pa.ChunkedArray) -> list[pa.Array]:
    """A shuffled dataset gives a chunk for each row, which is slow to go through."""
    try:
        return column.chunks if column.num_chunks < 2 else [column.combine_chunks()]
    except pa.ArrowInvalid:
        # More than 2 GiB of texts do not fit in one chunk.
        return column.chunks


def as_keys(joined: bytes | np.ndarray) -> pa.Array:
    """Keys from their bytes, one after the other."""
    buffer = pa.py_buffer(joined)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), buffer.size // KEY_BYTES, [None, buffer])
