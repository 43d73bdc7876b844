"""Small batches on a CPU against ten lines of torch: ``python -m benchmarks.small_batches [--rounds N] [--keep]``.

Forward and backward at D = G = 384 in float32, a guide, all blocks: ours as ``auto`` takes it, ours as ``tiled``, and
the plain version, checked against float64 and timed in the same rounds of one process. ``--keep`` stores the results
under ``benchmarks/results/<device>/small_batches.json``, and puts their table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.loss_cpu import RESULTS, seconds
from benchmarks.machine import command, machine, measured_on, quartiles
from benchmarks.marks import put
from gist_fast.bench.cases import LossCase
from gist_fast.bench.peers import OURS

SIZES = (16, 32, 64, 128, 256, 512, 1024)
TILED, PLAIN = "tiled", "plain"
NAME = "small_batches.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def measure(rows: int, rounds: int) -> dict:
    """Ratios within a round: of the plain version's time, and that of tiles, to ours."""
    case = LossCase(rows)
    times = seconds({OURS: (case, OURS), TILED: (case, "gist_fast tiled"), PLAIN: (case, PLAIN)}, rounds)
    return {
        "rows": rows,
        "rounds": rounds,
        "seconds": {name: found.median for name, found in times.items()},
        "speedup": quartiles(times[PLAIN], times[OURS]),
        "speedup_tiled": quartiles(times[PLAIN], times[TILED]),
    }


def table(results: dict) -> str:
    """Speed against the plain version by batch size."""
    ratio = "{1:.2f}x ({0:.2f} to {2:.2f})".format
    rows = [
        f"| {found['rows']:,} | {found['seconds'][OURS] * 1e3:.2f} ms | {ratio(*found['speedup'])} "
        f"| {ratio(*found['speedup_tiled'])} |"
        for found in results["sizes"]
    ]
    return "\n".join(
        [
            "| B | ours | against plain | `tiled` against plain |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Median (quartiles) of ratios within a round, of {' or '.join(_rounds(results))} rounds. "
            + measured_on(results["machine"], results["command"]),
        ]
    )


def _rounds(results: dict) -> list[str]:
    return [str(rounds) for rounds in sorted({found["rounds"] for found in results["sizes"]})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=201, help="counted rounds; a tenth of them from B 256 on")
    parser.add_argument("--keep", action="store_true", help="store the results, in the place of earlier ones")
    arguments = parser.parse_args()
    results: dict = {"command": command("benchmarks.small_batches"), "machine": machine(), "sizes": []}
    for rows in SIZES:
        print(f"B {rows} ...", file=sys.stderr)
        results["sizes"].append(measure(rows, arguments.rounds if rows < 256 else max(3, arguments.rounds // 10)))
    if arguments.keep:
        path = RESULTS / f"cpu-{torch.get_num_threads()}-threads" / NAME
        path.write_text(json.dumps(results, indent=2) + "\n")
        DOCUMENT.write_text(put(DOCUMENT.read_text(), {"small batches": table(results)}))
    print(table(results))


if __name__ == "__main__":
    main()
