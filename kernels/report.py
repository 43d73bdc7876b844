"""What each configuration compiles to for a named GPU, present or not.

Triton's compiler needs no card, and the disassembler that its wheel carries shows what came out: registers, spills,
shared memory, matrix instructions. A configuration of `gist_fast.kernels.config` that spills, does not fit or misses
the matrix units for one of its products is no configuration.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from gist_fast.kernels import forward, groups, masks, staged, unpack
from gist_fast.kernels.config import TABLE, Launch, Owned, Staged
from gist_fast.kernels.launch import ALIGNED_OR_NOT
from gist_fast.kernels.layout import TILE, TILE_WORDS
from gist_fast.kernels.targets import KIB, TARGETS, Target
from gist_fast.kernels.variants import Element, Variant, launch_of, shipped
from triton.compiler import ASTSource


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
    """Of a tile (a step of `owned`), at the widths asked for."""
    bytes: int
    """From memory for a tile, where the programs that run together share their operands in L2."""
    roofline: float
    """Share of the matrix rate that memory and exponentials leave."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def report(
    target: str, *, width: int = 384, guide_width: int = 1024, every: bool = False, size: int | None = None
) -> Iterator[Compiled]:
    """Compile every shipped configuration for `target`, one of `TARGETS`; figures are for those widths.

    With `every`, all kernels of all variants, and those of a student and a guide of different types; with `size`, those
    for elements of so many bytes alone.
    """
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}; one of {', '.join(TARGETS)} would do.")
    card = TARGETS[target]
    for n_bytes, variant in shipped(card, every):
        if size in (None, n_bytes):
            launch = launch_of(TABLE[card.generation, n_bytes], variant)
            yield compile_variant(card, variant, launch, width=width, guide_width=guide_width)


def compile_variant(card: Target, variant: Variant, launch: Launch, *, width: int, guide_width: int) -> Compiled:
    """Compile one kernel and look at what came out."""
    binary = _compile(card, variant, launch)
    listing, registers, spills = _disassemble(card, binary)
    shared = binary.metadata.shared
    programs = _programs(card, launch.warps, registers, shared)
    flops, traffic, exponentials = _work(card, variant, launch, programs, width, guide_width)
    found: dict[str, int] = {}
    for name in re.findall(rf"\b({card.matrix})\b", listing):
        found[name] = found.get(name, 0) + 1
    matrix_time = sum(n / _rate(card, element) for n, element in flops) * card.multiprocessors
    memory_time = traffic / (card.gigabytes * 1e9) * card.multiprocessors
    exponential_time = exponentials / (card.exponentials * card.gigahertz * 1e9)
    # Programs that share a multiprocessor hide one's exponentials under another's products.
    busy = max(matrix_time, exponential_time) if programs > 1 else matrix_time + exponential_time
    return Compiled(
        target=card.generation,
        kernel=variant.kernel,
        element=variant.element,
        warps=launch.warps,
        stages=launch.stages,
        block_k=launch.block_k,
        registers=registers,
        spills=spills,
        shared=shared,
        programs=programs,
        matrix_instructions=found,
        instructions=len(listing.splitlines()),
        flops=sum(n for n, _ in flops),
        bytes=traffic,
        roofline=matrix_time / max(busy, memory_time) if flops else 1.0,
    )


POINTERS = {
    "limits": "*fp32", "floors": "*fp32", "row_groups": "*i32", "column_groups": "*i32", "boosts": "*fp32",
    "lse2": "*fp32", "weights": "*fp32", "bits": "*i32", "counts": "*i32", "all_counts": "*i32", "gradient": "*fp32",
    "maximum": "*fp32", "total": "*fp32", "partial_maximum": "*fp32", "partial_sum": "*fp32", "row_maximum": "*fp32",
    "row_sum": "*fp32", "column_maximum": "*fp32", "column_sum": "*fp32",
}  # fmt: skip
STUDENT, GUIDE = ("x", "y", "own", "other", "coefficients", "masked"), ("guide_x", "guide_y")
DIVISIBLE = ("width", "guide_width")


def _compile(card: Target, variant: Variant, launch: Launch) -> Any:
    constants = {**variant.constants, "BLOCK_K": launch.block_k}
    if isinstance(launch, Owned):
        constants |= {"TILE": TILE, "ROWS": launch.rows, "COLUMNS": launch.columns, "SLICE": launch.slice_width}
    else:
        constants["GROUP"] = launch.group
    if isinstance(launch, Staged):
        constants["COLUMNS"] = launch.columns
    names = variant.function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    student, guide = variant.operands.student.type, variant.operands.guide.type
    signature = {
        name: "constexpr" if name in constants
        else f"*{student}" if name in STUDENT
        # A kernel that multiplies no embeddings of a guide is given the student's for them.
        else f"*{guide if variant.guided else student}" if name in GUIDE
        else POINTERS.get(name, "i32")
        for name in names
    }  # fmt: skip
    # What a launch finds out by itself: torch's memory is aligned where it begins, and widths are filled up.
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name in DIVISIBLE or (signature[name].startswith("*") and name not in ALIGNED_OR_NOT)
    }
    source = ASTSource(variant.function, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=card.gpu, options=options)


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
        code = _tool("nvdisasm", "-c", str(path))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    lines = [line for line in code.splitlines() if re.match(r"\s+/\*[0-9a-f]+\*/", line)]
    # A stack may hold more than spills; without a load from it none of it is one.
    spilled = stack if any(re.search(r"\b(LDL|STL)\b", line) for line in lines) else 0
    return "\n".join(lines), registers, spilled


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


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


def _work(
    card: Target, variant: Variant, launch: Launch, programs: int, width: int, guide_width: int
) -> tuple[list[tuple[int, Element]], int, int]:
    """FLOPs of each product with what it multiplies, bytes from memory and exponentials of a tile."""
    operands = variant.operands
    size, guide_size = (4 if element.type == "fp32" else 2 for element in (operands.student, operands.guide))
    together = max(1, programs) * card.multiprocessors
    if isinstance(launch, Owned):
        pairs = launch.rows * launch.columns
        held = min(launch.slice_width, width)
        # All programs stream the same rows at about the same time, so that one load from memory serves them all.
        streamed = launch.columns * width * size // together
        flops = [(2 * pairs * (width + held), operands.student)]
        return flops, streamed + variant.sides * pairs // 8, variant.sides * pairs
    if variant.function is forward.fold_kernel:
        return [], 8 * forward.FOLD_ROWS * (forward.FOLD_DEPTH + 2), forward.FOLD_ROWS * (forward.FOLD_DEPTH + 1)
    breadth = launch.columns if isinstance(launch, Staged) else TILE
    pairs = TILE * breadth
    deep = width * size * variant.student + guide_width * guide_size * variant.guided
    across = max(1, together // launch.group)
    read = breadth * deep * (launch.group + across) // (launch.group * across)
    bits = 4 * TILE_WORDS * variant.sides * breadth // TILE
    decides_only = variant.function in (masks.masks_kernel, groups.groups_kernel)
    written = variant.function in (staged.coefficients_kernel, unpack.unpack_kernel)
    out = pairs * size if written else 0 if decides_only else 8 * TILE * variant.sides
    quiet = decides_only or variant.function is unpack.unpack_kernel
    flops = [(2 * pairs * width, operands.student)] if variant.student else []
    if variant.guided:
        flops.append((2 * pairs * guide_width, operands.guide))
    return flops, read + bits + out, 0 if quiet else variant.sides * pairs
