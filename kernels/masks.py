"""Masks by themselves, without the softmax: the initial mask that student thresholds go on from, and a chunk's mask
once more for a backward pass that kept no mask bits.

Mask bits of a batch of B rows fill ``3 B^2 / 8`` bytes. Where that is too much, what decided them is repeated in the
backward pass, chunk by chunk, in tiles of the forward pass's own shape, operands and order of summation: every
comparison falls out the same. It is a kernel by itself because one that computed dlogits too would hold two products'
worth of registers, and spilled on two of the generations in the table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.config import Config
from gist_fast.kernels.groups import mask_groups
from gist_fast.kernels.launch import ALIGNED_OR_NOT, NOT_SPECIALISED, options, precision, start
from gist_fast.kernels.layout import TILE_WORDS
from gist_fast.kernels.rectangle import Chunk, Predicates, Rectangle
from torch import Tensor


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def masks_kernel(
    x,  # [R, D]; None where the student's scores decide nothing
    y,  # [C, D]
    guide_x,  # [rows of the chunk, G]; None where no guide decides, or the student itself
    guide_y,  # [columns of the chunk, G]
    guide_thresholds,  # [R] or None
    student_thresholds,  # [R] or None
    mask_bits,  # of the whole rectangle or of the chunk: written, and read before where HAS_INITIAL_MASK
    dim,
    guide_dim,
    row_count, column_count, excluded, chunk_row, chunk_column, row_tiles, column_tiles,
    SYMMETRIC: tl.constexpr, CHUNK_MASK: tl.constexpr, HAS_INITIAL_MASK: tl.constexpr, PRECISION: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = tile.TILE
    at = tile.locate(
        tl.program_id(0), row_count, column_count, excluded, chunk_row, chunk_column, row_tiles, column_tiles, GROUP
    )
    if SYMMETRIC and at.column < at.row:
        return
    rows = at.row * TILE + tl.arange(0, TILE)
    columns = at.column * TILE + tl.arange(0, TILE)
    if guide_x is not None:
        scores = tile.guide_scores(guide_x, guide_y, at, guide_dim, BLOCK_K, GUIDE_PRECISION)
    elif x is not None:
        scores = tile.student_scores(x, y, at, dim, BLOCK_K, PRECISION)
    if HAS_INITIAL_MASK:
        packed, mirrored = tile.load_masks(mask_bits, at, SYMMETRIC, CHUNK_MASK)
    else:
        packed = decide.never_counts(rows, at.column * TILE, row_count, column_count, excluded, tile.ROW_WORDS)
        mirrored = packed
    if guide_thresholds is not None:
        packed, mirrored = decide.above_guide_threshold(
            scores, guide_thresholds, rows, columns, row_count, packed, mirrored, SYMMETRIC
        )
    if student_thresholds is not None:
        packed = decide.below_student_threshold(scores, student_thresholds, rows, row_count, packed, 1)
        if SYMMETRIC:
            mirrored = decide.below_student_threshold(scores, student_thresholds, columns, row_count, mirrored, 0)
    tile.store_mask(mask_bits, packed, at, False, CHUNK_MASK)
    if SYMMETRIC:
        tile.store_mask(mask_bits, mirrored, at, True, CHUNK_MASK)


def chunk_words(row_tiles: int, column_tiles: int, symmetric: bool) -> int:
    """32-bit words that the packed mask of a chunk fills."""
    return (1 + symmetric) * row_tiles * column_tiles * TILE_WORDS


def predicate_arguments(predicates: Predicates, chunk: Chunk) -> dict[str, Any]:
    """What decides, as kernels take it; None for all that does not."""
    guide_x = guide_y = None
    if predicates.guide_rows is not None and predicates.guide_columns is not None:
        guide_x, guide_y = predicates.guide_rows(chunk.rows), predicates.guide_columns(chunk.columns)
    return {
        "guide_x": guide_x,
        "guide_y": guide_y,
        "guide_thresholds": predicates.guide_thresholds,
        "student_thresholds": predicates.student_thresholds,
        "guide_dim": None if guide_x is None else guide_x.shape[1],
        "GUIDE_PRECISION": precision(guide_x),
    }


def write_initial_mask(rectangle: Rectangle, chunk: Chunk, mask_bits: Tensor, chunk_mask: bool, config: Config) -> None:
    """Write the initial mask that the remaining predicates go on from: groups, and all else that comes before student
    thresholds.

    Args:
        mask_bits: of the chunk or of the whole rectangle, as `chunk_mask` says.
    """
    predicates = rectangle.predicates or Predicates()
    grouped = predicates.row_groups is not None
    if grouped:
        mask_groups(rectangle, chunk, mask_bits, chunk_mask)
    if predicates.student_thresholds is not None and (predicates.guide_rows is not None or not grouped):
        before = replace(predicates, student_thresholds=None)
        _start(rectangle, chunk, before, mask_bits, chunk_mask, config, has_initial_mask=grouped)


def mask_chunk(rectangle: Rectangle, chunk: Chunk, mask_bits: Tensor, config: Config) -> None:
    """Fill `mask_bits`, of the chunk, with what does not count in it."""
    predicates = rectangle.predicates or Predicates()
    write_initial_mask(rectangle, chunk, mask_bits, True, config)
    if predicates.has_initial_mask and predicates.remaining == Predicates():
        return
    _start(
        rectangle, chunk, predicates.remaining, mask_bits, True, config, has_initial_mask=predicates.has_initial_mask
    )


def _start(
    rectangle: Rectangle,
    chunk: Chunk,
    predicates: Predicates,
    mask_bits: Tensor,
    chunk_mask: bool,
    config: Config,
    *,
    has_initial_mask: bool,
) -> None:
    launch = config.masks_symmetric if rectangle.symmetric else config.masks
    x = y = None
    if predicates.self_guided or predicates.student_thresholds is not None:
        x, y = rectangle.rows, rectangle.columns
    start(
        masks_kernel,
        (chunk.row_tiles * chunk.column_tiles,),
        x=x,
        y=y,
        **predicate_arguments(predicates, chunk),
        mask_bits=mask_bits,
        dim=None if x is None else x.shape[1],
        **rectangle.geometry(chunk),
        SYMMETRIC=rectangle.symmetric,
        CHUNK_MASK=chunk_mask,
        HAS_INITIAL_MASK=has_initial_mask,
        PRECISION=precision(x),
        GROUP=launch.group,
        **options(launch),
    )
