"""Checkpoints that are whole or not there: how they are written, told from broken ones, and given up again.

The trainer writes a checkpoint into a folder of another name (`UNFINISHED`), flushes it to the disk with a list of its
files and their sizes (`MANIFEST`), and only then renames it to ``checkpoint-<step>``. Older ones go after that, each
renamed before it is deleted. So a process may die at any moment: whatever is called ``checkpoint-<step>`` is whole, and
one whole checkpoint stays once there was one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import remove, replace_folder

UNFINISHED = "unfinished-checkpoint"
"""The folder in a run's folder in which a checkpoint is written."""
MANIFEST = "gist_fast_manifest.json"
"""The names and sizes of a checkpoint's files, its last file to be written."""
_STATE = "trainer_state.json"
_REPLACED = ".replaced"
_DELETED = "deleted-"
_CHECKPOINT = re.compile(rf"checkpoint-(\d+)({re.escape(_REPLACED)})?")
_LEFTOVER = re.compile(rf"({UNFINISHED}|{_DELETED}checkpoint-\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. The message names the folder, the space it needs and the space there is."""


def step_of(path: Path) -> int:
    """The step after which a checkpoint was made, by its name."""
    match = _CHECKPOINT.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def checkpoint_folders(run: Path) -> list[Path]:
    """The folders of a run called ``checkpoint-<step>``, whole or not, oldest first."""
    if not run.is_dir():
        return []
    found = [path for path in run.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    # One that was being replaced stands in for its successor, should that be missing.
    return sorted(found, key=lambda path: (step_of(path), not path.name.endswith(_REPLACED)))


def fault(path: Path) -> str | None:
    """What a checkpoint lacks to be whole, or None.

    One without a manifest (of another trainer) is taken for whole if its ``trainer_state.json``, which trainers write
    last, can be read. One that its run deletes meanwhile is not whole.
    """
    # The manifest is read first: without it `_STATE` has to be there afterwards, so a folder that goes away in between
    # is never taken for another trainer's.
    try:
        sizes = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["bytes"]
    except FileNotFoundError:
        sizes = {}
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    try:
        json.loads((path / _STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{_STATE} is missing"
    except (OSError, ValueError):
        return f"{_STATE} cannot be read"
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def holds_model_alone(path: Path) -> bool:
    """Whether a checkpoint lacks the optimizer, as ``save_only_model`` leaves it out."""
    return not any((path / name).exists() for name in ("optimizer.pt", "optimizer.bin")) and not any(
        path.glob("global_step*")  # DeepSpeed's
    )


def whole_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return [path for path in checkpoint_folders(run) if fault(path) is None]


def leftovers(run: Path) -> list[Path]:
    """What a process that died while it wrote or deleted a checkpoint left in a run's folder."""
    return sorted(path for path in run.iterdir() if _LEFTOVER.fullmatch(path.name)) if run.is_dir() else []


def last_whole(run: Path) -> Path:
    """The last whole checkpoint of a run.

    Raises:
        InputError: there is none; says what is wrong with those there are.
    """
    whole = whole_checkpoints(run)
    if whole:
        return whole[-1]
    broken = "; ".join(f"{path.name}: {fault(path)}" for path in checkpoint_folders(run))
    raise InputError(f"{run}: holds no checkpoint to resume from" + (f" ({broken})." if broken else "."))


def tidy(run: Path) -> None:
    """Delete the `leftovers`, and what stayed beside the checkpoint that replaced it."""
    replaced = [path for path in checkpoint_folders(run) if path.name.endswith(_REPLACED)]
    superseded = [path for path in replaced if fault(path.with_name(path.name.removesuffix(_REPLACED))) is None]
    for path in [*leftovers(run), *superseded]:
        shutil.rmtree(path, ignore_errors=True)


def publish(new: Path, place: Path) -> None:
    """Flush a finished checkpoint to the disk and give it its name, in the place of one that may have it."""
    sizes = {str(file.relative_to(new)): file.stat().st_size for file in _files(new)}
    (new / MANIFEST).write_text(json.dumps({"bytes": sizes}, indent=1), encoding="utf-8")
    replace_folder(new, place, _REPLACED)


def delete_old(run: Path, keep: int | None, protected: str | None) -> None:
    """Delete the oldest checkpoints but `keep`; never the last one, nor the one whose path is `protected`.

    Args:
        keep: None or 0 to keep all.
    """
    if not keep:
        return
    held = checkpoint_folders(run)
    spared = {path for path in held if protected is not None and path.absolute() == Path(protected).absolute()}
    spared.update(held[-1:])
    for path in [path for path in held if path not in spared][: max(len(held) - max(keep, len(spared)), 0)]:
        gone = path.with_name(_DELETED + path.name.removesuffix(_REPLACED))
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        with contextlib.suppress(OSError):
            remove(gone)


@contextlib.contextmanager
def explained(run: Path, name: str, estimate: int) -> Iterator[None]:
    """Clean up after a checkpoint that could not be written, and say how much space it needs and which one is left.

    Args:
        estimate: its bytes, as far as known; the last whole checkpoint's, if larger, are told instead.

    Raises:
        CheckpointError: in the place of what went wrong inside.
    """
    try:
        yield
    except BaseException as error:
        whole = whole_checkpoints(run)
        shutil.rmtree(run / UNFINISHED, ignore_errors=True)
        # torch's writer raises RuntimeError and safetensors' an error of its own where the disk is full.
        if not isinstance(error, (OSError, RuntimeError)) and type(error).__name__ != "SafetensorError":
            raise
        needed = max([estimate, *(size_of(path) for path in whole[-1:])])
        free = shutil.disk_usage(next(path for path in (run, *run.absolute().parents) if path.exists())).free
        kept = f"{whole[-1].name} is whole and stays" if whole else "there is no older one"
        raise CheckpointError(
            f"{run}: {name} could not be saved ({' '.join(str(error).split())}). It needs about {_mib(needed)}; "
            f"{_mib(free)} are free there. What was written of it is deleted; {kept}."
        ) from error


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in _files(folder))


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
