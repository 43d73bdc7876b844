"""The table of configurations, by device generation and element size.

That of sm_90 for half types was measured on a card, with kernels of which the forward ones still held both products.
Each of the others was chosen on the compiler's report (`gist_fast.kernels.compile_report`, ``gist-fast kernels``): no
spills with the oldest and the newest Triton, operands that fit the shared memory, matrix instructions, and among those,
of whole tiles first, the one that lets most programs run on a multiprocessor. `benchmarks/gpu.sh` measures;
`gist_fast.kernels.tuning` tries its `candidates` on the card at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from gist_fast.kernels.layout import TILE

Generation = Literal["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942"]


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@dataclass(frozen=True)
class Launch:
    """How a kernel of square tiles is compiled."""

    block_k: int
    """Columns of the operands that one step multiplies; operands are filled up to a multiple of it."""
    warps: int
    stages: int
    group: int = 8
    """Tile rows of a band, whose programs run next to each other and share operands in L2."""
    columns: int = 128
    """Columns of a tile that a program takes; the rows it takes all."""
    descriptors: bool = False
    """Whether operands are loaded by tensor descriptors."""

    def __post_init__(self) -> None:
        if not (_is_power_of_two(self.block_k) and 16 <= self.block_k <= 128):
            raise ValueError(f"block_k: expected a power of two from 16 to 128, got {self.block_k}.")
        if self.warps not in (2, 4, 8, 16):
            raise ValueError(f"warps: expected 2, 4, 8 or 16, got {self.warps}.")
        if not (1 <= self.stages <= 6 and self.group >= 1):
            raise ValueError(f"stages, group: expected 1 to 6, and 1 or more; got {self.stages} and {self.group}.")
        if self.columns not in (64, 128):
            raise ValueError(f"columns: expected 64 or 128, got {self.columns}.")

    @property
    def shares(self) -> int:
        """Programs that share a tile."""
        return TILE // self.columns


@dataclass(frozen=True)
class Config:
    """All launches of a generation for one size of element. `*_symmetric` are those of symmetric rectangles."""

    forward: Launch
    forward_symmetric: Launch
    masks: Launch
    masks_symmetric: Launch
    dlogits: Launch
    dlogits_symmetric: Launch
    note: str
    """What it was chosen on."""

    def __post_init__(self) -> None:
        steps = {launch.block_k for launch in self.launches().values()}
        if len(steps) != 1:
            # One step to fill dims up to; and masks decided again must be summed in the same steps.
            raise ValueError(f"block_k: expected one for all launches of a configuration, got {sorted(steps)}.")

    def launches(self) -> dict[str, Launch]:
        """The launches by name."""
        return {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Launch)}

    @property
    def block_k(self) -> int:
        return self.forward.block_k


HALF, SINGLE = 2, 4
"""Bytes of an element: of the larger one, where student and guide differ."""


def _wide(block_k: int, warps: int, stages: int, note: str, **others: Launch) -> Config:
    """A configuration of one launch for all kernels but those named."""
    names = ("forward", "forward_symmetric", "masks", "masks_symmetric", "dlogits", "dlogits_symmetric")
    launches = {name: Launch(block_k, warps, stages) for name in names}
    return Config(**{**launches, **others}, note=note)


TABLE: dict[tuple[Generation, int], Config] = {
    # Symmetric scores hold a maximum and a sum along both sides: with 4 warps that takes all 255 registers and spills
    # nothing, and two programs fit. Whole tiles of dlogits of both sides spill up to 328 bytes with 4 warps.
    ("sm_90", HALF): _wide(
        64, 4, 3,
        dlogits_symmetric=Launch(64, 4, 3, columns=64),
        note="Measured on an H200, when forward kernels held the guide's product too; B 32,768, G 1024, D 384 and "
        "1024, ms: 4 warps and 3 stages for forward (5.1, 7.2), forward_symmetric (6.0, 8.6) and dlogits (2.2, 4.2), "
        "128 x 64 for dlogits_symmetric (3.0, 5.9). Lost: 8 warps for forward (6.8, 9.3) and forward_symmetric (9.1, "
        "12.0); 2 stages for them (5.8, 8.4; 6.9, 9.7) and for dlogits (2.3, 5.2); 128 x 64 for dlogits (2.5, 5.1); "
        "128 x 128 with 8 warps for dlogits_symmetric (3.7, 6.6). Bands of 4 and 16 tile rows: no difference beyond "
        "noise. The kernels as they are, with one product each: compiled, no spills, not yet measured.",
    ),
    ("sm_90", SINGLE): _wide(
        16, 8, 4,
        note="Compiler's report, TF32 and IEEE alike: no spills. Not yet measured on a GPU.",
    ),
    ("sm_80", HALF): _wide(
        32, 8, 4,
        forward=Launch(32, 4, 4),
        note="Compiler's report: no spills; 2 programs a multiprocessor in plain rectangles, 1 in symmetric ones. "
        "Lost: 8 warps for forward (1 program in half of the variants); 4 warps for forward_symmetric (up to 448 bytes "
        "spilled) and dlogits_symmetric (up to 488). Not yet measured on a GPU.",
    ),
    ("sm_80", SINGLE): _wide(
        16, 8, 3,
        forward_symmetric=Launch(16, 8, 2),
        dlogits=Launch(16, 4, 3, columns=64),
        note="Compiler's report, TF32 and IEEE alike: no spills. Lost for dlogits: 128 x 128 (8 bytes, with 3 and 4 "
        "stages in TF32 products, with 2 in those of a bf16 student beside a float32 guide); 128 x 64 with 8 warps (8 "
        "on sm_86 and sm_89 with Triton 3.6). Not yet measured on a GPU.",
    ),
    ("sm_100", HALF): _wide(
        64, 8, 3,
        dlogits_symmetric=Launch(64, 8, 3, columns=64),
        note="Compiler's report: no spills, products stand in tensor memory, 2 programs a multiprocessor but for the "
        "symmetric forward pass and masks. Lost: 128 x 128 for dlogits_symmetric (16 bytes spilled with weights of "
        "mixed signs and Triton 3.6); 16 warps (no matrix instructions at all). Not yet measured on a GPU.",
    ),
    ("sm_100", SINGLE): _wide(
        16, 8, 3,
        masks_symmetric=Launch(16, 8, 2),
        dlogits=Launch(16, 8, 2),
        dlogits_symmetric=Launch(16, 8, 3, columns=64),
        note="Compiler's report, TF32 and IEEE alike: no spills. Lost, by weights of mixed signs and with Triton 3.6: "
        "3 and 4 stages of dlogits (16 bytes in IEEE products), 128 x 128 for dlogits_symmetric (8 in TF32 products). "
        "Not yet measured on a GPU.",
    ),
    ("gfx942", HALF): _wide(
        32, 8, 2,
        note="Compiler's report: no spills, 1 to 3 programs a compute unit. Not yet measured on a GPU.",
    ),
    ("gfx942", SINGLE): _wide(
        16, 8, 2,
        note="Compiler's report: no spills; float32 has matrix instructions of its own here; steps of 16 leave room "
        "for twice the programs of 32. Not yet measured on a GPU.",
    ),
}  # fmt: skip
for _size in (HALF, SINGLE):
    TABLE["sm_86", _size] = TABLE["sm_89", _size] = TABLE["sm_80", _size]


def choose_config(generation: Generation, element_size: int) -> Config:
    """The configuration for a generation and bytes of an element."""
    return TABLE[generation, SINGLE if element_size > HALF else HALF]


def generation_of(major: int, minor: int) -> Generation:
    """The generation in the table whose configurations a CUDA device of that compute capability gets."""
    if major < 8:
        raise ValueError(f"compute capability: expected 8.0 or later, got {major}.{minor}.")
    if major == 8:
        return {0: "sm_80", 9: "sm_89"}.get(minor, "sm_86")
    # Consumer cards of the newer generations (12.x) have the shared memory and the matrix instructions of 8.9.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_89")


def notes(generation: Generation) -> dict[str, str]:
    """What the configurations of a generation were chosen on, by the size of an element."""
    return {f"{size} bytes": TABLE[generation, size].note for size in (HALF, SINGLE)}
