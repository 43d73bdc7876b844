"""Distillation from the guide: both models' scores of a tile, in one program.

**Forward.** With base-2 logits ``t_ij`` by the guide and ``z_ij`` by the student of the pairs that count, a row needs

    log2 sum_j 2^t_ij,  log2 sum_j 2^z_ij,  and the means of t and z under the softmax of t,

so a program leaves six numbers of each row: the maximum of t, the sums of ``2^(t - max)``, of that times t and of that
times z, the maximum of z and the sum of ``2^(z - max)``. `gist_fast.kernels.distil_reduce` puts them together.

**Backward.** With weights ``a_i`` of the student's logsumexp and ``b_i`` of the mean of z, the derivative by z_ij is
``a_i 2^(z_ij - lse_i) + b_i 2^(t_ij - guide_lse_i)``: the dlogits, from which the library's products make gradients as
in `gist_fast.kernels.dlogits`.

No mask is read: what guide or groups mask is distilled too. Two accumulators of a whole tile spill, so a program takes
half of one, with 8 warps. In a symmetric rectangle it serves rows and columns.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.chunks import ChunkSet
from gist_fast.kernels.config import Config, Launch
from gist_fast.kernels.dlogits import store_dlogits
from gist_fast.kernels.launch import (
    ALIGNED_OR_NOT,
    NOT_SPECIALISED,
    guide_arguments,
    operand_arguments,
    start,
    tile_arguments,
    tile_grid,
)
from torch import Tensor

NUMBERS = 6
"""That a program leaves of each row."""


def launch_of(config: Config) -> Launch:
    """How these kernels are compiled, in the steps of a configuration. With 4 warps they spill on sm_80 to sm_90, up to
    664 bytes; with 8 nowhere."""
    return replace(config.dlogits, columns=64, warps=8)


@triton.jit
def both_scores(x, y, dim, guide_x, guide_y, guide_dim, factor, at,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of a location's pairs by the guide and by the student, and which never count,
    ``[TILE, COLUMNS]``."""
    by_guide = tile.scores(guide_x, guide_y, at, guide_dim, COLUMNS, BLOCK_K, GUIDE_PRECISION, DESCRIPTORS, True)
    logits = tile.scores(x, y, at, dim, COLUMNS, BLOCK_K, PRECISION, DESCRIPTORS, False)
    never = tile.unpack(decide.never_counts(at, COLUMNS))
    return tl.where(never, float("-inf"), by_guide * factor), logits, never


@triton.jit
def store_numbers(partials, size, place, by_guide, logits, never, AXIS: tl.constexpr):
    """The six numbers of each row, or column, of a tile."""
    highest = tl.max(by_guide, axis=AXIS)
    # -inf - -inf would be NaN; and what lies behind an operand's last row may be anything.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(by_guide - tl.expand_dims(base, AXIS))
    tl.store(partials + place, highest)
    tl.store(partials + size + place, tl.sum(weights, axis=AXIS))
    tl.store(partials + 2 * size + place, tl.sum(weights * tl.where(never, 0.0, by_guide), axis=AXIS))
    tl.store(partials + 3 * size + place, tl.sum(weights * tl.where(never, 0.0, logits), axis=AXIS))
    counted = tl.where(never, float("-inf"), logits)
    largest = tl.max(counted, axis=AXIS)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(partials + 4 * size + place, largest)
    tl.store(partials + 5 * size + place, tl.sum(tl.exp2(counted - tl.expand_dims(base, AXIS)), axis=AXIS))


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def distil_kernel(
    x,  # the student's stack, [S, D]; see `gist_fast.kernels.tile.scores`
    y,
    dim,
    guide_x,  # the guide's
    guide_y,
    guide_dim,
    factor,  # from its cosine similarities to base-2 logits
    partials,  # [6, size]: written
    size,
    table,
    start,
    chunks,
    SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = tile.TILE
    SHARES: tl.constexpr = tile.TILE // COLUMNS
    at = tile.locate(table, start, chunks, GROUP, COLUMNS)
    if SYMMETRIC and tile.is_idle(at):
        return
    by_guide, logits, never = both_scores(
        x, y, dim, guide_x, guide_y, guide_dim, factor, at, COLUMNS, BLOCK_K, PRECISION, GUIDE_PRECISION, DESCRIPTORS
    )
    layer = at.column * SHARES + at.share
    # A batch has less than 2^31 of them, whatever the problem.
    place = (tl.load(at.chunk + tile.ROW_PARTIALS) + layer * at.row_tiles + at.row) * TILE + tl.arange(0, TILE)
    store_numbers(partials, size, place, by_guide, logits, never, 1)
    if SYMMETRIC and tile.serves_columns(at):
        first = (tl.load(at.chunk + tile.COLUMN_PARTIALS) + at.row * at.column_tiles) * TILE + at.first
        store_numbers(partials, size, first + tl.arange(0, COLUMNS), by_guide, logits, never, 0)


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def distil_dlogits_kernel(
    x,
    y,
    dim,
    guide_x,
    guide_y,
    guide_dim,
    factor,
    lse2,  # [R]: of the student
    guide_lse2,  # [R]
    weights,  # [R]: by the student's logsumexp
    mean_weights,  # [R]: by the mean under the guide's softmax
    dlogits,  # chunk after chunk: [rows, columns], padded to tiles
    table,
    start,
    chunks,
    SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    at = tile.locate(table, start, chunks, GROUP, COLUMNS)
    if SYMMETRIC and tile.is_idle(at):
        return
    by_guide, logits, never = both_scores(
        x, y, dim, guide_x, guide_y, guide_dim, factor, at, COLUMNS, BLOCK_K, PRECISION, GUIDE_PRECISION, DESCRIPTORS
    )
    value = tl.exp2(logits - decide.owners_of_rows(lse2, at)) * decide.owners_of_rows(weights, at)
    value += tl.exp2(by_guide - decide.owners_of_rows(guide_lse2, at)) * decide.owners_of_rows(mean_weights, at)
    if SYMMETRIC:
        other = tl.exp2(logits - decide.owners_of_columns(lse2, at, COLUMNS))
        other *= decide.owners_of_columns(weights, at, COLUMNS)
        of_guide = tl.exp2(by_guide - decide.owners_of_columns(guide_lse2, at, COLUMNS))
        other += of_guide * decide.owners_of_columns(mean_weights, at, COLUMNS)
        value += other
    store_dlogits(dlogits, tl.where(never, 0.0, value), at, SYMMETRIC, COLUMNS)


def start_distil(
    chunks: ChunkSet,
    table: Tensor,
    student: Tensor,
    guide: Tensor,
    factor: float,
    partials: Tensor,
    launch: Launch,
) -> None:
    """Write the partial results of some chunks.

    Args:
        table: where the chunks' set has its rows, on the device.
        student: the stack, at one Matryoshka dim.
        guide: its stack of unit vectors.
        factor: from the guide's cosine similarities to base-2 logits.
        partials: ``[NUMBERS, size]``, fp32; written, in places that the chunks' table names.
    """
    start(
        distil_kernel,
        tile_grid(chunks, launch),
        **operand_arguments(student, launch),
        **guide_arguments(guide, launch),
        factor=factor,
        partials=partials,
        size=partials.shape[1],
        **tile_arguments(chunks, table, launch),
    )


def write_distil_dlogits(
    chunks: ChunkSet,
    table: Tensor,
    student: Tensor,
    guide: Tensor,
    factor: float,
    lse2: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    dlogits: Tensor,
    launch: Launch,
) -> None:
    """Write the dlogits of some chunks; see `start_distil`.

    Args:
        lse2: ``[R]`` each, fp32: of the student and of the guide.
        weights: ``[R]`` each, fp32: by the student's logsumexp and by the mean under the guide's softmax.
        dlogits: flat, in the student's type.
    """
    start(
        distil_dlogits_kernel,
        tile_grid(chunks, launch),
        **operand_arguments(student, launch),
        **guide_arguments(guide, launch),
        factor=factor,
        lse2=lse2[0],
        guide_lse2=lse2[1],
        weights=weights[0],
        mean_weights=weights[1],
        dlogits=dlogits,
        **tile_arguments(chunks, table, launch),
    )
