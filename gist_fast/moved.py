"""Modules under the names that they once had, so that old imports, and pickles in old checkpoints, keep working."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "gist_fast.attention": "gist_fast.pipeline.attention",
    "gist_fast.backends": "gist_fast.functional.backends",
    "gist_fast.batches": "gist_fast.training.no_duplicates_sampler",
    "gist_fast.callbacks": "gist_fast.training.callbacks",
    "gist_fast.checkpoints": "gist_fast.training.checkpoints",
    "gist_fast.collator": "gist_fast.training.collator",
    "gist_fast.doctor": "gist_fast.pipeline.doctor",
    "gist_fast.errors": "gist_fast.runtime.errors",
    "gist_fast.function": "gist_fast.functional.function",
    "gist_fast.long_runs": "gist_fast.training.resume",
    "gist_fast.losses.micro_batches": "gist_fast.losses.mini_batches",
    "gist_fast.mteb_tasks": "gist_fast.evaluation.mteb_tasks",
    "gist_fast.operands": "gist_fast.functional.operands",
    "gist_fast.scored_pairs": "gist_fast.evaluation.scored_pairs",
    "gist_fast.stats": "gist_fast.functional.stats",
    "gist_fast.temperature_schedule": "gist_fast.training.temperature_schedule",
    "gist_fast.trainer": "gist_fast.training.trainer",
    "gist_fast.training_args": "gist_fast.training.arguments",
}
"""Old name to new. What lies in a package that moved, moved with it."""


def new_name(old: str) -> str | None:
    """The name that a module has now; None where it did not move."""
    if not old.startswith("gist_fast."):
        return None  # asked of every import of the process
    for name, new in MOVED.items():
        if old == name or old.startswith(f"{name}."):
            return new + old.removeprefix(name)
    return None


def names_in(package: str, *modules: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package that once was one module, whose names now lie in several."""

    def find(name: str) -> Any:
        for module in () if name.startswith("_") else modules:
            home = importlib.import_module(f"{package}.{module}")
            if hasattr(home, name):
                return getattr(home, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


class MovedModules(MetaPathFinder, Loader):
    """Finds a module under its old name, and gives the one under the new name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if new_name(fullname) else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = new_name(old)
        assert new is not None
        warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=2)
        # Python hands out what stands here after this call.
        sys.modules[old] = importlib.import_module(new)
