"""The kinds of GPU that kernels are compiled for, present or not."""

from __future__ import annotations

from dataclasses import dataclass

from gist_fast.kernels.config import Generation
from triton.backends.compiler import GPUTarget


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
    shared_rate: int = 128
    """To or from shared memory, a clock: 32 banks of 4 bytes."""

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
        Target("sm_90", "H100 SXM", 132, 228 * KIB, 227 * KIB, 65536, 2048, "HGMMA", 989, 67, 3350, gigahertz=1.83),
        Target("sm_100", "B200", 148, 228 * KIB, 227 * KIB, 65536, 2048, r"UTC\w*MMA", 2250, 75, 8000, gigahertz=1.85),
        Target(
            "gfx942", "MI300X", 304, 64 * KIB, 64 * KIB, 4 * 512 * 64, 2048, "v_mfma_[a-z0-9_]+", 1307, 163.4, 5300,
            gigahertz=2.1, warp=64,
        ),
    )
}  # fmt: skip
