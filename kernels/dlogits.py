"""The backward pass: dlogits of a chunk to memory, then the library's matrix products.

**The gradient.** With base-2 logits ``s_ij = x_i . y_j`` of the pairs that count, ``lse_i`` the base-2 logsumexp of row
i (its positive included) and ``w_i`` the weight of its loss, the pass computes the derivatives of

    L = sum_i w_i sum_j 2^(s_ij - lse_i),  where lse_i is held fixed,

divided by ln 2, which is the derivative of ``sum_i w_i lse_i`` by way of the negatives. With the dlogits

    W_ij = w_i 2^(s_ij - lse_i) where (i, j) counts, else 0

they are ``d x_i = sum_j W_ij y_j`` and ``d y_j = sum_i W_ij x_i``. Each dlogit is at most ``|w_i|``, since ``lse_i`` is
no less than any of its terms: no exponential overflows, whatever the temperature.

**Symmetry.** Where x and y are one operand u, both sums run over the same rows, and ``s_ij = s_ji``:

    d u_i = sum_j W_ij u_j + sum_j W_ji u_j = sum_j V_ij u_j,    V = W + W^T

so one score gives both terms. V is symmetric, and only its tiles on and above the diagonal are computed.

**Masks** are constants: decided once in the forward pass and read as mask bits. Where none were kept (None), they are
decided again from the same operands in tiles of the same shape and order of summation, which gives the same
comparisons. One mask serves all Matryoshka dims, each of which has an L, a logsumexp and weights of its own.

**Hardness weighting** multiplies some logits by a scale that counts as a constant addition: ``s_ij`` above is then the
heavier logit, and its derivative still that of ``x_i . y_j``.

**In two steps.** A launch writes the dlogits of one chunk of the rectangle (``W`` or ``V``), rounded to the operands'
type, and two products of the library feed the gradients of its rows and of its columns from them. Every score is
computed once: a plain rectangle costs 3 products of its size, a symmetric one 1.5. It works for every dim alike, since
no program holds a row of gradients. The price is the chunk in memory, which is of a fixed size, and its way there and
back: ``6 bytes`` a pair in a half type against ``6 D`` FLOPs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.config import Config, Dlogits
from gist_fast.kernels.launch import ALIGNED_OR_NOT, LIBRARY, NOT_SPECIALISED, options, pass_through, precision, start
from gist_fast.kernels.layout import TILE, tiles
from gist_fast.kernels.masks import chunk_words, mask_chunk
from gist_fast.kernels.rectangle import Chunk, Rectangle, chunks
from torch import Tensor

logger = logging.getLogger(__name__)

CHUNK_TILES = 64
"""Rows and columns of a chunk, in tiles: 128 MiB of dlogits in a half type, 256 MiB in float32."""
CAST_ROWS = 1024
"""Rows of dlogits made float32 at a time where torch cannot sum a product of half types in float32."""


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def dlogits_kernel(
    x,  # [R, D]
    y,  # [C, D]
    guide_thresholds,  # [R] where the student guides itself and its scores decide here; else None
    lse2,  # [R]
    weights,  # [R]; None where `lse2` is less their logarithms
    logit_scales,  # [2] or None
    mask_bits,  # of the whole rectangle, or of the chunk (`gist_fast.kernels.masks`); None where not kept
    dlogits,  # [rows of the chunk, columns of the chunk], padded to tiles
    dim,
    own_negative,  # or None
    row_count, column_count, excluded, chunk_row, chunk_column, row_tiles, column_tiles,
    SYMMETRIC: tl.constexpr, CHUNK_MASK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = tile.TILE
    WORDS: tl.constexpr = COLUMNS // 32
    SHARES: tl.constexpr = tile.TILE // COLUMNS
    # Programs that share a tile run next to each other.
    share = tl.program_id(0) % SHARES
    at = tile.locate(
        tl.program_id(0) // SHARES,
        row_count, column_count, excluded, chunk_row, chunk_column, row_tiles, column_tiles, GROUP,
    )  # fmt: skip
    if SYMMETRIC and at.column < at.row:
        return
    lane = tl.arange(0, TILE)
    rows = at.row * TILE + lane
    first = at.column * TILE + share * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    in_tile = tl.arange(0, TILE)[:, None] * tile.ROW_WORDS + (share * WORDS + tl.arange(0, WORDS))[None, :]
    last_row = row_count - 1
    own_rows = tl.minimum(rows, last_row)
    own_columns = tl.minimum(columns, last_row)

    logits = tile.scores(x, y, at.row * TILE, first, last_row, column_count - 1, dim, TILE, COLUMNS, BLOCK_K, PRECISION)
    if mask_bits is None:
        packed = decide.never_counts(rows, first, row_count, column_count, excluded, WORDS)
        mirrored = packed
        if guide_thresholds is not None:
            packed, mirrored = decide.above_guide_threshold(
                logits, guide_thresholds, rows, columns, row_count, packed, mirrored, SYMMETRIC
            )
    else:
        by_rows, by_columns = tile.find_masks(mask_bits, at, CHUNK_MASK)
        packed = tl.load(by_rows + in_tile)
        if SYMMETRIC:
            mirrored = tl.load(by_columns + in_tile)
    shift = at.row * TILE - first
    logits = tile.scale(logits, logit_scales, own_negative, shift, lane, tl.arange(0, COLUMNS))
    value = dlogit(logits, tile.unpack(packed), lse2, weights, own_rows, 1)
    if SYMMETRIC:
        value += dlogit(logits, tile.unpack(mirrored), lse2, weights, own_columns, 0)
    narrow = value.to(dlogits.dtype.element_ty)
    # A chunk has less than 2^31 entries, whatever the rectangle.
    stride = column_tiles * TILE
    across = at.column_in_chunk * TILE + share * COLUMNS + tl.arange(0, COLUMNS)
    down = at.row_in_chunk * TILE + lane
    tl.store(dlogits + down[:, None] * stride + across[None, :], narrow)
    if SYMMETRIC and at.column > at.row and chunk_row == chunk_column:
        # The chunk is on the diagonal, and its lower half is nobody else's to write.
        tl.store(dlogits + across[None, :] * stride + down[:, None], narrow)


@triton.jit
def dlogit(logits, masked, lse2, weights, owners, AXIS: tl.constexpr):
    """``weight * exp2(logit - lse2)`` of the rows (AXIS 1) or the columns (AXIS 0), 0 where masked.

    Args:
        weights: None for 1.
        owners: ``[ROWS]`` or ``[COLUMNS]``: who of the R rows they are.
    """
    value = tl.exp2(logits - tl.expand_dims(tl.load(lse2 + owners), AXIS))
    if weights is not None:
        value *= tl.expand_dims(tl.load(weights + owners), AXIS)
    return tl.where(masked, 0.0, value)


def backward_pass(
    rectangle: Rectangle,
    lse2: Tensor,
    weights: Tensor | None,
    row_gradients: Sequence[Tensor],
    column_gradients: Sequence[Tensor],
    config: Config,
) -> None:
    """Add a rectangle's gradients by its rows and columns, at each of its Matryoshka dims.

    Args:
        lse2: ``[L, R]``, fp32, positive included.
        weights: ``[L, R]``, fp32. None where all have one sign: ``lse2`` is then less ``log2(weight)``, so that no
            tile holds them beside its scores.
        row_gradients: ``[R, D]`` at each dim, fp32; updated.
        column_gradients: ``[C, D]`` at each dim, fp32; updated. Not looked at for a symmetric rectangle.
    """
    row_count, column_count = rectangle.rows.shape[0], rectangle.columns.shape[0]
    height, breadth = min(CHUNK_TILES, tiles(row_count)), min(CHUNK_TILES, tiles(column_count))
    scratch = rectangle.rows.new_empty(height * breadth * TILE * TILE)
    launch = config.dlogits_symmetric if rectangle.symmetric else config.dlogits
    chunk_mask = None
    if rectangle.mask_bits is None and not _masks_itself(rectangle):
        words = chunk_words(height, breadth, rectangle.symmetric)
        chunk_mask = rectangle.rows.new_empty(words, dtype=torch.int32)
    for chunk in chunks(row_count, column_count, height, breadth, upper=rectangle.symmetric):
        if chunk_mask is not None:
            mask_chunk(rectangle, chunk, chunk_mask, config)
        padded = scratch[: chunk.row_tiles * chunk.column_tiles * TILE * TILE].view(chunk.row_tiles * TILE, -1)
        for index, (rows, columns) in enumerate(rectangle.matryoshka):
            _start(
                rectangle,
                chunk,
                index,
                chunk_mask,
                lse2[index],
                None if weights is None else weights[index],
                padded,
                launch,
            )
            rows, columns = rows[chunk.rows], columns[chunk.columns]
            row_gradient, column_gradient = row_gradients[index], column_gradients[index]
            dlogits = padded[: rows.shape[0], : columns.shape[0]]
            add_product(row_gradient[chunk.rows], dlogits, columns)
            if not rectangle.symmetric:
                add_product(column_gradient[chunk.columns], dlogits.T, rows)
            elif chunk.row != chunk.column:
                add_product(row_gradient[chunk.columns], dlogits.T, rows)


def _masks_itself(rectangle: Rectangle) -> bool:
    """Whether the kernel of dlogits can decide the mask by the scores that it has anyway, if there is anything to
    decide."""
    if rectangle.own_negative is not None:
        # Together with two logit scales that spills, be it only for what lies outside.
        return False
    predicates = rectangle.predicates
    if predicates is None:
        return True
    return not predicates.has_initial_mask and predicates.self_guided and len(rectangle.matryoshka) == 1


def _start(
    rectangle: Rectangle,
    chunk: Chunk,
    index: int,
    chunk_mask: Tensor | None,
    lse2: Tensor,
    weights: Tensor | None,
    dlogits: Tensor,
    launch: Dlogits,
) -> None:
    x, y = rectangle.matryoshka[index]
    mask_bits = rectangle.mask_bits if chunk_mask is None else chunk_mask
    decides = mask_bits is None and rectangle.predicates is not None
    start(
        dlogits_kernel,
        (chunk.row_tiles * chunk.column_tiles * (TILE // launch.columns),),
        x=x,
        y=y,
        guide_thresholds=rectangle.predicates.guide_thresholds if decides else None,
        lse2=lse2,
        weights=weights,
        logit_scales=rectangle.logit_scales,
        mask_bits=mask_bits,
        dlogits=dlogits,
        dim=x.shape[1],
        own_negative=rectangle.own_negative,
        **rectangle.geometry(chunk),
        SYMMETRIC=rectangle.symmetric,
        CHUNK_MASK=chunk_mask is not None,
        PRECISION=precision(x),
        GROUP=launch.group,
        COLUMNS=launch.columns,
        **options(launch),
    )


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, summed in fp32. ``[N, D]``, ``[N, K]``, ``[K, D]``."""
    pass_through(LIBRARY, {"total": total, "a": a, "b": b}, lambda: _add_product(total, a, b))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    way = _way_to_add(a.device, a.dtype) if a.is_cuda else "cast"
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
    way = "cast"
    if _works(lambda: torch.addmm(total, ones, ones, out_dtype=total.dtype, out=total)) and (total == 17).all():
        way = "in place"
    elif _works(lambda: torch.mm(ones, ones, out_dtype=total.dtype)):
        way = "apart"
    logger.info("%s products are summed in float32: %s", dtype, way)
    return way


def _works(product: Callable[[], Tensor]) -> bool:
    """Whether torch knows such a product. A full or a broken card says nothing about that, and is nobody's to hide."""
    try:
        product()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, TypeError) as error:
        if "ALLOC_FAILED" in str(error):
            raise
        return False
    return True
