"""The loss on a CPU against what others compute: ``python -m benchmarks.loss_cpu [--rounds N]``.

Each case is checked against float64 before it is timed. Competitors take turns in one process, and every figure that
is quoted is a ratio within a round. The table is printed; ``--keep`` stores the results too, under
``benchmarks/results/<device>/loss_cpu.json``, of which the README's table is made (``--table`` prints that one).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import gist_fast
from benchmarks.machine import command, machine, measured_on, told
from benchmarks.measure import alternate, peak_memory
from benchmarks.peers import TEMPERATURE, Embeddings, make_embeddings, plain_matmul, sentence_transformers_gist
from gist_fast.bench.cases import LossCase
from gist_fast.functional.backends.tiled import _cpu_has_bf16

RESULTS = Path(__file__).parent / "results"
WIDTH = 384
LADDERS = ((384, 192, 96, 48), (384, 256, 128, 64))
"""Widths of nested embeddings: halved, and as published models have them."""


def ours(e: Embeddings) -> torch.Tensor:
    return gist_fast.guided_contrastive_loss(*e, temperature=TEMPERATURE, backend="tiled")


def ladder(widths: tuple[int, ...] | None, self_guided: bool, e: Embeddings) -> torch.Tensor:
    """At nested widths, or at the whole one alone; guided by embeddings of its own, or by the student's."""
    if self_guided:
        e = Embeddings(e.anchors, e.positives, e.anchors, e.positives)
    return gist_fast.guided_contrastive_loss(*e, temperature=TEMPERATURE, backend="tiled", matryoshka_dims=widths)


def step(loss: Callable[[Embeddings], torch.Tensor], e: Embeddings) -> Callable[[], None]:
    """Forward and backward."""

    def run() -> None:
        e.anchors.grad = e.positives.grad = None
        loss(e).backward()

    return run


def minimal_flops(rows: int, width: int, guide_width: int) -> float:
    """2 (D + G) for the forward pass and 8 D for the backward pass, in units of 2 B^2."""
    return LossCase(rows, width, guide_width).flops()


def check(loss: Callable[[Embeddings], torch.Tensor], e: Embeddings, tolerance: float) -> None:
    """Raise unless loss and gradients are those of float64 on the same (rounded) values, masks decided there too."""
    exact = Embeddings(*(x.detach().double() for x in e))
    exact.anchors.requires_grad_(), exact.positives.requires_grad_()
    gist_fast.guided_contrastive_loss(*exact, temperature=TEMPERATURE, backend="reference").backward()
    step(loss, e)()
    for got, want in ((e.anchors.grad, exact.anchors.grad), (e.positives.grad, exact.positives.grad)):
        error = ((got.double() - want).norm() / want.norm()).item()
        if not error < tolerance:
            raise SystemExit(f"wrong before fast: a gradient's relative error is {error}, allowed {tolerance}")


def against_plain(rounds: int) -> dict:
    """B 4096, float32: the plain version, and the share of the machine's own matrix product."""
    rows = 4096
    e = make_embeddings(rows, WIDTH, WIDTH)
    check(ours, make_embeddings(1000, WIDTH, WIDTH), 1e-4)
    check(plain_matmul, make_embeddings(1000, WIDTH, WIDTH), 1e-4)
    square = torch.randn(2048, 2048)
    times = alternate(
        {"ours": step(ours, e), "plain": step(plain_matmul, e), "sgemm": partial(torch.mm, square, square)}, rounds
    )
    flops = minimal_flops(rows, WIDTH, WIDTH)
    # seconds per FLOP of the product over those of the loss, counted minimally
    low, middle, high = times["sgemm"].ratio_to(times["ours"])
    share = flops / (2 * 2048**3)
    return {
        "rows": rows,
        "seconds": times["ours"].median,
        "seconds_plain": times["plain"].median,
        "speedup": times["plain"].ratio_to(times["ours"]),
        "share_of_sgemm": [x * share for x in (low, middle, high)],
        "sgemm_gflops": 2 * 2048**3 / times["sgemm"].median / 1e9,
    }


def against_sentence_transformers(rounds: int) -> dict:
    """B 512, float32: sentence-transformers' own loss."""
    e = make_embeddings(512, WIDTH, WIDTH)
    theirs = sentence_transformers_gist()
    # Memory first: what a call leaves with the allocator, the next one takes without asking for more.
    memory_ours, memory_theirs = peak_memory(step(ours, e)), peak_memory(step(theirs, e))
    check(ours, e, 1e-4)
    check(theirs, e, 1e-4)
    times = alternate({"ours": step(ours, e), "theirs": step(theirs, e)}, rounds)
    return {
        "rows": 512,
        "seconds": times["ours"].median,
        "seconds_theirs": times["theirs"].median,
        "speedup": times["theirs"].ratio_to(times["ours"]),
        "memory": memory_ours,
        "memory_theirs": memory_theirs,
    }


def bfloat16(rounds: int) -> dict:
    """B 4096: bfloat16 embeddings against float32 ones."""
    narrow, wide = (make_embeddings(4096, WIDTH, WIDTH, dtype) for dtype in (torch.bfloat16, torch.float32))
    check(ours, make_embeddings(1000, WIDTH, WIDTH, torch.bfloat16), 2e-2)
    times = alternate({"bfloat16": step(ours, narrow), "float32": step(ours, wide)}, rounds)
    return {
        "rows": 4096,
        "cpu_has_bfloat16": _cpu_has_bf16(),
        "speedup": times["float32"].ratio_to(times["bfloat16"]),
    }


def nested_widths(rounds: int) -> list[dict]:
    """float32: four widths against the whole one alone, in a large batch and a small one; guided by embeddings of its
    own and by the student's, where one width has no second product to share."""
    few = make_embeddings(1000, WIDTH, WIDTH)
    found = []
    for self_guided in (False, True):
        for widths in LADDERS:
            check_ladder(widths, self_guided, few)
        for rows in (4096, 1024):
            e = make_embeddings(rows, WIDTH, WIDTH)
            steps = {str(w): step(partial(ladder, w, self_guided), e) for w in (None, *LADDERS)}
            times = alternate(steps, rounds)
            found += [
                {
                    "rows": rows, "self_guided": self_guided, "widths": list(widths),
                    "cost": times[str(widths)].ratio_to(times["None"]),
                }
                for widths in LADDERS
            ]  # fmt: skip
    return found


def check_ladder(widths: tuple[int, ...], self_guided: bool, e: Embeddings) -> None:
    """Raise unless the sum over the widths is that of separate losses whose guide is the same."""
    guide = (e.anchors.detach(), e.positives.detach()) if self_guided else e[2:]
    parts = [
        gist_fast.guided_contrastive_loss(e.anchors[:, :w], e.positives[:, :w], *guide, temperature=TEMPERATURE)
        for w in widths
    ]
    got, want = ladder(widths, self_guided, e).item(), sum(part.item() for part in parts)
    if not abs(got - want) < 1e-4 * want:
        raise SystemExit(f"wrong before fast: widths {widths} give {got}, one by one {want}")


def memory() -> dict:
    """B 32,768, float32, forward and backward: what is added to the inputs."""
    step(ours, make_embeddings(512, WIDTH, WIDTH))()  # thread pools and libraries come up before the count
    e = make_embeddings(32768, WIDTH, WIDTH)
    return {"rows": 32768, "memory": peak_memory(step(ours, e))}


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
            "nested": partial(nested_widths, arguments.rounds),
        }.items():
            print(f"{name} ...", file=sys.stderr)
            results[name] = run()
        if arguments.keep:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
