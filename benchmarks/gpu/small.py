"""Small batches, which the host bounds: ``python -m benchmarks.gpu small``.

Of a step, forward and backward: how long the host takes to issue it, how long it takes until the device is done, and
how long the device takes where a CUDA graph replays it, so that the host does nothing between its launches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.speed import KERNELS
from gist_fast.bench.cases import LossCase
from gist_fast.bench.peers import OURS, PEERS, Peer

BATCHES, TOY_BATCHES = (256, 1024, 4096), (16,)
ROUNDS, TOY_ROUNDS = 50, 2
WARM_UP = 3


def small(bench: Bench) -> None:
    """Ours, the plain version and the compiled one at each batch."""
    peers = [KERNELS[0], PEERS["plain"], *(() if bench.toy else (PEERS["plain compiled"],))]
    steps: dict[str, dict[str, float | str]] = {}
    for rows in TOY_BATCHES if bench.toy else BATCHES:
        case = bench.case(rows, bench.sizes["widths"][0])
        for peer in peers:
            name = f"B {rows} {peer.name}"
            why = peer.obstacle(case)
            try:
                steps[name] = {"skipped": why} if why else time_step(peer, case, TOY_ROUNDS if bench.toy else ROUNDS)
            except Exception as error:
                # What one of them cannot do costs the others nothing; it stands in the results.
                steps[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            bench.write(width=case.width, guide=case.guide_width, steps=steps)
            print(name, steps[name], flush=True)
    if any("failed" in step for name, step in steps.items() if name.endswith(f" {OURS}")):
        raise SystemExit("ours failed")


def time_step(peer: Peer, case: LossCase, rounds: int) -> dict[str, float | str]:
    """Medians of seconds: ``host``, ``whole`` and, on a card, ``graph``, or ``no_graph`` with why there is none."""
    e, loss = case.embeddings(), peer.make(case)
    on_a_card = case.device.startswith("cuda")
    wait: Callable[[], object] = torch.cuda.synchronize if on_a_card else lambda: None

    def step() -> None:
        e.anchors.grad = e.positives.grad = None
        loss(e).backward()

    for _ in range(WARM_UP):
        step()
    host, whole = [], []
    for _ in range(rounds):
        wait()
        begin = time.perf_counter()
        step()
        host.append(time.perf_counter() - begin)
        wait()
        whole.append(time.perf_counter() - begin)
    found: dict[str, float | str] = {"host": statistics.median(host), "whole": statistics.median(whole)}
    if on_a_card:
        try:
            found["graph"] = graph_seconds(step, rounds)
        except Exception as error:
            found["no_graph"] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


def graph_seconds(step: Callable[[], object], rounds: int) -> float:
    """The median time of a replay, between device events."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    taken = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)
