"""The streaming backend on Triton kernels: what a problem becomes for `gist_fast.kernels`.

Embeddings of a model are stood below each other in one *stack* and normalised there; embedding dims are filled up with
zeros to what the kernels step by, which changes no product. Blocks become *rectangles* of the stack: a block ``pp``
that has more columns than rows (candidates gathered from all ranks) is a symmetric square and the plain rectangles left
and right of it. `gist_fast.kernels.chunks` cuts them up and says which launch covers what. So a batch of any size below
a chunk takes the same few launches, and the host has little to do.

**Forward**: units, thresholds, masks, partial softmaxes, and their reduction to the loss. **Backward**: units, weights,
masks once more unless they were kept, dlogits, products of the library, gradients by the embeddings.

A guide's unit vectors are held whole where they are few (`HELD_BYTES`), and else made for a chunk of pairs at a time:
a pass over 2 x 16 MiB in front of a product of 8192 x 8192 x 1024, a twentieth of its time at most.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from gist_fast.functional.backends.interface import LARGEST_WEIGHT, GuidedRows, Problem
from gist_fast.functional.blocks import ANCHORS, POSITIVES, Block
from gist_fast.functional.operands import tie_band
from gist_fast.kernels import layout, tuning
from gist_fast.kernels.chunks import NOWHERE, Batch, ChunkSet, Rectangle, batches
from gist_fast.kernels.config import Config, Generation, choose_config, generation_of
from gist_fast.kernels.layout import TILE, mask_words

MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = (8, 0)
HELD_BYTES = 2**28
"""Unit vectors of a guide that are held whole: those of 65,536 pairs of 1024 columns in a half type."""
FORWARD_CHUNKS = 4
"""Chunks of a batch in a forward pass: 2^28 pairs at most, and 32 MiB of partial softmaxes. A backward pass has one, or
several that are as small together."""


class Extent(NamedTuple):
    """Where a rectangle lies in its block."""

    first: int
    columns: int
    excluded: int
    symmetric: bool


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on tensors of that device and type, or None where they can."""
    if dtype == torch.float64:
        return "the kernels compute in float32, and embeddings, the student's or the guide's, are float64"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    if version < MINIMUM_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, MINIMUM_TRITON))}"
    if interpreted():
        if dtype == torch.bfloat16:
            return "Triton's interpreter (TRITON_INTERPRET=1) multiplies bfloat16 wrongly"
        return None
    if device.type != "cuda":
        return f"the tensors are on a {device.type} device, and Triton kernels need a GPU"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < MINIMUM_CAPABILITY:
        return f"the GPU's compute capability {capability[0]}.{capability[1]} is below 8.0"
    try:
        with _on(device):
            triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton has no driver or compiler for this GPU ({type(error).__name__}: {error})"
    return None


def interpreted() -> bool:
    """Whether Triton kernels are interpreted on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def mask_bytes(blocks: Sequence[Block], dims: int) -> int:
    """Bytes of the mask bits, which serve all Matryoshka dims; see `StreamingBackend`."""
    extents = ((block.rows, extent) for block in blocks for extent in _extents(block))
    return 4 * sum(mask_words(rows, extent.columns, extent.symmetric) for rows, extent in extents)


def forward(problem: Problem, keep_mask_bits: bool) -> GuidedRows:
    """See `gist_fast.functional.backends.interface.StreamingBackend`."""
    config = _config(_forward_direction(problem), problem, lambda c: forward_with(c, problem, keep_mask_bits))
    return forward_with(config, problem, keep_mask_bits)


def backward(problem: Problem, grad_loss: Tensor, lse2: Tensor | None, mask_bits: Tensor | None) -> list[Tensor]:
    """See `gist_fast.functional.backends.interface.StreamingBackend`."""
    direction = "recompute" if mask_bits is None and problem.masks else "backward"
    config = _config(direction, problem, lambda c: backward_with(c, problem, grad_loss, lse2, mask_bits))
    return backward_with(config, problem, grad_loss, lse2, mask_bits)


def forward_with(config: Config, problem: Problem, keep_mask_bits: bool) -> GuidedRows:
    """`forward` by a given configuration."""
    from gist_fast.kernels.forward import start_forward
    from gist_fast.kernels.reduce import reduce

    with _on(problem.student[0].device):
        work = _Work(problem, config)
        work.make_counts()
        work.decide()
        loss, lse2 = torch.empty_like(work.positives), torch.empty_like(work.positives)
        similarities = work.numbers(), work.numbers()
        keep_mask_bits = keep_mask_bits and problem.masks
        n_bytes = mask_bytes(problem.blocks, work.levels) if keep_mask_bits else 0
        mask_bits = torch.empty(n_bytes, dtype=torch.uint8, device=loss.device)
        own_masks = problem.masks and not keep_mask_bits
        shares = config.forward.shares, config.forward_symmetric.shares
        done = work.batches(FORWARD_CHUNKS, shares=shares, own_masks=own_masks)
        words = work.mask_scratch(done) if own_masks else mask_bits.view(torch.int32) if keep_mask_bits else None
        size = TILE * max(batch.partial_tiles for batch in done)
        maxima, sums = loss.new_empty(size), loss.new_empty(size)
        running = loss.new_empty(work.levels, 2, loss.shape[1]) if len(done) > 1 else None
        for index, batch in enumerate(done):
            if work.decided_before:
                assert words is not None
                work.write_masks(batch, words, before_student=True)
            for level, stack in enumerate(work.stacks):
                decides = level == 0
                for chunks in batch.sets:
                    start_forward(
                        chunks,
                        stack,
                        maxima,
                        sums,
                        config.forward_symmetric if chunks.symmetric else config.forward,
                        guide_thresholds=work.guide_thresholds if decides and problem.config.self_guided else None,
                        student_thresholds=work.student_thresholds if decides else None,
                        temperature=work.temperature,
                        strength=problem.config.hardness_strength,
                        mask_bits=words,
                        masked=work.masked if decides and problem.config.self_guided else None,
                        easy=work.easy,
                        has_initial_mask=words is not None and (work.decided_before or not decides),
                    )
                reduce(
                    maxima,
                    sums,
                    batch.partials,
                    None if running is None else running[level],
                    work.at(work.positives, level),
                    work.temperature,
                    work.is_bad,
                    work.at(loss, level),
                    work.at(lse2, level),
                    similarities if decides else None,
                    first=index == 0,
                    last=index == len(done) - 1,
                )
    return GuidedRows(loss, lse2, *similarities, work.masked, work.easy, mask_bits)


def backward_with(
    config: Config, problem: Problem, grad_loss: Tensor, lse2: Tensor | None, mask_bits: Tensor | None
) -> list[Tensor]:
    """`backward` by a given configuration."""
    from gist_fast.kernels.dlogits import add_dlogits, write_dlogits
    from gist_fast.kernels.gradients import carry_back
    from gist_fast.kernels.rows import weigh

    if lse2 is None:
        lse2 = forward_with(config, problem, False).lse2
    if mask_bits is not None:
        problem = problem.decided()
    with _on(lse2.device):
        work = _Work(problem, config, norms=True)
        if problem.masks:
            work.decide()
        grad_loss = grad_loss.contiguous()
        extremes = torch.aminmax(grad_loss)
        total, positive_dlogits = torch.empty_like(lse2), torch.empty_like(lse2)
        weights = None if problem.one_sign else torch.empty_like(lse2)
        for level, stack in enumerate(work.stacks):
            weigh(
                work.at(grad_loss, level),
                extremes,
                work.at(lse2, level),
                stack,
                work.partner,
                work.at(total, level),
                None if weights is None else work.at(weights, level),
                work.at(positive_dlogits, level),
                LARGEST_WEIGHT,
            )
        own_masks = problem.masks
        done = work.batches(1, own_masks=own_masks)
        words = work.mask_scratch(done) if own_masks else None if mask_bits is None else mask_bits.view(torch.int32)
        dlogits = work.stacks[0].new_empty(TILE * TILE * max(batch.dlogits_tiles for batch in done))
        operands = [stack.split(work.split) for stack in work.stacks]
        gradients, fresh = work.empty_gradients(done)
        for batch in done:
            if own_masks:
                assert words is not None
                work.write_masks(batch, words, before_student=False)
            for level, stack in enumerate(work.stacks):
                for chunks in batch.sets:
                    write_dlogits(
                        chunks,
                        stack,
                        work.at(total, level),
                        None if weights is None else work.at(weights, level),
                        dlogits,
                        config.dlogits_symmetric if chunks.symmetric else config.dlogits,
                        temperature=work.temperature,
                        strength=problem.config.hardness_strength,
                        mask_bits=words,
                    )
                    add_dlogits(
                        chunks, operands[level], work.starts, dlogits, gradients[level], fresh=fresh[level]
                    )  # fmt: skip
        del dlogits, words, operands
        assert work.norms is not None
        by_embedding = []
        for k, x in enumerate(problem.student):
            # Sums of several dims are rounded once, at the end.
            out = None if work.levels == 1 else torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            for level, stack in enumerate(work.stacks):
                gradient = gradients[level].pop(0)
                if out is None:
                    # Where shape and type are one, the gradient takes the place of that by the operand.
                    in_place = gradient.dtype == x.dtype and gradient.shape == x.shape
                    out = gradient if in_place else torch.empty_like(x, memory_format=torch.contiguous_format)
                carry_back(
                    gradient,
                    x,
                    work.at(work.norms, level),
                    work.starts[k],
                    stack,
                    work.pair(k),
                    work.at(positive_dlogits, level),
                    work.temperature,
                    extremes,
                    out,
                    work.dims[level],
                    LARGEST_WEIGHT,
                    one_sign=problem.one_sign,
                    adds=work.levels > 1,
                )
                del gradient
            assert out is not None
            by_embedding.append(out.to(x.dtype))
        # In the place of the norms stands what each row gives.
        return [*by_embedding, work.norms.sum().to(problem.temperature.dtype)]


def mask_product(
    blocks: Sequence[Block], dims: int, mask_bits: Tensor, index: int, other: Tensor, transposed: bool
) -> Tensor:
    """A block's mask times a matrix; see `gist_fast.functional.backends.interface.StreamingBackend`."""
    from gist_fast.kernels.unpack import add_masked

    block, side = blocks[index], layout.CHUNK_TILES
    shape = block.columns if transposed else block.rows, other.shape[1]
    total = torch.zeros(shape, dtype=torch.float32, device=other.device)
    first_column = _starts(blocks)[block.column_operand]
    of_block = [
        chunks
        for batch in batches(_rectangles(tuple(blocks)), side, 1, other.device)
        for chunks in batch.sets
        if chunks.chunks[0].rectangle.block == index
    ]
    scratch = other.new_empty(TILE * TILE * max(chunks.tiles for chunks in of_block))
    with _on(other.device):
        for chunks in of_block:
            words = mask_bits.view(torch.int32)
            add_masked(chunks, words, other, total, scratch, first_column, transposed=transposed)
    return total


class _Work:
    """A pass over a problem: its operands on the device, and what decides its masks."""

    def __init__(self, problem: Problem, config: Config, *, norms: bool = False) -> None:
        self._problem, self._config = problem, config
        self._rectangles = _rectangles(tuple(problem.blocks))
        anchors = problem.student[ANCHORS]
        self._rows, self._device = anchors.shape[0], anchors.device
        self.starts = _starts(problem.blocks)
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
        self.guide_thresholds: Tensor | None = None
        self.student_thresholds: Tensor | None = None
        self.is_bad: Tensor | None = None
        self._guide: Tensor | None = None

    def numbers(self, *shape: int) -> Tensor:
        """Room for fp32 numbers, ``[B]`` where no shape is given."""
        return torch.empty(shape or (self._rows,), dtype=torch.float32, device=self._device)

    def at(self, values: Tensor, level: int) -> Tensor:
        """Those of one dim; all of them, in their shape, where there is one: each view costs the host microseconds."""
        return values if self.levels == 1 else values[level]

    def pair(self, operand: int) -> tuple[int, int] | None:
        """The first row of an operand, and the first one of the stack, from which on they are pairs."""
        if operand == ANCHORS:
            return 0, self.partner
        return (self._problem.offset, 0) if operand == POSITIVES else None

    @property
    def decided_before(self) -> bool:
        """Whether masks are written before the student's scores are computed."""
        return len(self._problem.guide) > 0 or self._problem.groups is not None

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
        if problem.guide and self._holds_guide:
            self._guide = self._guide_stack(problem.guide)
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

    def _thresholds(
        self, level: int, student: Tensor | None, guide: Tensor | None, first: int, count: int, partner: int
    ) -> None:
        from gist_fast.kernels.rows import make_thresholds

        config, margins = self._problem.config, self._problem.margins
        width = self.dims[0] if guide is None else self._problem.guide[ANCHORS].shape[1]
        band = tie_band(torch.float32, width)
        widest = level == 0
        make_thresholds(
            student,
            guide,
            count,
            partner,
            self.temperature,
            float(config.margin) if margins is None else margins.to(torch.float32).contiguous(),
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

    def batches(self, chunks: int, *, shares: tuple[int, int] = (1, 1), own_masks: bool = False) -> tuple[Batch, ...]:
        """All chunks, so many of full size at a time."""
        side = layout.CHUNK_TILES
        return batches(
            self._rectangles,
            side,
            chunks * side * side,
            self._device,
            shares=shares,
            own_masks=own_masks,
            alone=len(self._problem.guide) > 0 and not self._holds_guide,
        )

    def mask_scratch(self, done: Sequence[Batch]) -> Tensor:
        """Room for the mask bits of a batch."""
        words = layout.TILE_WORDS * max(batch.mask_tiles for batch in done)
        return torch.empty(words, dtype=torch.int32, device=self._device)

    def write_masks(self, batch: Batch, mask_bits: Tensor, *, before_student: bool) -> None:
        """Write a batch's masks: all of them, or those that are decided before the student's scores are computed. Only
        the latter are counted, once in a forward pass."""
        problem, guided = self._problem, len(self._problem.guide) > 0
        masked = self.masked if before_student else None
        guide = self._guide
        if guided and guide is None:
            guide = self._guide_of(batch)
        for chunks in batch.sets:
            if problem.groups is not None:
                from gist_fast.kernels.groups import mask_groups

                # Whoever decides next counts.
                last = not guided and not problem.config.self_guided
                anchors = problem.student[ANCHORS].shape[0]
                mask_groups(
                    chunks, problem.groups.contiguous(), problem.offset, anchors, mask_bits, masked if last else None
                )
            has_initial_mask = problem.groups is not None
            if guide is not None:
                self._write(chunks, guide, self.guide_thresholds, mask_bits, masked, has_initial_mask, guide=True)
                has_initial_mask = True
            if before_student:
                continue
            stack = self.stacks[0]
            if problem.config.self_guided:
                self._write(chunks, stack, self.guide_thresholds, mask_bits, None, has_initial_mask)
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
        from gist_fast.kernels.masks import write_masks

        assert thresholds is not None
        launch = self._config.masks_symmetric if chunks.symmetric else self._config.masks
        write_masks(
            chunks,
            stack,
            thresholds,
            mask_bits,
            masked,
            launch,
            below=below,
            guide=guide,
            has_initial_mask=has_initial_mask,
        )

    def _guide_of(self, batch: Batch) -> Tensor:
        """Unit vectors of the guide for a chunk's rows and columns."""
        (chunk,) = batch.chunks
        spans = [chunk.x] if chunk.triangle else [chunk.x, chunk.y]
        return self._guide_stack([self._guide_rows(span) for span in spans])

    def _guide_rows(self, span: slice) -> Tensor:
        """Rows of the guide by their place in a stack."""
        k = max(k for k, start in enumerate(self.starts) if start <= span.start)
        return self._problem.guide[k][span.start - self.starts[k] : span.stop - self.starts[k]]

    def empty_gradients(self, done: Sequence[Batch]) -> tuple[list[list[Tensor]], list[set[int]]]:
        """Room for the gradients by each operand, at each dim, and which of them hold nothing yet. Where a product is
        the first to reach an operand and reaches all of it, nothing needs to be set to 0."""
        whole = {
            span
            for batch in done
            for chunk in batch.chunks
            if not chunk.symmetric
            for span in ((chunk.x.start, chunk.rows), (chunk.y.start, chunk.columns))
        }
        counts = self.split[:-1]
        fresh = all(span in whole for span in zip(self.starts, counts, strict=True))
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
    from gist_fast.kernels.launch import in_tf32
    from gist_fast.kernels.rows import make_units

    count, width = sum(x.shape[0] for x in rows), rows[0].shape[1]
    stacks = [rows[0].new_empty(count + TILE, dim + -dim % step) for dim in dims]
    in_place = len(dims) == 1 and stacks[0].shape[1] == width
    raw = stacks[0][:count] if in_place else rows[0].new_empty(count, width)
    torch.cat(rows, out=raw)
    for level, (stack, dim) in enumerate(zip(stacks, dims, strict=True)):
        own = norms if norms is None or len(dims) == 1 else norms[level]
        make_units(stack if in_place else raw, stack, count, own, temperature, is_bad, dim, tf32=in_tf32(stack))
    return stacks


def _starts(blocks: Sequence[Block]) -> list[int]:
    """The first row of each operand in the stack."""
    sizes = {ANCHORS: blocks[0].rows} | {b.column_operand: b.columns for b in blocks if b.column_operand != ANCHORS}
    return [0, *accumulate(sizes[k] for k in range(len(sizes) - 1))]


@functools.lru_cache(maxsize=64)
def _rectangles(blocks: tuple[Block, ...]) -> tuple[Rectangle, ...]:
    """The rectangles of all blocks."""
    starts = _starts(blocks)
    return tuple(
        Rectangle(
            block=index,
            x=starts[block.row_operand] + block.row_start,
            y=starts[block.column_operand] + extent.first,
            rows=block.rows,
            columns=extent.columns,
            excluded=extent.excluded,
            symmetric=extent.symmetric,
            own_negative=NOWHERE if block.own_negative is None else block.own_negative,
            scales_own=block.scaled in ("all", "own"),
            scales_others=block.scaled in ("all", "others"),
        )
        for index, block in enumerate(blocks)
        for extent in _extents(block)
    )


def _extents(block: Block) -> Iterator[Extent]:
    """The block's rectangles, from left to right."""
    if not block.symmetric or block.excluded is None:
        yield Extent(0, block.columns, NOWHERE if block.excluded is None else block.excluded, symmetric=False)
        return
    square, right = block.excluded, block.excluded + block.rows
    if square > 0:
        yield Extent(0, square, excluded=NOWHERE, symmetric=False)
    yield Extent(square, block.rows, excluded=0, symmetric=True)
    if right < block.columns:
        yield Extent(right, block.columns - right, excluded=NOWHERE, symmetric=False)


def _config(direction: str, problem: Problem, run: Callable[[Config], object]) -> Config:
    """The configuration of the table, or with ``GIST_FAST_AUTOTUNE=1`` the fastest known or found by `run`."""
    models = [model[ANCHORS] for model in (problem.student, problem.guide) if model]
    device = models[0].device
    default = choose_config(generation(device), max(x.element_size() for x in models))
    if not tuning.enabled() or device.type != "cuda":
        return default

    def key(direction: str) -> str:
        return tuning.make_key(
            direction,
            device=torch.cuda.get_device_name(device),
            versions=(torch.__version__, importlib.metadata.version("triton")),
            dtypes=tuple(sorted({str(x.dtype) for x in models})),
            dims=(*(problem.dims or models[0].shape[1:]), models[1].shape[1] if problem.guide else 0),
            variant=" ".join(_variant(problem)),
            rows=models[0].shape[0],
            pairs=sum(block.rows * block.columns for block in problem.blocks),
        )

    def seconds(config: Config) -> float:
        with _on(device):
            from triton.testing import do_bench

            return do_bench(lambda: run(config), return_mode="median") / 1e3

    if direction != "recompute":
        return tuning.tuned(key(direction), default, direction, seconds)
    # Masks decided again must be summed in the forward pass's own steps.
    step = tuning.recall(key(_forward_direction(problem)), default).block_k
    return tuning.tuned(key(f"{direction} in steps of {step}"), tuning.with_step(default, step), direction, seconds)


def _variant(problem: Problem) -> Iterator[str]:
    """What of the loss's variants is on that changes which kernels run, or what they hold."""
    config = problem.config
    for name, on in {
        "self-guided": config.self_guided,
        "hard": config.hard,
        "groups": problem.groups is not None,
        "hardness": config.hardness_mode is not None,
    }.items():
        if on:
            yield name


def _forward_direction(problem: Problem) -> str:
    """What the forward pass is to `gist_fast.kernels.tuning`."""
    return "guided forward" if problem.guide else "forward"


@functools.cache
def generation(device: torch.device) -> Generation:
    """The generation whose configurations a device gets; the interpreter takes any, and gets the newest common one."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    return generation_of(*torch.cuda.get_device_capability(device))


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
