"""Pairs of one group never count: the initial mask of a batch, before any product.

A kernel by itself. Beside a product, the comparison of two numbers for each pair takes registers that no configuration
has left on all cards; here it costs the mask's way to memory and back, 2 KiB a tile and side.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.chunks import ChunkSet
from gist_fast.kernels.launch import ALIGNED_OR_NOT, NOT_SPECIALISED, options_of, start
from torch import Tensor

WARPS = 4


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def groups_kernel(
    groups,  # [M], int64: of the positives
    mask_bits,  # written
    masked,  # [blocks], or None where another kernel counts
    table,
    start,
    chunks,
    anchors,  # B, the stack's rows before the first positive
    offset,  # anchor i is in the group of positive offset + i
    positive_count,  # M
    SYMMETRIC: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = tile.TILE
    at = tile.locate(table, start, chunks, 1, TILE)
    if SYMMETRIC and tile.is_idle(at):
        return
    lane = tl.arange(0, TILE)
    rows = tl.load(at.chunk + tile.X) + at.row * TILE + lane
    columns = tl.load(at.chunk + tile.Y) + at.first + lane
    never = decide.never_counts(at, TILE)
    packed = never
    first_row, first_column = tl.load(at.chunk + tile.X), tl.load(at.chunk + tile.Y)
    # A column of negatives is in no group.
    if first_column < anchors + positive_count:
        row_group = tl.load(
            groups + rows + tl.where(first_row < anchors, offset, -anchors), mask=lane < at.rows, other=0
        )
        column_group = tl.load(
            groups + columns + tl.where(first_column < anchors, offset, -anchors), mask=lane < at.columns, other=0
        )
        packed = never | tile.pack(row_group[:, None] == column_group[None, :])
    # Both sides see the same groups.
    tile.store_masks(mask_bits, packed, packed, at, SYMMETRIC, TILE)
    if masked is not None:
        tile.add_count(masked, at, decide.count_masked(packed, packed, never, at, SYMMETRIC))


def mask_groups(
    chunks: ChunkSet, table: Tensor, groups: Tensor, offset: int, anchors: int, mask_bits: Tensor, masked: Tensor | None
) -> None:
    """Write what never counts in some chunks, pairs of one group among it.

    Args:
        table: where the chunks' set has its rows, on the device.
        groups: ``[M]``, int64, of the positives.
        offset: anchor i is in the group of positive ``offset + i``.
        anchors: how many there are.
        masked: ``[blocks]``, int64: pairs masked are added; None to leave them.
    """
    start(
        groups_kernel,
        (chunks.tiles,),
        groups=groups,
        mask_bits=mask_bits,
        masked=masked,
        table=table,
        start=chunks.start,
        chunks=len(chunks.chunks),
        anchors=anchors,
        offset=offset,
        positive_count=len(groups),
        SYMMETRIC=chunks.symmetric,
        **options_of(WARPS),
    )
