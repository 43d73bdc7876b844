"""Large batches on a CPU against ten lines of torch: ``python -m benchmarks.large_batches [--rounds N] [--keep]``.

Forward and backward at D = G = 384, a guide, all blocks, in float32 and bfloat16: ours, ours with MKL's float32
products alone (`gist_fast.functional.backends.cpu_products`), the plain version, and that under ``torch.compile``. All
are checked against float64 and timed in the same rounds of one process. ``--keep`` stores the results under
``benchmarks/results/<device>/large_batches.json``, and puts their table into docs/benchmarks.md.

On a machine with other work run it under ``OMP_WAIT_POLICY=PASSIVE``: threads that wait and spin hold the core from the
one that they wait for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.loss_cpu import RESULTS, SUITE
from benchmarks.machine import command, machine, measured_on, quartiles
from benchmarks.marks import put
from gist_fast.bench.cases import LossCase
from gist_fast.bench.peers import OURS
from gist_fast.bench.timing import BOTH, Stopwatch, Timing, time_iterations
from gist_fast.functional.backends import cpu_products

SIZES = (1024, 4096, 8192)
DTYPES = ("float32", "bfloat16")
BY_MKL = "gist_fast by MKL"
NAMES = {BY_MKL: "by MKL's products", "plain": "plain", "plain compiled": "plain compiled"}
NAME = "large_batches.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"


@contextlib.contextmanager
def by_mkl() -> Iterator[None]:
    """All float32 products go through ``torch.mm``."""
    chosen = cpu_products.onednn_is_faster
    cpu_products.onednn_is_faster = lambda: False
    try:
        yield
    finally:
        cpu_products.onednn_is_faster = chosen


def _within(call: Callable[[], object]) -> None:
    with by_mkl():
        call()


def measure(rows: int, dtype: str, rounds: int) -> dict:
    """Ratios within a round: of others' times to ours."""
    case = LossCase(rows, dtype=dtype)
    torch._dynamo.reset()  # what another size compiled counts against the limit of compilations
    names = (OURS, *(name for name in NAMES if name != BY_MKL))
    for name in names:
        SUITE.check(case, name)
        SUITE.check_whole(case, name)
    calls = {name: SUITE.build(case, name) for name in names}
    with by_mkl():
        SUITE.check_whole(case, OURS)
    calls[BY_MKL] = {part: partial(_within, call) for part, call in SUITE.build(case, OURS).items()}
    timed = time_iterations(calls, stopwatch=Stopwatch(), most=rounds, least=rounds)
    times: dict[str, Timing] = {name: found.parts[BOTH] for name, found in timed.items()}
    return {
        "rows": rows,
        "dtype": dtype,
        "rounds": rounds,
        "seconds": {name: found.median for name, found in times.items()},
        "speedup": {name: quartiles(times[name], times[OURS]) for name in NAMES},
    }


def table(results: dict) -> str:
    """Ours against each of the others."""
    rows = [
        f"| {found['rows']:,} | {found['dtype']} | {found['seconds'][OURS] * 1e3:,.0f} ms | "
        + " | ".join("{1:.2f}x ({0:.2f} to {2:.2f})".format(*found["speedup"][name]) for name in NAMES)
        + " |"
        for found in results["sizes"]
    ]
    rounds = " or ".join(map(str, sorted({found["rounds"] for found in results["sizes"]})))
    return "\n".join(
        [
            f"| B | type | ours | {' | '.join(f'against {name}' for name in NAMES.values())} |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Median (quartiles) of ratios within a round, of {rounds} rounds. "
            + measured_on(results["machine"], results["command"]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds; half as many at B 8,192")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="batch sizes, with commas between them")
    parser.add_argument("--keep", action="store_true", help="store the results, in the place of earlier ones")
    arguments = parser.parse_args()
    results: dict = {"command": command("benchmarks.large_batches"), "machine": machine(), "sizes": []}
    for rows in map(int, arguments.sizes.split(",")):
        for dtype in DTYPES:
            print(f"B {rows} {dtype} ...", file=sys.stderr)
            rounds = arguments.rounds if rows < 8192 else max(3, arguments.rounds // 2)
            results["sizes"].append(measure(rows, dtype, rounds))
            print(results["sizes"][-1], file=sys.stderr)
    if arguments.keep:
        path = RESULTS / f"cpu-{torch.get_num_threads()}-threads" / NAME
        path.write_text(json.dumps(results, indent=2) + "\n")
        DOCUMENT.write_text(put(DOCUMENT.read_text(), {"large batches": table(results)}))
    print(table(results))


if __name__ == "__main__":
    main()
