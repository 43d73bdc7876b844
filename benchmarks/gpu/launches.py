"""Every launch of a step timed by itself, and the rate at which it multiplies: ``python -m benchmarks.gpu kernels``.

Device events stand before and after each launch and each product of the library. What a launch multiplies is counted
from its own arguments, so that both show: which kernel takes the time, and how far it is from the rate of a large
product.
"""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from gist_fast.kernels.launch import LIBRARY, around_launches
from gist_fast.kernels.layout import TILE

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.speed import ours
from gist_fast.bench.cases import LossCase

ROUNDS = 3
STEP = "the whole step"


@dataclass
class Work:
    """What all launches of one name did in a step."""

    seconds: float = 0.0
    launches: int = 0
    flops: float = 0.0
    """Executed, what lies outside of the matrix in its last tiles included."""
    events: list[tuple[Any, Any]] = field(default_factory=list)


def flops_of(arguments: dict[str, Any]) -> float:
    """What a launch of tiles multiplies.

    Args:
        arguments: by name, as `gist_fast.kernels.launch.start` takes them.
    """
    if "row_tiles" not in arguments:
        return 0.0
    row_tiles, column_tiles = arguments["row_tiles"], arguments["column_tiles"]
    count = row_tiles * column_tiles
    if arguments.get("SYMMETRIC") and arguments["chunk_row"] == arguments["chunk_column"]:
        count = row_tiles * (row_tiles + 1) // 2
    student = arguments["dim"] if arguments.get("x") is not None else 0
    return 2.0 * count * TILE * TILE * ((student or 0) + (arguments.get("guide_dim") or 0))


@contextlib.contextmanager
def timed_launches(on_a_card: bool) -> Iterator[dict[str, Work]]:
    """Time the launches of a block of code, by the kernel's name. Seconds are there when it ends."""
    found: dict[str, Work] = defaultdict(Work)

    def timed(name: str, flops: float, run: Callable[[], object]) -> None:
        work = found[name]
        work.launches += 1
        work.flops += flops
        if not on_a_card:
            run()
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        work.events.append((begin, end))

    def around(name: str, arguments: dict[str, Any], run: Callable[[], object]) -> None:
        if name == LIBRARY:
            a, b = arguments["a"], arguments["b"]
            timed(name, 2.0 * a.shape[0] * a.shape[1] * b.shape[1], run)
            return
        name = name.removesuffix("_kernel") + (", symmetric" if arguments.get("SYMMETRIC") else "")
        timed(name, flops_of(arguments), run)

    with around_launches(around):
        yield found
    if on_a_card:
        torch.cuda.synchronize()
    for work in found.values():
        work.seconds = sum(begin.elapsed_time(end) for begin, end in work.events) / 1e3


def time_launches(bench: Bench, case: LossCase, mask_bits: str) -> dict[str, dict[str, float]]:
    """Medians over a few steps of what each kernel took, beside the whole step without the events between."""
    e, loss = case.embeddings(), ours(mask_bits)(case)

    def step() -> None:
        e.anchors.grad = e.positives.grad = None
        loss(e).backward()

    step()
    rounds: list[dict[str, Work]] = []
    for _ in range(ROUNDS):
        with timed_launches(not bench.toy) as found:
            step()
        rounds.append(found)
    table = {
        name: {
            "seconds": statistics.median(one[name].seconds for one in rounds),
            "launches": work.launches,
            "flops": work.flops,
        }
        for name, work in rounds[0].items()
    }
    if not bench.toy:
        from triton.testing import do_bench

        whole = do_bench(step, warmup=1, rep=100, return_mode="median") / 1e3
        table[STEP] = {"seconds": whole, "launches": sum(w.launches for w in rounds[0].values()), "flops": 0.0}
        table[STEP]["flops"] = sum(w.flops for w in rounds[0].values())
    return table


def _show(table: dict[str, dict[str, float]]) -> None:
    for name, row in table.items():
        rate = f"{row['flops'] / row['seconds'] / 1e12:8.0f} TFLOP/s" if row["seconds"] and row["flops"] else ""
        print(f"{name:28}{row['launches']:8}{1e3 * row['seconds']:10.2f} ms{rate}", flush=True)


def kernels(bench: Bench) -> None:
    """The kernels of a large batch, one by one, at a narrow and a wide dim."""
    widths = bench.sizes["widths"]
    for width in dict.fromkeys((widths[0], widths[-1])):
        case = bench.case(bench.sizes["batch"], width)
        for mask_bits in ("keep", "recompute"):
            table = time_launches(bench, case, mask_bits)
            bench.write(**{f"D {width}, {mask_bits}": table})
            print(f"\nB {case.rows}, D {width}, G {case.guide_width}, {mask_bits}")
            _show(table)
