"""The streaming backend on Triton kernels: what operands and blocks become for `gist_fast.kernels`.

Blocks become *rectangles*: a block ``pp`` that has more columns than rows (candidates gathered from all ranks) is a
symmetric square and the plain rectangles left and right of it. Embedding dims are filled up with zeros to what the
kernels step by, which changes no product.

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
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gist_fast.functional.backends.interface import Negatives
from gist_fast.functional.blocks import ANCHORS, Block
from gist_fast.functional.operands import Operands, UnitRows
from gist_fast.kernels import tuning
from gist_fast.kernels.config import Config, Generation, choose_config, generation_of
from gist_fast.kernels.layout import mask_words
from gist_fast.kernels.rectangle import Predicates, Rectangle, Rows

MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = (8, 0)
HELD_BYTES = 2**28
"""Unit vectors of a guide that are held whole: those of 65,536 pairs of 1024 columns in a half type."""


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


def forward(operands: Operands, blocks: Sequence[Block], keep_mask_bits: bool) -> Negatives:
    """The softmax over the negatives of each row; see `gist_fast.functional.backends.interface.StreamingBackend`."""
    direction = _forward_direction(operands, blocks)
    config = _config(direction, operands, blocks, lambda c: forward_with(c, operands, blocks, keep_mask_bits))
    return forward_with(config, operands, blocks, keep_mask_bits)


def backward(
    operands: Operands, blocks: Sequence[Block], lse2: Tensor, weights: Tensor | None, mask_bits: Tensor | None
) -> list[list[Tensor]]:
    """Gradients by the student operands; see `gist_fast.functional.backends.interface.StreamingBackend`."""
    direction = "recompute" if mask_bits is None and operands.masks else "backward"
    config = _config(
        direction, operands, blocks, lambda c: backward_with(c, operands, blocks, lse2, weights, mask_bits)
    )
    return backward_with(config, operands, blocks, lse2, weights, mask_bits)


def mask_product(
    blocks: Sequence[Block], dims: int, mask_bits: Tensor, index: int, other: Tensor, transposed: bool
) -> Tensor:
    """A block's mask times a matrix; see `gist_fast.functional.backends.interface.StreamingBackend`."""
    from gist_fast.kernels.unpack import add_masked

    block = blocks[index]
    total = torch.zeros(
        block.columns if transposed else block.rows, other.shape[1], dtype=torch.float32, device=other.device
    )
    with _on(other.device):
        for found, extent, packed in _with_mask_bits(blocks, mask_bits):
            if found is not block:
                continue
            assert packed is not None, "masks are multiplied by where they are kept"
            columns = slice(extent.first, extent.first + extent.columns)
            add_masked(
                packed,
                (block.rows, extent.columns),
                extent.excluded,
                extent.symmetric,
                other if transposed else other[columns],
                transposed,
                total[columns] if transposed else total,
            )
    return total


def forward_with(config: Config, operands: Operands, blocks: Sequence[Block], keep_mask_bits: bool) -> Negatives:
    """`forward` by a given configuration."""
    from gist_fast.kernels.forward import forward_pass

    work = _Padded(operands, config)
    device = operands.student[0].device
    maximum = torch.full((len(operands.matryoshka), blocks[0].rows), -torch.inf, device=device)
    total = torch.zeros_like(maximum)
    keep_mask_bits = keep_mask_bits and operands.masks
    n_bytes = mask_bytes(blocks, len(operands.matryoshka)) if keep_mask_bits else 0
    mask_bits = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    counts = torch.zeros(len(blocks), 2, dtype=torch.int64, device=device)
    with _on(device):
        for block, extent, packed in _with_mask_bits(blocks, mask_bits if keep_mask_bits else None):
            rectangle = work.rectangle(block, extent, packed, decide=operands.masks)
            counts[blocks.index(block)] += forward_pass(rectangle, maximum, total, config)
    masked, easy_negatives = counts.unbind(1)
    return Negatives(maximum + total.log2(), maximum[0], masked.clone(), easy_negatives.clone(), mask_bits)


def backward_with(
    config: Config,
    operands: Operands,
    blocks: Sequence[Block],
    lse2: Tensor,
    weights: Tensor | None,
    mask_bits: Tensor | None,
) -> list[list[Tensor]]:
    """`backward` by a given configuration."""
    from gist_fast.kernels.dlogits import backward_pass

    work = _Padded(operands, config)
    gradients = [[torch.zeros_like(u, dtype=torch.float32) for u in student] for student in work.matryoshka]
    with _on(lse2.device):
        for block, extent, packed in _with_mask_bits(blocks, mask_bits):
            rectangle = work.rectangle(block, extent, packed, decide=mask_bits is None and operands.masks)
            rows, columns = _slices(block, extent)
            row_gradients = [by_dim[block.row_operand][rows] for by_dim in gradients]
            column_gradients = [by_dim[block.column_operand][columns] for by_dim in gradients]
            backward_pass(rectangle, lse2, weights, row_gradients, column_gradients, config)
    # Contiguous, as the operator's fake implementation says.
    return [
        [gradient[:, : u.shape[1]].contiguous() for gradient, u in zip(by_dim, student.operands, strict=True)]
        for by_dim, student in zip(gradients, operands.matryoshka, strict=True)
    ]


def _extents(block: Block) -> Iterator[Extent]:
    """The block's rectangles, from left to right."""
    if not block.symmetric or block.excluded is None:
        none = block.columns
        yield Extent(0, block.columns, none if block.excluded is None else block.excluded, symmetric=False)
        return
    square, right = block.excluded, block.excluded + block.rows
    if square > 0:
        yield Extent(0, square, excluded=square, symmetric=False)
    yield Extent(square, block.rows, excluded=0, symmetric=True)
    if right < block.columns:
        yield Extent(right, block.columns - right, excluded=block.columns - right, symmetric=False)


def _slices(block: Block, extent: Extent) -> tuple[slice, slice]:
    """The rows and the columns of a rectangle, in their operands."""
    return slice(block.row_start, block.row_start + block.rows), slice(extent.first, extent.first + extent.columns)


def _with_mask_bits(blocks: Sequence[Block], mask_bits: Tensor | None) -> Iterator[tuple[Block, Extent, Tensor | None]]:
    """Each rectangle's extent with its block and its packed mask; these stand one after the other."""
    words = None if mask_bits is None else mask_bits.view(torch.int32)
    cursor = 0
    for block in blocks:
        for extent in _extents(block):
            size = mask_words(block.rows, extent.columns, extent.symmetric)
            yield block, extent, None if words is None else words[cursor : cursor + size]
            cursor += size


class _Padded:
    """Operands filled up to dims that the kernels step by, cut into the rectangles of each block."""

    def __init__(self, operands: Operands, config: Config) -> None:
        step = config.block_k
        self.matryoshka = [tuple(_fill_up(u, step) for u in student.operands) for student in operands.matryoshka]
        self._operands = operands
        self._groups = None if operands.groups is None else _dense(operands.groups)
        self._guide = None if operands.guide_rows is None else _Guide(operands.guide_rows, step)

    def rectangle(self, block: Block, extent: Extent, packed: Tensor | None, *, decide: bool) -> Rectangle:
        """A block's rectangle; with `decide`, what masks its pairs goes with it."""
        rows, columns = _slices(block, extent)
        return Rectangle(
            matryoshka=tuple((u[block.row_operand][rows], u[block.column_operand][columns]) for u in self.matryoshka),
            predicates=self._predicates(block, rows, columns) if decide else None,
            excluded=extent.excluded,
            symmetric=extent.symmetric,
            mask_bits=packed,
            logit_scales=self._logit_scales(block),
            own_negative=block.own_negative,
        )

    def _predicates(self, block: Block, rows: slice, columns: slice) -> Predicates | None:
        operands, guide = self._operands, self._guide
        groups = None if self._groups is None else replace(operands, groups=self._groups).groups_of(block)
        if not operands.guided and operands.student_thresholds is None and groups is None:
            return None
        return Predicates(
            guide_thresholds=operands.guide_thresholds,
            self_guided=operands.self_guided,
            guide_rows=None if guide is None else guide.within(block.row_operand, rows),
            guide_columns=None if guide is None else guide.within(block.column_operand, columns),
            student_thresholds=operands.student_thresholds,
            row_groups=None if groups is None else groups[0],
            column_groups=None if groups is None else groups[1][columns],
        )

    def _logit_scales(self, block: Block) -> Tensor | None:
        """``[2]``: that of an anchor's own negative and that of all others."""
        scales = self._operands.logit_scales_of(block)
        if scales == (None, None):
            return None
        one = torch.ones((), device=self.matryoshka[0][0].device)
        return torch.stack([one if scale is None else scale for scale in scales])


def _dense(groups: Tensor) -> Tensor:
    """The groups numbered from 0 in int32, which a kernel compares at half the price; the host waits for nothing."""
    ordered, order = groups.sort()
    begins = torch.zeros_like(ordered, dtype=torch.int32)
    begins[1:] = ordered[1:] != ordered[:-1]
    numbers = begins.cumsum(0, dtype=torch.int32)
    return torch.empty_like(numbers).scatter_(0, order, numbers)


class _Guide:
    """The guide's unit vectors, filled up: whole, or a chunk's rows and a chunk's columns at a time."""

    def __init__(self, guide: tuple[UnitRows, ...], step: int) -> None:
        raw = guide[ANCHORS].raw
        self._guide = guide
        self._width = raw.shape[1] + -raw.shape[1] % step
        n_bytes = self._width * raw.element_size() * sum(len(g.raw) for g in guide)
        self._whole = [_fill_up(g.whole, step) for g in guide] if n_bytes <= HELD_BYTES else None
        self._made: dict[tuple[int, int, int], Tensor] = {}

    def within(self, operand: int, span: slice) -> Rows:
        """Gives rows of `span` of an operand, which are numbered from its start and may be asked for beyond its end."""

        def rows(wanted: slice) -> Tensor:
            start, stop = span.start + wanted.start, min(span.start + wanted.stop, span.stop)
            if self._whole is not None:
                return self._whole[operand][start:stop]
            key = operand, start, stop
            # The two asked for last are kept, the later one behind: a chunk's rows mostly are those of the one before.
            made = self._made.pop(key, None)
            if made is None:
                while len(self._made) > 1:
                    del self._made[next(iter(self._made))]
                made = self._guide[operand].rows(slice(start, stop), self._width)
            self._made[key] = made
            return made

        return rows


def _fill_up(operand: Tensor, step: int) -> Tensor:
    """``[N, width]`` contiguous, with columns of zeros up to a multiple of `step`."""
    missing = -operand.shape[1] % step
    return torch.nn.functional.pad(operand, (0, missing)) if missing else operand.contiguous()


def _config(direction: str, operands: Operands, blocks: Sequence[Block], run: Callable[[Config], object]) -> Config:
    """The configuration of the table, or with ``GIST_FAST_AUTOTUNE=1`` the fastest known or found by `run`."""
    student = operands.student[ANCHORS]
    element_size, guide_dim = student.element_size(), 0
    dtypes = {str(student.dtype)}
    if operands.guide_rows is not None:
        guide = operands.guide_rows[ANCHORS].raw
        element_size = max(element_size, guide.element_size())
        guide_dim = guide.shape[1]
        dtypes.add(str(guide.dtype))
    default = choose_config(generation(student.device), element_size)
    if not tuning.enabled() or student.device.type != "cuda":
        return default

    def key(direction: str) -> str:
        return tuning.make_key(
            direction,
            device=torch.cuda.get_device_name(student.device),
            versions=(torch.__version__, importlib.metadata.version("triton")),
            dtypes=tuple(sorted(dtypes)),
            dims=(*(by_dim.operands[ANCHORS].shape[1] for by_dim in operands.matryoshka), guide_dim),
            variant=" ".join(_variant(operands)),
            rows=blocks[0].rows,
            pairs=sum(block.rows * block.columns for block in blocks),
        )

    def seconds(config: Config) -> float:
        with _on(student.device):
            from triton.testing import do_bench

            return do_bench(lambda: run(config), return_mode="median") / 1e3

    if direction != "recompute":
        return tuning.tuned(key(direction), default, direction, seconds)
    # Masks decided again must be summed in the forward pass's own steps.
    step = tuning.recall(key(_forward_direction(operands, blocks)), default).block_k
    return tuning.tuned(key(f"{direction} in steps of {step}"), tuning.with_step(default, step), direction, seconds)


def _variant(operands: Operands) -> Iterator[str]:
    """What of the loss's variants is on that changes which kernels run, or what they hold."""
    if operands.self_guided:
        yield "self-guided"
    for name in ("student_thresholds", "groups", "logit_scale"):
        if getattr(operands, name) is not None:
            yield name


def _forward_direction(operands: Operands, blocks: Sequence[Block]) -> str:
    """What the forward pass is to `gist_fast.kernels.tuning`."""
    found = ["student thresholds"] if operands.student_thresholds is not None else []
    if any(block.own_negative is not None for block in blocks):
        found.append("own-negative scale")
    return ", ".join(found) or "forward"


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
