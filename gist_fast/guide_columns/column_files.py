"""A column's embeddings, row by row, as an Arrow stream that `datasets` maps into memory.

The file's name says what texts it is of and, so that damage is seen, what its checksum is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from gist_fast.data.names import GUIDE_EMBEDDING
from gist_fast.guide_columns.files import as_vectors, checksum, set_aside, vectors_of, written_whole
from gist_fast.guide_columns.store import Store
from gist_fast.runtime.files import put

_WRITTEN_ROWS = 65536
_BATCH_ROWS = 1024


def find_column(folder: Path, digest: str, rows: int, dtype: np.dtype) -> Path | None:
    """The whole file of a column with that digest of its texts; damaged ones are set aside with a warning."""
    for path in sorted(folder.glob(f"{digest}-*.arrow")):
        try:
            if _sum(path, rows, dtype) == int(path.stem.rpartition("-")[2], 16):
                return path
            reason: object = "its checksum does not fit"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error
        set_aside(path, reason)
    return None


def write_column(folder: Path, digest: str, store: Store, places: np.ndarray) -> Path:
    """Write the store's embeddings at `places`, one a row.

    Raises:
        OSError: the file cannot be written; nothing of it is left then.
    """
    schema = pa.schema([(GUIDE_EMBEDDING, pa.list_(pa.from_numpy_dtype(store.dtype), store.width))])
    total = 0
    with written_whole(folder) as partial:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for start in range(0, len(places), _WRITTEN_ROWS):
                rows = store.gather(places[start : start + _WRITTEN_ROWS])
                total = checksum(rows, total)
                table = pa.table([as_vectors(rows)], schema=schema)
                # Small batches: `datasets` finds a row by its batch, and fetches within it.
                writer.write_table(table, max_chunksize=_BATCH_ROWS)
        path = folder / f"{digest}-{total:08x}.arrow"
        put(partial, path)
    return path


def _sum(path: Path, rows: int, dtype: np.dtype) -> int:
    """The checksum of a file's numbers.

    Raises:
        ValueError: it has other rows, or numbers of another type.
    """
    with pa.memory_map(str(path)) as source:
        column = pa.ipc.open_stream(source).read_all().column(GUIDE_EMBEDDING)
    if len(column) != rows or column.type.value_type != pa.from_numpy_dtype(dtype):
        raise ValueError(f"it holds {len(column)} rows of {column.type}")
    total = 0
    for chunk in column.chunks:
        total = checksum(vectors_of(chunk), total)
    return total
