"""The entries of a stream that score highest, kept while all of it goes by."""

from __future__ import annotations

import torch
from torch import Tensor


class Best:
    """Keeps the `most` entries with the highest keys; of equal ones those that came first.

    Args:
        most: how many; None for all.
    """

    def __init__(self, most: int | None) -> None:
        self.most = most
        self._parts: list[tuple[Tensor, ...]] = []
        self._held = 0
        self._least: float | None = None

    def add(self, keys: Tensor, *values: Tensor) -> None:
        """Add entries: their keys ``[n]``, and what belongs to each, tensors of ``n`` rows."""
        if self.most == 0 or not len(keys):
            return
        if self._least is not None:
            better = keys > self._least
            keys, values = keys[better], tuple(value[better] for value in values)
        self._parts.append((keys, *values))
        self._held += len(keys)
        if self.most is not None and self._held > 2 * self.most:
            self._prune()

    def taken(self) -> tuple[Tensor, ...]:
        """The keys from the highest to the lowest, and the values in that order; empty where nothing came."""
        if not self._parts:
            return ()
        self._prune()
        return self._parts[0]

    def _prune(self) -> None:
        columns = [torch.cat(column) for column in zip(*self._parts, strict=True)]
        order = columns[0].argsort(descending=True, stable=True)[: self.most]
        self._parts = [tuple(column[order] for column in columns)]
        self._held = len(order)
        if self._held == self.most:
            self._least = float(self._parts[0][0][-1])
