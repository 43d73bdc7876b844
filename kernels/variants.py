"""The kernels of a configuration, as the loss's variants start them: functions, constants, and what is multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gist_fast.kernels import decide, forward, groups, masks, owned, staged, tile, unpack
from gist_fast.kernels.config import HALF, SINGLE, Config, Launch
from gist_fast.kernels.layout import TILE
from gist_fast.kernels.targets import Target

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


LIGHT = {
    unpack.unpack_kernel: unpack.WARPS,
    groups.groups_kernel: groups.WARPS,
    forward.fold_kernel: forward.FOLD_WARPS,
}
"""Kernels that multiply nothing, so that there is nothing to choose but warps."""


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


def shipped(card: Target, every: bool) -> Iterator[tuple[int, Variant]]:
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


def launch_of(config: Config, variant: Variant) -> Launch:
    """The launch that starts it."""
    if variant.function in LIGHT:
        return Launch(config.block_k, LIGHT[variant.function], stages=1)
    return config.launches()[variant.launch]
