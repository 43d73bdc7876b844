"""gist_fast: fast, guided fine-tuning of text-embedding models (GISTEmbed, arXiv 2402.16829).

Everything here is imported at its first use, so that ``import gist_fast`` itself is immediate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gist_fast.function import guided_contrastive_loss
    from gist_fast.guide_columns import embed_guide
    from gist_fast.stats import GuidedContrastiveStats
    from gist_fast.trainer import GISTTrainer
    from gist_fast.training_args import GISTTrainingArguments

_HOMES = {
    "guided_contrastive_loss": "function",
    "GuidedContrastiveStats": "stats",
    "GISTTrainer": "trainer",
    "GISTTrainingArguments": "training_args",
    "embed_guide": "guide_columns",
}

__all__ = [
    "GISTTrainer",
    "GISTTrainingArguments",
    "GuidedContrastiveStats",
    "__version__",
    "embed_guide",
    "guided_contrastive_loss",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"gist_fast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gist_fast' has no attribute {name!r}")
