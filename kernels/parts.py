"""The rectangle of scores that the kernels work on, and its operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gist_fast.kernels.layout import TILE, tiles
from torch import Tensor

Rows = Callable[[slice], Tensor]
"""Gives some rows of an operand, contiguous. What it gives may be made for the occasion, so it is asked a chunk at a
time."""


@dataclass(frozen=True)
class Part:
    """``R`` rows against ``C`` columns. Widths ``D`` and ``G`` are multiples of the configuration's BLOCK_K."""

    rows: Tensor
    """``[R, D]``, contiguous: row i is compared with ``limits[i]`` and feeds the logsumexp of anchor i."""
    columns: Tensor
    """``[C, D]``, contiguous."""
    guide_rows: Rows | None
    """Of ``[R, G]``; None where no guide decides, or the student itself."""
    guide_columns: Rows | None
    """Of ``[C, G]``."""
    excluded: int
    """Column ``excluded + i`` never counts in row i; may lie outside."""
    symmetric: bool
    """Rows and columns are one and the same tensor, and the excluded entries are the diagonal."""
    bits: Tensor | None
    """int32 words in the order of `gist_fast.kernels.layout`; None where not kept."""

    @property
    def compared(self) -> int:
        """Pairs that the part compares."""
        count, width = self.rows.shape[0], self.columns.shape[0]
        inside = min(width - self.excluded, count) - max(0, -self.excluded)
        return count * width - max(0, inside)

    @property
    def padded(self) -> int:
        """Pairs in its tiles, those outside the matrix included."""
        return tiles(self.rows.shape[0]) * tiles(self.columns.shape[0]) * TILE * TILE


@dataclass(frozen=True)
class Chunk:
    """A rectangle of tiles that one launch computes, ``[row_tiles, column_tiles]`` from a first tile on."""

    row: int
    column: int
    row_tiles: int
    column_tiles: int

    @property
    def rows(self) -> slice:
        """The rows it covers, which may end beyond the part."""
        return slice(self.row * TILE, (self.row + self.row_tiles) * TILE)

    @property
    def columns(self) -> slice:
        return slice(self.column * TILE, (self.column + self.column_tiles) * TILE)


def chunks(part: Part, row_tiles: int, column_tiles: int) -> Iterator[Chunk]:
    """Cover the part by chunks of at most that size; of a symmetric one, only what reaches above the diagonal.

    Of a symmetric part chunks must be square to be on the diagonal or wholly above it, which `gist_fast.kernels.staged`
    needs.
    """
    across = tiles(part.columns.shape[0])
    down = tiles(part.rows.shape[0])
    for r in range(0, down, row_tiles):
        for c in range(r if part.symmetric else 0, across, column_tiles):
            yield Chunk(r, c, min(row_tiles, down - r), min(column_tiles, across - c))
