"""The guide's embeddings of all texts met so far, for datasets that were not embedded before."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gist_fast.runtime.memory import free_memory, processes_here

logger = logging.getLogger(__name__)

SHARE = 0.5
"""Of the main memory that is free, what the next tables of embeddings may take at most, of all processes together."""
_FIRST_ROWS = 1024


class GuideMemory:
    """Embeddings by the digest of what they were computed from.

    They stay in main memory, in the type in which the guide gave them, so that a remembered embedding is the very
    one that was computed. Each distinct text takes a row of ``G`` numbers and some 150 bytes to find it by. The table
    of rows doubles when it is full. Once `SHARE` of the free memory does not hold the larger table, no text is added:
    the guide encodes the others each time.
    """

    def __init__(self) -> None:
        self._row_of: dict[bytes, int] = {}
        self._rows: Tensor | None = None  # [capacity, G]
        self._full = False

    def __len__(self) -> int:
        return len(self._row_of)

    def recall(self, keys: np.ndarray, encode: Callable[[list[int]], Tensor], device: torch.device) -> Tensor:
        """The embeddings of texts, ``[n, G]``, on `device`.

        Args:
            keys: ``[n]`` distinct digests (``numpy.void``).
            encode: embeds those at the given positions, ``[m, G]``.
            device: of the guide.
        """
        names = keys.tolist()
        missing = [k for k, name in enumerate(names) if name not in self._row_of]
        new = encode(missing) if missing else None
        if new is not None and len(missing) == len(names):
            self._add(names, new)
            return new
        assert self._rows is not None
        rows = torch.tensor([self._row_of.get(name, 0) for name in names])
        found = self._rows.index_select(0, rows).to(device)
        if new is not None:
            found[missing] = new
            self._add([names[k] for k in missing], new)
        return found

    def _add(self, names: list[bytes], embeddings: Tensor) -> None:
        """Remember them, if the table holds that many rows; it grows if it can."""
        held, count = 0 if self._rows is None else len(self._rows), len(self._row_of)
        needed = count + len(names)
        if needed > held:
            rows, width = max(needed, 2 * held, _FIRST_ROWS), embeddings.shape[1]
            if self._full:
                return
            # Of several processes on a machine each takes its part: their tables double at about the same step.
            if rows * width * embeddings.element_size() > SHARE * free_memory() / processes_here():
                self._full = True
                logger.warning(
                    "guide_cache: no memory for embeddings of more than %d texts; the guide encodes the others anew "
                    "each time.", count,
                )  # fmt: skip
                return
            grown = torch.empty(rows, width, dtype=embeddings.dtype)
            if self._rows is not None:
                grown[:count] = self._rows[:count]
            self._rows = grown
        assert self._rows is not None
        self._rows[count:needed] = embeddings
        self._row_of.update(zip(names, range(count, needed), strict=True))
