"""The folder of a training run: what it holds, what continuing or overwriting it means."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from gist_fast.errors import InputError

logger = logging.getLogger(__name__)

FINAL = "final"
PART = ".part"
"""Added to a folder's name while it is written."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WRITTEN_BESIDES = ("eval", "runs")
"""What a run leaves besides its models: the evaluators' tables and TensorBoard's events."""


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. One that was cut off while it was written is none."""
    return [path for path in _checkpoint_folders(folder) if (path / "trainer_state.json").is_file()]


def prepare_folder(folder: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """Check that a run may go to `folder`; nothing is written or removed.

    Returns:
        The checkpoint to continue from, where `resume` asks for that.

    Raises:
        InputError: the folder holds a run and neither option was given, or there is nothing to resume from.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; keep one.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; training.output_dir must be a folder, or not exist yet.")
    whole = checkpoints(folder)
    if resume:
        if not whole:
            raise InputError(f"{folder}: holds no checkpoint to resume from; leave out --resume to start a run there.")
        broken = [path.name for path in _checkpoint_folders(folder) if path not in whole]
        if broken:
            logger.warning("%s: not whole, and passed over: %s", folder, ", ".join(broken))
        return whole[-1]
    held = [path.name for path in _models(folder)]
    if held and not overwrite:
        raise InputError(
            f"{folder}: already holds a run ({_listed(held)}); continue it with --resume, start anew with --overwrite "
            "(which deletes it), or choose another training.output_dir."
        )
    return None


def clear_folder(folder: Path) -> list[str]:
    """Delete what an earlier run wrote to `folder`, and nothing else; return the names of what is gone."""
    parts = [*_models(folder), *(folder / name for name in _WRITTEN_BESIDES), folder / f"{FINAL}{PART}"]
    gone = [path for path in parts if path.is_dir()]
    for path in gone:
        shutil.rmtree(path)
    return [path.name for path in gone]


def final_part(folder: Path) -> Path:
    """Where to write the final model, empty; `replace_folder` then puts it in its place."""
    part = folder / f"{FINAL}{PART}"
    shutil.rmtree(part, ignore_errors=True)
    return part


def replace_folder(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`, so that at every moment one of the two is whole under a findable name."""
    previous = old.with_name(old.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if old.exists():
        os.replace(old, previous)
    os.replace(new, old)
    shutil.rmtree(previous, ignore_errors=True)


def _models(folder: Path) -> list[Path]:
    found = _checkpoint_folders(folder)
    return found + ([folder / FINAL] if (folder / FINAL).exists() else [])


def _checkpoint_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def _listed(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 3 else [*names[:2], "...", names[-1]])
