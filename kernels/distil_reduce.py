"""Partial results of distillation to those of each row, always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels import reduce as reduction
from gist_fast.kernels.chunks import Batch
from gist_fast.kernels.launch import ALIGNED_OR_NOT, NOT_SPECIALISED, options_of, start
from torch import Tensor

ROWS, DEPTH, WARPS = 32, 16, 4


@triton.jit
def raised(values, maximum):
    """The largest of some maxima ``[DEPTH, ROWS]`` and the running one, and what sums are multiplied by to go from
    theirs to it."""
    risen = tl.maximum(maximum, tl.max(values, axis=0))
    base = tl.where(risen == float("-inf"), 0.0, risen)
    return risen, tl.exp2(values - base[None, :]), tl.exp2(maximum - base)


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def distil_reduce_kernel(
    partials,  # [6, size]; see `gist_fast.kernels.distil`
    size,
    table,
    start,  # of its rows [entries, PARTIAL_FIELDS] in the table
    entries,
    running,  # [6, B], over the batches of chunks: read unless FIRST, written
    count,  # B
    FIRST: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < count
    guide_maximum = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    maximum = guide_maximum
    guide_sum = tl.zeros((ROWS,), dtype=tl.float32)
    guide_mean, mean, total = guide_sum, guide_sum, guide_sum
    if not FIRST:
        guide_maximum = tl.load(running + rows, mask=inside, other=float("-inf"))
        guide_sum = tl.load(running + count + rows, mask=inside, other=0.0)
        guide_mean = tl.load(running + 2 * count + rows, mask=inside, other=0.0)
        mean = tl.load(running + 3 * count + rows, mask=inside, other=0.0)
        maximum = tl.load(running + 4 * count + rows, mask=inside, other=float("-inf"))
        total = tl.load(running + 5 * count + rows, mask=inside, other=0.0)
    for entry in range(0, entries):
        fields = table + start + entry * reduction.WIDTH
        row_tiles = tl.load(fields + reduction.ROW_TILES)
        own_tile = first_row // reduction.TILE_ROWS - tl.load(fields + reduction.OWNER) // reduction.TILE_ROWS
        if (own_tile >= 0) & (own_tile < row_tiles):
            # On the diagonal tiles below it were not computed.
            first_layer = own_tile * tl.load(fields + reduction.FIRST_STEP)
            last_layer = tl.load(fields + reduction.LAST_LAYER) + own_tile * tl.load(fields + reduction.LAST_STEP)
            base = (tl.load(fields + reduction.PLACE) + own_tile) * reduction.TILE_ROWS
            base += first_row % reduction.TILE_ROWS + tl.arange(0, ROWS)
            for shallowest in range(first_layer, last_layer, DEPTH):
                layer = shallowest + tl.arange(0, DEPTH)
                place = layer[:, None] * (row_tiles * reduction.TILE_ROWS) + base[None, :]
                there = (layer < last_layer)[:, None] & inside[None, :]
                values = tl.load(partials + place, mask=there, other=float("-inf"))
                guide_maximum, theirs, mine = raised(values, guide_maximum)
                values = tl.load(partials + size + place, mask=there, other=0.0)
                guide_sum = guide_sum * mine + tl.sum(values * theirs, axis=0)
                values = tl.load(partials + 2 * size + place, mask=there, other=0.0)
                guide_mean = guide_mean * mine + tl.sum(values * theirs, axis=0)
                values = tl.load(partials + 3 * size + place, mask=there, other=0.0)
                mean = mean * mine + tl.sum(values * theirs, axis=0)
                values = tl.load(partials + 4 * size + place, mask=there, other=float("-inf"))
                maximum, theirs, mine = raised(values, maximum)
                values = tl.load(partials + 5 * size + place, mask=there, other=0.0)
                total = total * mine + tl.sum(values * theirs, axis=0)
    tl.store(running + rows, guide_maximum, mask=inside)
    tl.store(running + count + rows, guide_sum, mask=inside)
    tl.store(running + 2 * count + rows, guide_mean, mask=inside)
    tl.store(running + 3 * count + rows, mean, mask=inside)
    tl.store(running + 4 * count + rows, maximum, mask=inside)
    tl.store(running + 5 * count + rows, total, mask=inside)


def reduce_distilled(
    partials: Tensor, batch: Batch, table: Tensor, running: Tensor, softmax: int, *, first: bool
) -> None:
    """Reduce a batch's partial results of one softmax into the running ones.

    Args:
        partials: ``[6, size]``, fp32; see `gist_fast.kernels.distil`.
        table: where the batch has its rows, on the device.
        running: ``[6, B]``, fp32: written, and read unless `first`.
        softmax: which of each row's.
    """
    first_row, entries = batch.reductions[softmax]
    start(
        distil_reduce_kernel,
        (triton.cdiv(running.shape[1], ROWS),),
        partials=partials,
        size=partials.shape[1],
        table=table,
        start=first_row,
        entries=entries,
        running=running,
        count=running.shape[1],
        FIRST=first,
        ROWS=ROWS,
        DEPTH=DEPTH,
        **options_of(WARPS),
    )
