"""The staged plan of the backward pass: tiles of coefficients to memory, then library matrix products.

A launch writes the coefficients ``V`` (see `gist_fast.kernels.backward`) of one chunk of the part, rounded to the
operands' type, and two products of the library feed the gradients of its rows and of its columns from them. Every
score is computed once: a plain part costs 3 products of its size where a program that owns rows needs 4, a symmetric
one 1.5 instead of 2. It works for every width alike, since no program holds a row of gradients. The price is the
chunk in memory, which is of a fixed size, and its way there and back: ``6 bytes`` a pair in a half type against
``6 D`` FLOPs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.config import Config, Staged
from gist_fast.kernels.launch import ALIGNED_OR_NOT, PLACES, boost, options, precision
from gist_fast.kernels.layout import TILE, tiles
from gist_fast.kernels.masks import chunk_words, decide_chunk
from gist_fast.kernels.parts import Chunk, Part, chunks
from torch import Tensor

CHUNK_TILES = 64
"""Rows and columns of a chunk, in tiles: 128 MiB of coefficients in a half type, 256 MiB in float32."""
CAST_ROWS = 1024
"""Rows of coefficients made float32 at a time where torch cannot sum a product of half types in float32."""


@triton.jit(do_not_specialize=PLACES, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def coefficients_kernel(
    x,  # [R, D]
    y,  # [C, D]
    limits,  # [R]; looked at where the student guides itself
    lse2,  # [R]
    weights,  # [R]
    boosts,  # [2]
    bits,  # words of the whole part, or of the chunk (`gist_fast.kernels.masks`)
    coefficients,  # [rows of the chunk, columns of the chunk], padded to tiles
    row_count,
    column_count,
    width,
    excluded,
    own_negative,
    chunk_row,
    chunk_column,
    row_tiles,
    column_tiles,
    all_column_tiles,
    SELF_GUIDED: tl.constexpr,
    BOOST: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    TILE: tl.constexpr = tile.TILE
    WORDS: tl.constexpr = COLUMNS // 32
    SHARES: tl.constexpr = tile.TILE // COLUMNS
    # Programs that share a tile run next to each other.
    tile_row, tile_column = tile.place(tl.program_id(0) // SHARES, row_tiles, column_tiles, GROUP)
    share = tl.program_id(0) % SHARES
    r = chunk_row + tile_row
    c = chunk_column + tile_column
    if SYMMETRIC and c < r:
        return
    lane = tl.arange(0, TILE)
    rows = r * TILE + lane
    first = c * TILE + share * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    in_tile = tl.arange(0, TILE)[:, None] * tile.ROW_WORDS + (share * WORDS + tl.arange(0, WORDS))[None, :]
    last_row = row_count - 1
    last_column = column_count - 1
    own_rows = tl.minimum(rows, last_row)
    own_columns = tl.minimum(columns, last_row)

    logits = tile.scores(x, y, r * TILE, first, last_row, last_column, width, TILE, COLUMNS, BLOCK_K, PRECISION)
    if BITS == tile.NO_BITS:
        words = decide.never_counts(rows, first, row_count, column_count, excluded, WORDS)
        mirrored = words
        if SELF_GUIDED:
            words, mirrored = decide.above(logits, limits, rows, columns, row_count, words, mirrored, SYMMETRIC, WORDS)
    else:
        at, mirrored_at = tile.places_of_words(
            bits, r, c, all_column_tiles, tile_row, tile_column, row_tiles, column_tiles, BITS
        )
        words = tl.load(at + in_tile)
        if SYMMETRIC:
            mirrored = tl.load(mirrored_at + in_tile)
    logits = tile.boost(logits, boosts, own_negative + r * TILE - first, lane, tl.arange(0, COLUMNS), BOOST)
    hidden = tile.unpack(words, TILE, WORDS)
    value = coefficient(logits, hidden, tl.load(lse2 + own_rows)[:, None], tl.load(weights + own_rows)[:, None])
    if SYMMETRIC:
        hidden = tile.unpack(mirrored, TILE, WORDS)
        value += coefficient(
            logits, hidden, tl.load(lse2 + own_columns)[None, :], tl.load(weights + own_columns)[None, :]
        )
    narrow = value.to(coefficients.dtype.element_ty)
    # A chunk has less than 2^31 entries, whatever the part.
    stride = column_tiles * TILE
    across = tile_column * TILE + share * COLUMNS + tl.arange(0, COLUMNS)
    down = tile_row * TILE + lane
    tl.store(coefficients + down[:, None] * stride + across[None, :], narrow)
    if SYMMETRIC and c > r and chunk_row == chunk_column:
        # The chunk is on the diagonal, and its lower half is nobody else's to write.
        tl.store(coefficients + across[None, :] * stride + down[:, None], narrow)


@triton.jit
def coefficient(logits, hidden, lse2, weight):
    """``weight * exp2(logit - lse2)``, 0 where hidden."""
    return tl.where(hidden, 0.0, tl.exp2(logits - lse2) * weight)


def backward_part_staged(
    part: Part,
    levels: Sequence[int],
    lse2: Tensor,
    weights: Tensor,
    row_gradients: Sequence[Tensor],
    column_gradients: Sequence[Tensor],
    config: Config,
) -> None:
    """Add a part's gradients by its rows and columns, at some widths of its ladder.

    Args:
        levels: which.
        lse2: ``[L, R]``, positive included.
        weights: ``[L, R]``
        row_gradients: ``[R, D]`` at each width, fp32; updated.
        column_gradients: ``[C, D]`` at each width, fp32; updated. Not looked at for a symmetric part.
    """
    row_count, column_count = part.rows.shape[0], part.columns.shape[0]
    height, breadth = min(CHUNK_TILES, tiles(row_count)), min(CHUNK_TILES, tiles(column_count))
    scratch = part.rows.new_empty(height * breadth * TILE * TILE)
    launch = config.staged_symmetric if part.symmetric else config.staged
    masks = None
    if part.bits is None and not _decides_itself(part):
        masks = part.rows.new_empty(chunk_words(height, breadth, part.symmetric), dtype=torch.int32)
    for chunk in chunks(row_count, column_count, height, breadth, upper=part.symmetric):
        if masks is not None:
            decide_chunk(part, chunk, masks, config)
        padded = scratch[: chunk.row_tiles * chunk.column_tiles * TILE * TILE].view(chunk.row_tiles * TILE, -1)
        for level in levels:
            _launch(part, chunk, level, masks, lse2[level], weights[level], padded, launch)
            rows, columns = (x[span] for x, span in zip(part.ladder[level], (chunk.rows, chunk.columns), strict=True))
            row_gradient, column_gradient = row_gradients[level], column_gradients[level]
            values = padded[: rows.shape[0], : columns.shape[0]]
            add_product(row_gradient[chunk.rows], values, columns)
            if not part.symmetric:
                add_product(column_gradient[chunk.columns], values.T, rows)
            elif chunk.row != chunk.column:
                add_product(row_gradient[chunk.columns], values.T, rows)


def _decides_itself(part: Part) -> bool:
    """Whether the kernel of coefficients can decide the masks by the scores that it has anyway, if there is anything to
    decide."""
    if part.own is not None:
        # Together with two factors of a boost that spills, be it only for what lies outside.
        return False
    decision = part.decision
    if decision is None:
        return True
    if decision.floors is not None or decision.row_groups is not None:
        return False
    return decision.self_guided and len(part.ladder) == 1


def _launch(
    part: Part,
    chunk: Chunk,
    level: int,
    masks: Tensor | None,
    lse2: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    launch: Staged,
) -> None:
    x, y = part.ladder[level]
    kept = part.bits if part.bits is not None else masks
    which = tile.NO_BITS if kept is None else tile.CHUNK_BITS if part.bits is None else tile.PART_BITS
    limits = part.decision.limits if kept is None and part.decision is not None else None
    coefficients_kernel[(chunk.row_tiles * chunk.column_tiles * (TILE // launch.columns),)](
        x,
        y,
        lse2 if limits is None else limits,
        lse2,
        weights,
        coefficients if part.boosts is None else part.boosts,
        coefficients if kept is None else kept,
        coefficients,
        x.shape[0],
        y.shape[0],
        x.shape[1],
        part.excluded,
        part.own or 0,
        chunk.row,
        chunk.column,
        chunk.row_tiles,
        chunk.column_tiles,
        tiles(y.shape[0]),
        SELF_GUIDED=limits is not None,
        BOOST=boost(part),
        SYMMETRIC=part.symmetric,
        BITS=which.value,
        PRECISION=precision(x),
        GROUP=launch.group,
        COLUMNS=launch.columns,
        **options(launch),
    )


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, summed in fp32. ``[N, D]``, ``[N, K]``, ``[K, D]``."""
    way = "cast" if a.dtype == total.dtype or not a.is_cuda else _way_to_add(a.device, a.dtype)
    if way == "in place":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif way == "apart":
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        b = b.to(total.dtype)
        for rows in range(0, a.shape[0], CAST_ROWS):
            total[rows : rows + CAST_ROWS].addmm_(a[rows : rows + CAST_ROWS].to(total.dtype), b)


@functools.cache
def _way_to_add(device: torch.device, dtype: torch.dtype) -> str:
    """How this torch sums a product of half types into a float32 tensor; found out by doing it once.

    ``"in place"`` saves the product's way to memory; where torch has neither that nor a product of half types that is
    not rounded to a half type, ``"cast"`` multiplies in float32.
    """
    total = torch.ones(16, 16, device=device)
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, ones, ones, out_dtype=total.dtype, out=total)
        if (total == 17).all():
            return "in place"
    except (RuntimeError, TypeError):
        pass
    try:
        return "apart" if (torch.mm(ones, ones, out_dtype=total.dtype) == 16).all() else "cast"
    except (RuntimeError, TypeError):
        return "cast"
