"""The folder of a training run: what it holds, what continuing or overwriting it means.

Overwriting deletes nothing before the new run has saved something. What an older run wrote waits in a folder of its own
(`ASIDE`), into which it is renamed when training begins. It is deleted once a checkpoint or the model of the new run
stands, and renamed back where the new run ends without one. A process that is killed in between leaves the older run
there; the next start in that folder puts it back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import PREVIOUS, remove, try_to_write
from gist_fast.training.checkpoints import (
    MANIFEST,
    checkpoint_folders,
    fault,
    last_whole,
    leftovers,
    whole_checkpoints,
)

logger = logging.getLogger(__name__)

FINAL = "final"
PART = ".part"
"""Added to a folder's name while it is written."""
ASIDE = "replaced-run"
"""Before the host and the process that put an older run aside: the name of the folder in which it waits."""
_MOVING = ".moving"
"""Added to that name while what it holds is renamed into it, or out of it."""
_ASIDE = re.compile(rf"{ASIDE}\.(?P<host>.+)-(?P<pid>\d+)({re.escape(_MOVING)})?")
_WRITTEN_BESIDES = {"eval": "*.csv", "runs": "events.out.tfevents.*"}
"""What a run leaves besides its models: the folders of the evaluators' tables and of TensorBoard's events, and how its
files are called. A folder that holds another file is left as it is."""
_OF_CHECKPOINTS = {"trainer_state.json", MANIFEST, "modules.json", "config.json", "model.safetensors", "optimizer.pt"}
"""Files of which a checkpoint has some, even a damaged one."""
_LONGEST_WAIT = 60.0
"""Seconds that other ranks wait for the first one to put an older run back."""


def prepare_folder(folder: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """Check that a run may go to `folder`, and can.

    Nothing is changed, but that a run which a killed process left aside is put back; see `settle`.

    Returns:
        The checkpoint to continue from, where `resume` asks for that.

    Raises:
        InputError: the folder holds a run and neither option was given, there is nothing to resume from, or nothing
            can be written there.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; keep one.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; training.output_dir must be a folder, or not exist yet.")
    for place in (folder, *(folder / name for name in _WRITTEN_BESIDES)):
        try_to_write(place, "training.output_dir", "choose another folder")
    _settle_once(folder)
    if resume:
        try:
            last = last_whole(folder)
        except InputError as error:
            raise InputError(f"{str(error).removesuffix('.')}; leave out --resume to start a run there.") from None
        broken = [f"{path.name} ({said})" for path in checkpoint_folders(folder) if (said := fault(path))]
        broken += [path.name for path in leftovers(folder)]
        if broken:
            logger.warning("%s: not whole, and passed over: %s", folder, ", ".join(broken))
        return last
    held = [path.name for path in _models(folder)]
    if held and not overwrite:
        shown = ", ".join(held if len(held) <= 3 else [*held[:2], "...", held[-1]])
        raise InputError(
            f"{folder}: already holds a run ({shown}); continue it with --resume, start anew with --overwrite "
            "(which deletes it), or choose another training.output_dir."
        )
    return None


def check_sources(folder: Path, sources: Iterator[tuple[str, str]]) -> None:
    """Refuse to replace a run of which the new one reads something, or what is no run's.

    Args:
        sources: what a configuration names, by its key; texts that are no paths may be among them.

    Raises:
        InputError: naming the key and the path, or the folder.
    """
    for checkpoint in checkpoint_folders(folder):
        names = {path.name for path in checkpoint.iterdir()}
        if names and not names & _OF_CHECKPOINTS:
            raise InputError(
                f"{checkpoint}: holds nothing of a checkpoint, and --overwrite would delete it; move it away, or "
                "choose another training.output_dir."
            )
    places = [place for path in written(folder) for place in {path.absolute(), path.parent.resolve() / path.name}]
    for key, named in sources:
        if not named or not os.path.lexists(named):
            continue
        read = {Path(os.path.abspath(named)), Path(named).resolve()}
        if inside := next((place for place in places if any(path.is_relative_to(place) for path in read)), None):
            raise InputError(
                f"{key}: {named} lies in what --overwrite deletes ({inside.name}); copy it elsewhere, or choose "
                "another training.output_dir."
            )


def kept_in(folder: Path) -> str:
    """What a run that was stopped has kept, as a sentence."""
    kept = [path.name for path in whole_checkpoints(folder)[-1:]]
    hint = " (continue with --resume)" if kept else ""
    kept += [FINAL] if (folder / FINAL).is_dir() else []
    return f"{folder} holds {', '.join(kept) or 'no checkpoint'}{hint}."


def written(folder: Path) -> list[Path]:
    """What a run wrote to `folder`: checkpoints, the model, tables, events, and what is left of those half-written."""
    besides = [folder / name for name, of_a_run in _WRITTEN_BESIDES.items() if _holds_only(folder / name, of_a_run)]
    parts = [*_models(folder), *besides, *leftovers(folder)]
    parts += [folder / f"{FINAL}{PART}", folder / f"{FINAL}{PREVIOUS}"]
    return [path for path in parts if os.path.lexists(path)]


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """A context in which what an older run wrote to `folder` is out of the way; at its end, see `settle`."""
    parts = written(folder)
    if parts:
        aside = folder / f"{ASIDE}.{socket.gethostname()}-{os.getpid()}"
        moving = aside.with_name(aside.name + _MOVING)
        moving.mkdir()
        for path in parts:
            os.replace(path, moving / path.name)
        os.replace(moving, aside)
        logger.info("%s: the run there waits in %s until the new one has saved something.", folder, aside.name)
    try:
        yield
    finally:
        settle(folder)


def settle(folder: Path) -> None:
    """End what `replacing` began, wherever that was cut off.

    The older run goes where the new one has a checkpoint or a model. Else it is put back, in the place of what the new
    one left.
    """
    for aside in _aside(folder):
        moving = aside
        if not aside.name.endswith(_MOVING):
            names = ", ".join(sorted(path.name for path in aside.iterdir()))
            if whole_checkpoints(folder) or os.path.lexists(folder / FINAL):
                remove(aside)
                logger.info("Deleted from %s: %s.", folder, names)
                continue
            for path in written(folder):
                remove(path)
            moving = aside.with_name(aside.name + _MOVING)
            os.replace(aside, moving)
        # Each name is in one of the two folders, so this may be cut off too.
        back = sorted(path.name for path in moving.iterdir())
        for name in back:
            if os.path.lexists(folder / name):
                remove(folder / name)  # of the new run, in whatever shape
            os.replace(moving / name, folder / name)
        moving.rmdir()
        logger.warning("%s: put back, as the run that was to replace it saved nothing: %s.", folder, ", ".join(back))


def _settle_once(folder: Path) -> None:
    """`settle`, in the first of several processes; the others wait for it.

    Raises:
        InputError: the process that put the run aside is still at it.
    """
    end = time.monotonic() + _LONGEST_WAIT
    while os.environ.get("RANK", "0") != "0" and _aside(folder) and time.monotonic() < end:
        time.sleep(0.1)
    for aside in _aside(folder):
        if _is_of_a_running_process(aside):
            raise InputError(
                f"{folder}: process {_owner(aside)[1]} is replacing the run there; wait for it, or end it first. (The "
                f"older run waits in {aside.name}.)"
            )
    settle(folder)


def _aside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{ASIDE}.*") if _ASIDE.fullmatch(path.name) and path.is_dir())


def _owner(aside: Path) -> tuple[str, int]:
    match = _ASIDE.fullmatch(aside.name)
    assert match is not None, aside
    return match["host"], int(match["pid"])


def _is_of_a_running_process(aside: Path) -> bool:
    """Whether the process that put a run aside runs, as far as this machine can tell; another may have its number."""
    import psutil

    host, pid = _owner(aside)
    if host != socket.gethostname() or pid == os.getpid():
        return False
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= aside.stat().st_mtime
    except (psutil.Error, FileNotFoundError):
        return False


def _holds_only(folder: Path, pattern: str) -> bool:
    """Whether a folder is there, and all files below it are called so. A link goes, and what it points to stays."""
    if folder.is_symlink() or not folder.is_dir():
        return True
    return all(path.is_dir() or path.match(pattern) for path in folder.rglob("*"))


def _models(folder: Path) -> list[Path]:
    found = checkpoint_folders(folder)
    return found + ([folder / FINAL] if os.path.lexists(folder / FINAL) else [])
