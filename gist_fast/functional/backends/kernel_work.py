"""A problem on the device, as the kernels get it: stacks of operands, thresholds, and who masks what.

A guide's unit vectors are held whole where they are few (`HELD_BYTES`), and else made for a chunk of pairs at a time:
a pass over 2 x 16 MiB in front of a product of 8192 x 8192 x 1024, a twentieth of its time at most.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from gist_fast.functional.backends.interface import Problem
from gist_fast.functional.backends.kernel_blocks import rectangles, starts
from gist_fast.functional.blocks import ANCHORS, POSITIVES
from gist_fast.functional.operands import tie_band
from gist_fast.kernels import layout
from gist_fast.kernels.chunks import Batch, ChunkSet, make_plan
from gist_fast.kernels.config import Config
from gist_fast.kernels.groups import mask_groups
from gist_fast.kernels.launch import in_tf32
from gist_fast.kernels.layout import TILE
from gist_fast.kernels.masks import write_masks
from gist_fast.kernels.rows import make_thresholds, make_units

HELD_BYTES = 2**28
"""Unit vectors of a guide that are held whole: those of 65,536 pairs of 1024 columns in a half type."""


class Work:
    """A pass over a problem: its operands on the device, and what decides its masks."""

    def __init__(self, problem: Problem, config: Config, *, norms: bool = False) -> None:
        self._problem, self._config = problem, config
        self._rectangles = rectangles(tuple(problem.blocks))
        anchors = problem.student[ANCHORS]
        self._rows, self._device = problem.rows, anchors.device
        self.softmaxes = problem.config.softmaxes
        self.starts = starts(problem.blocks)
        """The first row of each operand in the stack."""
        self.count = sum(x.shape[0] for x in problem.student)
        """Rows of the stack."""
        self.split = [*(x.shape[0] for x in problem.student), TILE]
        """Rows of each operand in the stack, and behind them."""
        self.partner = self.starts[POSITIVES] + problem.offset
        """Rows of the stack from an anchor to its positive."""
        self.temperature = problem.temperature.to(torch.float32)
        self.dims = problem.dims or (anchors.shape[1],)
        self.levels = len(self.dims)
        self.norms = self.numbers(self.levels, self.count) if norms else None
        """``[L, S]``: of the embeddings at each dim, where asked for."""
        self.stacks = _stacks(problem.student, self.dims, config.block_k, self.temperature, self.norms, None)
        """Student operands at each dim."""
        self._groups = [groups.contiguous() for groups in problem.groups]
        self._margin = float(problem.config.margin) if problem.margins is None else _numbers_of(problem.margins)
        self.guide_thresholds: Tensor | None = None
        self.student_thresholds: Tensor | None = None
        self.is_bad: Tensor | None = None
        self._guide: Tensor | None = None

    def numbers(self, *shape: int) -> Tensor:
        """Room for fp32 numbers, ``[B]`` where no shape is given."""
        return torch.empty(shape or (self._rows,), dtype=torch.float32, device=self._device)

    def at(self, values: Tensor, level: int, softmax: int | None = None) -> Tensor:
        """Those of one dim, and of one softmax of it if said; all of them, in their shape, where there is one: each
        view costs the host microseconds."""
        of_level = values if self.levels == 1 else values[level]
        if softmax is None or self.softmaxes == 1:
            return of_level
        return of_level.view(self.softmaxes, self._rows)[softmax]

    def has_initial_mask(self, chunks: ChunkSet) -> bool:
        """Whether masks of theirs are written before the student's scores are computed: by a guide or groups; also
        where no guide may mask, since mask bits are kept of all pairs or of none."""
        return len(self._problem.guide) > 0 or len(self._groups) > 0 or not chunks.guided

    def student_guides(self, chunks: ChunkSet) -> bool:
        """Whether the student's own scores decide as a guide's."""
        return self._problem.config.self_guided and chunks.guided

    def make_counts(self) -> None:
        """Make room for what a forward pass counts."""
        self.masked = torch.zeros(len(self._problem.blocks), dtype=torch.int64, device=self._device)
        """Pairs of each block that a guide or their group masked."""
        self.easy = torch.zeros_like(self.masked)
        """Of the others those that a student threshold did."""
        self.is_bad = torch.zeros_like(self.masked) if self._problem.guide else None
        """Its first is not 0 where a row of the guide is not finite."""

    def decide(self) -> None:
        """Compute thresholds, and the positives' logits with them."""
        problem, config = self._problem, self._problem.config
        self.positives = self.numbers(self.levels, self._rows)
        """``[L, B]``: base-2 logits of the positives."""
        if config.self_guided or problem.guide:
            self.guide_thresholds = self.numbers()
        if config.hard:
            self.student_thresholds = self.numbers()
        self.hold_guide()
        for level, stack in enumerate(self.stacks):
            self._thresholds(level, stack, self._guide if level == 0 else None, 0, self._rows, self.partner)
        if problem.guide and self._guide is None:
            step = layout.CHUNK_TILES * TILE
            for first in range(0, self._rows, step):
                piece = slice(first, min(first + step, self._rows))
                own = slice(problem.offset + piece.start, problem.offset + piece.stop)
                guide = self._guide_stack((problem.guide[ANCHORS][piece], problem.guide[POSITIVES][own]))
                count = piece.stop - piece.start
                self._thresholds(0, None, guide, first, count, count)
        if self.softmaxes > 1:
            # Tables count rows on from one softmax to the next.
            self.guide_thresholds, self.student_thresholds = (
                None if x is None else torch.cat([x] * self.softmaxes)
                for x in (self.guide_thresholds, self.student_thresholds)
            )

    def hold_guide(self) -> None:
        """Make the guide's unit vectors, where they are held whole."""
        if self._problem.guide and self._holds_guide:
            self._guide = self._guide_stack(self._problem.guide)

    def _thresholds(
        self, level: int, student: Tensor | None, guide: Tensor | None, first: int, count: int, partner: int
    ) -> None:
        config = self._problem.config
        width = self.dims[0] if guide is None else self._problem.guide[ANCHORS].shape[1]
        band = tie_band(torch.float32, width)
        widest = level == 0
        make_thresholds(
            student,
            guide,
            count,
            partner,
            self.temperature,
            self._margin,
            None if student is None else self.at(self.positives, level),
            self.guide_thresholds if guide is not None or (config.self_guided and widest) else None,
            self.student_thresholds if widest and student is not None else None,
            first=first,
            guide_band=-band if config.mask_ties else band,
            student_band=tie_band(torch.float32, self.dims[0]),
            self_guided=config.self_guided and widest,
            relative=config.relative,
        )

    @property
    def _holds_guide(self) -> bool:
        guide, step = self._problem.guide, self._config.block_k
        width = guide[ANCHORS].shape[1]
        return (width + -width % step) * guide[ANCHORS].element_size() * sum(len(g) for g in guide) <= HELD_BYTES

    def _guide_stack(self, rows: Sequence[Tensor]) -> Tensor:
        """Unit vectors of rows of the guide."""
        (stack,) = _stacks(rows, (rows[0].shape[1],), self._config.block_k, None, None, self.is_bad)
        return stack

    def plan(self, chunks: int, *, shares: tuple[int, int] = (1, 1), own_masks: bool = False) -> tuple[Batch, ...]:
        """All chunks in batches, so many of full size at a time; their table is on the device from here on."""
        side = layout.CHUNK_TILES
        plan = make_plan(
            self._rectangles,
            side,
            chunks * side * side,
            pinned=self._device.type == "cuda",
            shares=shares,
            own_masks=own_masks,
            alone=len(self._problem.guide) > 0 and not self._holds_guide,
        )
        self.table = plan.table_on(self._device)
        return plan.batches

    def mask_scratch(self, batches: Sequence[Batch]) -> Tensor:
        """Room for the mask bits of a batch."""
        words = layout.TILE_WORDS * max(batch.mask_tiles for batch in batches)
        return torch.empty(4 * words, dtype=torch.uint8, device=self._device)

    def write_masks(self, batch: Batch, mask_bits: Tensor, *, before_student: bool) -> None:
        """Write a batch's masks: all of them, or those that are decided before the student's scores are computed. Only
        the latter are counted, once in a forward pass."""
        problem = self._problem
        masked = self.masked if before_student else None
        for chunks in batch.sets:
            by_guide = len(problem.guide) > 0 and chunks.guided
            has_initial_mask = len(self._groups) > 0 or not chunks.guided
            if has_initial_mask:
                # Whoever decides next counts.
                last = not by_guide and not self.student_guides(chunks)
                mask_groups(chunks, self.table, self._groups, mask_bits, masked if last else None)
            if by_guide:
                self._write(
                    chunks, self.guide_of(batch), self.guide_thresholds, mask_bits, masked, has_initial_mask, guide=True
                )
                has_initial_mask = True
            if before_student:
                continue
            stack = self.stacks[0]
            if self.student_guides(chunks):
                self._write(chunks, stack, self.guide_thresholds, mask_bits, None, has_initial_mask)
                has_initial_mask = True
            if problem.config.hard:
                self._write(chunks, stack, self.student_thresholds, mask_bits, None, has_initial_mask, below=True)

    def _write(
        self,
        chunks: ChunkSet,
        stack: Tensor,
        thresholds: Tensor | None,
        mask_bits: Tensor,
        masked: Tensor | None,
        has_initial_mask: bool,
        *,
        guide: bool = False,
        below: bool = False,
    ) -> None:
        assert thresholds is not None
        launch = self._config.masks_symmetric if chunks.symmetric else self._config.masks
        write_masks(
            chunks,
            self.table,
            stack,
            thresholds,
            mask_bits,
            masked,
            launch,
            below=below,
            guide=guide,
            has_initial_mask=has_initial_mask,
        )

    def guide_of(self, batch: Batch) -> Tensor:
        """Unit vectors of the guide for a batch: all of them or, where they are not held whole, those of the rows and
        columns of its one chunk."""
        if self._guide is not None:
            return self._guide
        (chunk,) = batch.chunks
        spans = [chunk.x] if chunk.triangle else [chunk.x, chunk.y]
        return self._guide_stack([self._guide_rows(span) for span in spans])

    def _guide_rows(self, span: slice) -> Tensor:
        """Rows of the guide by their place in a stack."""
        k = self._operand_of(span)
        return self._problem.guide[k][span.start - self.starts[k] : span.stop - self.starts[k]]

    def _operand_of(self, span: slice) -> int:
        """Which operand some rows of the stack are of."""
        return bisect_right(self.starts, span.start) - 1

    def empty_gradients(self, batches: Sequence[Batch]) -> tuple[list[list[Tensor]], list[set[int]]]:
        """Room for the gradients by each operand, at each dim, and which of them hold nothing yet. Where a product is
        the first to reach an operand and reaches all of it, nothing needs to be set to 0."""
        counts = self.split[:-1]
        # Of each operand, whether the first rows of it that a product reaches are all.
        whole: dict[int, bool] = {}
        for chunk in itertools.chain.from_iterable(batch.chunks for batch in batches):
            for span in (chunk.x, chunk.y):
                k = self._operand_of(span)
                whole.setdefault(k, (span.start, span.stop - span.start) == (self.starts[k], counts[k]))
        fresh = all(whole.get(k, False) for k in range(len(counts)))
        make = torch.empty if fresh else torch.zeros
        gradients = [
            [make(n, stack.shape[1], dtype=torch.float32, device=self._device) for n in counts] for stack in self.stacks
        ]
        return gradients, [set(range(len(counts))) if fresh else set() for _ in self.stacks]


def _stacks(
    rows: Sequence[Tensor],
    dims: Sequence[int],
    step: int,
    temperature: Tensor | None,
    norms: Tensor | None,
    is_bad: Tensor | None,
) -> list[Tensor]:
    """Rows below each other, ``[S + TILE, D]`` for each dim, normalised: what a tile reads behind the last row is
    never used."""
    count = sum(x.shape[0] for x in rows)
    stacks = [rows[0].new_empty(count + TILE, dim + -dim % step) for dim in dims]
    for level, (stack, dim) in enumerate(zip(stacks, dims, strict=True)):
        own = norms if norms is None or len(dims) == 1 else norms[level]
        make_units(rows, stack, own, temperature, is_bad, dim, tf32=in_tf32(stack))
    return stacks


def _numbers_of(margins: Tensor) -> Tensor:
    return margins.to(torch.float32).contiguous()
