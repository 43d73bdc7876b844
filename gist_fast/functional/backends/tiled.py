"""The streaming backend in plain PyTorch: tiles of scores, never a whole matrix of them, on any device.

Beside the gradients it holds a few tiles, some numbers a row, and (unless told to decide them again) one mask bit a
pair; a batch of few pairs keeps its masked scores instead, and saves the product that would make them again. Both
savings of the design are here:

- **Symmetry.** In ``aa`` and ``pp`` a tile above the diagonal serves both of its row blocks. With ``W_ij = weight_i *
  exp2(s_ij - lse_i)`` where unmasked, and ``s_ij = u_i . u_j``:  ``d u_i = sum_j (W_ij + W_ji) u_j``, so one tile of
  ``W + W^T`` (mirrored) feeds rows and columns alike.
- **Bits.** Every comparison of the forward pass is kept as a bit, so the backward pass never touches the guide and
  agrees with the forward pass on every near-tie.

A tile's masks are decided once and serve every width of a ladder.

Masks live as float tiles of 0 and 1: on a CPU torch compares into float32 four times as fast as into bool, and
subtracting ``MASKED * mask`` is twenty times as fast as ``masked_fill_``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gist_fast.functional.backends.interface import Negatives
from gist_fast.functional.blocks import Block
from gist_fast.functional.operands import Operands, accumulation_dtype

TILE = 768
"""Rows and columns of a tile; a multiple of 8. On two cores with 32 MB of shared cache, B 4096, D = G = 384, a step
took 0.733 s with tiles of 512, 0.725 s with 768 and 0.747 s with 1024 (medians of five in one process)."""
MASKED = 1e30
"""Subtracted from a masked logit: far below any real one (at most 1.5e3 at temperature 0.001), and 0 after exp2."""


SCORES_PAIRS = 2**26
"""Batches of up to so many pairs (256 MiB in float32; 4,700 rows without negatives) keep their masked scores of every
width for the backward pass instead of bits, which spares it a fifth of all products."""


class Tile(NamedTuple):
    """A part of a block."""

    rows: slice
    columns: slice
    excluded: int
    """The diagonal, as ``torch.diagonal`` counts them, of the entries that never count; outside if there are none."""
    mirrored: bool
    """Whether the block's entries (j, i) are in no tile of their own, so that this one serves both."""


class Side(NamedTuple):
    """One of the (at most two) row blocks that a tile serves."""

    own: slice
    """Which of the B rows it belongs to."""
    dim: int
    """The tile's dimension that runs over its candidates: 1, or 0 on the mirror side."""


def mask_bytes(blocks: Sequence[Block], widths: int) -> int:
    """Bytes kept for the backward pass: of float32 scores, or of packed masks, which are never more.

    Those of the masks are an upper bound, each row of a tile being padded to whole bytes. A mirrored tile packs both
    its masks along its columns, so a symmetric square costs the square of its side in bytes, rounded up. The columns
    left and right of it are two parts, each padded on its own.
    """
    if _keeps_scores(blocks):
        return 4 * widths * sum(block.rows * block.columns for block in blocks)
    total = 0
    for block in blocks:
        square = block.rows if block.symmetric else 0
        side = (square + 7) // 8
        total += 8 * side * side + block.rows * ((block.columns - square + 14) // 8)
    return total


def forward(operands: Operands, blocks: Sequence[Block], keep_bits: bool) -> Negatives:
    """The softmax over each row's unmasked negatives; see `StreamingBackend`."""
    work = _Workspace(operands)
    widths = len(operands.ladder)
    maximum = operands.ladder[0].positives.new_full((widths, blocks[0].rows), -MASKED)
    total = torch.zeros_like(maximum)
    masked = torch.zeros(len(blocks), dtype=torch.int64, device=total.device)
    easy = torch.zeros_like(masked)
    kept = _kept(blocks, total, mask_bytes(blocks, widths) if operands.masks and keep_bits else 0)

    for index, block in enumerate(blocks):
        for tile in _tiles(block):
            masks = []
            for side, mask, hidden, by_floor in work.decide(block, tile):
                masked[index] += hidden
                easy[index] += by_floor
                kept.append_mask(mask)
                masks.append((side, mask))
            for width in range(widths):
                scores = work.logits(block, tile, width)
                for side, mask in masks:
                    logits = work.suppress(scores, mask, tile, kept.room_for_scores(scores))
                    own = side.own
                    _accumulate(maximum[width, own], total[width, own], logits, side.dim, work.scratch(tile))
    none = maximum <= -MASKED / 2
    return Negatives(
        lse2=(maximum + total.log2()).masked_fill_(none, -torch.inf),
        hardest=maximum[0].masked_fill(none[0], -torch.inf),
        masked=masked,
        easy=easy,
        bits=kept.buffer,
    )


def backward(
    operands: Operands, blocks: Sequence[Block], lse2: Tensor, weights: Tensor, bits: Tensor | None
) -> list[list[Tensor]]:
    """Gradients by the student operands; see `gist_fast.functional.backends.interface.StreamingBackend`."""
    work = _Workspace(operands)
    gradients = [[torch.zeros_like(u, dtype=lse2.dtype) for u in student.operands] for student in operands.ladder]
    kept = None if bits is None else _kept(blocks, lse2, bits)

    for block in blocks:
        for tile in _tiles(block):
            for width, side, logits in _masked_logits(work, kept, block, tile, len(operands.ladder)):
                first = side.dim == 1
                coefficients = work.coefficients(tile) if first else work.scratch(tile)
                torch.sub(logits, _across(lse2[width, side.own], side), out=coefficients).exp2_()
                coefficients.mul_(_across(weights[width, side.own], side))
                if not first:  # the mirror side joins the other
                    coefficients = work.coefficients(tile).add_(coefficients)
                if not (first and tile.mirrored):
                    work.add_products(gradients[width], coefficients, block, tile, width)
    return gradients


def mask_product(
    blocks: Sequence[Block], widths: int, bits: Tensor, index: int, other: Tensor, transposed: bool
) -> Tensor:
    """A block's mask times a matrix; see `gist_fast.functional.backends.interface.StreamingBackend`."""
    dtype = accumulation_dtype(other.dtype)
    other, target = other.to(dtype), blocks[index]
    found = other.new_zeros(target.columns if transposed else target.rows, other.shape[1])
    kept = _kept(blocks, other, bits)
    for block in blocks[: index + 1]:
        for tile in _tiles(block):
            for mask, side in _kept_masks(kept, block, tile, widths):
                if block is not target:
                    continue
                mask.diagonal(tile.excluded).fill_(0.0)
                columns = tile.columns
                if side.dim == 0:
                    mask, columns = mask.T, _moved(tile.rows, block.excluded or 0)
                if transposed:
                    found[columns] += mask.T @ other[side.own]
                else:
                    found[side.own] += mask @ other[columns]
    return found


def _kept_masks(kept: _Kept, block: Block, tile: Tile, widths: int) -> Iterator[tuple[Tensor, Side]]:
    """The masks of a tile, 1.0 where an entry does not count."""
    scores = isinstance(kept, _KeptScores)
    for width in range(widths if scores else 1):
        for side in _sides(block, tile):
            found = kept.next(*_shape(tile))
            if width == 0:
                yield ((found < -MASKED / 2).to(found.dtype) if scores else found), side


def _masked_logits(
    work: _Workspace, kept: _Kept | None, block: Block, tile: Tile, widths: int
) -> Iterator[tuple[int, Side, Tensor]]:
    """At each width, for each side of a tile, its logits, the masked ones out of reach; not to be changed, and gone
    with the next."""
    if isinstance(kept, _KeptScores):
        for width in range(widths):
            for side in _sides(block, tile):
                yield width, side, kept.next(*_shape(tile))
        return
    if kept is None:
        masks = [(side, mask) for side, mask, _, _ in work.decide(block, tile)]
    else:
        masks = [(side, kept.next(*_shape(tile))) for side in _sides(block, tile)]
    for width in range(widths):
        scores = work.logits(block, tile, width)
        for side, mask in masks:
            yield width, side, work.suppress(scores, mask, tile)


def _tiles(block: Block) -> Iterator[Tile]:
    """The block cut up; of a symmetric block's square only the tiles on and above the diagonal."""
    square = range(0)
    if block.symmetric and block.excluded is not None:
        square = range(block.excluded, block.excluded + block.rows)
    for r in range(0, block.rows, TILE):
        rows = slice(r, min(r + TILE, block.rows))
        for start, stop in ((0, square.start), (square.stop, block.columns)):
            for c in range(start, stop, TILE):
                yield _tile(block, rows, slice(c, min(c + TILE, stop)), mirrored=False)
        for c in range(square.start + r, square.stop, TILE):
            columns = slice(c, min(c + TILE, square.stop))
            yield _tile(block, rows, columns, mirrored=c > square.start + r)


def _tile(block: Block, rows: slice, columns: slice, mirrored: bool) -> Tile:
    if block.excluded is None:
        return Tile(rows, columns, columns.stop - columns.start, mirrored)
    return Tile(rows, columns, block.excluded + rows.start - columns.start, mirrored)


def _sides(block: Block, tile: Tile) -> Iterator[Side]:
    yield Side(tile.rows, dim=1)
    if tile.mirrored and block.excluded is not None:
        yield Side(_moved(tile.columns, -block.excluded), dim=0)


def _moved(places: slice, by: int) -> slice:
    return slice(places.start + by, places.stop + by)


def _across(values: Tensor, side: Side) -> Tensor:
    """A value per owner, shaped to broadcast over a tile."""
    return values.unsqueeze(side.dim)


def _accumulate(maximum: Tensor, total: Tensor, logits: Tensor, dim: int, out: Tensor) -> None:
    """Fold a tile into the running maximum and sum of exp2. ``out`` is overwritten and may be `logits` itself.

    A row that has met only masked entries holds a meaningless sum at a maximum of about -MASKED; the first real entry
    multiplies it by exp2(-MASKED) = 0.
    """
    risen = torch.maximum(maximum, logits.amax(dim))
    torch.sub(logits, risen.unsqueeze(dim), out=out)
    total.mul_(torch.exp2(maximum - risen)).add_(out.exp2_().sum(dim))
    maximum.copy_(risen)


class _Workspace:
    """The operands in the type they are multiplied in, and tiles of scratch memory used again for every tile."""

    def __init__(self, operands: Operands) -> None:
        self._operands = operands
        self._ladder = [tuple(map(_multiplicand, student.operands)) for student in operands.ladder]
        self._guide: tuple[Tensor, ...] | None = None
        if operands.guide is not None:
            self._guide = self._ladder[0] if operands.self_guided else tuple(map(_multiplicand, operands.guide))
        self._like = operands.ladder[0].positives
        # bf16 units double the gradient products. Scores stay in float32: torch has no bf16 product with a float32
        # result on a CPU, and a logit rounded to bf16 is too coarse.
        narrow = operands.student[0].dtype == torch.bfloat16 and self._like.device.type == "cpu" and _cpu_has_bf16()
        self._factors = [student.operands for student in operands.ladder] if narrow else self._ladder
        self._buffers: dict[str, Tensor] = {}
        self._widest_of: tuple[Block, Tile] | None = None

    def decide(self, block: Block, tile: Tile) -> list[tuple[Side, Tensor | None, Tensor | int, Tensor | int]]:
        """For each side of a tile: 1.0 where its entries do not count, else 0.0 (None where nothing masks); how many a
        guide or their group masked; how many of the others lie below their floor."""
        operands = self._operands
        found: list[tuple[Side, Tensor | None, Tensor | int, Tensor | int]] = []
        if not operands.masks:
            return [(side, None, 0, 0) for side in _sides(block, tile)]
        guide = None if operands.limits is None else self._guide_scores(block, tile)
        groups = operands.groups_of(block)
        for side in _sides(block, tile):
            mask = self._buffer(f"mask {side.dim}", *_shape(tile))
            more = self._buffer("more", *_shape(tile))
            easy: Tensor | int = 0
            if guide is not None and operands.limits is not None:
                torch.gt(guide, _across(operands.limits[side.own], side), out=mask)
            else:
                mask.zero_()
            if groups is not None:
                torch.eq(groups[0][tile.rows, None], groups[1][tile.columns], out=more)
                torch.maximum(mask, more, out=mask)
            masked = self._count(mask, tile)
            if operands.floors is not None:
                torch.lt(self.widest(block, tile), _across(operands.floors[side.own], side), out=more)
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

    def widest(self, block: Block, tile: Tile) -> Tensor:
        """Base-2 logits ``[r, c]`` of the widest operands, without boost; computed once a tile."""
        if self._widest_of != (block, tile):
            self._scores(self._ladder[0], block, tile, "student")
            self._widest_of = block, tile
        return self._buffer("student", *_shape(tile))

    def logits(self, block: Block, tile: Tile, width: int) -> Tensor:
        """Base-2 logits ``[r, c]``, boosted; widths are asked for in their order, after the tile's masks."""
        if width == 0:
            scores = self.widest(block, tile)
            self._widest_of = None  # from here on boosted, or overwritten
        else:
            scores = self._scores(self._ladder[width], block, tile, "student")
        own, others = self._operands.boosts_of(block)
        if block.own is not None:
            place = block.own + tile.rows.start - tile.columns.start
            inside = -scores.shape[0] < place < scores.shape[1]
            kept = scores.diagonal(place).clone() if inside else None
            if others is not None:
                scores.mul_(others)
            if kept is not None:
                scores.diagonal(place).copy_(kept if own is None else kept * own)
        elif others is not None:
            scores.mul_(others)
        return scores

    def suppress(self, scores: Tensor, mask: Tensor | None, tile: Tile, out: Tensor | None = None) -> Tensor:
        """The scores with the masked ones out of reach: a copy in `out` or in scratch memory, or, where there is no
        mask, themselves."""
        if mask is None:
            scores.diagonal(tile.excluded).fill_(-MASKED)
            return scores
        return torch.sub(scores, mask, alpha=MASKED, out=self.scratch(tile) if out is None else out)

    def scratch(self, tile: Tile) -> Tensor:
        """Scratch of the tile's shape; what `suppress` returns may lie in it."""
        return self._buffer("logits", *_shape(tile))

    def coefficients(self, tile: Tile) -> Tensor:
        """Scratch of the tile's shape."""
        return self._buffer("coefficients", *_shape(tile))

    def _guide_scores(self, block: Block, tile: Tile) -> Tensor:
        """The guide's scores ``[r, c]``, in the unit of the limits."""
        assert self._guide is not None, "limits come with a guide"
        if self._operands.self_guided:
            return self.widest(block, tile)
        return self._scores(self._guide, block, tile, "guide")

    def add_products(self, gradients: list[Tensor], coefficients: Tensor, block: Block, tile: Tile, width: int) -> None:
        """Add a tile's ``coefficients @ columns`` to its rows' gradient, and the transposed product to its columns'."""
        rows = slice(block.row_start + tile.rows.start, block.row_start + tile.rows.stop)
        row_gradient = gradients[block.row_operand][rows]
        column_gradient = gradients[block.column_operand][tile.columns]
        row_operand = self._factors[width][block.row_operand][rows]
        column_operand = self._factors[width][block.column_operand][tile.columns]
        if block.symmetric and rows == tile.columns:
            # A square on the diagonal: both products are of the same rows, so one of W + W^T does.
            _add_product(row_gradient, coefficients + coefficients.T, row_operand)
        else:
            _add_product(row_gradient, coefficients, column_operand)
            _add_product(column_gradient, coefficients.T, row_operand)

    def _scores(self, operands: Sequence[Tensor], block: Block, tile: Tile, name: str) -> Tensor:
        rows = operands[block.row_operand][block.row_start + tile.rows.start : block.row_start + tile.rows.stop]
        columns = operands[block.column_operand][tile.columns]
        # A float64 guide decides in float64: its band of ties is too narrow for scores of another type.
        out = self._buffer(name, *_shape(tile), dtype=accumulation_dtype(rows.dtype) if name == "guide" else None)
        if rows.dtype == out.dtype:
            return torch.mm(rows, columns.T, out=out)
        return out.copy_(_product(rows, columns.T, out.dtype))

    def _buffer(self, name: str, r: int, c: int, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._buffers:
            # Pages touched once and used for every tile: fresh memory costs more to map than the arithmetic on it.
            self._buffers[name] = self._like.new_empty(TILE * TILE, dtype=dtype)
        return self._buffers[name][: r * c].view(r, c)


class _Kept:
    """What the forward pass keeps of its tiles, appended one by one and read back in the same order."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self._cursor = 0

    def append_mask(self, mask: Tensor | None) -> None:
        """Keep a tile's mask of 0.0 and 1.0, if masks are kept."""

    def room_for_scores(self, scores: Tensor) -> Tensor | None:
        """Where a tile's masked logits are to be written, if these are kept."""
        return None

    def next(self, r: int, c: int) -> Tensor:
        """The next tile, ``[r, c]``."""
        raise NotImplementedError

    def _take(self, n_bytes: int) -> Tensor:
        taken = self.buffer[self._cursor : self._cursor + n_bytes]
        self._cursor += n_bytes
        return taken


class _KeptScores(_Kept):
    """Masked logits, float32."""

    def room_for_scores(self, scores: Tensor) -> Tensor:
        return self.next(*scores.shape)

    def next(self, r: int, c: int) -> Tensor:
        return self._take(4 * r * c).view(torch.float32).view(r, c)


class _KeptBits(_Kept):
    """Masks, one bit a pair."""

    def __init__(self, buffer: Tensor, like: Tensor) -> None:
        super().__init__(buffer)
        places = torch.arange(8, device=like.device)
        self._powers = (2**places).to(like.dtype)
        bytes_ = torch.arange(256, dtype=torch.int64, device=like.device)
        self._unpacked = ((bytes_[:, None] >> places) & 1).to(like.dtype)

    def append_mask(self, mask: Tensor | None) -> None:
        """Eight neighbours in a row make a byte, the first its lowest bit."""
        assert mask is not None, "what keeps bits has masks"
        padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)) if mask.shape[1] % 8 else mask
        # Sums of distinct powers of two up to 255 are exact in every float type used here.
        self._take(padded.numel() // 8).copy_(torch.mv(padded.view(-1, 8), self._powers))

    def next(self, r: int, c: int) -> Tensor:
        width = (c + 7) // 8
        packed = self._take(r * width)
        return self._unpacked.index_select(0, packed.to(torch.int32)).view(r, 8 * width)[:, :c]


def _kept(blocks: Sequence[Block], like: Tensor, buffer: Tensor | int) -> _Kept:
    """What is kept in a buffer, or in a new one of so many bytes; nothing, in an empty one."""
    scores = _keeps_scores(blocks) and like.dtype == torch.float32
    if isinstance(buffer, int):
        # Scores fill their buffer. The bound on bits is not always reached, and what is left over must not vary.
        make = torch.empty if scores else torch.zeros
        buffer = make(buffer, dtype=torch.uint8, device=like.device)
    if len(buffer) == 0:
        return _Kept(buffer)
    return _KeptScores(buffer) if scores else _KeptBits(buffer, like)


def _keeps_scores(blocks: Sequence[Block]) -> bool:
    return sum(block.rows * block.columns for block in blocks) <= SCORES_PAIRS


def _shape(tile: Tile) -> tuple[int, int]:
    return tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start


def _multiplicand(operand: Tensor) -> Tensor:
    """The operand as it is multiplied: half types stay as they are only where a product can be summed into float32."""
    return operand if operand.is_cuda else operand.to(accumulation_dtype(operand.dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, with `a` rounded to the type of `b`."""
    if a.dtype == b.dtype:
        total.addmm_(a, b)
    else:
        total.add_(_product(a.to(b.dtype), b, total.dtype))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` of half types as `dtype`; on a CPU the sum itself is rounded to the half type first."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a, b)


@functools.cache
def _cpu_has_bf16() -> bool:
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in every build of torch
    return probe is not None and probe()
