"""The guide's embeddings of all texts met so far, for datasets that were not embedded before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_FIRST_ROWS = 1024


class GuideMemory:
    """Embeddings by the digest of what they were computed from.

    They stay in main memory, in the type in which the guide gave them, so that a remembered embedding is the very
    one that was computed: ``rows * G * 4`` bytes in float32.
    """

    def __init__(self) -> None:
        self._row_of: dict[bytes, int] = {}
        self._rows: Tensor | None = None  # [capacity, G]

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
        if new is not None:
            self._add([names[k] for k in missing], new)
        assert self._rows is not None
        rows = torch.tensor([self._row_of[name] for name in names])
        return self._rows.index_select(0, rows).to(device)

    def _add(self, names: list[bytes], embeddings: Tensor) -> None:
        count = len(self._row_of)
        if self._rows is None:
            self._rows = torch.empty(_FIRST_ROWS, embeddings.shape[1], dtype=embeddings.dtype)
        needed = count + len(names)
        if needed > len(self._rows):
            grown = torch.empty(max(needed, 2 * len(self._rows)), self._rows.shape[1], dtype=self._rows.dtype)
            grown[:count] = self._rows[:count]
            self._rows = grown
        self._rows[count:needed] = embeddings
        self._row_of.update(zip(names, range(count, needed), strict=True))
