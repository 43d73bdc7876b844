"""From a configuration to a trained model: what ``gist-fast train`` and ``profile`` share with Python users.

`prepare` checks a configuration and makes a `RunPlan` of it, `make_trainer` loads the models, and `train_and_save`
trains. Each is imported at its first use, because not every module here needs torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gist_fast.pipeline.plan import RunPlan, make_trainer, prepare
    from gist_fast.pipeline.train import train_and_save

__all__ = ["RunPlan", "make_trainer", "prepare", "train_and_save"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'gist_fast.pipeline' has no attribute {name!r}")
    module = "train" if name == "train_and_save" else "plan"
    return getattr(importlib.import_module(f"gist_fast.pipeline.{module}"), name)
