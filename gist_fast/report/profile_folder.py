"""The folder of a profile: its figures, its pictures and its trace, all of them or nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_fast.pipeline.run_folder import PART
from gist_fast.report.facts import machine_facts
from gist_fast.report.profile import save_pictures
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import replace_folder

if TYPE_CHECKING:
    from gist_fast.pipeline.plan import RunPlan
    from gist_fast.profiling.run import Profile

logger = logging.getLogger(__name__)

TRACE, FIGURES = "trace.json.gz", "profile.json"
_OURS = {TRACE, FIGURES, *(f"{name}.{ending}" for name in ("steps", "steps-device") for ending in ("svg", "png"))}
"""All that a folder of a profile may hold."""


def check_folder(target: Path, overwrite: bool) -> None:
    """Raise `InputError` where a profile could not be written to `target`; nothing is left behind."""
    if target.exists() and not target.is_dir():
        raise InputError(f"--output: {target} is a file; name a folder that does not exist yet.")
    held = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    strange = [name for name in held if name not in _OURS]
    if strange:
        raise InputError(f"--output: {target} holds {strange[0]}, which is no profile's; name a folder of its own.")
    if held and not overwrite:
        raise InputError(f"--output: {target} holds a profile; give --overwrite to replace it, or another --output.")
    part = _part(target.resolve())
    there = next(folder for folder in part.parents if folder.exists())
    probe = there / part.name
    try:
        # Rights alone do not tell: a disk can be full or read-only, a name too long, and /proc lets nobody write.
        probe.mkdir()
        (probe / FIGURES).write_text(" ")
    except OSError as error:
        raise InputError(
            f"--output: {target} cannot be written ({there}: {error.strerror or error}); name another folder."
        ) from None
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def write_folder(found: Profile, result: dict[str, Any], trace: Path, target: Path) -> list[str]:
    """Put a profile in place; the paths written.

    Args:
        result: the figures.
        trace: a file, which is moved.
    """
    target = target.resolve()
    part = _part(target)
    try:
        part.mkdir(parents=True)
        shutil.move(trace, part / TRACE)
        (part / FIGURES).write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        try:
            save_pictures(found, part)
        except InputError as error:
            logger.info("No picture: %s.", error)
        replace_folder(part, target)
    except OSError as error:
        raise InputError(f"--output: {target} cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sorted(str(path) for path in target.iterdir())


def profile_facts(plan: RunPlan, found: Profile) -> dict[str, str]:
    """What was profiled, where and with which versions."""
    config, arguments, half = plan.config, plan.arguments, plan.arguments.half_precision
    return {
        "configuration": config.source,
        "student": config.student.path,
        "guide": config.guide.path if config.guide else ("none" if config.unguided else "in the data"),
        "pairs a step": str(round(sum(found.pairs) / len(found.pairs))),
        "steps": f"{len(found.steps)}, after {len(found.warmup_ms)} to warm up",
        "computes in": "float32" if half is None else str(half).removeprefix("torch."),
        "dataloader workers": str(arguments.dataloader_num_workers),
        **machine_facts(arguments.device.type),
    }


def _part(target: Path) -> Path:
    """Where a profile is written before it is put in place."""
    return target.with_name(f".{target.name}.{os.getpid()}{PART}")
