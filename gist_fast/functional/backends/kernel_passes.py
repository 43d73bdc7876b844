"""The two passes of the loss by the kernels, and a product of its masks.

**Forward**: units, thresholds, masks, partial softmaxes, and their reduction to the loss. **Backward**: units, weights,
masks once more unless they were kept, dlogits, products of the library, gradients by the embeddings.

A batch of any size below a chunk takes the same few launches. Each view of a tensor costs the host microseconds, as
each launch does, so kernels get whole tensors and numbers of rows where that spares one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gist_fast.functional.backends.interface import LARGEST_WEIGHT, GuidedRows, Problem
from gist_fast.functional.backends.kernel_blocks import mask_bytes, rectangles, starts
from gist_fast.functional.backends.kernel_work import Work
from gist_fast.functional.blocks import Block
from gist_fast.kernels import layout
from gist_fast.kernels.chunks import make_plan
from gist_fast.kernels.config import Config
from gist_fast.kernels.dlogits import add_dlogits, write_dlogits
from gist_fast.kernels.forward import start_forward
from gist_fast.kernels.gradients import carry_back
from gist_fast.kernels.layout import TILE
from gist_fast.kernels.reduce import reduce
from gist_fast.kernels.rows import weigh
from gist_fast.kernels.unpack import add_masked

FORWARD_CHUNKS = 4
"""Chunks of a batch in a forward pass: 2^28 pairs at most, and 32 MiB of partial softmaxes (64 where two programs share
a tile). A backward pass has one, or several that are as small together."""


def forward_with(config: Config, problem: Problem, keep_mask_bits: bool) -> GuidedRows:
    """The forward pass by a given configuration; see `gist_fast.functional.backends.interface.StreamingBackend`."""
    work = Work(problem, config)
    work.make_counts()
    work.decide()
    loss, lse2 = (work.numbers(work.levels, work.softmaxes * problem.rows) for _ in range(2))
    similarities = [(work.numbers(), work.numbers()) for _ in range(work.softmaxes)]
    keep_mask_bits = keep_mask_bits and problem.masks
    n_bytes = mask_bytes(problem.blocks, work.levels) if keep_mask_bits else 0
    mask_bits = torch.empty(n_bytes, dtype=torch.uint8, device=loss.device)
    own_masks = problem.masks and not keep_mask_bits
    shares = config.forward.shares, config.forward_symmetric.shares
    batches = work.plan(FORWARD_CHUNKS, shares=shares, own_masks=own_masks)
    decided = work.mask_scratch(batches) if own_masks else mask_bits if keep_mask_bits else None
    size = TILE * max(batch.partial_tiles for batch in batches)
    maxima, sums = work.numbers(size), work.numbers(size)
    running = work.numbers(work.levels, work.softmaxes, 2, problem.rows) if len(batches) > 1 else None
    for index, batch in enumerate(batches):
        if any(map(work.has_initial_mask, batch.sets)):
            assert decided is not None
            work.write_masks(batch, decided, before_student=True)
        for level, stack in enumerate(work.stacks):
            decides = level == 0
            for chunks in batch.sets:
                guides = decides and work.student_guides(chunks)
                start_forward(
                    chunks,
                    work.table,
                    stack,
                    maxima,
                    sums,
                    config.forward_symmetric if chunks.symmetric else config.forward,
                    guide_thresholds=work.guide_thresholds if guides else None,
                    student_thresholds=work.student_thresholds if decides else None,
                    temperature=work.temperature,
                    strength=problem.config.hardness_strength,
                    mask_bits=decided,
                    masked=work.masked if guides else None,
                    easy=work.easy,
                    has_initial_mask=decided is not None and (work.has_initial_mask(chunks) or not decides),
                )
            for softmax in range(work.softmaxes):
                reduce(
                    maxima,
                    sums,
                    batch,
                    work.table,
                    None if running is None else running[level, softmax],
                    work.at(work.positives, level),
                    work.temperature,
                    work.is_bad,
                    work.at(loss, level, softmax),
                    work.at(lse2, level, softmax),
                    similarities[softmax] if decides else None,
                    softmax,
                    first=index == 0,
                    last=index == len(batches) - 1,
                )
    positive, hardest = similarities[0]
    for _, other in similarities[1:]:
        hardest = torch.maximum(hardest, other)
    return GuidedRows(loss, lse2, positive, hardest, work.masked, work.easy, mask_bits)


def backward_with(
    config: Config, problem: Problem, grad_loss: Tensor, lse2: Tensor | None, mask_bits: Tensor | None
) -> list[Tensor]:
    """The backward pass by a given configuration; see `gist_fast.functional.backends.interface.StreamingBackend`."""
    if lse2 is None:
        lse2 = forward_with(config, problem, False).lse2
    if mask_bits is not None:
        problem = problem.decided()
    work = Work(problem, config, norms=True)
    if problem.masks:
        work.decide()
    upstream = grad_loss.contiguous()
    extremes = torch.aminmax(upstream)
    total, positive_dlogits = torch.empty_like(lse2), torch.empty_like(lse2)
    weights = None if problem.one_sign else torch.empty_like(lse2)
    for level, stack in enumerate(work.stacks):
        for softmax in range(work.softmaxes):
            weigh(
                work.at(upstream, level, softmax),
                extremes,
                work.at(lse2, level, softmax),
                stack,
                work.partner,
                work.at(total, level, softmax),
                None if weights is None else work.at(weights, level, softmax),
                work.at(positive_dlogits, level, softmax),
                LARGEST_WEIGHT,
            )
    if work.softmaxes > 1:
        # The positive's logit is in each of them.
        positive_dlogits = positive_dlogits.view(work.levels, work.softmaxes, problem.rows).sum(1)
    gradients = _by_operand(work, config, problem, total, weights, mask_bits)
    return by_embedding(work, problem, gradients, positive_dlogits, extremes, one_sign=problem.one_sign)


def by_embedding(
    work: Work,
    problem: Problem,
    gradients: list[list[Tensor]],
    positive_dlogits: Tensor,
    extremes: tuple[Tensor, Tensor],
    *,
    one_sign: bool,
) -> list[Tensor]:
    """The gradients by the embeddings, in their types, and last by the temperature.

    Args:
        gradients: by each operand at each dim, fp32, by way of the negatives; emptied.
        positive_dlogits: ``[L, B]``, or ``[B]`` of one dim: the derivatives by the positives' logits.
        extremes, one_sign: of the upstream gradients, see `gist_fast.kernels.gradients.carry_back`.
    """
    assert work.norms is not None
    student, width = problem.student, problem.student[0].shape[1]
    # Sums of several dims are rounded once, at the end.
    dtype = torch.float32 if work.levels > 1 else student[0].dtype
    # The gradients by the widest operands are fp32 too. Where they are as wide as those by the embeddings, these take
    # their place.
    in_place = dtype == torch.float32 and gradients[0][0].shape[1] == width
    # A kernel writes the columns of its dim alone, and the first dim is the widest.
    make = torch.empty if work.dims[0] == width else torch.zeros
    outs = gradients[0] if in_place else [make(x.shape, dtype=dtype, device=x.device) for x in student]
    for level, stack in enumerate(work.stacks):
        carry_back(
            gradients.pop(0),
            student,
            outs,
            work.at(work.norms, level),
            stack,
            work.partner,
            work.at(positive_dlogits, level),
            work.temperature,
            extremes,
            work.dims[level],
            LARGEST_WEIGHT,
            one_sign=one_sign,
            adds=level > 0,
        )
    by_embedding = [out.to(x.dtype) for out, x in zip(outs, student, strict=True)]
    # In the place of the norms stands what each row gives.
    return [*by_embedding, work.norms.sum().to(problem.temperature.dtype)]


def _by_operand(
    work: Work,
    config: Config,
    problem: Problem,
    lse2: Tensor,
    weights: Tensor | None,
    mask_bits: Tensor | None,
) -> list[list[Tensor]]:
    """``[N_k, D]``, fp32: by each operand at each dim, by way of the negatives.

    Args:
        lse2: ``[L, R]``, positive included; see `gist_fast.kernels.rows.weigh`, as for `weights`.
        mask_bits: None to decide the masks again, if there are any.
    """
    batches = work.plan(1, own_masks=problem.masks)
    if problem.masks:
        mask_bits = work.mask_scratch(batches)
    dlogits = work.stacks[0].new_empty(TILE * TILE * max(batch.dlogits_tiles for batch in batches))
    operands = [stack.split(work.split) for stack in work.stacks]
    gradients, fresh = work.empty_gradients(batches)
    for batch in batches:
        if problem.masks:
            assert mask_bits is not None
            work.write_masks(batch, mask_bits, before_student=False)
        for level, stack in enumerate(work.stacks):
            for chunks in batch.sets:
                write_dlogits(
                    chunks,
                    work.table,
                    stack,
                    work.at(lse2, level),
                    None if weights is None else work.at(weights, level),
                    dlogits,
                    config.dlogits_symmetric if chunks.symmetric else config.dlogits,
                    temperature=work.temperature,
                    strength=problem.config.hardness_strength,
                    mask_bits=mask_bits,
                )
                add_dlogits(chunks, operands[level], work.starts, dlogits, gradients[level], fresh=fresh[level])
    return gradients


def multiply_mask(blocks: Sequence[Block], mask_bits: Tensor, index: int, other: Tensor, *, transposed: bool) -> Tensor:
    """A block's mask times a matrix; see `gist_fast.functional.backends.interface.StreamingBackend.mask_product`."""
    block = blocks[index]
    shape = block.columns if transposed else block.rows, other.shape[1]
    total = torch.zeros(shape, dtype=torch.float32, device=other.device)
    first_column = starts(blocks)[block.column_operand]
    plan = make_plan(rectangles(tuple(blocks)), layout.CHUNK_TILES, 1, pinned=other.is_cuda)
    table = plan.table_on(other.device)
    of_block = [
        chunks
        for batch in plan.batches
        for chunks in batch.sets
        for rectangle in (chunks.chunks[0].rectangle,)
        if index == rectangle.block or (rectangle.symmetric and index == rectangle.mirror_block)
    ]
    scratch = other.new_empty(TILE * TILE * max(chunks.tiles for chunks in of_block))
    for chunks in of_block:
        add_masked(chunks, index, table, mask_bits, other, total, scratch, first_column, transposed=transposed)
    return total
