"""What one step of the guided loss takes on each of many devices, by formula: memory, traffic, arithmetic.

``python -m benchmarks.scaling`` prints the table of docs/many-devices.md, which derives the formulas. Nothing here is
measured. The encoders, the gradients of the student's weights and their reduction are not part of it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

GB = 1e9
PEAK_FLOPS = 989e12
"""H100 SXM, bf16, dense: the vendor's figure."""
PEAK_SHARE = 0.6
NVLINK = 450e9
"""Bytes a second that an H100 SXM sends over NVLink 4 (and receives as many)."""
NETWORK = 50e9
"""Bytes a second of the one 400 Gbit/s adapter for each device."""
DEVICES_A_NODE = 8
STAGING = 128 * 2**20
"""Bytes of the backward pass's chunk of dlogits (docs/kernels.md)."""


TILE = 128
"""Rows and columns of a tile of pairs (docs/kernels.md)."""


@dataclass(frozen=True)
class Setup:
    """A step of pairs (anchor, positive), both contrasts on, candidates gathered from all devices."""

    rows: int = 2**20
    """N: of the joined batch."""
    devices: int = 64
    """W"""
    student_width: int = 768
    """D"""
    guide_width: int = 1024
    """G"""
    element: int = 2
    """Bytes of a number of an embedding, student's and guide's."""

    @property
    def own_rows(self) -> int:
        """n: of one device."""
        if self.rows % self.devices:
            raise ValueError(f"rows: {self.rows} do not divide over {self.devices} devices.")
        return self.rows // self.devices


def flops(s: Setup) -> float:
    """Of one device, forward and backward: ``n N (16 D + 4 G)``.

    In units of ``2 n N``: forward, one for ap and one for pp with the aa that its symmetry pays for, each ``D + G``
    wide; backward, three products ``D`` wide (score, row gradient, column gradient) for each of the two.
    """
    return 2.0 * s.own_rows * s.rows * (2 * (s.student_width + s.guide_width) + 6 * s.student_width)


def mask_bytes(s: Setup) -> float:
    """One bit for each pair of ap ``[n, N]``, pp ``[n, N]`` and aa ``[n, n]``; each of the two symmetric squares has a
    column of tiles more."""
    return s.own_rows * (2 * s.rows + s.own_rows + 2 * TILE) / 8


def gathered_bytes(s: Setup) -> tuple[float, float]:
    """The positives of all devices, student's and guide's, on one device."""
    return float(s.rows * s.student_width * s.element), float(s.rows * s.guide_width * s.element)


def forward_bytes(s: Setup) -> float:
    """Held at once: gathered candidates, unit operands of both models beside them, own anchors likewise, mask bits."""
    both = s.student_width + s.guide_width
    return 2.0 * (s.rows + s.own_rows) * both * s.element + mask_bytes(s)


def backward_bytes(s: Setup) -> float:
    """Held at once: gathered student candidates, operands, their gradients in float32 and in the embeddings' type, mask
    bits, the chunk of dlogits. The guide's are gone by then, since the bits have decided."""
    return (s.rows + s.own_rows) * s.student_width * (3 * s.element + 4.0) + mask_bytes(s) + STAGING


def received_bytes(s: Setup) -> tuple[float, float]:
    """Bytes that one device receives (and sends): all-gather of both models, reduce-scatter of float32 gradients."""
    share = (s.devices - 1) / s.devices
    return sum(gathered_bytes(s)) * share, s.rows * s.student_width * 4 * share


def link_seconds(s: Setup, received: float) -> float:
    """A ring collective's time by bandwidth alone: the slower of NVLink, which carries all that a device receives, and
    the network, where a node's adapters share what comes from other nodes."""
    within = received / NVLINK
    if s.devices <= DEVICES_A_NODE:
        return within
    total = received * s.devices / (s.devices - 1)
    return max(within, total * (1 - DEVICES_A_NODE / s.devices) / (DEVICES_A_NODE * NETWORK))


def table(rows: int = Setup.rows, devices: int = Setup.devices, widths: tuple[int, ...] = (384, 768, 1024)) -> str:
    """Markdown, a column for each student width."""
    setups = [Setup(rows, devices, student_width=width) for width in widths]
    lines = [
        ("gathered, student (GB)", [gathered_bytes(s)[0] / GB for s in setups]),
        ("gathered, guide (GB)", [gathered_bytes(s)[1] / GB for s in setups]),
        ("mask bits (GB)", [mask_bytes(s) / GB for s in setups]),
        ("held in the forward pass (GB)", [forward_bytes(s) / GB for s in setups]),
        ("held in the backward pass (GB)", [backward_bytes(s) / GB for s in setups]),
        ("all-gather, received (GB)", [received_bytes(s)[0] / GB for s in setups]),
        ("reduce-scatter, received (GB)", [received_bytes(s)[1] / GB for s in setups]),
        ("both on the links (s)", [sum(link_seconds(s, b) for b in received_bytes(s)) for s in setups]),
        ("loss, forward and backward (TFLOP)", [flops(s) / 1e12 for s in setups]),
        (f"at {PEAK_SHARE:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s (s)",
         [flops(s) / (PEAK_FLOPS * PEAK_SHARE) for s in setups]),
    ]  # fmt: skip
    own = setups[0]
    head = f"| {own.rows:,} rows on {own.devices} devices ({own.own_rows:,} each), G = {own.guide_width} |"
    out = [head + "".join(f" D = {width} |" for width in widths), "|---|" + "---|" * len(widths)]
    for name, values in lines:
        shown = [f"{v:.3f}" if v < 1 else f"{v:.2f}" if v < 100 else f"{v:.0f}" for v in values]
        out.append(f"| {name} |" + "".join(f" {v} |" for v in shown))
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=Setup.rows, help="of the joined batch")
    parser.add_argument("--devices", type=int, default=Setup.devices)
    options = parser.parse_args()
    print(table(options.rows, options.devices))


if __name__ == "__main__":
    main()
