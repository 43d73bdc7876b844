"""What the shape of a tile and tensor descriptors do for a kernel of one product: ``python -m benchmarks.gpu shapes``.

Three kernels as bare as can be stand for those of `gist_fast.kernels`: a product, and then what each does with a score.
``masks`` compares and packs, ``forward`` unpacks and reduces, ``dlogits`` unpacks, exponentiates and stores. Sizes are
multiples of every tile, and nothing is symmetric. It is not part of the script: it answers a question about kernels
that are yet to be written.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from gist_fast.kernels import tile
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.processes import outcomes

STEP = 64
BAND = 8
SHAPES = (
    (128, 128, 4, 3), (128, 128, 4, 4), (128, 128, 8, 3), (128, 256, 8, 3), (128, 256, 8, 4), (256, 128, 8, 3),
    (256, 128, 8, 4), (64, 256, 4, 4),
)  # fmt: skip
"""Rows, columns, warps and stages."""


@triton.jit
def _place(program, row_tiles, column_tiles, BAND: tl.constexpr):
    """As `gist_fast.kernels.tile.locate` orders tiles."""
    band = program // (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    inside = program % (BAND * column_tiles)
    return band * BAND + inside % height, inside // height


@triton.jit
def _scores(
    x, y, row, column, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if DESCRIPTORS:
        for depth in range(0, dim, BLOCK_K):
            a = x.load([row * ROWS, depth])
            b = y.load([column * COLUMNS, depth])
            total = tl.dot(a, tl.trans(b), total)
    else:
        within = tl.arange(0, BLOCK_K)
        in_x = tl.arange(0, ROWS)[:, None] * dim + within[None, :]
        in_y = tl.arange(0, COLUMNS)[:, None] * dim + within[None, :]
        x += dim.to(tl.int64) * row * ROWS
        y += dim.to(tl.int64) * column * COLUMNS
        for _ in range(0, dim, BLOCK_K):
            total = tl.dot(tl.load(x + in_x), tl.trans(tl.load(y + in_y)), total)
            x += BLOCK_K
            y += BLOCK_K
    return total


@triton.jit
def _words(row, column, column_tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    WORDS: tl.constexpr = COLUMNS // 32
    first = (row * column_tiles + column) * ROWS * WORDS
    return first + tl.arange(0, ROWS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]


@triton.jit
def masks_kernel(
    x, y, mask_bits, thresholds, out, dim, row_tiles, column_tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row, column = _place(tl.program_id(0), row_tiles, column_tiles, BAND)
    scores = _scores(x, y, row, column, dim, ROWS, COLUMNS, BLOCK_K, DESCRIPTORS)
    threshold = tl.load(thresholds + row * ROWS + tl.arange(0, ROWS))
    tl.store(mask_bits + _words(row, column, column_tiles, ROWS, COLUMNS), tile.pack(scores > threshold[:, None]))


@triton.jit
def forward_kernel(
    x, y, mask_bits, thresholds, out, dim, row_tiles, column_tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row, column = _place(tl.program_id(0), row_tiles, column_tiles, BAND)
    scores = _scores(x, y, row, column, dim, ROWS, COLUMNS, BLOCK_K, DESCRIPTORS)
    packed = tl.load(mask_bits + _words(row, column, column_tiles, ROWS, COLUMNS))
    logits = tl.where(tile.unpack(packed), float("-inf"), scores)
    maximum = tl.max(logits, axis=1)
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp2(logits - base[:, None]), axis=1)
    # Both lie in one tensor, the sums behind the maxima.
    place = column * (row_tiles * ROWS) + row * ROWS + tl.arange(0, ROWS)
    tl.store(out + place, maximum)
    tl.store(out + column_tiles * row_tiles * ROWS + place, total)


@triton.jit
def dlogits_kernel(
    x, y, mask_bits, thresholds, out, dim, row_tiles, column_tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row, column = _place(tl.program_id(0), row_tiles, column_tiles, BAND)
    scores = _scores(x, y, row, column, dim, ROWS, COLUMNS, BLOCK_K, DESCRIPTORS)
    packed = tl.load(mask_bits + _words(row, column, column_tiles, ROWS, COLUMNS))
    rows = row * ROWS + tl.arange(0, ROWS)
    # In the place of a logsumexp and of a weight.
    number = tl.load(thresholds + rows)[:, None]
    value = tl.where(tile.unpack(packed), 0.0, tl.exp2(scores - number) * number)
    columns = column * COLUMNS + tl.arange(0, COLUMNS)
    place = rows.to(tl.int64)[:, None] * (column_tiles * COLUMNS) + columns[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty))


KERNELS = {"masks": masks_kernel, "forward": forward_kernel, "dlogits": dlogits_kernel}


def launch(
    kind: str, shape: tuple[int, int, int, int], descriptors: bool, rows: int, dim: int, device: str, dtype: torch.dtype
) -> Callable[[], Any]:
    """A kernel on random operands ``[rows, dim]``."""
    height, breadth, warps, stages = shape
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randn(2, rows, dim, generator=generator, device=device)
    x, y = torch.nn.functional.normalize(drawn, dim=-1).to(dtype)
    numbers = torch.rand(rows, generator=generator, device=device)
    bits = torch.randint(-(2**31), 2**31 - 1, (rows * rows // 32,), generator=generator, device=device).to(torch.int32)
    down, across = rows // height, rows // breadth
    out = (
        torch.empty(rows, rows, device=device, dtype=dtype) if kind == "dlogits" else drawn.new_empty(2 * across, rows)
    )
    operands = (x, y)
    if descriptors:
        operands = (TensorDescriptor.from_tensor(x, [height, STEP]), TensorDescriptor.from_tensor(y, [breadth, STEP]))

    def run() -> Any:
        return KERNELS[kind][(down * across,)](
            *operands, bits, numbers, out, dim, down, across,
            ROWS=height, COLUMNS=breadth, BLOCK_K=STEP, DESCRIPTORS=descriptors, BAND=BAND,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

    return run


def compiled(
    kind: str, shape: tuple[int, int, int, int], descriptors: bool, device: str, dtype: torch.dtype
) -> list[int]:
    """Compile one by running it on few rows: its registers, spills and shared memory."""
    kernel = launch(kind, shape, descriptors, 512, 128, device, dtype)()
    return [] if kernel is None else [kernel.n_regs, kernel.n_spills, kernel.metadata.shared]


def shapes(bench: Bench) -> None:
    """Every shape of every kernel, by pointers and by descriptors; then the library's products."""
    device = bench.device.type
    chosen = list(itertools.product(KERNELS, SHAPES[:1] if bench.toy else SHAPES, (False, True)))
    names = {one: f"{one[0]} {one[1]} {'descriptors' if one[2] else 'pointers'}" for one in chosen}
    work = {names[one]: functools.partial(compiled, *one, device, bench.dtype) for one in chosen}
    made = dict(outcomes(work, here=bench.toy))
    bench.write(compiled={name: x if isinstance(x, list) else str(x)[:200] for name, x in made.items()})
    if bench.toy:
        return
    from triton.testing import do_bench

    rows, rates = bench.sizes["batch"] // 2, {}
    for dim, one in itertools.product(bench.sizes["widths"], chosen):
        if isinstance(made[names[one]], Exception):
            continue
        seconds = do_bench(launch(*one, rows, dim, device, bench.dtype), warmup=5, rep=30, return_mode="median") / 1e3
        rates[f"D {dim} {names[one]}"] = rate = 2.0 * rows**2 * dim / seconds / 1e12
        bench.write(rows=rows, tflops=rates)
        print(f"D {dim} {names[one]}: {rate:.0f} TFLOP/s", flush=True)
