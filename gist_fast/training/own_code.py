"""The code that a model brings with it, saved beside its weights where loading looks for it."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from transformers.dynamic_module_utils import get_relative_import_files

_BROUGHT = "transformers_modules."
"""Where transformers puts the code that came with a model."""


def save_own_code(model: nn.Module, folder: Path) -> None:
    """Copy the files of the model's own modules into `folder`, and those that they import from beside them.

    sentence-transformers puts a module's file into the module's folder, and looks for it in the model's.
    """
    for file in _files(model):
        shutil.copyfile(file, folder / file.name)


def _files(model: nn.Module) -> Iterator[Path]:
    for module in model.modules():
        for cls in {type(module), type(getattr(module, "config", None))}:
            if cls.__module__.startswith(_BROUGHT):
                file = inspect.getfile(cls)
                yield from (Path(path) for path in (file, *get_relative_import_files(file)))
