"""What a guide or groups masked, as a matrix of 0 and 1 to multiply by, and sums of similarities over it.

Terms of a row that are means over its negatives need no matrix of scores, since sums of cosines are linear in the
embeddings: with the mask ``M`` of 0 and 1 of a block, ``sum over masked j of sim(x_i, y_j) = x_i . (M y)_i``, one
product with the masks that the softmax left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gist_fast.functional.backends import reference, streaming_backend
from gist_fast.functional.blocks import Block, make_blocks
from gist_fast.functional.cosines import unit_vectors
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.operands import Operands, accumulation_dtype
from gist_fast.functional.operator import no_gradients

COUNTERS = 8
"""Columns of ones behind an operand, whose product is the number of masked entries; eight, to keep rows aligned."""
Product = Callable[[int, Tensor], Tensor]


class MaskProduct(NamedTuple):
    """Products by what a guide or groups masked."""

    multiply: Product
    """From a block's index and ``[columns, E]``: its mask of 0 and 1, times that, ``[rows, E]``; differentiable."""
    dtype: torch.dtype | None = None
    """To which columns of at most 1 are rounded before they are multiplied; None where they are not."""

    def rounded(self, columns: Tensor) -> Tensor:
        """The columns as they are multiplied, with the derivative of what they were: so that the sum over all less that
        over the masked is one of what is left, and not of roundings."""
        if self.dtype is None:
            return columns
        return columns + (columns.detach().to(self.dtype).to(columns.dtype) - columns.detach())


class Sums(NamedTuple):
    """Cosine similarities of each row's entries in some blocks, excluded ones left out: their sums ``[B]``,
    differentiable, and how many there are."""

    everything: Tensor
    number: Tensor | int
    """Of them: one for all rows, or ``[B]``."""
    masked: Tensor
    """The sum over what a guide or groups masked."""
    masked_number: Tensor
    """``[B]``"""

    @property
    def negatives(self) -> tuple[Tensor, Tensor]:
        """The sum over the others ``[B]``, 0 where there are none, and how many they are."""
        number = self.number - self.masked_number
        return torch.where(number > 0, self.everything - self.masked, 0.0), number

    def add(self, similar: Tensor, there: Tensor, masked: Tensor) -> Sums:
        """The same with own negatives, ``[K, B]`` each: their similarities, whether a row has one, and whether it is
        masked; see `gist_fast.functional.own_negatives.OwnTerms`."""
        return Sums(
            self.everything + similar.sum(0),
            self.number + there.sum(0),
            self.masked + (similar * masked).sum(0),
            self.masked_number + masked.sum(0),
        )


def sum_similarities(
    student: Sequence[Tensor], blocks: Iterable[tuple[int, Block]], product: MaskProduct | None
) -> Sums:
    """Sums over some blocks, each with its index.

    Args:
        student: embeddings of one Matryoshka dim: anchors ``[A, D]``, positives ``[M, D]``, negatives.
        product: by the masks of the same batch; None where nothing masks.
    """
    unit = [unit_vectors(x.to(accumulation_dtype(x.dtype))) for x in student]
    everything = masked = masked_count = unit[0].new_zeros(())
    count = 0
    for index, block in blocks:
        rows = unit[block.row_operand][block.row_start : block.row_start + block.rows]
        columns = unit[block.column_operand]
        if product is not None:
            columns = product.rounded(columns)
        everything = everything + rows @ columns.sum(0)
        count += block.columns
        if block.excluded is not None:
            everything = everything - (rows * columns[block.excluded : block.excluded + block.rows]).sum(1)
            count -= 1
        if product is not None:
            found = product.multiply(index, pad(columns, (0, COUNTERS), value=1.0))
            masked = masked + (rows * found[:, :-COUNTERS]).sum(1)
            masked_count = masked_count + found[:, -1].detach()
    return Sums(everything, count, masked, masked_count)


def count_negatives(blocks: Sequence[Block], product: MaskProduct | None, like: Tensor) -> Tensor:
    """``[B]``: how many entries of each row count, in all blocks; in the type and on the device of `like`."""
    total = sum(block.columns - (0 if block.excluded is None else 1) for block in blocks)
    counts = like.new_full((blocks[0].rows,), total)
    if product is not None:
        for index, block in enumerate(blocks):
            counts = counts - product.multiply(index, like.new_ones(block.columns, COUNTERS))[:, 0]
    return counts


def dense_product(operands: Operands, blocks: Sequence[Block]) -> MaskProduct:
    """By the reference's masks, one bool a pair."""
    masked = [reference.decide(operands, block)[1] for block in blocks]
    return MaskProduct(lambda index, columns: masked[index].to(columns.dtype) @ columns)


def kept_product(
    backend: str, mask_bits: Tensor, dtype: torch.dtype, sizes: Sequence[int], config: LossConfig
) -> MaskProduct:
    """By the masks that a streaming backend kept for its backward pass; `dtype` is that of the embeddings."""
    settings = config.to_arguments()

    def multiply(index: int, columns: Tensor) -> Tensor:
        return mask_product(backend, mask_bits, columns, False, index, dtype, sizes, *settings)

    return MaskProduct(multiply, dtype)


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
