"""What the demo trains with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Sizes and hyperparameters of a run; those of the guided training and of the one beside it are the same.

    The default was chosen on the dev texts, one seed, within what two cores do in four minutes. Learning rate: 1e-4
    was worse than 3e-4, 5e-4 a little better still, with the guide and without. Temperature: 0.02 was no better than
    0.05 with the guide and equal without. Margin: -0.1 (fewer pairs dropped) changed nothing. Contrasting anchors and
    positives among themselves, or not: equal within chance. None of these was tuned to favour the guide.
    """

    train_pairs: int | None
    max_tokens: int  # longer pairs are left out: on a CPU the longest text of a batch sets what the batch costs
    batch_size: int
    learning_rate: float
    temperature: float
    margin: float
    epochs: int
    warmup: float  # share of the steps
    dropout: float  # none: too few steps to overfit in, and drawing it is slow on a CPU
    dev_queries: int
    dev_documents: int | None
    dev_evaluations: int  # on the way, the one before the first step not counted
    test_queries: int
    test_documents: int | None

    def asdict(self) -> dict[str, Any]:
        """As a plain dictionary, for the report."""
        return dataclasses.asdict(self)


DEFAULT = Recipe(
    train_pairs=6144,
    max_tokens=18,
    batch_size=128,
    learning_rate=5e-4,
    temperature=0.05,
    margin=0.0,
    epochs=1,
    warmup=0.1,
    dropout=0.0,
    dev_queries=200,
    dev_documents=1000,
    dev_evaluations=3,
    test_queries=600,
    test_documents=None,
)

QUICK = dataclasses.replace(
    DEFAULT,
    train_pairs=128,
    batch_size=32,
    dev_queries=20,
    dev_documents=40,
    dev_evaluations=1,
    test_queries=40,
    test_documents=120,
)
