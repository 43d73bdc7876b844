"""The folder of a training run: what it holds, what continuing or overwriting it means."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import PREVIOUS, try_to_write
from gist_fast.training.checkpoints import checkpoint_folders, fault, last_whole, leftovers, whole_checkpoints

logger = logging.getLogger(__name__)

FINAL = "final"
PART = ".part"
"""Added to a folder's name while it is written."""
_WRITTEN_BESIDES = ("eval", "runs")
"""What a run leaves besides its models: the evaluators' tables and TensorBoard's events."""


def prepare_folder(folder: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """Check that a run may go to `folder`, and can; nothing is changed.

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
    try_to_write(folder, "training.output_dir", "choose another folder")
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


def kept_in(folder: Path) -> str:
    """What a run that was stopped has kept, as a sentence."""
    kept = [path.name for path in whole_checkpoints(folder)[-1:]]
    hint = " (continue with --resume)" if kept else ""
    kept += [FINAL] if (folder / FINAL).is_dir() else []
    return f"{folder} holds {', '.join(kept) or 'no checkpoint'}{hint}."


def clear_folder(folder: Path) -> list[str]:
    """Delete what an earlier run wrote to `folder`, and nothing else; return the names of what is gone."""
    parts = [*_models(folder), *(folder / name for name in _WRITTEN_BESIDES), *leftovers(folder)]
    parts += [folder / f"{FINAL}{PART}", folder / f"{FINAL}{PREVIOUS}"]
    gone = [path for path in parts if path.is_dir()]
    for path in gone:
        shutil.rmtree(path)
    return [path.name for path in gone]


def _models(folder: Path) -> list[Path]:
    found = checkpoint_folders(folder)
    return found + ([folder / FINAL] if (folder / FINAL).exists() else [])
