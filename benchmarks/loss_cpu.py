"""The loss on a CPU against what others compute: ``python -m benchmarks.loss_cpu [--rounds N]``.

The cases are those of `gist_fast.bench`: each is checked against float64 before it is timed, competitors are timed in
the same rounds of one process, and every figure that is quoted is a ratio within a round. The table is printed.
``--keep`` stores the results too, under ``benchmarks/results/<device>/loss_cpu.json``, of which the README's table is
made; ``--table`` prints that one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.machine import command, machine, measured_on, quartiles, told
from gist_fast.bench.cases import LossCase, WrongResult
from gist_fast.bench.loss import LossSuite, matmul
from gist_fast.bench.peers import OURS
from gist_fast.bench.results import WHOLE
from gist_fast.bench.timing import BOTH, Stopwatch, Timing, time_iterations
from gist_fast.functional.backends.tiled import _cpu_has_bf16
from gist_fast.runtime.memory import peak_memory

RESULTS = Path(__file__).parent / "results"
SUITE = LossSuite()
DIMS = ((384, 192, 96, 48), (384, 256, 128, 64))
"""Matryoshka dims: halved, and as published models have them."""


def seconds(compared: dict[str, tuple[LossCase, str]], rounds: int, square: int = 0) -> dict[str, Timing]:
    """Forward and backward of each competitor on its case, checked before they are timed in the same rounds.

    Args:
        square: the side of a matrix product that is timed beside them, as ``sgemm``.
    """
    for case, name in compared.values():
        SUITE.check(case, name)
        SUITE.check_whole(case, name)
    calls = {label: SUITE.build(case, name) for label, (case, name) in compared.items()}
    if square:
        calls["sgemm"], _ = matmul(LossCase(square), square)
    timed = time_iterations(calls, stopwatch=Stopwatch(), most=rounds, least=rounds)
    return {label: found.parts[WHOLE if label == "sgemm" else BOTH] for label, found in timed.items()}


def peak(case: LossCase, name: str) -> int:
    """Bytes that forward and backward add to the inputs."""
    parts = SUITE.build(case, name)
    return peak_memory(lambda: [call() for call in parts.values()])


def against_plain(rounds: int) -> dict:
    """B 4096, float32: the plain version, and the share of the machine's own matrix product."""
    case, square = LossCase(4096), 2048
    times = seconds({"ours": (case, OURS), "plain": (case, "plain")}, rounds, square)
    work = 2 * square**3
    # Seconds per FLOP of the product over those of the loss, counted minimally.
    share = times["sgemm"].against(times["ours"]).scaled(case.flops() / work)
    return {
        "rows": case.rows,
        "seconds": times["ours"].median,
        "seconds_plain": times["plain"].median,
        "speedup": quartiles(times["plain"], times["ours"]),
        "share_of_sgemm": [share.low, share.median, share.high],
        "sgemm_gflops": work / times["sgemm"].median / 1e9,
    }


def against_sentence_transformers(rounds: int) -> dict:
    """B 512, float32: sentence-transformers' own loss."""
    case, theirs = LossCase(512), "st GISTEmbedLoss"
    # Memory first: what a call leaves with the allocator, the next one takes without asking for more.
    memory_ours, memory_theirs = peak(case, OURS), peak(case, theirs)
    times = seconds({"ours": (case, OURS), "theirs": (case, theirs)}, rounds)
    return {
        "rows": case.rows,
        "seconds": times["ours"].median,
        "seconds_theirs": times["theirs"].median,
        "speedup": quartiles(times["theirs"], times["ours"]),
        "memory": memory_ours,
        "memory_theirs": memory_theirs,
    }


def bfloat16(rounds: int) -> dict:
    """B 4096: bfloat16 embeddings against float32 ones."""
    times = seconds({dtype: (LossCase(4096, dtype=dtype), OURS) for dtype in ("bfloat16", "float32")}, rounds)
    speedup = quartiles(times["float32"], times["bfloat16"])
    return {"rows": 4096, "cpu_has_bfloat16": _cpu_has_bf16(), "speedup": speedup}


def matryoshka(rounds: int) -> list[dict]:
    """float32: four dims against the whole width alone, in a large batch and a small one; guided by embeddings of its
    own and by the student's, where one dim has no second product to share."""
    found = []
    for self_guided, rows in itertools.product((False, True), (4096, 1024)):
        case = LossCase(rows, guide="self" if self_guided else "model")
        every = {str(dims): (replace(case, matryoshka_dims=dims), OURS) for dims in ((), *DIMS)}
        times = seconds(every, rounds)
        for dims in DIMS:
            about = {"rows": rows, "self_guided": self_guided, "widths": list(dims)}
            found.append({**about, "cost": quartiles(times[str(dims)], times["()"])})
    return found


def memory() -> dict:
    """B 32,768, float32, forward and backward: what is added to the inputs."""
    peak(LossCase(512), OURS)  # thread pools and libraries come up before the count
    return {"rows": 32768, "memory": peak(LossCase(32768), OURS)}


def table(results: dict) -> str:
    """The README's table."""
    plain, st, bf16, mem = (results[k] for k in ("plain", "sentence_transformers", "bfloat16", "memory"))
    low, middle, high = plain["share_of_sgemm"]
    ours_mib, theirs_mib = st["memory"] / 2**20, st["memory_theirs"] / 2**20
    rows = [
        (f"against sentence-transformers' `GISTEmbedLoss`, B {st['rows']:,}", told(st["speedup"])),
        (f"memory there, B {st['rows']:,}", f"{ours_mib:,.0f} MiB, theirs {theirs_mib:,.0f} MiB"),
        (f"against plain normalise, matmul, mask, `cross_entropy`, B {plain['rows']:,}", told(plain["speedup"])),
        ("share of the machine's matrix-product rate, by minimal FLOPs", f"{middle:.2f} ({low:.2f} to {high:.2f})"),
        (f"bfloat16 embeddings against float32, B {bf16['rows']:,}", told(bf16["speedup"])),
        (f"memory above the inputs, B {mem['rows']:,}", f"{mem['memory'] / 2**30:.2f} GiB"),
        *(
            (
                f"cost of Matryoshka widths {nested['widths']} against 384 alone, B {nested['rows']:,}"
                + (", self-guided" if nested["self_guided"] else ""),
                told(nested["cost"]),
            )
            for nested in results["nested"]
        ),
    ]
    return "\n".join(
        [
            "| forward and backward, D = G = 384, all blocks | result |",
            "|---|---|",
            *(f"| {what} | {result} |" for what, result in rows),
            "",
            "Median (quartiles) of ratios within a round. "
            # A file that tells no command is one that benchmarks/cpu.sh wrote before they were recorded, by this one.
            + measured_on(results["machine"], results.get("command", "python -m benchmarks.loss_cpu")),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds of each comparison")
    parser.add_argument("--device", default=f"cpu-{torch.get_num_threads()}-threads", help="the results' folder")
    parser.add_argument("--keep", action="store_true", help="store the results, in the place of earlier ones")
    parser.add_argument("--table", action="store_true", help="only print the table of the stored results")
    arguments = parser.parse_args()
    path = RESULTS / arguments.device / "loss_cpu.json"
    if arguments.table:
        results = json.loads(path.read_text())
    else:
        results = {"command": command("benchmarks.loss_cpu"), "machine": machine()}
        for name, run in {
            "memory": memory,
            "sentence_transformers": partial(against_sentence_transformers, max(3, arguments.rounds // 3)),
            "plain": partial(against_plain, arguments.rounds),
            "bfloat16": partial(bfloat16, arguments.rounds),
            "nested": partial(matryoshka, arguments.rounds),
        }.items():
            print(f"{name} ...", file=sys.stderr)
            try:
                results[name] = run()
            except WrongResult as error:
                raise SystemExit(f"wrong before fast: {error}") from error
        if arguments.keep:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
