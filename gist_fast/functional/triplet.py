"""The soft triplet term of the guided loss: anchors closer to what the guide calls positive than to what it does not.

GISTEmbed's training code calls it ``guided-triplet-soft``. For row i, over the entries of the blocks ap, aa and an_k
(all whose row is the anchor), with P_i the positive and what the guide or the group masked, and N_i all others that
count:

    term_i = max(0, mean of sim over N_i - mean of sim over P_i + triplet_margin)

and 0 where N_i is empty. Means are linear in the embeddings, so no matrix of scores is needed: with the mask ``M`` of 0
and 1, ``sum over masked j of sim(a_i, y_j) = a_i . (M y)_i``, one product with the masks that the
softmax left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from gist_fast.functional.backends import reference, streaming_backend
from gist_fast.functional.blocks import ANCHORS, POSITIVES, Block, make_blocks
from gist_fast.functional.cosines import unit_vectors
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.operands import Operands, accumulation_dtype
from gist_fast.functional.operator import no_gradients

COUNTERS = 8
"""Columns of ones behind an operand, whose product is the number of masked entries; eight, to keep rows aligned."""
MaskProduct = Callable[[int, Tensor], Tensor]
"""From a block's index and ``[columns, E]``: what a guide or their group masked in it, of 0 and 1, times that,
``[rows, E]``; differentiable."""


def triplet_rows(
    student: Sequence[Tensor],
    offset: int,
    margin: float,
    blocks: Sequence[Block],
    product: MaskProduct,
    own_negatives: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The term of each row, ``[B]``, accumulation type, differentiable by the embeddings.

    Args:
        student: embeddings of one Matryoshka dim: anchors ``[A, D]``, positives ``[M, D]``, negatives.
        offset: anchor i's positive is row ``offset + i`` of the positives.
        margin: in units of cosine similarity.
        product: by the masks of the same batch.
        own_negatives: of negatives that are one anchor's alone, ``[K, B]`` each: their similarities at that dim,
            whether a row has one, and whether a guide or their group masked it; see
            `gist_fast.functional.own_negatives.OwnTerms`.
    """
    dtype = accumulation_dtype(student[ANCHORS].dtype)
    unit = [unit_vectors(x.to(dtype)) for x in student]
    rows = blocks[0].rows
    anchors = unit[ANCHORS][:rows]
    own = slice(offset, offset + rows)
    positive = (anchors * unit[POSITIVES][own]).sum(1)
    masked, everything, masked_count = (torch.zeros_like(positive) for _ in range(3))
    count: Tensor | int = 0
    for index, block in enumerate(blocks):
        if block.row_operand != ANCHORS:
            continue
        columns = unit[block.column_operand]
        found = product(index, pad(columns, (0, COUNTERS), value=1.0))
        masked = masked + (anchors * found[:, :-COUNTERS]).sum(1)
        masked_count = masked_count + found[:, -1].detach()
        everything = everything + anchors @ columns.sum(0)
        count += block.columns
        if block.excluded is not None:
            everything = everything - (anchors * columns[block.excluded : block.excluded + rows]).sum(1)
            count -= 1
    if own_negatives is not None:
        similar, there, dropped = own_negatives
        everything, masked = everything + similar.sum(0), masked + (similar * dropped).sum(0)
        masked_count, count = masked_count + dropped.sum(0), count + there.sum(0)
    negatives = count - masked_count
    gap = (everything - masked) / negatives.clamp_min(1) - (positive + masked) / (1 + masked_count)
    return torch.where(negatives > 0, (gap + margin).clamp_min(0), 0.0)


def dense_product(operands: Operands, blocks: Sequence[Block]) -> MaskProduct:
    """By the reference's masks, one bool a pair."""
    masked = [reference.decide(operands, block)[1] for block in blocks]
    return lambda index, columns: masked[index].to(columns.dtype) @ columns


def kept_product(
    backend: str, mask_bits: Tensor, dtype: torch.dtype, sizes: Sequence[int], config: LossConfig
) -> MaskProduct:
    """By the masks that a streaming backend kept for its backward pass; `dtype` is that of the embeddings."""
    settings = config.to_arguments()
    return lambda index, columns: mask_product(backend, mask_bits, columns, False, index, dtype, sizes, *settings)


def _mask_product(backend, mask_bits, other, transposed, index, dtype, sizes, *settings):
    """A block's mask, or its transpose, times ``other [.., E]``; operands are rounded to `dtype`.

    `sizes` are the rows of the loss, of anchors, positives and each column of negatives, the number of Matryoshka dims,
    and the offset.
    """
    blocks, dims = _read_sizes(sizes, settings)
    # A float16 operand knows no small gradients.
    largest = other.abs().amax().clamp_min(torch.finfo(other.dtype).tiny)
    narrow = (other / largest).to(dtype)
    with torch.autocast(other.device.type, enabled=False):
        found = streaming_backend(backend).mask_product(blocks, dims, mask_bits, index, narrow, transposed)
    return found.to(other.dtype) * largest


def _read_sizes(sizes: Sequence[int], settings: Sequence) -> tuple[list[Block], int]:
    rows, *operands, dims, offset = sizes
    return make_blocks(rows, operands, LossConfig.from_arguments(settings), offset), dims


mask_product = torch.library.custom_op(
    "gist_fast::mask_product",
    _mask_product,
    mutates_args=(),
    schema="(str backend, Tensor mask_bits, Tensor other, bool transposed, int index, ScalarType dtype, "
    f"SymInt[] sizes, {LossConfig.schema()}) -> Tensor",
)


@mask_product.register_fake
def _(backend, mask_bits, other, transposed, index, dtype, sizes, *settings):
    blocks, _ = _read_sizes(sizes, settings)
    block = blocks[index]
    return other.new_empty(block.columns if transposed else block.rows, other.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    backend, mask_bits, _, transposed, *static = inputs
    ctx.backend, ctx.transposed, ctx.static = backend, transposed, static
    ctx.save_for_backward(mask_bits)


def _backward(ctx, gradient):
    (mask_bits,) = ctx.saved_tensors
    by_other = mask_product(ctx.backend, mask_bits, gradient, not ctx.transposed, *ctx.static)
    return (None, None, by_other, None, *no_gradients(ctx.static))


mask_product.register_autograd(_backward, setup_context=_setup_context)
