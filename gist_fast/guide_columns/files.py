"""Files that are whole or not there: written beside their place, checked by a checksum when read."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

logger = logging.getLogger(__name__)

_PARTIAL = re.compile(r"\.(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]+\.partial")


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A path to write to; whoever has written moves the file to its name with `put`. What is left there is removed.

    Raises:
        OSError: the file cannot be written; for a full disk, saying so.
    """
    partial = folder / f".{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield partial
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"{folder}: no space left on the disk. What was written before is whole and stays; make room, or name "
                "another cache_dir, and run again to go on from there",
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def put(partial: Path, path: Path) -> None:
    """Move a written file to its name, at once and for good."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes of this machine that are no more left half-written."""
    for path in folder.glob(".*.partial"):
        match = _PARTIAL.fullmatch(path.name)
        if match and match["host"] == socket.gethostname() and not psutil.pid_exists(int(match["pid"])):
            path.unlink(missing_ok=True)


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
