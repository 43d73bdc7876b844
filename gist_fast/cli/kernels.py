"""``gist-fast kernels``: what each kernel compiles to for a named GPU, present or not."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from gist_fast.cli.output import Json, note, only_results_on_stdout, print_json, print_table


def kernels(
    target: Annotated[
        str, typer.Option("--target", help="sm_80, sm_86, sm_89, sm_90, sm_100 or gfx942; no such GPU need be here.")
    ] = "sm_90",
    width: Annotated[int, typer.Option("--width", min=1, help="Student width that work is counted for.")] = 384,
    guide_width: Annotated[int, typer.Option("--guide-width", min=1, help="Guide width, likewise.")] = 1024,
    every: Annotated[
        bool, typer.Option("--every", help="All kernels of all of the loss's variants, and of a guide of another type.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile every shipped configuration for a GPU and show registers, spills, memory, matrix instructions, work."""
    from gist_fast.kernels.config import notes
    from gist_fast.runtime.errors import InputError

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET: expected it not to be set, got 1. What is interpreted is not compiled.")

    try:
        from gist_fast.kernels.targets import TARGETS
    except ImportError as error:
        raise InputError(f"kernels: Triton is needed and cannot be imported ({error}).") from error
    if target not in TARGETS:
        raise InputError(f"--target: expected one of {', '.join(TARGETS)}, got {target!r}.")

    from gist_fast.functional.backends.kernel_variants import report

    found = []
    with only_results_on_stdout():
        for compiled in report(target, dim=width, guide_dim=guide_width, every=every):
            found.append(compiled)
            note(f"compiled {compiled.kernel} ({compiled.element})")
    if as_json:
        print_json(
            {
                "target": target,
                "width": width,
                "guide_width": guide_width,
                "notes": notes(TARGETS[target].generation),
                "kernels": [compiled.as_dict() for compiled in found],
            }
        )
        return
    print_table(
        f"{target} ({TARGETS[target].card}), D {width}, G {guide_width}; compiled, not measured",
        (
            "kernel", "type", "warps", "regs", "spills", "shared", "progs", "matrix", "MFLOP", "KB", "L2 TB/s", "roof",
            "bound by",
        ),
        [
            (
                c.kernel, c.element, c.warps, c.registers, c.spills, c.shared, c.programs,
                sum(c.matrix_instructions.values()), f"{c.flops / 1e6:.1f}" if c.flops else "", f"{c.bytes / 1e3:.1f}",
                f"{c.l2_rate:.1f}" if c.flops else "", f"{c.roofline:.0%}", c.bound_by,
            )
            for c in found
        ],
    )  # fmt: skip
    names = sorted({name for c in found for name in c.matrix_instructions})
    print(f"matrix instructions: {', '.join(names)}; shared: bytes; KB: from memory a tile; roof: share of the matrix")
    print("rate that memory, shared memory and exponentials leave; L2: what is read from it at that pace, no bound.")
