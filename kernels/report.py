"""What each configuration compiles to for a named GPU, present or not.

Triton's compiler needs no card, and the disassembler that its wheel carries shows what came out: registers, spills,
shared memory, matrix instructions. A configuration of `gist_fast.kernels.config` that spills, does not fit or misses
the matrix units for one of its products is no configuration.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from gist_fast.kernels import decide, forward, groups, masks, owned, staged, tile, unpack
from gist_fast.kernels.config import HALF, SINGLE, TABLE, Config, Generation, Launch, Owned, Staged
from gist_fast.kernels.launch import ALIGNED_OR_NOT
from gist_fast.kernels.layout import TILE, TILE_WORDS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Target:
    """A kind of GPU. Sizes in bytes a multiprocessor unless said otherwise; rates are the vendor's, dense."""

    generation: Generation
    card: str
    """The card whose rates these are."""
    multiprocessors: int
    shared: int
    shared_program: int
    """The most that one program may have."""
    registers: int
    """32-bit registers."""
    threads: int
    matrix: str
    """Name of the matrix instructions in the disassembly, a regular expression."""
    teraflops: float
    """bf16, fp32 sums. TF32 has half of it."""
    single: float
    """fp32 throughout, TFLOP/s."""
    gigabytes: float
    """From memory, a second."""
    exponentials: float = 16
    """exp2 a clock."""
    gigahertz: float = 1.5
    warp: int = 32

    @property
    def gpu(self) -> GPUTarget:
        if self.generation.startswith("sm_"):
            return GPUTarget("cuda", int(self.generation[3:]), 32)
        return GPUTarget("hip", self.generation, 64)


KIB = 1024
TARGETS: dict[str, Target] = {
    t.generation: t
    for t in (
        Target("sm_80", "A100 SXM", 108, 164 * KIB, 163 * KIB, 65536, 2048, "HMMA", 312, 19.5, 2039, gigahertz=1.41),
        Target("sm_86", "A10", 72, 100 * KIB, 99 * KIB, 65536, 1536, "HMMA", 125, 31.2, 600, gigahertz=1.695),
        Target("sm_89", "L40S", 142, 100 * KIB, 99 * KIB, 65536, 1536, "HMMA", 362, 91.6, 864, gigahertz=2.52),
        Target("sm_90", "H100 SXM", 132, 228 * KIB, 227 * KIB, 65536, 2048, "HGMMA", 989, 67, 3350, gigahertz=1.755),
        Target("sm_100", "B200", 148, 228 * KIB, 227 * KIB, 65536, 2048, r"UTC\w*MMA", 2250, 75, 8000, gigahertz=1.85),
        Target(
            "gfx942", "MI300X", 304, 64 * KIB, 64 * KIB, 4 * 512 * 64, 2048, "v_mfma_[a-z0-9_]+", 1307, 163.4, 5300,
            gigahertz=2.1, warp=64,
        ),
    )
}  # fmt: skip


NONE, OWN, SELF = decide.NO_GUIDE.value, decide.OWN_GUIDE.value, decide.SELF_GUIDE.value
ALL, DIFFERS = tile.ALL_BOOSTED.value, tile.OWN_DIFFERS.value


@dataclass(frozen=True)
class Element:
    """Of an operand."""

    type: str
    """Triton's name."""
    precision: str = "ieee"
    """How ``tl.dot`` multiplies float32; half types have one way only."""

    def __str__(self) -> str:
        return f"fp32 {self.precision}" if self.type == "fp32" else self.type

    @property
    def exact(self) -> bool:
        """Whether it is multiplied as float32, for which NVIDIA's matrix units have no instruction."""
        return (self.type, self.precision) == ("fp32", "ieee")


@dataclass(frozen=True)
class Operands:
    """What is multiplied."""

    student: Element
    guide: Element


BF16, TF32, FP32 = Element("bf16"), Element("fp32", "tf32"), Element("fp32")


@dataclass(frozen=True)
class Variant:
    """A kernel as one of the launches of a configuration starts it."""

    kernel: str
    launch: str
    """The name of the launch in the configuration."""
    operands: Operands
    function: Callable
    constants: dict[str, Any]
    sides: int = 1
    """Rows of the problem that a tile serves: 2 in a symmetric part."""
    guided: bool = False
    """Multiplies the guide's operands."""
    student: bool = True
    """Multiplies the student's."""

    @property
    def element(self) -> str:
        """What the report calls its operands."""
        student, guide = self.operands.student, self.operands.guide
        return str(student) if student == guide or not self.guided else f"{student}, guide {guide}"


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


def variants(student: Element, guide: Element | None = None, *, every: bool = False) -> Iterator[Variant]:
    """The kernels of a configuration: those of a guide with embeddings of its own; with `every`, all others too, each
    of the loss's variants by itself and all of them at once.

    Args:
        guide: what its embeddings are; as the student's without it.
    """
    operands = Operands(student, guide or student)
    for symmetric in (False, True):
        end = "_symmetric" if symmetric else ""
        both = {"SYMMETRIC": symmetric, "PRECISION": student.precision}
        guided = {**both, "GUIDE_PRECISION": operands.guide.precision}
        for name, options in _forward_options(symmetric, every):
            launch = "forward_own_differs" if options["BOOST"] == DIFFERS else f"forward{end}"
            yield _variant(f"forward{end}{name}", launch, operands, forward.forward_kernel, guided | options)
        for name, options in _masks_options(every):
            yield _variant(f"masks{end}{name}", f"masks{end}", operands, masks.masks_kernel, guided | options)
        for name, options in _staged_options(symmetric, every):
            yield _variant(f"staged{end}{name}", f"staged{end}", operands, staged.coefficients_kernel, both | options)
        if every:
            yield _variant(f"unpack{end}", "", operands, unpack.unpack_kernel, {"SYMMETRIC": symmetric, "TILE": TILE})
            for name, bits in (("", tile.PART_BITS.value), (" for a chunk", tile.CHUNK_BITS.value)):
                constants = {"SYMMETRIC": symmetric, "BITS": bits}
                yield _variant(f"groups{end}{name}", "", operands, groups.groups_kernel, constants)
    for name, direct, mirrored in (("rows", True, False), ("columns", False, True), ("symmetric", True, True)):
        sides = {"PRECISION": student.precision, "DIRECT": direct, "MIRRORED": mirrored}
        for end, options in _owned_options(direct and mirrored, every):
            yield _variant(f"owned_{name}{end}", "owned", operands, owned.owned_kernel, sides | options)
    if every:
        constants = {"ROWS": forward.FOLD_ROWS, "DEPTH": forward.FOLD_DEPTH}
        yield _variant("fold", "", operands, forward.fold_kernel, constants)


Options = Iterator[tuple[str, dict[str, Any]]]


def _forward_options(symmetric: bool, every: bool) -> Options:
    plain = {
        "GUIDE": OWN, "HARD": False, "BOOST": 0, "GIVEN": False, "COUNTED": True, "BITS": tile.PART_BITS.value,
    }  # fmt: skip
    yield "", plain
    if not every:
        return
    chunk = {"BITS": tile.CHUNK_BITS.value}
    unguided = {"GUIDE": NONE, "COUNTED": False}
    unkept = {**unguided, "BITS": tile.NO_BITS.value}
    light, differs = ({}, {}) if symmetric else ({"BOOST": ALL}, {"BOOST": DIFFERS})
    yield " self-guided", {**plain, "GUIDE": SELF}
    yield " unguided", {**plain, **unkept}
    yield " unguided kept", {**plain, **unguided}
    yield " for a chunk", {**plain, **chunk}
    # With what was decided before floors, or by groups, to begin with, as all below that are given.
    yield " hard", {**plain, "GUIDE": NONE, "GIVEN": True, "HARD": True}
    yield " hard for a chunk", {**plain, **chunk, "GUIDE": NONE, "GIVEN": True, "HARD": True}
    yield " grouped", {**plain, "GIVEN": True, **light}
    yield " self-guided grouped", {**plain, "GUIDE": SELF, "GIVEN": True, **light}
    yield " of groups", {**plain, "GUIDE": NONE, "GIVEN": True, **light}
    yield " given", {**plain, **unguided, "GIVEN": True, **light}
    yield " given for a chunk", {**plain, **chunk, **unguided, "GIVEN": True, **light}
    if not symmetric:
        yield " differently boosted", {**plain, **differs}
        yield " grouped, differently boosted", {**plain, "GIVEN": True, **differs}
        yield " given, differently boosted", {**plain, **unguided, "GIVEN": True, **differs}
        yield " hard, differently boosted", {**plain, "GUIDE": NONE, "GIVEN": True, "HARD": True, **differs}
        yield " self-guided, differently boosted", {**plain, "GUIDE": SELF, **differs}
        yield " self-guided grouped, differently boosted", {**plain, "GUIDE": SELF, "GIVEN": True, **differs}
        yield " unguided boosted", {**plain, **unkept, **light}
        yield " unguided, differently boosted", {**plain, **unkept, **differs}


def _masks_options(every: bool) -> Options:
    plain = {"GUIDE": OWN, "HARD": False, "GIVEN": False, "BITS": tile.CHUNK_BITS.value}
    before = {**plain, "BITS": tile.PART_BITS.value}
    yield "", plain
    if every:
        yield " before floors", before
        yield " grouped before floors", {**before, "GIVEN": True}
        yield " grouped", {**plain, "GIVEN": True}
        yield " self-guided", {**plain, "GUIDE": SELF}
        yield " self-guided grouped", {**plain, "GUIDE": SELF, "GIVEN": True}
        yield " hard", {**plain, "GUIDE": NONE, "HARD": True, "GIVEN": True}
        yield " of nothing", {**plain, "GUIDE": NONE}
        yield " of nothing before floors", {**before, "GUIDE": NONE}


def _staged_options(symmetric: bool, every: bool) -> Options:
    plain = {"BITS": tile.PART_BITS.value, "SELF_GUIDED": False, "BOOST": 0}
    yield "", plain
    if not every:
        return
    yield " self-guided", {**plain, "BITS": tile.NO_BITS.value, "SELF_GUIDED": True}
    yield " recomputed", {**plain, "BITS": tile.CHUNK_BITS.value}
    yield " unguided", {**plain, "BITS": tile.NO_BITS.value}
    if not symmetric:
        yield " boosted", {**plain, "BOOST": ALL}
        yield " differently boosted", {**plain, "BOOST": DIFFERS}
        yield " recomputed, differently boosted", {**plain, "BITS": tile.CHUNK_BITS.value, "BOOST": DIFFERS}
        yield " unguided boosted", {**plain, "BITS": tile.NO_BITS.value, "BOOST": ALL}
        yield " self-guided boosted", {**plain, "BITS": tile.NO_BITS.value, "SELF_GUIDED": True, "BOOST": ALL}


def _owned_options(symmetric: bool, every: bool) -> Options:
    plain = {"HAVE_BITS": True, "BOOST": 0}
    yield "", plain
    if every:
        yield " unguided", {**plain, "HAVE_BITS": False}
        if not symmetric:
            yield " boosted", {**plain, "BOOST": DIFFERS}
            yield " boosted by one factor", {**plain, "BOOST": ALL}


def _variant(kernel: str, launch: str, operands: Operands, function: Callable, constants: dict[str, Any]) -> Variant:
    sides = 1 + (constants.get("SYMMETRIC") or constants.get("DIRECT", 0) + constants.get("MIRRORED", 0) > 1)
    guided = constants.get("GUIDE") == OWN
    alone = function is masks.masks_kernel
    student = function not in LIGHT and (not alone or constants["HARD"] or constants["GUIDE"] == SELF)
    return Variant(kernel, launch, operands, function, constants, sides, guided, student)


def report(target: str, *, width: int = 384, guide_width: int = 1024, every: bool = False) -> Iterator[Compiled]:
    """Compile every shipped configuration for `target`, one of `TARGETS`; figures are for those widths.

    With `every`, all kernels of all variants, and those of a student and a guide of different types.
    """
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}; one of {', '.join(TARGETS)} would do.")
    card = TARGETS[target]
    for size, variant in _shipped(card, every):
        launch = launch_of(TABLE[card.generation, size], variant)
        yield compile_variant(card, variant, launch, width=width, guide_width=guide_width)


def _shipped(card: Target, every: bool) -> Iterator[tuple[int, Variant]]:
    """What the table starts on a card, with the bytes of the larger element."""
    for variant in variants(BF16, every=every):
        yield HALF, variant
    # torch multiplies float32 in full on gfx942, unless told otherwise.
    for single in (FP32,) if card.generation == "gfx942" else (TF32, FP32):
        for variant in variants(single, every=every):
            yield SINGLE, variant
        if every:
            for variant in variants(BF16, single, every=True):
                yield SINGLE, variant
            # What looks at no embeddings of the guide is as above.
            for variant in variants(single, BF16, every=True):
                if variant.guided:
                    yield SINGLE, variant


LIGHT = {
    unpack.unpack_kernel: unpack.WARPS,
    groups.groups_kernel: groups.WARPS,
    forward.fold_kernel: forward.FOLD_WARPS,
}
"""Kernels that multiply nothing, so that there is nothing to choose but warps."""


def launch_of(config: Config, variant: Variant) -> Launch:
    """The launch that starts it."""
    if variant.function in LIGHT:
        return Launch(config.block_k, LIGHT[variant.function], stages=1)
    return config.launches()[variant.launch]


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
