"""Embeddings of texts by the text's digest, for one guide, prompt, maximum length and type; it only ever grows.

A folder of shards. Each is an Arrow file of keys and vectors that appears under its name when it is whole, never
changes, and carries a checksum of its keys and one of its vectors. Names never collide, so any number of processes may
add shards at once; a text that two of them embedded is there twice, which does no harm.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gist_fast.guide_columns.files import as_vectors, checksum, set_aside, vectors_of, written_whole
from gist_fast.guide_columns.texts import KEY_BYTES, as_keys
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import put

SUFFIX = ".shard"


@dataclass
class _Shard:
    path: Path
    keys: pa.Array
    vectors: np.ndarray
    """``[rows, width]``, in the mapped file."""
    checksum: int
    """What that of the vectors must be; reading them all is put off until some are needed."""


class Store:
    """The shards of one folder.

    Args:
        dtype: of the numbers.
    """

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.folder = folder
        self.dtype = np.dtype(dtype)
        self._shards: list[_Shard] = []
        self._starts = np.zeros(1, np.int64)

    def add(self, keys: pa.Array, vectors: np.ndarray) -> None:
        """Write a shard: keys ``[n]``, vectors ``[n, width]``.

        Raises:
            OSError: it cannot be written; nothing of it is left then.
        """
        vectors = np.ascontiguousarray(vectors, self.dtype)
        columns = {"key": keys, "vector": as_vectors(vectors)}
        sums = {"keys": str(checksum(_bytes_of(keys))), "vectors": str(checksum(vectors))}
        table = pa.table(columns).replace_schema_metadata(sums)
        with written_whole(self.folder) as partial:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=len(keys))
            # Names in the order of time; the rest keeps those of two processes apart.
            put(partial, self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}{SUFFIX}")

    def open(self, names: Sequence[str] | None = None) -> None:
        """Map shards into memory, all or those named; damaged ones are set aside with a warning.

        Raises:
            ValueError: a shard that is named is not there, or damaged.
        """
        self._shards = []
        paths = sorted(self.folder.glob(f"*{SUFFIX}")) if names is None else [self.folder / name for name in names]
        for path in paths:
            try:
                self._shards.append(self._read(path))
            except (OSError, ValueError, KeyError, TypeError) as error:
                if names is not None:
                    raise InputError(
                        f"cache_dir: another process wrote {path}, and here it cannot be read ({error}). Name a folder "
                        "that all processes share."
                    ) from error
                set_aside(path, error)
        self._number()

    def locate(self, keys: pa.Array, *, check: bool = True) -> np.ndarray:
        """Where each key's vector is, for `gather`; -1 where it is not.

        Args:
            check: whether to read and check the vectors of every shard that has some of them; damaged shards are set
                aside with a warning, and their keys are not there.
        """
        while True:
            known = pa.concat_arrays([as_keys(b""), *(shard.keys for shard in self._shards)])
            places = pc.fill_null(pc.index_in(keys, value_set=known), -1).to_numpy().astype(np.int64)
            if not check:
                return places
            used = np.unique(np.searchsorted(self._starts, places[places >= 0], side="right") - 1)
            damaged = [self._shards[k] for k in used if checksum(self._shards[k].vectors) != self._shards[k].checksum]
            if not damaged:
                return places
            for shard in damaged:
                set_aside(shard.path, "the checksum of its vectors does not fit")
                self._shards.remove(shard)
            self._number()

    def gather(self, places: np.ndarray) -> np.ndarray:
        """``[len(places), width]``."""
        owners = np.searchsorted(self._starts, places, side="right") - 1
        rows = np.empty((len(places), self.width), self.dtype)
        for k in np.unique(owners):
            own = np.flatnonzero(owners == k)
            rows[own] = self._shards[k].vectors[places[own] - self._starts[k]]
        return rows

    @property
    def width(self) -> int:
        return self._shards[0].vectors.shape[1]

    def opened(self) -> list[str]:
        """The names of the shards in use."""
        return [shard.path.name for shard in self._shards]

    def _number(self) -> None:
        self._starts = np.cumsum([0, *(len(shard.keys) for shard in self._shards)], dtype=np.int64)

    def _read(self, path: Path) -> _Shard:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        if table.num_rows == 0 or table.column("key").num_chunks != 1 or table.column("vector").num_chunks != 1:
            raise ValueError("not one batch of rows")
        keys, vectors = table.column("key").chunk(0), vectors_of(table.column("vector").chunk(0))
        if keys.type != pa.binary(KEY_BYTES) or vectors.dtype != self.dtype:
            raise ValueError(f"it holds {keys.type} and {vectors.dtype}")
        if self._shards and vectors.shape[1] != self.width:
            raise ValueError(f"vectors of {vectors.shape[1]} numbers beside others of {self.width}")
        sums = table.schema.metadata or {}
        if checksum(_bytes_of(keys)) != int(sums[b"keys"]):
            raise ValueError("the checksum of its keys does not fit")
        return _Shard(path, keys, vectors, int(sums[b"vectors"]))


def _bytes_of(keys: pa.Array) -> memoryview:
    start = keys.offset * KEY_BYTES
    return memoryview(keys.buffers()[1])[start : start + len(keys) * KEY_BYTES]
