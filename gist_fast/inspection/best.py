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

    def add(self, keys: Tensor, *values: Tensor) -> None:
        """Add entries: their keys ``[n]``, and what belongs to each, tensors of ``n`` rows."""
        if len(keys):
            self._parts.append((keys, *values))
            if self.most is not None:
                self._parts = [self.taken()]

    def taken(self) -> tuple[Tensor, ...]:
        """The keys from the highest to the lowest, and the values in that order; empty where nothing came."""
        if not self._parts:
            return ()
        columns = [torch.cat(column) for column in zip(*self._parts, strict=True)]
        order = columns[0].argsort(descending=True, stable=True)[: self.most]
        return tuple(column[order] for column in columns)
