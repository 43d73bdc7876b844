"""How a kernel is started, and how launches are recorded in place of being started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from gist_fast.kernels.chunks import ChunkSet
from gist_fast.kernels.config import Launch
from gist_fast.kernels.layout import TILE
from gist_fast.kernels.precision import multiplies_in_tf32
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

NOT_SPECIALISED = [
    "start", "chunks", "entries", "count", "first", "partner", "pairs", "size",
    "group_count", "other_count", "relative",
]  # fmt: skip
"""Numbers of the kernels that say how much there is of something. None is a multiple of anything that a kernel could
make use of, and a kernel for each that happens to be would be compiled in the middle of a run."""
ALIGNED_OR_NOT = [
    "guide_thresholds", "student_thresholds", "thresholds", "lse2", "weights", "masked", "easy", "maximum",
    "total", "table", "positives", "positive_dlogits", "loss", "positive_similarity", "hardest_similarity",
    "norms", "temperature", "margins", "is_bad", "upstream", "least", "largest", "groups",
    "others", "guide_lse2", "mean_weights", "running", "partials",
]  # fmt: skip
"""Pointers of which some launches get a row or a slice of a tensor, so that 16 bytes may or may not divide them. A
program reads or writes but a few numbers there, and a kernel for each case would be compiled in the middle of a run."""


class TensorNote(NamedTuple):
    """What is noted of a tensor, whose memory may go."""

    dtype: torch.dtype
    offset: int
    """In bytes, from where its storage begins."""


class DescriptorNote(NamedTuple):
    """What is noted of a tensor descriptor."""

    dtype: torch.dtype
    block_shape: tuple[int, ...]


class Started(NamedTuple):
    """A launch that was recorded."""

    kernel: Any
    arguments: dict[str, Any]
    """By name: the kernel's own, and the options of the launch. A `TensorNote` stands for a tensor, a `DescriptorNote`
    for a tensor descriptor."""


class Recording(NamedTuple):
    """What is launched while it is on is noted and does not run."""

    tf32: bool
    """Whether float32 is multiplied in TF32."""
    launches: list[Started]


_recording: Recording | None = None

Around = Callable[[str, dict[str, Any], Callable[[], object]], object]
"""Of a launch's name, its arguments by name, and what runs it."""
LIBRARY = "the library's products"
"""The name of a library's matrix product, whose arguments are ``total``, ``a`` and ``b``."""
_around: Around | None = None


@contextmanager
def around_launches(around: Around) -> Iterator[None]:
    """Pass every launch and every product of the library in a block of code through a function, which runs it."""
    global _around
    before, _around = _around, around
    try:
        yield
    finally:
        _around = before


def pass_through(name: str, arguments: dict[str, Any], run: Callable[[], object]) -> None:
    """Run a piece of work, by way of `around_launches` where that is on."""
    if _around is None:
        run()
    else:
        _around(name, arguments, run)


@contextmanager
def record_launches(*, tf32: bool = False) -> Iterator[list[Started]]:
    """Note the launches of a block of code in place of running them. Tensors may then be of torch's ``meta`` device."""
    global _recording
    before, _recording = _recording, Recording(tf32, [])
    try:
        yield _recording.launches
    finally:
        _recording = before


def start(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Start a kernel, all arguments and options by name. An absent tensor is None, which Triton compiles in."""
    if _recording is None:
        pass_through(kernel.__name__, arguments, lambda: kernel[grid](**arguments))
        return
    _recording.launches.append(Started(kernel, {name: _note(x) for name, x in arguments.items()}))


def _note(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(_note(each) for each in x)
    if isinstance(x, TensorDescriptor):
        return DescriptorNote(x.base.dtype, tuple(x.block_shape))
    return TensorNote(x.dtype, x.storage_offset() * x.element_size()) if isinstance(x, Tensor) else x


def operand_arguments(stack: Tensor, launch: Launch) -> dict[str, Any]:
    """A stack, as `gist_fast.kernels.tile.scores` takes it."""
    x = y = stack
    if launch.descriptors:
        x, y = (TensorDescriptor.from_tensor(stack, [rows, launch.block_k]) for rows in (TILE, launch.columns))
    return {"x": x, "y": y, "dim": stack.shape[1], "PRECISION": precision(stack), "DESCRIPTORS": launch.descriptors}


def guide_arguments(stack: Tensor, launch: Launch) -> dict[str, Any]:
    """A guide's stack beside a student's."""
    found = operand_arguments(stack, launch)
    named = {"guide_x": found["x"], "guide_y": found["y"], "guide_dim": found["dim"]}
    return named | {"GUIDE_PRECISION": found["PRECISION"]}


def tile_arguments(chunks: ChunkSet, table: Tensor, launch: Launch) -> dict[str, Any]:
    """Where the programs of a kernel of products work, and how it is compiled."""
    return {
        "table": table,
        "start": chunks.start,
        "chunks": len(chunks.chunks),
        "SYMMETRIC": chunks.symmetric,
        "BLOCK_K": launch.block_k,
        "COLUMNS": launch.columns,
        "GROUP": launch.group,
        "num_stages": launch.stages,
        **options_of(launch.warps),
    }


def tile_grid(chunks: ChunkSet, launch: Launch) -> tuple[int]:
    """How many programs that takes."""
    return (chunks.tiles * launch.shares,)


def options_of(warps: int) -> dict[str, Any]:
    """How any kernel is compiled.

    Fused multiply-adds are asked for by name: Triton is about to change its default, and forward and backward pass
    must not depend on what a user's environment says.
    """
    return {"num_warps": warps, "enable_fp_fusion": True}


def precision(operand: Tensor) -> str:
    """How ``tl.dot`` multiplies an operand: float32 as torch's own matmul does. Half types have one way only."""
    return "tf32" if in_tf32(operand) else "ieee"


def in_tf32(operand: Tensor) -> bool:
    """Whether it is multiplied in TF32."""
    if operand.dtype != torch.float32:
        return False
    return operand.is_cuda and multiplies_in_tf32() if _recording is None else _recording.tf32
