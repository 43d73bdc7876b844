"""Files that are whole or not there: written beside their place, checked by a checksum when read."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from gist_fast.runtime.files import partial_file, try_to_write

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """`partial_file`, whose errors of a full disk say what stays and how to go on."""
    try:
        with partial_file(folder) as partial:
            yield partial
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"{folder}: no space left on the disk. What was written before is whole and stays. Free some space, or "
                "name another cache_dir, and run again to go on from there",
            ) from error
        raise


def cache_folder(cache_dir: str | os.PathLike | None) -> Path:
    """Where embeddings are kept. If nothing is there yet, a folder that can be written to.

    Raises:
        InputError: it cannot; see `try_cache`.
    """
    import datasets

    given = Path(datasets.config.HF_DATASETS_CACHE) / "gist_fast" if cache_dir is None else Path(cache_dir)
    folder = given.expanduser()
    if not folder.is_dir():
        try_cache(folder)
    return folder


def try_cache(folder: Path) -> None:
    """Raise `InputError` where embeddings cannot be kept in `folder`; what lies there can be read all the same."""
    try_to_write(folder, "cache_dir", "name another cache_dir, or set HF_DATASETS_CACHE")


def set_aside(path: Path, reason: object) -> None:
    """Take a damaged file out of use, and say so."""
    aside = path.with_name(path.name + ".damaged")
    logger.warning("%s: damaged (%s); renamed to %s, and its embeddings are computed again.", path, reason, aside.name)
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, aside)


def vectors_of(array: pa.FixedSizeListArray) -> np.ndarray:
    """The numbers of an Arrow column of vectors, ``[rows, width]``, where they lie."""
    return array.flatten().to_numpy(zero_copy_only=True).reshape(len(array), array.type.list_size)


def as_vectors(rows: np.ndarray) -> pa.FixedSizeListArray:
    """``[rows, width]`` as an Arrow column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


def checksum(content: np.ndarray | memoryview, before: int = 0) -> int:
    """A checksum of these bytes behind those that gave `before`."""
    return zlib.crc32(content, before)  # type: ignore[arg-type]
