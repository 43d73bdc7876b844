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
from gist_fast.kernels import decide, forward, masks, owned, staged, tile, unpack
from gist_fast.kernels.config import HALF, SINGLE, TABLE, Config, Generation, Launch, Owned, Staged
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
class Variant:
    """A kernel as one of the launches of a configuration starts it."""

    kernel: str
    launch: str
    """The name of the launch in the configuration."""
    element: str
    """Triton's name of the operands' type."""
    precision: str
    function: Callable
    constants: dict[str, Any]
    sides: int = 1
    """Rows of the problem that a tile serves: 2 in a symmetric part."""
    guided: bool = False
    """Multiplies the guide's operands."""
    student: bool = True
    """Multiplies the student's."""

    @property
    def multiplies(self) -> bool:
        return self.guided or self.student


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


def variants(element: str, precision: str, *, every: bool = False) -> Iterator[Variant]:
    """The kernels of a configuration: those of a guide with embeddings of its own; with `every`, all others too, each
    of the loss's variants by itself and all of them at once."""
    for symmetric in (False, True):
        end = "_symmetric" if symmetric else ""
        both = {"SYMMETRIC": symmetric, "PRECISION": precision}
        guided = {**both, "GUIDE_PRECISION": precision}
        for name, options in _forward_options(symmetric, every):
            heavy = options["HARD"] or options["BOOST"] == DIFFERS
            launch = f"forward{end}_heavy" if heavy else f"forward{end}"
            yield _variant(f"forward{end}{name}", launch, element, forward.forward_kernel, guided | options)
        for name, options in _masks_options(every):
            yield _variant(f"masks{end}{name}", f"masks{end}", element, masks.masks_kernel, guided | options)
        for name, options in _staged_options(symmetric, every):
            yield _variant(f"staged{end}{name}", f"staged{end}", element, staged.coefficients_kernel, both | options)
        if every:
            constants = {"SYMMETRIC": symmetric, "TILE": TILE, "PRECISION": precision}
            yield _variant(f"unpack{end}", "unpack", element, unpack.unpack_kernel, constants)
    for name, direct, mirrored in (("rows", True, False), ("columns", False, True), ("symmetric", True, True)):
        sides = {"PRECISION": precision, "DIRECT": direct, "MIRRORED": mirrored}
        for end, options in _owned_options(direct and mirrored, every):
            yield _variant(f"owned_{name}{end}", "owned", element, owned.owned_kernel, sides | options)


Options = Iterator[tuple[str, dict[str, Any]]]


def _forward_options(symmetric: bool, every: bool) -> Options:
    plain = {"GUIDE": OWN, "GROUPED": False, "HARD": False, "BOOST": 0, "GIVEN": False, "BITS": tile.PART_BITS.value}
    yield "", plain
    if not every:
        return
    unkept, chunk = {"BITS": tile.NO_BITS.value}, {"BITS": tile.CHUNK_BITS.value}
    light, heavy = ({}, {}) if symmetric else ({"BOOST": ALL}, {"BOOST": DIFFERS})
    yield " self-guided", {**plain, "GUIDE": SELF}
    yield " unguided", {**plain, **unkept, "GUIDE": NONE}
    yield " unguided kept", {**plain, "GUIDE": NONE}
    yield " for a chunk", {**plain, **chunk}
    yield " hard", {**plain, "HARD": True}
    yield " with all", {**plain, "GROUPED": True, "HARD": True, **heavy}
    yield " unguided with all", {**plain, "GUIDE": NONE, "GROUPED": True, "HARD": True, **heavy}
    yield " grouped", {**plain, "GROUPED": True, **light}
    yield " self-guided grouped", {**plain, "GUIDE": SELF, "GROUPED": True, **light}
    yield " given", {**plain, "GUIDE": NONE, "GIVEN": True, **light}
    yield " given for a chunk", {**plain, **chunk, "GUIDE": NONE, "GIVEN": True, **light}
    if not symmetric:
        yield " self-guided with all", {**plain, "GUIDE": SELF, "GROUPED": True, **heavy}
        yield " given, differently boosted", {**plain, "GUIDE": NONE, "GIVEN": True, **heavy}
        yield " unguided boosted", {**plain, **unkept, "GUIDE": NONE, **light}


def _masks_options(every: bool) -> Options:
    plain = {"GUIDE": OWN, "GROUPED": False, "HARD": False, "GIVEN": False}
    yield "", plain
    if every:
        yield " grouped", {**plain, "GROUPED": True}
        yield " self-guided", {**plain, "GUIDE": SELF, "GROUPED": True}
        yield " unguided hard", {**plain, "GUIDE": NONE, "GROUPED": True, "HARD": True}
        yield " given hard", {**plain, "GUIDE": NONE, "HARD": True, "GIVEN": True}
        yield " of groups", {**plain, "GUIDE": NONE, "GROUPED": True}
        yield " of nothing", {**plain, "GUIDE": NONE}


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


def _variant(kernel: str, launch: str, element: str, function: Callable, constants: dict[str, Any]) -> Variant:
    sides = 1 + (constants.get("SYMMETRIC") or constants.get("DIRECT", 0) + constants.get("MIRRORED", 0) > 1)
    guided = constants.get("GUIDE") == OWN
    alone = function is masks.masks_kernel
    student = function is not unpack.unpack_kernel and (not alone or constants["HARD"] or constants["GUIDE"] == SELF)
    return Variant(kernel, launch, element, constants["PRECISION"], function, constants, sides, guided, student)


def report(target: str, *, width: int = 384, guide_width: int = 1024, every: bool = False) -> Iterator[Compiled]:
    """Compile every shipped configuration for `target`, one of `TARGETS`; figures are for those widths."""
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}; one of {', '.join(TARGETS)} would do.")
    card = TARGETS[target]
    for size, elements in ((HALF, (("bf16", "ieee"),)), (SINGLE, (("fp32", "tf32"), ("fp32", "ieee")))):
        config = TABLE[card.generation, size]
        for element, precision in elements:
            if target == "gfx942" and precision == "tf32":
                # torch multiplies float32 in full there, unless told otherwise.
                continue
            for variant in variants(element, precision, every=every):
                launch = launch_of(config, variant)
                yield compile_variant(card, variant, launch, width=width, guide_width=guide_width)


def launch_of(config: Config, variant: Variant) -> Launch:
    """The launch that starts it."""
    if variant.function is unpack.unpack_kernel:
        # It multiplies nothing, so there is nothing to choose but warps.
        return Launch(config.block_k, unpack.WARPS, stages=1)
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
    halved = 1 if variant.element != "fp32" else 0.5
    rate = 1e12 * (card.single if (variant.element, variant.precision) == ("fp32", "ieee") else card.teraflops * halved)
    matrix_time = flops / rate * card.multiprocessors
    memory_time = traffic / (card.gigabytes * 1e9) * card.multiprocessors
    exponential_time = exponentials / (card.exponentials * card.gigahertz * 1e9)
    # Programs that share a multiprocessor hide one's exponentials under another's products.
    busy = max(matrix_time, exponential_time) if programs > 1 else matrix_time + exponential_time
    return Compiled(
        target=card.generation,
        kernel=variant.kernel,
        element=variant.element if variant.element != "fp32" else f"fp32 {variant.precision}",
        warps=launch.warps,
        stages=launch.stages,
        block_k=launch.block_k,
        registers=registers,
        spills=spills,
        shared=shared,
        programs=programs,
        matrix_instructions=found,
        instructions=len(listing.splitlines()),
        flops=flops,
        bytes=traffic,
        roofline=matrix_time / max(busy, memory_time) if flops else 1.0,
    )


POINTERS = {
    "limits": "*fp32", "floors": "*fp32", "row_groups": "*i32", "column_groups": "*i32", "boosts": "*fp32",
    "lse2": "*fp32", "weights": "*fp32", "bits": "*i32", "counts": "*i32", "all_counts": "*i32", "gradient": "*fp32",
    "row_maximum": "*fp32", "row_sum": "*fp32", "column_maximum": "*fp32", "column_sum": "*fp32",
}  # fmt: skip
OPERANDS = ("x", "y", "guide_x", "guide_y", "own", "other", "coefficients", "masked")
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
    signature = {
        name: "constexpr" if name in constants
        else f"*{variant.element}" if name in OPERANDS
        else POINTERS.get(name, "i32")
        for name in names
    }  # fmt: skip
    # What a launch finds out by itself: torch's memory is aligned, and widths are filled up.
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in DIVISIBLE
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


def _work(
    card: Target, variant: Variant, launch: Launch, programs: int, width: int, guide_width: int
) -> tuple[int, int, int]:
    """FLOPs, bytes from memory and exponentials of a tile."""
    size = 4 if variant.element == "fp32" else 2
    together = max(1, programs) * card.multiprocessors
    if isinstance(launch, Owned):
        pairs = launch.rows * launch.columns
        held = min(launch.slice_width, width)
        # All programs stream the same rows at about the same time, so that one load from memory serves them all.
        streamed = launch.columns * width * size // together
        return 2 * pairs * (width + held), streamed + variant.sides * pairs // 8, variant.sides * pairs
    breadth = launch.columns if isinstance(launch, Staged) else TILE
    pairs = TILE * breadth
    alone = variant.function is masks.masks_kernel
    depth = (width if variant.student else 0) + (guide_width if variant.guided else 0)
    across = max(1, together // launch.group)
    operands = breadth * depth * size * (launch.group + across) // (launch.group * across)
    bits = 4 * TILE_WORDS * variant.sides * breadth // TILE
    written = variant.function in (staged.coefficients_kernel, unpack.unpack_kernel)
    out = pairs * size if written else 0 if alone else 8 * TILE * variant.sides
    quiet = alone or variant.function is unpack.unpack_kernel
    return 2 * pairs * depth, operands + bits + out, 0 if quiet else variant.sides * pairs
