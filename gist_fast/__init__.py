"""gist_fast: fast, guided fine-tuning of text-embedding models (GISTEmbed, arXiv 2402.16829).

Everything here is imported at its first use, so that ``import gist_fast`` itself is immediate.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from gist_fast.moved import MovedModules, new_name
from gist_fast.version import __version__

if TYPE_CHECKING:
    from gist_fast.functional.function import guided_contrastive_loss
    from gist_fast.functional.stats import GuidedContrastiveStats
    from gist_fast.guide_columns import embed_guide
    from gist_fast.guide_columns.mine import mine_negatives
    from gist_fast.training.arguments import GISTTrainingArguments
    from gist_fast.training.trainer import GISTTrainer

_HOMES = {
    "guided_contrastive_loss": "functional.function",
    "GuidedContrastiveStats": "functional.stats",
    "GISTTrainer": "training.trainer",
    "GISTTrainingArguments": "training.arguments",
    "embed_guide": "guide_columns",
    "mine_negatives": "guide_columns.mine",
}

__all__ = [
    "GISTTrainer",
    "GISTTrainingArguments",
    "GuidedContrastiveStats",
    "__version__",
    "embed_guide",
    "guided_contrastive_loss",
    "mine_negatives",
]

# Before the finder of files, which would load a module of a package that moved a second time.
sys.meta_path.insert(0, MovedModules())


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"gist_fast.{_HOMES[name]}"), name)
    if new_name(f"gist_fast.{name}"):
        return importlib.import_module(f"gist_fast.{name}")
    raise AttributeError(f"module 'gist_fast' has no attribute {name!r}")
