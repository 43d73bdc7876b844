"""The kernels that launches start, as Triton compiles them: recorded, and told apart by what is compiled in.

`gist_fast.kernels.launch.record_launches` notes launches; `variants_of` makes of them what the compiler is given. Which
launches a loss starts is known further up, in `gist_fast.functional.backends.kernel_variants`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from gist_fast.kernels.launch import DescriptorNote, Started, TensorNote

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
"""Triton's names."""
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
ALIGNMENT = 16
"""Triton compiles in that a number, or the bytes of an address, are a multiple of it."""
OPERANDS = 3
"""Of a problem whose launches are recorded, unless said: anchors, positives and a column of negatives."""
Place = str | tuple[str, int]
"""An argument, or one of an argument that is a tuple."""
Kind = str | tuple[str, ...]
"""Triton's name of the type of an argument, or those of a tuple."""


@dataclass(frozen=True)
class Variant:
    """A kernel, compiled for some constants, some types, and some arguments that are there."""

    kernel: Any
    constants: tuple[tuple[Place, Any], ...]
    """Arguments that are compiled in: those by a capital name, None for an absent tensor, and a 1."""
    types: tuple[tuple[str, Kind], ...]
    """Triton's name of the type of every other argument."""
    aligned: frozenset[Place]
    """Those of them that are a multiple of `ALIGNMENT`."""
    options: tuple[tuple[str, Any], ...]

    def constant(self, name: str, default: Any = None) -> Any:
        return dict(self.constants).get(name, default)

    def has(self, name: str) -> bool:
        """Whether a tensor or number is an argument and there."""
        return name in dict(self.types)

    @property
    def kinds(self) -> dict[str, str]:
        """Triton's name of every argument's type, by name; of a tuple that of its first, as all are of one type."""
        return {name: kind if isinstance(kind, str) else kind[0] for name, kind in self.types}

    @property
    def warps(self) -> int:
        return dict(self.options)["num_warps"]

    @property
    def stages(self) -> int:
        return dict(self.options).get("num_stages", 1)

    @property
    def name(self) -> str:
        """The kernel's name and, with a blank before them, what makes it another than those of the plain loss."""
        name = self.kernel.__name__.removesuffix("_kernel")
        if self.constant("SYMMETRIC"):
            name += "_symmetric"
        return " ".join([name, ", ".join(self._differences())]).strip()

    def _differences(self) -> Iterable[str]:
        kernel, initial = self.kernel.__name__.removesuffix("_kernel"), self.constant("HAS_INITIAL_MASK")
        operands = len(dict(self.types).get("embeddings", ()))
        if kernel == "units":
            student = self.has("temperature")
            yield "student" if student else "guide"
            if self.has("norms"):
                yield "norms"
            if not (student or self.has("is_bad")):
                yield "unchecked"
        if kernel == "thresholds":
            types = [(name, kind) for name, kind in self.types if name in ("student", "guide")]
            yield " and ".join(name for name, _ in types)
            if len({kind for _, kind in types}) > 1:
                yield "of two types"
            if self.constant("SELF_GUIDED"):
                yield "self-guided"
            if self.has("margins"):
                yield "margins"
            if self.has("student_thresholds"):
                yield "student thresholds"
        if kernel == "distil_reduce":
            yield from ["first"] if self.constant("FIRST") else []
        if kernel == "masks":
            yield "guide" if self.constant("GUIDE") else "student"
            if self.constant("BELOW"):
                yield "student thresholds"
            if initial:
                yield "initial mask"
        if kernel == "groups" and (count := sum(map(self.has, ("groups", "others")))) != 1:
            yield "two a row" if count else "none"
        if kernel == "forward":
            decides = self.has("guide_thresholds"), self.has("student_thresholds")
            yield from (name for name, on in zip(("self-guided", "student thresholds"), decides, strict=True) if on)
            if initial and any(decides):
                yield "initial mask"
        if kernel in ("forward", "dlogits"):
            if not self.has("mask_bits"):
                yield "no mask"
            if self.has("temperature"):
                yield "scaled"
        if kernel in ("masks", "groups", "forward") and (self.has("masked") or self.has("easy")):
            yield "counted"
        if kernel == "reduce":
            yield from (name.lower() for name in ("FIRST", "LAST") if self.constant(name))
            if not self.has("positive_similarity"):
                yield "narrower dim"
            if not self.has("is_bad"):
                yield "unchecked"
        if kernel in ("weights", "dlogits") and self.has("weights"):
            yield "mixed signs"
        if kernel == "gradients":
            if not self.constant("ONE_SIGN"):
                yield "mixed signs"
            if self.constant("ADDS"):
                yield "added"
            elif self.kinds["outs"] != self.kinds["embeddings"]:
                yield "to be added to"
        if kernel in ("units", "gradients") and operands != OPERANDS:
            yield f"{operands} operands"
        if kernel == "unpack" and self.constant("BY_COLUMNS"):
            yield "by columns"
        if self.constant("DESCRIPTORS"):
            yield "descriptors"

    @property
    def sides(self) -> int:
        """Rows of the problem that a tile serves: 2 in a symmetric rectangle."""
        return 2 if self.constant("SYMMETRIC") else 1

    @property
    def operand(self) -> Element | None:
        """What it multiplies, or reads or writes of embeddings; None where it looks at none of them."""
        types = self.kinds
        precision = self.constant("PRECISION", "tf32" if self.constant("TF32") else "ieee")
        for name in ("x", "embeddings", "stack", "student", "guide", "matrix"):
            if name in types:
                return self.element_of(types[name], precision)
        return None

    @property
    def guide_operand(self) -> Element | None:
        """What it multiplies of a guide beside a student; None where it does not."""
        types = self.kinds
        return self.element_of(types["guide_x"], self.constant("GUIDE_PRECISION")) if "guide_x" in types else None

    @staticmethod
    def element_of(kind: str, precision: str) -> Element:
        """Of an operand by Triton's name of its type."""
        return Element(kind.removeprefix("*").removeprefix("tensordesc<").partition("[")[0], precision)

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies operands by tiles."""
        return self.constant("BLOCK_K") is not None

    @property
    def element(self) -> str:
        """What the report calls its operands."""
        kinds = [str(each) for each in (self.operand, self.guide_operand) if each is not None]
        return " and ".join(dict.fromkeys(kinds)) or "any"


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
    def size(self) -> int:
        """Bytes."""
        return 4 if self.type == "fp32" else 2

    @property
    def exact(self) -> bool:
        """Whether it is multiplied as float32, for which NVIDIA's matrix units have no instruction."""
        return (self.type, self.precision) == ("fp32", "ieee")


def variants_of(launches: Iterable[Started]) -> list[Variant]:
    """What Triton compiles for these launches, each kernel once, in the order in which they first start."""
    return list(dict.fromkeys(_variant(launch) for launch in launches))


def _variant(launch: Started) -> Variant:
    """As Triton's own launcher tells kernels apart; it does so by the address of a tensor that is in memory."""
    constants: dict[Place, Any] = {}
    types: dict[str, Kind] = {}
    aligned: set[Place] = set()
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        if type(value) is tuple:  # a note is a named one
            # Of a tuple it specialises everything, whatever is said of the argument.
            kinds = []
            for place, each in enumerate(value):
                kind, is_aligned = _kind(each)
                kinds.append(kind or "constexpr")
                if kind is None:
                    constants[name, place] = each
                if is_aligned:
                    aligned.add((name, place))
            types[name] = tuple(kinds)
            continue
        of_alignment = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        kind, is_aligned = (
            (None, False) if parameter.is_constexpr else _kind(value, ones=not parameter.do_not_specialize)
        )
        if kind is None:
            constants[name] = value
            continue
        types[name] = kind
        if is_aligned and of_alignment:
            aligned.add(name)
    options = tuple((name, launch.arguments[name]) for name in OPTIONS if name in launch.arguments)
    return Variant(launch.kernel, tuple(constants.items()), tuple(types.items()), frozenset(aligned), options)


def _kind(value: Any, *, ones: bool = True) -> tuple[str | None, bool]:
    """Triton's name of an argument's type, None where it is compiled in, as with `ones` a 1 is; and whether it is a
    multiple of `ALIGNMENT`."""
    if value is None:
        return None, False
    if isinstance(value, DescriptorNote):
        return f"tensordesc<{TYPES[value.dtype]}{list(value.block_shape)}>", False
    if isinstance(value, TensorNote):
        # The storage is aligned where it begins, as all memory that torch allocates.
        return "*" + TYPES[value.dtype], value.offset % ALIGNMENT == 0
    if isinstance(value, float):
        return "fp32", False
    return (None, False) if value == 1 and ones else ("i32", value % ALIGNMENT == 0)
