"""What kernels compile to for a named GPU, present or not.

Triton's compiler needs no card, and the disassembler that its wheel carries shows what came out: registers, spills,
shared memory, matrix instructions. A configuration of `gist_fast.kernels.config` that spills, does not fit or misses
the matrix units for one of its products is no configuration.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from gist_fast.kernels.compile_variants import ALIGNMENT, Element, Place, Variant
from gist_fast.kernels.distil import NUMBERS
from gist_fast.kernels.layout import TILE, TILE_WORDS
from gist_fast.kernels.targets import KIB, Target
from triton.compiler import ASTSource

STREAMS = {
    "units": {"embeddings": 1, "units": 1},
    "thresholds": {"student": 2, "guide": 2},
    "weights": {"stack": 2},
    "gradients": {"gradients": 1, "embeddings": 1, "stack": 1, "outs": 1},
}
"""Matrices that kernels of rows read or write: rows of each for one of theirs."""


@dataclass(frozen=True)
class Compiled:
    """What came out, and what it allows."""

    target: str
    kernel: str
    element: str
    warps: int
    stages: int
    block_k: int
    registers: int
    spills: int
    """Bytes a thread."""
    shared: int
    programs: int
    """That one multiprocessor can hold."""
    matrix_instructions: dict[str, int]
    """By the element that they multiply where the name says so; how many the code holds."""
    instructions: int
    flops: int
    """Of a tile, at the embedding dims asked for."""
    bytes: int
    """From memory for a tile, where the programs that run together share their operands in L2."""
    shared_bytes: int
    """Of operands to shared memory and from there to the matrix units, for a tile."""
    l2_bytes: int
    """Of operands from L2 for a tile: what `bytes` counts once for many programs, each of them reads."""
    roofline: float
    """Share of the matrix rate that memory, shared memory and exponentials leave."""
    l2_rate: float
    """TB/s of operands that all programs read from L2 at that pace. It is no bound: see docs/kernels.md."""
    bound_by: str
    """Which of "matrix units", "exponentials", "memory" and "shared memory" needs longest for its share of the work."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compile_variant(card: Target, variant: Variant, *, dim: int, guide_dim: int) -> Compiled:
    """Compile one kernel and look at what came out; work is counted for those embedding dims."""
    binary = _compile(card, variant)
    listing, registers, spills = _disassemble(card, binary)
    shared = binary.metadata.shared
    programs = _programs(card, variant.warps, registers, shared)
    flops, traffic, exponentials = _work(card, variant, programs, dim, guide_dim)
    found: dict[str, int] = {}
    for name in re.findall(rf"\b({card.matrix})\b", listing):
        found[name] = found.get(name, 0) + 1
    products = _products(variant, dim, guide_dim)
    shared_bytes = sum(_shared_traffic(binary, variant, width * of.size) for width, of in products)
    pairs = TILE * variant.constant("COLUMNS", TILE)
    matrix_time = sum(2 * pairs * width / _rate(card, of) for width, of in products) * card.multiprocessors
    times = {
        "matrix units": matrix_time,
        "exponentials": exponentials / (card.exponentials * card.gigahertz * 1e9),
        "memory": traffic / (card.gigabytes * 1e9) * card.multiprocessors,
        "shared memory": shared_bytes / (card.shared_rate * card.gigahertz * 1e9),
    }
    _, exponential_time, memory_time, shared_time = times.values()
    product_time = max(matrix_time, shared_time)
    # Programs that share a multiprocessor hide one's exponentials under another's products.
    busy = max(max(product_time, exponential_time) if programs > 1 else product_time + exponential_time, memory_time)
    l2_bytes = sum((TILE + variant.constant("COLUMNS")) * width * of.size for width, of in products)
    return Compiled(
        target=card.generation,
        kernel=variant.name,
        element=variant.element,
        warps=variant.warps,
        stages=variant.stages,
        block_k=variant.constant("BLOCK_K", 0),
        registers=registers,
        spills=spills,
        shared=shared,
        programs=programs,
        matrix_instructions=found,
        instructions=len(listing.splitlines()),
        flops=flops,
        bytes=traffic,
        shared_bytes=shared_bytes,
        l2_bytes=l2_bytes,
        roofline=matrix_time / busy if flops else 1.0,
        l2_rate=l2_bytes / busy * card.multiprocessors / 1e12,
        # 16.00 clocks against 15.99 are a tie, which is the matrix units'.
        bound_by=max(times, key=lambda name: times[name] * (1.005 if name == "matrix units" else 1)),
    )


def _compile(card: Target, variant: Variant) -> Any:
    names = variant.kernel.arg_names
    types = dict(variant.types)
    signature = {name: types.get(name, "constexpr") for name in names}

    def path(place: Place) -> tuple[int, ...]:
        return (names.index(place),) if isinstance(place, str) else (names.index(place[0]), place[1])

    constants = {path(place): value for place, value in variant.constants}
    attributes = {path(place): [["tt.divisibility", ALIGNMENT]] for place in variant.aligned}
    source = ASTSource(variant.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=card.gpu, options=dict(variant.options))


def _disassemble(card: Target, binary: Any) -> tuple[str, int, int]:
    """The instructions, a line each; registers a thread; bytes a thread spilled."""
    if card.generation == "gfx942":
        text = binary.asm["amdgcn"]
        vector = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))
        spilled = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1))
        scratch = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text).group(1))
        lines = [line for line in text.splitlines() if re.match(r"\s+[a-z]\w+_\w+", line)]
        return "\n".join(lines), vector, max(4 * spilled, scratch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        # No control flow is looked at, whose analysis takes a quarter of the time.
        code = _tool("nvdisasm", "--print-code", "--no-dataflow", str(path))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    lines = [line for line in code.splitlines() if re.match(r"\s+/\*[0-9a-f]+\*/", line)]
    # A stack may hold more than spills; without a load from it none of it is one.
    spilled = stack if any(re.search(r"\b(LDL|STL)\b", line) for line in lines) else 0
    return "\n".join(lines), registers, spilled


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _shared_traffic(binary: Any, variant: Variant, row_bytes: int) -> int:
    """Bytes of operands that a tile's product of rows of `row_bytes` moves to shared memory and from there to the
    matrix units; 0 where no matrix units multiply.

    A warp of sm_80 or a wave of gfx942 fetches the rows and the columns of its own part of the tile. An instruction of
    sm_90 reads 64 rows and all columns; one of sm_100 128 rows.
    """
    text, columns = binary.asm["ttgir"], variant.constant("COLUMNS")
    if "tc_gen5_mma" in text:
        down, across = 1, 1
    elif found := re.search(
        r"nvidia_mma<{versionMajor = 3|(?:nvidia_mma|amd_mfma)<.*?warpsPerCTA = \[(\d+), (\d+)\]", text
    ):
        down, across = (int(found[1]), int(found[2])) if found[1] else (TILE // 64, 1)
    else:
        return 0
    return (TILE * (1 + across) + columns * (1 + down)) * row_bytes


def _programs(card: Target, warps: int, registers: int, shared: int) -> int:
    """How many programs fit on a multiprocessor."""
    # Registers are handed out to a warp in steps of 8 a thread.
    taken = (registers + 7) // 8 * 8 * card.warp * warps
    reserved = KIB if card.generation.startswith("sm_") else 0
    fits = shared <= card.shared_program
    by_shared = card.shared // (shared + reserved) if shared else card.threads
    return min(card.registers // taken, by_shared, card.threads // (card.warp * warps)) if fits else 0


def _rate(card: Target, element: Element) -> float:
    """FLOPs a second."""
    if element.exact:
        return 1e12 * card.single
    return 1e12 * card.teraflops * (0.5 if element.type == "fp32" else 1)


def _products(variant: Variant, dim: int, guide_dim: int) -> list[tuple[int, Element]]:
    """The products of a kernel of tiles: how wide its operands are, and of what."""
    if not variant.multiplies:
        return []
    assert variant.operand is not None
    found = [(guide_dim if variant.constant("GUIDE") else dim, variant.operand)]
    return found if variant.guide_operand is None else [*found, (guide_dim, variant.guide_operand)]


def _work(card: Target, variant: Variant, programs: int, dim: int, guide_dim: int) -> tuple[int, int, int]:
    """FLOPs, bytes from memory and exponentials of a program: of its tile, of its share of one, or of its rows."""
    kernel, element, sides = variant.kernel.__name__, variant.operand, variant.sides
    rows = variant.constant("ROWS", TILE)
    if kernel in ("reduce_kernel", "distil_reduce_kernel"):
        depth, softmaxes = variant.constant("DEPTH"), 1 if kernel == "reduce_kernel" else 2
        numbers = 2 if softmaxes == 1 else NUMBERS
        # And what is written: of each row two numbers, or the running ones.
        return 0, 4 * rows * numbers * (depth + (2 if softmaxes == 1 else 1)), softmaxes * rows * (depth + 1)
    if (streams := STREAMS.get(kernel.removesuffix("_kernel"))) is not None:
        of_guide = kernel == "units_kernel" and not variant.has("temperature")
        read = 0
        for name, kind in variant.kinds.items():
            across = guide_dim if of_guide or name == "guide" else dim
            # What is added to is read too.
            times = streams.get(name, 0) + (name == "outs" and bool(variant.constant("ADDS")))
            read += times * across * (4 if kind == "*fp32" else 2)
        return 0, rows * read, 0
    together = max(1, programs) * card.multiprocessors
    columns = variant.constant("COLUMNS", TILE)
    pairs = TILE * columns
    flops = read = out = 0
    for width, of in _products(variant, dim, guide_dim):
        flops += 2 * pairs * width
        down = variant.constant("GROUP")
        across = max(1, together // down)
        read += width * of.size * (TILE * down + columns * across) // (down * across)
    softmaxes = {"forward": 1, "dlogits": 1, "distil": 2, "distil_dlogits": 2}.get(kernel.removesuffix("_kernel"), 0)
    bits = 0 if softmaxes == 2 else 4 * TILE_WORDS * sides * columns // TILE
    if kernel in ("dlogits_kernel", "distil_dlogits_kernel", "unpack_kernel"):
        assert element is not None
        out = pairs * element.size
    elif softmaxes:
        out = 4 * (2 if softmaxes == 1 else NUMBERS) * TILE * sides
    return flops, read + bits + out, softmaxes * sides * pairs
