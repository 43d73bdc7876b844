"""What a tile of ``tiled`` costs on a CPU, and what else was tried: ``python -m benchmarks.tile_parts [--rounds N]``.

Its product at D = 384 by each way that torch has, and the rest of its work, forward and backward, as it is and under
``torch.compile`` (shapes dynamic, in one function each). All are timed in the same rounds of one process.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from benchmarks.machine import command, machine, measured_on, quartiles
from gist_fast.bench.results import WHOLE
from gist_fast.bench.timing import Call, Stopwatch, time_iterations
from gist_fast.functional.backends import cpu_products
from gist_fast.functional.backends.kept import MASKED
from gist_fast.functional.backends.tiled import TILE, _accumulate

WIDTH = 384


def forward(
    guide: Tensor, scores: Tensor, thresholds: Tensor, maximum: Tensor, total: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask, count, keep, and reduce into maximum and sum; for a compiler."""
    masked = guide > thresholds[:, None]
    logits = torch.where(masked, scores - MASKED, scores)
    kept.copy_(logits)
    risen = torch.maximum(maximum, logits.amax(1))
    return risen, total * torch.exp2(maximum - risen) + torch.exp2(logits - risen[:, None]).sum(1), masked.sum()


def backward(logits: Tensor, mirrored: Tensor, lse: Tensor) -> Tensor:
    """The gradient by the logits of both sides; for a compiler."""
    return torch.exp2(logits - lse[:, None]) + torch.exp2(mirrored - lse)


def calls() -> dict[str, Call]:
    """By name, what is timed."""
    generator = torch.Generator().manual_seed(0)
    a, b, guide, scores = (torch.randn(TILE, n, generator=generator) for n in (WIDTH, WIDTH, TILE, TILE))
    narrow = a.bfloat16(), b.bfloat16().T
    thresholds, maximum, total = torch.rand(TILE), torch.full((TILE,), -MASKED), torch.zeros(TILE)
    mask, kept, scratch, out = (torch.empty(TILE, TILE) for _ in range(4))
    lse = torch.full((TILE,), 5.0)

    def through_bfloat16() -> None:
        # A setting of the whole process, and so nothing that a loss may touch.
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        torch.mm(a, b.T, out=out)
        torch.backends.mkldnn.matmul.fp32_precision = "none"

    def forward_as_it_is() -> None:
        torch.gt(guide, thresholds[:, None], out=mask)
        mask.diagonal().fill_(0.0)
        mask.sum().to(torch.int64)
        mask.diagonal().fill_(1.0)
        torch.sub(scores, mask, alpha=MASKED, out=kept)
        _accumulate(maximum.clone(), total.clone(), kept, 1, scratch)

    def backward_as_it_is() -> None:
        torch.sub(scores, lse[:, None], out=out).exp2_()
        out.add_(torch.sub(guide, lse, out=scratch).exp2_())

    forward_compiled, backward_compiled = (torch.compile(f, dynamic=True) for f in (forward, backward))
    return {
        "product, float32, MKL": lambda: torch.mm(a, b.T, out=out),
        "product, float32, oneDNN": lambda: cpu_products._linear(a, b.T),
        "product, float32 operands that oneDNN rounds to bfloat16": through_bfloat16,
        "product, bfloat16, sums rounded to bfloat16": lambda: torch.mm(*narrow),
        "the rest, forward": forward_as_it_is,
        "the rest, forward, compiled": lambda: forward_compiled(guide, scores, thresholds, maximum, total, kept),
        "the rest, backward, both sides": backward_as_it_is,
        "the rest, backward, both sides, compiled": lambda: backward_compiled(scores, guide, lse),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101, help="counted rounds")
    rounds = parser.parse_args().rounds
    parts = calls()
    start = time.perf_counter()
    parts["the rest, forward, compiled"]()
    compiling = time.perf_counter() - start
    timed = time_iterations(
        {name: {WHOLE: call} for name, call in parts.items()}, stopwatch=Stopwatch(), most=rounds, least=rounds
    )
    times = {name: found.parts[WHOLE] for name, found in timed.items()}
    base = times["product, float32, MKL"]
    print(f"| a tile of {TILE} x {TILE}, D {WIDTH} | median | share of MKL's product |\n|---|---|---|")
    for name, found in times.items():
        low, middle, high = quartiles(found, base)
        print(f"| {name} | {found.median * 1e3:.2f} ms | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    print(f"\nThe first compilation took {compiling:.0f} s. Median (quartiles) of ratios within a round, of {rounds}.")
    print(measured_on(machine(), command("benchmarks.tile_parts")))


if __name__ == "__main__":
    main()
