"""The initial mask of a batch, before any product: what never counts, and pairs of one group.

A kernel by itself. Beside a product, the comparison of two numbers for each pair takes registers that no configuration
has left on all cards; here it costs the mask's way to memory and back, 2 KiB a tile and side. A program takes a narrow
part of a tile for the same reason: of a whole one, two groups a row take up to 178 registers, and spill on some cards.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.chunks import ChunkSet
from gist_fast.kernels.launch import ALIGNED_OR_NOT, NOT_SPECIALISED, options_of, start
from gist_fast.kernels.layout import TILE
from torch import Tensor

WARPS = 4
COLUMNS = 32
"""Of a tile, that a program takes: a word of each row's mask."""


@triton.jit
def of_one_group(groups, packed, at, count, COLUMNS: tl.constexpr):
    """The packed mask, with the pairs of one group; what stands behind the `count` that have groups is in none."""
    row_lane, column_lane = tl.arange(0, tile.TILE), tl.arange(0, COLUMNS)
    first_row, first_column = tl.load(at.chunk + tile.X), tl.load(at.chunk + tile.Y)
    if first_column < count:
        rows = groups + first_row + at.row * tile.TILE + row_lane
        columns = groups + first_column + at.first + column_lane
        row_group = tl.load(rows, mask=row_lane < at.rows, other=0)
        column_group = tl.load(columns, mask=column_lane < at.columns, other=0)
        packed = packed | tile.pack(row_group[:, None] == column_group[None, :])
    return packed


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def groups_kernel(
    groups,  # [G], int64: of the stack's first rows, which are all but perhaps the negatives; None without
    others,  # [H], likewise: the second group of each
    mask_bits,  # written
    masked,  # [blocks], or None where another kernel counts
    table,
    start,
    chunks,
    group_count,  # G
    other_count,  # H
    SYMMETRIC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = tile.locate(table, start, chunks, 1, COLUMNS)
    if SYMMETRIC and tile.is_idle(at):
        return
    never = decide.never_counts(at, COLUMNS)
    packed = never
    if groups is not None:
        packed = of_one_group(groups, packed, at, group_count, COLUMNS)
    if others is not None:
        packed = of_one_group(others, packed, at, other_count, COLUMNS)
    # Both sides see the same groups.
    tile.store_masks(mask_bits, packed, packed, at, SYMMETRIC, COLUMNS)
    if masked is not None:
        decide.count_more(masked, packed, packed, never, never, at, SYMMETRIC)


def mask_groups(
    chunks: ChunkSet,
    table: Tensor,
    groups: Sequence[Tensor],
    mask_bits: Tensor,
    masked: Tensor | None,
) -> None:
    """Write what never counts in some chunks, pairs of one group among it.

    Args:
        table: where the chunks' set has its rows, on the device.
        groups: two at most, of which one that two rows have in common is enough: ``[G]``, int64, of the stack's first
            rows, which are all but perhaps the negatives.
        masked: ``[blocks]``, int64: pairs masked are added; None to leave them.
    """
    first, second = (*groups, None, None)[:2]
    start(
        groups_kernel,
        (chunks.tiles * (TILE // COLUMNS),),
        groups=first,
        others=second,
        mask_bits=mask_bits,
        masked=masked,
        table=table,
        start=chunks.start,
        chunks=len(chunks.chunks),
        group_count=0 if first is None else len(first),
        other_count=0 if second is None else len(second),
        SYMMETRIC=chunks.symmetric,
        COLUMNS=COLUMNS,
        **options_of(WARPS),
    )
