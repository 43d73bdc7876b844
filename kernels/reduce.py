"""Partial softmaxes to the logsumexp and the loss of each row."""

from __future__ import annotations

import triton
import triton.language as tl
from gist_fast.kernels.chunks import PARTIAL_FIELDS, Batch
from gist_fast.kernels.launch import ALIGNED_OR_NOT, NOT_SPECIALISED, options_of, start
from gist_fast.kernels.layout import TILE
from gist_fast.kernels.numbers import LN2, softplus2
from torch import Tensor

ROWS, DEPTH, WARPS = 32, 32, 4
WIDTH = tl.constexpr(len(PARTIAL_FIELDS))
OWNER, ROW_TILES = tl.constexpr(PARTIAL_FIELDS.index("owner")), tl.constexpr(PARTIAL_FIELDS.index("row_tiles"))
PLACE, FIRST_STEP = tl.constexpr(PARTIAL_FIELDS.index("place")), tl.constexpr(PARTIAL_FIELDS.index("first_step"))
LAST_LAYER, LAST_STEP = tl.constexpr(PARTIAL_FIELDS.index("last")), tl.constexpr(PARTIAL_FIELDS.index("last_step"))
TILE_ROWS = tl.constexpr(TILE)


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=ALIGNED_OR_NOT)
def reduce_kernel(
    partial_maxima,
    partial_sums,
    table,
    start,  # of its rows [entries, PARTIAL_FIELDS] in the table
    entries,
    maximum,  # [B]: running, over the batches of chunks; read unless FIRST
    total,
    positives,  # [B]: base-2 logits of the positives
    temperature,  # [1]
    is_bad,  # [1]: not 0 where a row of the guide is not finite; or None
    loss,  # [B]: written, as all that follow, where LAST
    lse2,  # [B]
    positive_similarity,  # [B]; None but for the widest dim
    hardest_similarity,
    count,  # B
    FIRST: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < count
    if FIRST:
        running = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        running_sum = tl.zeros((ROWS,), dtype=tl.float32)
    else:
        running = tl.load(maximum + rows, mask=inside, other=float("-inf"))
        running_sum = tl.load(total + rows, mask=inside, other=0.0)
    for entry in range(0, entries):
        fields = table + start + entry * WIDTH
        row_tiles = tl.load(fields + ROW_TILES)
        own_tile = first_row // TILE_ROWS - tl.load(fields + OWNER) // TILE_ROWS
        if (own_tile >= 0) & (own_tile < row_tiles):
            # On the diagonal tiles below it were not computed.
            first_layer = own_tile * tl.load(fields + FIRST_STEP)
            last_layer = tl.load(fields + LAST_LAYER) + own_tile * tl.load(fields + LAST_STEP)
            base = (tl.load(fields + PLACE) + own_tile) * TILE_ROWS + first_row % TILE_ROWS + tl.arange(0, ROWS)
            for shallowest in range(first_layer, last_layer, DEPTH):
                layer = shallowest + tl.arange(0, DEPTH)
                place = layer[:, None] * (row_tiles * TILE_ROWS) + base[None, :]
                there = (layer < last_layer)[:, None] & inside[None, :]
                partial = tl.load(partial_maxima + place, mask=there, other=float("-inf"))
                summed = tl.load(partial_sums + place, mask=there, other=0.0)
                risen = tl.maximum(running, tl.max(partial, axis=0))
                lifted = tl.where(risen == float("-inf"), 0.0, risen)
                more = tl.sum(summed * tl.exp2(partial - lifted[None, :]), axis=0)
                running_sum = running_sum * tl.exp2(running - lifted) + more
                running = risen
    if LAST:
        # Of a row without negatives the sum is 0, and this -inf.
        found = running + tl.log2(running_sum)
        positive = tl.load(positives + rows, mask=inside, other=0.0)
        if is_bad is not None:
            # Its comparisons were false and masked nothing; the loss says so, and so will the gradients.
            found += tl.where(tl.load(is_bad) != 0, float("nan"), 0.0)
        tl.store(lse2 + rows, found, mask=inside)
        tl.store(loss + rows, softplus2(found - positive) * LN2, mask=inside)
        if positive_similarity is not None:
            to_cosine = tl.load(temperature) * LN2
            tl.store(positive_similarity + rows, positive * to_cosine, mask=inside)
            tl.store(hardest_similarity + rows, running * to_cosine, mask=inside)
    else:
        tl.store(maximum + rows, running, mask=inside)
        tl.store(total + rows, running_sum, mask=inside)


def reduce(
    maxima: Tensor,
    sums: Tensor,
    batch: Batch,
    table: Tensor,
    running: Tensor | None,
    positives: Tensor,
    temperature: Tensor,
    is_bad: Tensor | None,
    loss: Tensor,
    lse2: Tensor,
    similarities: tuple[Tensor, Tensor] | None,
    softmax: int,
    *,
    first: bool,
    last: bool,
) -> None:
    """Reduce a batch's partial results of one softmax into the running one; after the last batch, to the loss.

    Args:
        maxima: partial softmaxes, fp32, with `sums`.
        table: where the batch has its rows, on the device.
        running: ``[2, B]``, fp32: maximum and sum of each row; read unless `first`, written unless `last`. None where
            one batch is all.
        positives: ``[B]``, fp32.
        is_bad: ``[1]``: where it is not 0, all losses are NaN.
        loss: ``[B]``, fp32; written with `last`, as `lse2` ``[B]`` and `similarities` are: ``[B]`` each, the
            cosine similarities of the positives and of the hardest negatives.
        softmax: which of each row's.
    """
    first_row, entries = batch.reductions[softmax]
    start(
        reduce_kernel,
        (triton.cdiv(loss.numel(), ROWS),),
        partial_maxima=maxima,
        partial_sums=sums,
        table=table,
        start=first_row,
        entries=entries,
        maximum=None if running is None else running[0],
        total=None if running is None else running[1],
        positives=positives,
        temperature=temperature,
        is_bad=is_bad,
        loss=loss,
        lse2=lse2,
        positive_similarity=None if similarities is None else similarities[0],
        hardest_similarity=None if similarities is None else similarities[1],
        count=loss.numel(),
        FIRST=first,
        LAST=last,
        ROWS=ROWS,
        DEPTH=DEPTH,
        **options_of(WARPS),
    )
