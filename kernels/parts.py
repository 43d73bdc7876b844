"""The rectangle of scores that the kernels work on: its operands, and what decides its masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gist_fast.kernels.layout import TILE, tiles
from torch import Tensor

Rows = Callable[[slice], Tensor]
"""Gives some rows of an operand, contiguous. What it gives may be made for the occasion, so it is asked a chunk at a
time."""


@dataclass(frozen=True)
class Decision:
    """What masks the pairs of a part. All comparisons are of the widest student's scores, before any boost."""

    limits: Tensor | None = None
    """``[R]``, fp32: what the guide scores higher is masked. None without a guide."""
    self_guided: bool = False
    """The student's own scores are the guide's."""
    guide_rows: Rows | None = None
    """Of ``[R, G]``; None where no guide decides, or the student itself."""
    guide_columns: Rows | None = None
    """Of ``[C, G]``."""
    floors: Tensor | None = None
    """``[R]``, fp32: a lower logit is masked."""
    row_groups: Tensor | None = None
    """``[R]``, int32: pairs of one group are masked."""
    column_groups: Tensor | None = None
    """``[C]``, int32."""

    @property
    def begun(self) -> bool:
        """Some of it is decided before the student's scores are looked at, by kernels that leave words to go on from:
        groups, and all else that floors come after. With the guide's product before them in one kernel, or with the
        words made there, floors find too few registers."""
        return self.row_groups is not None or self.floors is not None

    @property
    def rest(self) -> Decision:
        """What is left to decide from those words on."""
        if self.floors is not None:
            return Decision(floors=self.floors)
        return replace(self, row_groups=None, column_groups=None)


@dataclass(frozen=True)
class Part:
    """``R`` rows against ``C`` columns. Widths ``D`` and ``G`` are multiples of the configuration's BLOCK_K."""

    ladder: tuple[tuple[Tensor, Tensor], ...]
    """Rows ``[R, D]`` and columns ``[C, D]`` at each width, the widest first, contiguous: row i is compared with
    ``limits[i]`` and feeds the logsumexp of anchor i."""
    decision: Decision | None
    """None where nothing is masked, or the bits say it all."""
    excluded: int
    """Column ``excluded + i`` never counts in row i; may lie outside."""
    symmetric: bool
    """Rows and columns are one and the same tensor, and the excluded entries are the diagonal."""
    bits: Tensor | None
    """int32 words in the order of `gist_fast.kernels.layout`; None where not kept."""
    boosts: Tensor | None = None
    """``[2]``, fp32: what multiplies the logits of column ``own + i`` in row i, and all others. Never of a symmetric
    part."""
    own: int | None = None
    """None where both factors are the second."""

    @property
    def rows(self) -> Tensor:
        """The widest."""
        return self.ladder[0][0]

    @property
    def columns(self) -> Tensor:
        return self.ladder[0][1]

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


def chunks(rows: int, columns: int, row_tiles: int, column_tiles: int, *, upper: bool = False) -> Iterator[Chunk]:
    """Cover a rectangle by chunks of at most that size; with `upper`, only what reaches above the diagonal.

    There chunks must be square to be on the diagonal or wholly above it, which `gist_fast.kernels.staged` needs.
    """
    down, across = tiles(rows), tiles(columns)
    for r in range(0, down, row_tiles):
        for c in range(r if upper else 0, across, column_tiles):
            yield Chunk(r, c, min(row_tiles, down - r), min(column_tiles, across - c))
