"""The backward pass: dlogits of a chunk to memory, then the library's matrix products.

**The gradient.** With base-2 logits ``s_ij = x_i . y_j`` of the pairs that count, ``lse_i`` the base-2 logsumexp of row
i (its positive included) and ``w_i`` the weight of its loss, the pass computes the derivatives of

    L = sum_i w_i sum_j 2^(s_ij - lse_i),  where lse_i is held fixed,

divided by ln 2, which is the derivative of ``sum_i w_i lse_i`` by way of the negatives. With the dlogits

    W_ij = w_i 2^(s_ij - lse_i) where (i, j) counts, else 0

they are ``d x_i = sum_j W_ij y_j`` and ``d y_j = sum_i W_ij x_i``. Each dlogit is at most ``|w_i|``, since ``lse_i`` is
no less than any of its terms: no exponential overflows, whatever the temperature. Where all weights are of one sign,
``lse_i`` is less ``log2 |w_i|`` beforehand, which saves a factor a pair.

**Symmetry.** Where x and y are one operand u, both sums run over the same rows, and ``s_ij = s_ji``:

    d u_i = sum_j W_ij u_j + sum_j W_ji u_j = sum_j V_ij u_j,    V = W + W^T

so one score gives both terms. V is symmetric, and only its tiles on and above the diagonal are computed.

**Masks** are constants: decided once in the forward pass and read as mask bits. Where none were kept, they are decided
again by `gist_fast.kernels.masks` from the same operands in the same order of summation, which gives the same
comparisons. One mask serves all Matryoshka dims, each of which has an L, a logsumexp and weights of its own.

**Hardness weighting** multiplies some logits by a scale that counts as a constant addition: ``s_ij`` above is then the
heavier logit, and its derivative still that of ``x_i . y_j``.

**In two steps.** A launch writes the dlogits of a batch of chunks (``W`` or ``V``), rounded to the operands' type, and
two products of the library feed the gradients of a chunk's rows and columns from them. Every score is computed once: a
plain rectangle costs 3 products of its size, a symmetric one 1.5. The price is the batch in memory, which is of a fixed
size, and its way there and back: ``6 bytes`` a pair in a half type against ``6 D`` FLOPs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import triton
import triton.language as tl
from gist_fast.kernels import decide, tile
from gist_fast.kernels.chunks import ChunkSet
from gist_fast.kernels.config import Launch
from gist_fast.kernels.launch import (
    ALIGNED_OR_NOT,
    NOT_SPECIALISED,
    operand_arguments,
    start,
    tile_arguments,
    tile_grid,
)
from gist_fast.kernels.layout import TILE
from gist_fast.kernels.library import add_product
from torch import Tensor


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def dlogits_kernel(
    x,  # the student's stack, [S, D]; see `gist_fast.kernels.tile.scores`
    y,
    dim,
    lse2,  # [B]
    weights,  # [B]; None where `lse2` is less their logarithms
    temperature,  # [1], or None where hardness weighting is off
    strength,
    mask_bits,  # None where nothing masks
    dlogits,  # chunk after chunk: [rows, columns], padded to tiles
    table,
    start,
    chunks,
    SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    at = tile.locate(table, start, chunks, GROUP, COLUMNS)
    if SYMMETRIC and tile.is_idle(at):
        return
    logits = tile.scores(x, y, at, dim, COLUMNS, BLOCK_K, PRECISION, DESCRIPTORS, False)
    if mask_bits is None:
        packed = decide.never_counts(at, COLUMNS)
        mirrored = packed
    else:
        packed, mirrored = tile.load_masks(mask_bits, at, SYMMETRIC, COLUMNS)
    logits = tile.scale(logits, temperature, strength, at, SYMMETRIC, COLUMNS)
    value = tl.exp2(logits - decide.owners_of_rows(lse2, at))
    if weights is not None:
        value *= decide.owners_of_rows(weights, at)
    value = tl.where(tile.unpack(packed), 0.0, value)
    if SYMMETRIC:
        other = tl.exp2(logits - decide.owners_of_columns(lse2, at, COLUMNS))
        if weights is not None:
            other *= decide.owners_of_columns(weights, at, COLUMNS)
        value += tl.where(tile.unpack(mirrored), 0.0, other)
    store_dlogits(dlogits, value, at, SYMMETRIC, COLUMNS)


@triton.jit
def store_dlogits(dlogits, value, at, SYMMETRIC: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a location's dlogits ``[TILE, COLUMNS]``, in the type of the memory, to where its chunk has them."""
    TILE: tl.constexpr = tile.TILE
    narrow = value.to(dlogits.dtype.element_ty)
    # A chunk has less than 2^31 entries, whatever the rectangle.
    stride = at.column_tiles * TILE
    across = at.first + tl.arange(0, COLUMNS)
    down = at.row * TILE + tl.arange(0, TILE)
    dlogits += tl.load(at.chunk + tile.DLOGITS).to(tl.int64) * (TILE * TILE)
    tl.store(dlogits + down[:, None] * stride + across[None, :], narrow)
    if SYMMETRIC and (at.triangle != 0) & (at.column > at.row):
        # The chunk is on the diagonal, and its lower half is nobody else's to write.
        tl.store(dlogits + across[None, :] * stride + down[:, None], narrow)


def write_dlogits(
    chunks: ChunkSet,
    table: Tensor,
    stack: Tensor,
    lse2: Tensor,
    weights: Tensor | None,
    dlogits: Tensor,
    launch: Launch,
    *,
    temperature: Tensor | None,
    strength: float,
    mask_bits: Tensor | None,
) -> None:
    """Write the dlogits of some chunks.

    Args:
        table: where the chunks' set has its rows, on the device.
        stack: the student's, at one Matryoshka dim.
        lse2: ``[B]``, fp32, positive included.
        weights: ``[B]``, fp32. None where all have one sign: ``lse2`` is then less ``log2(weight)``.
        dlogits: flat, in the operands' type.
        temperature: ``[1]``, fp32; None without hardness weighting, whose `strength` it goes with.
    """
    start(
        dlogits_kernel,
        tile_grid(chunks, launch),
        **operand_arguments(stack, launch),
        lse2=lse2,
        weights=weights,
        temperature=temperature if chunks.scaled else None,
        strength=strength,
        mask_bits=mask_bits,
        dlogits=dlogits,
        **tile_arguments(chunks, table, launch),
    )


def add_dlogits(
    chunks: ChunkSet,
    operands: Sequence[Tensor],
    starts: Sequence[int],
    dlogits: Tensor,
    gradients: Sequence[Tensor],
    *,
    fresh: set[int],
) -> None:
    """Add what some chunks' dlogits give to the gradients of their rows and columns.

    Args:
        operands: the student's, ``[N_k, D]`` each, at one Matryoshka dim.
        starts: the first row of each in the stack.
        dlogits: of `write_dlogits`.
        gradients: ``[N_k, D]``, fp32, by each operand; updated.
        fresh: those of them that hold nothing yet: their first product is put there, and they are taken out.
    """
    place = 0
    for chunk in chunks.chunks:
        stride = chunk.column_tiles * TILE
        sides = [(chunk.x, chunk.y, (stride, 1))]
        if not chunk.triangle:
            sides.append((chunk.y, chunk.x, (1, stride)))
        for own, other, strides in sides:
            k, total = _rows(gradients, starts, own)
            _, factor = _rows(operands, starts, other)
            w = dlogits.as_strided((own.stop - own.start, other.stop - other.start), strides, place)
            add_product(total, w, factor, fresh=k in fresh)
            fresh.discard(k)
        place += chunk.tiles * TILE * TILE


def _rows(operands: Sequence[Tensor], starts: Sequence[int], span: slice) -> tuple[int, Tensor]:
    """Which operand some rows of the stack are of, and those rows."""
    k = bisect_right(starts, span.start) - 1
    first, last = span.start - starts[k], span.stop - starts[k]
    return k, operands[k] if (first, last) == (0, len(operands[k])) else operands[k][first:last]
