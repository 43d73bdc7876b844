"""Masks by themselves, without the softmax: what floors go on from, and a chunk's once more for a backward pass that
kept no bits.

Bits of a batch of B rows fill ``3 B^2 / 8`` bytes. Where that is too much, what decided them is repeated in the
backward pass, chunk by chunk, in tiles of the forward pass's own shape, operands and order of summation: every
comparison falls out the same. It is a kernel by itself because one that computed coefficients too would hold two
products' worth of registers, and spilled on two of the generations in the table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.config import Config
from gist_fast.kernels.groups import decide_groups
from gist_fast.kernels.launch import ALIGNED_OR_NOT, PLACES, options, precision
from gist_fast.kernels.layout import TILE_WORDS, tiles
from gist_fast.kernels.parts import Chunk, Decision, Part
from torch import Tensor


@triton.jit(do_not_specialize=PLACES, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def masks_kernel(
    x,  # [R, D]; looked at where the student's scores decide
    y,  # [C, D]
    guide_x,  # [rows of the chunk, G]
    guide_y,  # [columns of the chunk, G]
    limits,  # [R]
    floors,  # [R]
    bits,  # words of the part or of the chunk: written, and read before where GIVEN
    row_count,
    column_count,
    width,
    guide_width,
    excluded,
    chunk_row,
    chunk_column,
    row_tiles,
    column_tiles,
    all_column_tiles,
    GUIDE: tl.constexpr,
    HARD: tl.constexpr,
    GIVEN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    TILE: tl.constexpr = tile.TILE
    WORDS: tl.constexpr = tile.ROW_WORDS
    tile_row, tile_column = tile.place(tl.program_id(0), row_tiles, column_tiles, GROUP)
    r = chunk_row + tile_row
    c = chunk_column + tile_column
    if SYMMETRIC and c < r:
        return
    rows = r * TILE + tl.arange(0, TILE)
    columns = c * TILE + tl.arange(0, TILE)
    if GUIDE == decide.OWN_GUIDE:
        scores = tile.scores(
            guide_x, guide_y, tile_row * TILE, tile_column * TILE,
            row_count - 1 - chunk_row * TILE, column_count - 1 - chunk_column * TILE, guide_width,
            TILE, TILE, BLOCK_K, GUIDE_PRECISION,
        )  # fmt: skip
    elif HARD or GUIDE == decide.SELF_GUIDE:
        scores = tile.scores(
            x, y, r * TILE, c * TILE, row_count - 1, column_count - 1, width, TILE, TILE, BLOCK_K, PRECISION
        )
    if GIVEN:
        words, mirrored = tile.load_words(
            bits, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, SYMMETRIC, BITS
        )
    else:
        words = decide.never_counts(rows, c * TILE, row_count, column_count, excluded, WORDS)
        mirrored = words
    if GUIDE != decide.NO_GUIDE:
        words, mirrored = decide.above(scores, limits, rows, columns, row_count, words, mirrored, SYMMETRIC, WORDS)
    if HARD:
        words = decide.below(scores, floors, rows, row_count, words, 1, WORDS)
        if SYMMETRIC:
            mirrored = decide.below(scores, floors, columns, row_count, mirrored, 0, WORDS)
    tile.store_words(bits, words, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, False, BITS)
    if SYMMETRIC:
        tile.store_words(
            bits, mirrored, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, True, BITS
        )


def chunk_words(row_tiles: int, column_tiles: int, symmetric: bool) -> int:
    """Words that the bits of a chunk fill."""
    return (1 + symmetric) * row_tiles * column_tiles * TILE_WORDS


def decision_arguments(decision: Decision | None, part: Part, chunk: Chunk, nothing: Tensor) -> list[Tensor]:
    """Guide's rows and columns, limits and floors, as kernels take them; `nothing` stands for what they will not look
    at."""
    decision = decision or Decision()
    guide_rows, guide_columns = part.rows, part.columns
    if decision.guide_rows is not None:
        guide_rows, guide_columns = decision.guide_rows(chunk.rows), decision.guide_columns(chunk.columns)
    compared = decision.limits, decision.floors
    return [guide_rows, guide_columns, *(nothing if x is None else x for x in compared)]


def decision_constants(decision: Decision | None) -> dict[str, Any]:
    """The constants of a kernel that decides so."""
    decision = decision or Decision()
    guide = decide.OWN_GUIDE if decision.guide_rows is not None else decide.NO_GUIDE
    return {
        "GUIDE": (decide.SELF_GUIDE if decision.self_guided else guide).value,
        "HARD": decision.floors is not None,
    }


def begin(part: Part, chunk: Chunk, bits: Tensor, where: tl.constexpr, config: Config) -> None:
    """Write the words that the rest of a decision goes on from: of groups, and of all else that floors come after.

    Args:
        bits: words of the part or of the chunk, as `where` says.
    """
    decision = part.decision or Decision()
    grouped = decision.row_groups is not None
    if grouped:
        decide_groups(part, chunk, bits, where)
    if decision.floors is not None and (decision.guide_rows is not None or not grouped):
        _launch(part, chunk, replace(decision, floors=None), bits, where, config, given=grouped)


def decide_chunk(part: Part, chunk: Chunk, bits: Tensor, config: Config) -> None:
    """Fill `bits`, words of the chunk, with what does not count in it."""
    decision = part.decision or Decision()
    begin(part, chunk, bits, tile.CHUNK_BITS, config)
    if decision.begun and decision.rest == Decision():
        return
    _launch(part, chunk, decision.rest, bits, tile.CHUNK_BITS, config, given=decision.begun)


def _launch(
    part: Part,
    chunk: Chunk,
    decision: Decision,
    bits: Tensor,
    where: tl.constexpr,
    config: Config,
    *,
    given: bool,
) -> None:
    launch = config.masks_symmetric if part.symmetric else config.masks
    guide_rows, guide_columns, *compared = decision_arguments(decision, part, chunk, bits)
    masks_kernel[(chunk.row_tiles * chunk.column_tiles,)](
        part.rows,
        part.columns,
        guide_rows,
        guide_columns,
        *compared,
        bits,
        part.rows.shape[0],
        part.columns.shape[0],
        part.rows.shape[1],
        guide_rows.shape[1],
        part.excluded,
        chunk.row,
        chunk.column,
        chunk.row_tiles,
        chunk.column_tiles,
        tiles(part.columns.shape[0]),
        **decision_constants(decision),
        GIVEN=given,
        SYMMETRIC=part.symmetric,
        BITS=where.value,
        PRECISION=precision(part.rows),
        GUIDE_PRECISION=precision(guide_rows),
        GROUP=launch.group,
        **options(launch),
    )
