"""Whether a folder can be written to, found out before the work whose results go there."""

from __future__ import annotations

import tempfile
from pathlib import Path


def try_to_write(folder: Path) -> None:
    """Write a file in a folder that is there; nothing is left behind.

    Raises:
        OSError: it cannot be done.
    """
    # Whoever may write by the rights of the folder may still not: a disk can be full, or read-only.
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".gist-fast.", suffix=".part") as file:
        file.write(b" ")
        file.flush()
