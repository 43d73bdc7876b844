"""The streaming backend in plain PyTorch: tiles of scores, never a whole matrix of them, on any device.

Beside the gradients it holds a few tiles, some numbers a row, and (unless told to decide them again) one mask bit a
pair; a batch of few pairs keeps its masked scores instead, and saves the product that would make them again
(`gist_fast.functional.backends.kept`). Two things are saved:

- **Both sides.** In ``aa`` and ``pp`` a tile above the diagonal serves both of its row blocks. With ``W_ij = weight_i *
  exp2(s_ij - lse_i)`` where unmasked, and ``s_ij = u_i . u_j``:  ``d u_i = sum_j (W_ij + W_ji) u_j``, so one tile of
  ``W + W^T`` (mirrored) feeds rows and columns alike. Every tile of ``ap`` serves ``pa`` in the same way.
- **Masks.** Every comparison of the forward pass is kept, so the backward pass never touches the guide and agrees with
  the forward pass on every near-tie.

A tile's masks are decided once and serve every Matryoshka dim.

Masks are float tiles of 0 and 1: on a CPU torch compares into float32 four times as fast as into bool, and subtracting
``MASKED * mask`` is twenty times as fast as ``masked_fill_``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gist_fast.functional.backends import around_tiles
from gist_fast.functional.backends.around_tiles import Negatives
from gist_fast.functional.backends.cpu_products import add_product, product
from gist_fast.functional.backends.interface import GuidedRows, Problem
from gist_fast.functional.backends.kept import MASKED, Kept, KeptScores, make_kept, mask_bytes
from gist_fast.functional.blocks import Block, Strip, strips
from gist_fast.functional.operands import Operands, accumulation_dtype, moved

TILE = 768
"""Rows and columns of a tile; a multiple of 8. On two cores with 32 MB of shared cache, B 4096, D = G = 384, a step
took 0.733 s with tiles of 512, 0.725 s with 768 and 0.747 s with 1024 by MKL's products (medians of five in one
process); by oneDNN's, 1 / 0.87 of the time with 512 that it took with 768, at B 1024 1 / 1.05."""


class Tile(NamedTuple):
    """A part of a block."""

    strip: Strip
    rows: slice
    columns: slice
    """Of the block."""
    excluded: int
    """The diagonal, as ``torch.diagonal`` counts them, of the entries that never count; outside if there are none."""
    mirrored: bool
    """Whether its scores serve its columns too, which are rows of `Strip.mirror`: no other tile has them."""

    @property
    def block(self) -> Block:
        return self.strip.block

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


class Side(NamedTuple):
    """One of the (at most two) row blocks that a tile serves."""

    own: slice
    """Which of the B rows it belongs to."""
    axis: int
    """The axis of the tile that runs over its candidates: 1, or 0 on the mirror side."""
    block_index: int
    """Of the block whose rows they are."""
    softmax: slice
    """Where those rows stand among the ``R`` of all softmaxes."""


def forward(problem: Problem, keep_mask_bits: bool) -> GuidedRows:
    """See `gist_fast.functional.backends.interface.StreamingBackend`."""
    return around_tiles.forward(problem, keep_mask_bits, negatives)


def backward(problem: Problem, grad_loss: Tensor, lse2: Tensor | None, mask_bits: Tensor | None) -> list[Tensor]:
    """See `gist_fast.functional.backends.interface.StreamingBackend`."""
    return around_tiles.backward(problem, grad_loss, lse2, mask_bits, negatives, gradients)


def negatives(operands: Operands, blocks: Sequence[Block], keep_mask_bits: bool) -> Negatives:
    """The softmax over each row's unmasked negatives."""
    work = Workspace(operands)
    dims, rows = len(operands.matryoshka), blocks[0].rows
    softmaxes = 1 + max(block.softmax for block in blocks)
    maximum = operands.matryoshka[0].positives.new_full((dims, softmaxes * rows), -MASKED)
    total = torch.zeros_like(maximum)
    masked = torch.zeros(len(blocks), dtype=torch.int64, device=total.device)
    easy = torch.zeros_like(masked)
    kept = make_kept(blocks, total, mask_bytes(blocks, dims) if operands.masks and keep_mask_bits else 0)

    for tile in tiles(blocks):
        masks = []
        for side, mask, by_guide_or_group, by_student in work.decide(tile):
            masked[side.block_index] += by_guide_or_group
            easy[side.block_index] += by_student
            kept.append_mask(mask)
            masks.append((side, mask))
        for dim in range(dims):
            scores = work.logits(tile, dim)
            for side, mask in masks:
                logits = work.suppress(scores, mask, tile, kept.next_scores(*tile.shape))
                at = side.softmax
                accumulate(maximum[dim, at], total[dim, at], logits, side.axis, work.scratch(tile))
    none = maximum <= -MASKED / 2
    hardest = maximum[0].masked_fill(none[0], -torch.inf)
    return Negatives(
        lse2=(maximum + total.log2()).masked_fill_(none, -torch.inf),
        hardest=hardest if len(hardest) == rows else hardest.view(-1, rows).amax(0),
        masked=masked,
        easy_negatives=easy,
        mask_bits=kept.buffer,
    )


def gradients(
    operands: Operands, blocks: Sequence[Block], lse2: Tensor, weights: Tensor | None, mask_bits: Tensor | None
) -> list[list[Tensor]]:
    """Gradients by the student operands; see `gist_fast.functional.backends.around_tiles.GradientsBy`."""
    work = Workspace(operands)
    found = [[torch.zeros_like(u, dtype=lse2.dtype) for u in student.operands] for student in operands.matryoshka]
    kept = None if mask_bits is None else make_kept(blocks, lse2, mask_bits)

    for tile in tiles(blocks):
        for dim, side, logits in _masked_logits(work, kept, tile, len(operands.matryoshka)):
            first = side.axis == 1
            dlogits = work.dlogits(tile) if first else work.scratch(tile)
            torch.sub(logits, across(lse2[dim, side.softmax], side), out=dlogits).exp2_()
            if weights is not None:
                dlogits.mul_(across(weights[dim, side.softmax], side))
            if not first:  # the mirror side joins the other
                dlogits = work.dlogits(tile).add_(dlogits)
            if not (first and tile.mirrored):
                work.add_products(found[dim], dlogits, tile, dim)
    return found


def mask_product(
    blocks: Sequence[Block], dims: int, mask_bits: Tensor, index: int, other: Tensor, transposed: bool
) -> Tensor:
    """A block's mask times a matrix; see `gist_fast.functional.backends.interface.StreamingBackend`."""
    dtype = accumulation_dtype(other.dtype)
    other, target = other.to(dtype), blocks[index]
    found = other.new_zeros(target.columns if transposed else target.rows, other.shape[1])
    kept = make_kept(blocks, other, mask_bits)
    # Scores are kept of every dim, and are masked alike.
    repeated = dims if isinstance(kept, KeptScores) else 1
    for tile in tiles(blocks):
        if tile.strip.index > index:
            break
        for repeat in range(repeated):
            for side in sides(tile):
                mask = kept.next_mask(*tile.shape)
                if repeat > 0 or side.block_index != index:
                    continue
                mask.diagonal(tile.excluded).fill_(0.0)
                columns = tile.columns
                if side.axis == 0:
                    mask, columns = mask.T, moved(tile.rows, target.excluded or 0)
                if transposed:
                    found[columns] += mask.T @ other[side.own]
                else:
                    found[side.own] += mask @ other[columns]
    return found


def _masked_logits(work: Workspace, kept: Kept | None, tile: Tile, dims: int) -> Iterator[tuple[int, Side, Tensor]]:
    """At each dim, for each side of a tile, its logits, the masked ones out of reach; not to be changed, and valid
    until the next are asked for."""
    if isinstance(kept, KeptScores):
        for dim in range(dims):
            for side in sides(tile):
                yield dim, side, kept.next(*tile.shape)
        return
    if kept is None:
        masks = [(side, mask) for side, mask, _, _ in work.decide(tile)]
    else:
        masks = [(side, kept.next_mask(*tile.shape)) for side in sides(tile)]
    for dim in range(dims):
        scores = work.logits(tile, dim)
        for side, mask in masks:
            yield dim, side, work.suppress(scores, mask, tile)


def tiles(blocks: Sequence[Block]) -> Iterator[Tile]:
    """The blocks cut up; of a symmetric square only the tiles on and above the diagonal."""
    for strip in strips(blocks):
        rows, first = strip.block.rows, strip.first
        for r in range(0, rows, TILE):
            for c in range(r if strip.symmetric else 0, strip.columns, TILE):
                # Outside, where all count.
                excluded = strip.columns if strip.excluded is None else strip.excluded + r - c
                yield Tile(
                    strip,
                    slice(r, min(r + TILE, rows)),
                    slice(first + c, first + min(c + TILE, strip.columns)),
                    excluded,
                    mirrored=strip.mirror is not None and not (strip.symmetric and r == c),
                )


def sides(tile: Tile) -> Iterator[Side]:
    strip, block = tile.strip, tile.block
    yield Side(tile.rows, 1, strip.index, moved(tile.rows, block.softmax * block.rows))
    if tile.mirrored and strip.mirror is not None:
        own = moved(tile.columns, -strip.first)
        yield Side(own, 0, strip.mirror, moved(own, strip.mirror_softmax * block.rows))


def across(values: Tensor, side: Side) -> Tensor:
    """A value per owner, shaped to broadcast over a tile."""
    return values.unsqueeze(side.axis)


def accumulate(maximum: Tensor, total: Tensor, logits: Tensor, axis: int, out: Tensor) -> None:
    """Reduce a tile into the running maximum and sum of exp2. ``out`` is overwritten and may be `logits` itself.

    A row that has met only masked entries holds a meaningless sum at a maximum of about -MASKED; the first real entry
    multiplies it by exp2(-MASKED) = 0.
    """
    risen = torch.maximum(maximum, logits.amax(axis))
    torch.sub(logits, risen.unsqueeze(axis), out=out)
    total.mul_(torch.exp2(maximum - risen)).add_(out.exp2_().sum(axis))
    maximum.copy_(risen)


class Workspace:
    """The operands in the type they are multiplied in, and tiles of scratch memory used again for every tile."""

    def __init__(self, operands: Operands) -> None:
        self._operands = operands
        self._students = [tuple(map(_multiplicand, student.operands)) for student in operands.matryoshka]
        self._guide: tuple[Tensor, ...] | None = None
        if operands.guide is not None and not operands.self_guided:
            self._guide = tuple(map(_multiplicand, operands.guide))
        self._like = operands.matryoshka[0].positives
        # bf16 units double the gradient products. Scores stay in float32: torch has no bf16 product with a float32
        # result on a CPU, and a logit rounded to bf16 is too coarse.
        narrow = operands.student[0].dtype == torch.bfloat16 and self._like.device.type == "cpu" and _cpu_has_bf16()
        self._factors = [student.operands for student in operands.matryoshka] if narrow else self._students
        self._memory: dict[str, Tensor] = {}
        self._largest: tuple[Tile, Tensor] | None = None

    def decide(self, tile: Tile) -> list[tuple[Side, Tensor | None, Tensor | int, Tensor | int]]:
        """For each side of a tile: 1.0 where its entries do not count, else 0.0 (None where nothing masks); how many a
        guide or their group masked; how many of the others are easy negatives."""
        operands, block = self._operands, tile.block
        found: list[tuple[Side, Tensor | None, Tensor | int, Tensor | int]] = []
        if not operands.masks:
            return [(side, None, 0, 0) for side in sides(tile)]
        guide = self.largest(tile) if operands.self_guided and block.guided else None
        if self._guide is not None and block.guided:
            guide = self._scores(self._guide, tile, "guide")
        groups = list(operands.groups_of(block))
        for side in sides(tile):
            mask = self.buffer(f"mask {side.axis}", *tile.shape)
            more = self.buffer("more", *tile.shape)
            easy: Tensor | int = 0
            if guide is not None and operands.guide_thresholds is not None:
                torch.gt(guide, across(operands.guide_thresholds[side.own], side), out=mask)
            else:
                mask.zero_()
            for rows, columns in groups:
                torch.eq(rows[tile.rows, None], columns[tile.columns], out=more)
                torch.maximum(mask, more, out=mask)
            masked = self._count(mask, tile)
            if operands.student_thresholds is not None:
                torch.lt(self.largest(tile), across(operands.student_thresholds[side.own], side), out=more)
                torch.maximum(mask, more, out=mask)
                easy = self._count(mask, tile) - masked
            mask.diagonal(tile.excluded).fill_(1.0)
            found.append((side, mask, masked, easy))
        return found

    @staticmethod
    def _count(mask: Tensor, tile: Tile) -> Tensor:
        """How many entries are masked, the excluded ones not counted; they are 0.0 afterwards."""
        mask.diagonal(tile.excluded).fill_(0.0)
        return mask.sum().to(torch.int64)

    def largest(self, tile: Tile) -> Tensor:
        """Base-2 logits ``[r, c]`` of the largest dim, not scaled by hardness; computed once a tile."""
        if self._largest is None or self._largest[0] is not tile:
            self._largest = None  # its memory goes first
            self._largest = tile, self._scores(self._students[0], tile, "student")
        return self._largest[1]

    def logits(self, tile: Tile, dim: int) -> Tensor:
        """Base-2 logits ``[r, c]``, scaled by hardness; dims are asked for in their order, after the tile's masks."""
        if dim == 0:
            scores = self.largest(tile)
            self._largest = None  # from here on scaled, or overwritten
        else:
            scores = self._scores(self._students[dim], tile, "student")
        block = tile.block
        own, others = self._operands.logit_scales_of(block)
        if block.own_negative is not None:
            place = block.own_negative + tile.rows.start - tile.columns.start
            inside = -scores.shape[0] < place < scores.shape[1]
            unscaled = scores.diagonal(place).clone() if inside else None
            if others is not None:
                scores.mul_(others)
            if unscaled is not None:
                scores.diagonal(place).copy_(unscaled if own is None else unscaled * own)
        elif others is not None:
            scores.mul_(others)
        return scores

    def student_scores(self, tile: Tile, dim: int) -> Tensor:
        """Base-2 logits ``[r, c]`` at a dim, without hardness weighting."""
        return self._scores(self._students[dim], tile, "student")

    def guide_scores(self, tile: Tile) -> Tensor:
        """Cosine similarities ``[r, c]`` by the guide."""
        assert self._guide is not None
        return self._scores(self._guide, tile, "guide")

    def suppress(self, scores: Tensor, mask: Tensor | None, tile: Tile, out: Tensor | None = None) -> Tensor:
        """The scores with the masked ones out of reach: a copy in `out` or in scratch memory, or, where there is no
        mask, themselves."""
        if mask is None:
            scores.diagonal(tile.excluded).fill_(-MASKED)
            return scores
        return torch.sub(scores, mask, alpha=MASKED, out=self.scratch(tile) if out is None else out)

    def scratch(self, tile: Tile) -> Tensor:
        """Scratch of the tile's shape; what `suppress` returns may lie in it."""
        return self.buffer("logits", *tile.shape)

    def dlogits(self, tile: Tile) -> Tensor:
        """Scratch of the tile's shape, for the gradient by its logits."""
        return self.buffer("dlogits", *tile.shape)

    def add_products(self, gradients: list[Tensor], dlogits: Tensor, tile: Tile, dim: int) -> None:
        """Add a tile's ``dlogits @ columns`` to its rows' gradient, and the transposed product to its columns'."""
        block = tile.block
        rows = moved(tile.rows, block.row_start)
        row_gradient = gradients[block.row_operand][rows]
        column_gradient = gradients[block.column_operand][tile.columns]
        row_operand = self._factors[dim][block.row_operand][rows]
        column_operand = self._factors[dim][block.column_operand][tile.columns]
        if block.symmetric and rows == tile.columns:
            # A square on the diagonal: both products are of the same rows, so one of W + W^T does.
            _add_product(row_gradient, dlogits + dlogits.T, row_operand)
        else:
            _add_product(row_gradient, dlogits, column_operand)
            _add_product(column_gradient, dlogits.T, row_operand)

    def _scores(self, operands: Sequence[Tensor], tile: Tile, name: str) -> Tensor:
        block = tile.block
        rows = operands[block.row_operand][moved(tile.rows, block.row_start)]
        columns = operands[block.column_operand][tile.columns]
        # A float64 guide decides in float64: its band of ties is too narrow for scores of another type.
        out = self.buffer(name, *tile.shape, dtype=accumulation_dtype(rows.dtype) if name == "guide" else None)
        if rows.dtype == out.dtype:
            return product(rows, columns.T, out)
        return out.copy_(_half_product(rows, columns.T, out.dtype))

    def buffer(self, name: str, r: int, c: int, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._memory:
            # Pages touched once and used for every tile: fresh memory costs more to map than the arithmetic on it.
            self._memory[name] = self._like.new_empty(TILE * TILE, dtype=dtype)
        return self._memory[name][: r * c].view(r, c)


def _multiplicand(operand: Tensor) -> Tensor:
    """The operand as it is multiplied: half types stay as they are only where a product can be summed into float32."""
    return operand if operand.is_cuda else operand.to(accumulation_dtype(operand.dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, with `a` rounded to the type of `b`."""
    if a.dtype == b.dtype:
        add_product(total, a, b)
    else:
        total.add_(_half_product(a.to(b.dtype), b, total.dtype))


def _half_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` of half types as `dtype`; on a CPU the sum itself is rounded to the half type first."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a, b)


@functools.cache
def _cpu_has_bf16() -> bool:
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in every build of torch
    return probe is not None and probe()
