"""The rectangle of scores that a pass works on: its operands, what masks its pairs, and the chunks of its launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gist_fast.kernels.layout import TILE, tiles
from torch import Tensor

Rows = Callable[[slice], Tensor]
"""Gives some rows of an operand, contiguous. What it gives may be made for the occasion, so it is asked a chunk at a
time."""


@dataclass(frozen=True)
class Predicates:
    """What masks the pairs of a rectangle. Student scores that are compared are those of the widest dim, unscaled."""

    guide_thresholds: Tensor | None = None
    """``[R]``, fp32: what the guide scores higher is masked. None without a guide."""
    self_guided: bool = False
    """The student's own scores are the guide's."""
    guide_rows: Rows | None = None
    """Of ``[R, G]``; None where no guide decides, or the student itself."""
    guide_columns: Rows | None = None
    """Of ``[C, G]``."""
    student_thresholds: Tensor | None = None
    """``[R]``, fp32: a lower logit is masked."""
    row_groups: Tensor | None = None
    """``[R]``, int32: pairs of one group are masked."""
    column_groups: Tensor | None = None
    """``[C]``, int32."""

    @property
    def has_initial_mask(self) -> bool:
        """Whether some predicates are decided before the student's scores are computed, by kernels that write an
        initial mask: groups, and all else that comes before student thresholds. In one kernel with another product or
        predicate, student thresholds find too few registers."""
        return self.row_groups is not None or self.student_thresholds is not None

    @property
    def remaining(self) -> Predicates:
        """The predicates that are left once the initial mask is written."""
        if self.student_thresholds is not None:
            return Predicates(student_thresholds=self.student_thresholds)
        return replace(self, row_groups=None, column_groups=None)


@dataclass(frozen=True)
class Rectangle:
    """``R`` rows against ``C`` columns. Embedding dims ``D`` and ``G`` are multiples of the configuration's BLOCK_K."""

    matryoshka: tuple[tuple[Tensor, Tensor], ...]
    """Rows ``[R, D]`` and columns ``[C, D]`` of each Matryoshka dim, the widest first, contiguous: row i is compared
    with ``guide_thresholds[i]`` and feeds the logsumexp of anchor i."""
    predicates: Predicates | None
    """None where nothing is masked, or the mask bits say it all."""
    excluded: int
    """Column ``excluded + i`` never counts in row i; may lie outside."""
    symmetric: bool
    """Rows and columns are one and the same tensor, and the excluded entries are the diagonal."""
    mask_bits: Tensor | None
    """int32, a packed mask as `gist_fast.kernels.layout` describes it; None where not kept."""
    logit_scales: Tensor | None = None
    """``[2]``, fp32: what multiplies the logits of column ``own_negative + i`` in row i, and all others. None for a
    symmetric rectangle."""
    own_negative: int | None = None
    """Column ``own_negative + i`` is the negative that came with row i; None where both scales are the second."""

    @property
    def rows(self) -> Tensor:
        """Those of the widest dim."""
        return self.matryoshka[0][0]

    @property
    def columns(self) -> Tensor:
        return self.matryoshka[0][1]

    @property
    def compared(self) -> int:
        """Pairs that are compared."""
        rows, columns = self.rows.shape[0], self.columns.shape[0]
        inside = min(columns - self.excluded, rows) - max(0, -self.excluded)
        return rows * columns - max(0, inside)

    @property
    def padded(self) -> int:
        """Pairs in its tiles, those outside the matrix included."""
        return tiles(self.rows.shape[0]) * tiles(self.columns.shape[0]) * TILE * TILE

    def geometry(self, chunk: Chunk) -> dict[str, int]:
        """See the function `geometry`."""
        return geometry((self.rows.shape[0], self.columns.shape[0]), self.excluded, chunk)


@dataclass(frozen=True)
class Chunk:
    """A rectangle of tiles that one launch computes, ``[row_tiles, column_tiles]`` from a first tile on."""

    row: int
    column: int
    row_tiles: int
    column_tiles: int

    @property
    def rows(self) -> slice:
        """The rows it covers, which may end beyond the rectangle."""
        return slice(self.row * TILE, (self.row + self.row_tiles) * TILE)

    @property
    def columns(self) -> slice:
        return slice(self.column * TILE, (self.column + self.column_tiles) * TILE)


def chunks(rows: int, columns: int, row_tiles: int, column_tiles: int, *, upper: bool = False) -> Iterator[Chunk]:
    """Cover a rectangle by chunks of at most that size; with `upper`, only what reaches above the diagonal.

    There chunks must be square to be on the diagonal or wholly above it, which `gist_fast.kernels.dlogits` needs.
    """
    down, across = tiles(rows), tiles(columns)
    for r in range(0, down, row_tiles):
        for c in range(r if upper else 0, across, column_tiles):
            yield Chunk(r, c, min(row_tiles, down - r), min(column_tiles, across - c))


def geometry(shape: tuple[int, int], excluded: int, chunk: Chunk) -> dict[str, int]:
    """Where a launch works, as arguments of the kernels by name; `gist_fast.kernels.tile.locate` takes them all.

    They are numbers and not one tuple, because Triton compiles a kernel for each value in a tuple that is 1 or a
    multiple of 16, and knows no way to leave that out. A run would then compile in the middle.
    """
    return {
        "row_count": shape[0],
        "column_count": shape[1],
        "excluded": excluded,
        "chunk_row": chunk.row,
        "chunk_column": chunk.column,
        "row_tiles": chunk.row_tiles,
        "column_tiles": chunk.column_tiles,
    }
