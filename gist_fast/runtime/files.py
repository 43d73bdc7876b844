"""Files and folders that are whole or not there: written beside their place under another name, flushed, renamed.

A process may die at any moment: under a name that a reader looks for stands what was there before, or all of what
was written.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from gist_fast.runtime.errors import InputError

PREVIOUS = ".previous"
"""Added to a folder's name while it is replaced."""
_PARTIAL = re.compile(r"\.(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]+\.partial")


def expanded(path: str | Path) -> Path:
    """A path with ``~`` as the home directory.

    Raises:
        InputError: it begins with a user that has none.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no home directory of that user; write the path out.") from error


def try_to_write(folder: Path, name: str, advice: str, file: str = "probe") -> None:
    """Try, before the work whose results go to `folder`, to write there, or where it would be made; nothing is left.

    Args:
        file: what will be written there, whose name could be too long.

    Raises:
        InputError: it cannot be done; the message begins with `name` and ends in `advice`.
    """
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if there.is_symlink() and not os.path.exists(there):
        raise InputError(f"{name}: {there} is a link to {os.readlink(there)}, which does not exist; {advice}.")
    if not there.is_dir():
        raise InputError(f"{name}: {there} is a file, not a folder; {advice}.")
    try:
        str(folder / file).encode()
    except UnicodeEncodeError:
        raise InputError(f"{name}: {str(folder / file)!a} is not UTF-8, as names must be; {advice}.") from None
    try:
        # The rights of the folder do not tell: a disk can be full, or read-only.
        with tempfile.TemporaryDirectory(dir=there, prefix=".gist-fast.", suffix=".part") as probe:
            below = probe / folder.relative_to(there)
            below.mkdir(parents=True, exist_ok=True)
            (below / file).write_bytes(b" ")
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: {there} cannot be written to ({said}); {advice}.") from None


@contextlib.contextmanager
def partial_file(folder: Path) -> Iterator[Path]:
    """A path to write to, in a folder that is made where it is missing; `put` then gives the file its name.

    What is still there at the end is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = _partial_name(folder)
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def put(partial: Path, path: Path, *, overwrite: bool = True) -> None:
    """Give a written file its name, at once; what it holds is on the disk by then.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is False; it stays as it is.
    """
    flush(partial)
    if not overwrite:
        try:
            path.hardlink_to(partial)  # unlike a rename it never replaces
            return
        except OSError:
            if path.exists():
                raise FileExistsError(f"{path}: exists") from None
        # A file system without hard links.
    os.replace(partial, path)


def write_whole(path: Path, text: str, *, overwrite: bool = False) -> None:
    """Write a file and the folders above it: all of it, or nothing.

    Raises:
        FileExistsError: see `put`.
    """
    with partial_file(path.absolute().parent) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
        put(partial, path, overwrite=overwrite)


def remove_leftovers(folder: Path) -> None:
    """Remove the files and folders that processes of this machine which no longer run left half-written."""
    import psutil

    for path in folder.glob(".*.partial"):
        match = _PARTIAL.fullmatch(path.name)
        if match and match["host"] == socket.gethostname() and not psutil.pid_exists(int(match["pid"])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def replace_folder(new: Path, old: Path, previous: str = PREVIOUS) -> None:
    """Put `new` in the place of `old`, so that at every moment one of the two is whole under a findable name.

    Args:
        previous: added to the name of `old` until `new` stands in its place; and a number, where that name is taken.
    """
    for path in [*new.rglob("*"), new]:
        flush(path)
    kept = None
    if os.path.lexists(old):  # a link, which may lead nowhere, is replaced itself
        endings = (f"{previous}-{number}" if number > 1 else previous for number in itertools.count(1))
        places = (old.with_name(old.name + ending) for ending in endings)
        kept = next(place for place in places if not os.path.lexists(place))
        os.replace(old, kept)
    os.replace(new, old)
    flush(old.parent)
    if kept is not None:
        with contextlib.suppress(OSError):
            remove(kept)


def remove(path: Path) -> None:
    """Remove a file, a folder with all it holds, or a link, but not what that leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to, beside `folder`, whose place it takes at the end.

    What is still there where writing failed is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    partial = _partial_name(folder.parent)
    partial.mkdir()
    try:
        yield partial
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial_name(folder: Path) -> Path:
    """Of something half-written in `folder`; no other process has it."""
    return folder / f".{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names a folder holds."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
