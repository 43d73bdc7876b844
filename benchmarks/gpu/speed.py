"""The Triton kernels at one large batch and several widths, as cases of `gist_fast.bench`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.gpu.bench import Bench
from gist_fast.bench.cases import Embeddings, LossCase
from gist_fast.bench.loss import LossSuite
from gist_fast.bench.peers import OURS, PEERS, Loss, Peer
from gist_fast.bench.peers import ours as ours_by
from gist_fast.bench.suite import Scope
from gist_fast.functional.backends import kernel_work

if TYPE_CHECKING:
    from torch import Tensor

SECONDS = {"speed": 35.0, "tuned": 28.0}
"""Of the parts' limits in gpu.sh, what timing may take; loading torch and compiling have the rest."""


def ours(mask_bits: str = "keep", held_bytes: int = kernel_work.HELD_BYTES) -> Callable[[LossCase], Loss]:
    """Our loss; with `held_bytes` 0 a guide's unit vectors are made chunk by chunk, as those of large batches are."""

    def make(case: LossCase) -> Loss:
        loss = ours_by(case, "triton", mask_bits=mask_bits)

        def computed(e: Embeddings) -> Tensor:
            kernel_work.HELD_BYTES = held_bytes  # for the backward pass that follows, too
            return loss(e)

        return computed

    return make


def _peer(name: str, make: Callable[[LossCase], Loss]) -> Peer:
    return Peer(name, lambda case: None, make)


KERNELS = (
    _peer(OURS, ours()),
    _peer("gist_fast recompute", ours("recompute")),
    _peer("gist_fast recompute, guide by chunks", ours("recompute", 0)),
)


class SpeedSuite(LossSuite):
    """Each width at the batch of the part."""

    def __init__(self, bench: Bench, peers: Mapping[str, Peer]) -> None:
        super().__init__(bench.part, "The kernels at one batch: embeddings to gradients")
        # In the interpreter there is nothing to measure in a process of its own.
        self._bench, self.peers, self.isolated = bench, peers, not bench.toy

    def cases(self, scope: Scope) -> Sequence[LossCase]:
        return [self._bench.case(self._bench.sizes["batch"], width) for width in self._bench.sizes["widths"]]

    def matmul_side(self, case: LossCase) -> int:
        return self._bench.sizes["matrix"]


def speed(bench: Bench) -> None:
    """Ours in three ways, and what a good engineer would write, by hand and by torch's compiler."""
    plain = ("plain",) if bench.toy else ("plain compiled", "plain")
    chosen = {peer.name: peer for peer in (*KERNELS, *(PEERS[name] for name in plain))}
    bench.measure([SpeedSuite(bench, chosen)], "bench-speed.json", SECONDS["speed"])


def tuned(bench: Bench) -> None:
    """Ours with tuned launches, one width at a time, and what was chosen; its result is held to the exact one."""
    from gist_fast.kernels import tuning

    from benchmarks.gpu.candidates import compile_candidates

    unfit = compile_candidates(bench.device, bench.dtype, toy=bench.toy)
    bench.write(do_not_fit=unfit)
    print(f"compiled what is tried; {len(unfit)} do not fit", flush=True)
    bench.measure(
        [SpeedSuite(bench, {OURS: KERNELS[0]})],
        "bench-tuned.json",
        SECONDS["tuned"],
        more=lambda: {"chosen": {key: str(replace(config, note="")) for key, config in tuning._known.items()}},
    )


def memory(bench: Bench) -> None:
    """What a step adds to the embeddings at its peak, their gradients included, and what it is held to."""
    from gist_fast.runtime.memory import peak_memory

    case = bench.case(bench.sizes["largest"], bench.sizes["widths"][0])
    bench.write(batch=case.rows, width=case.width)
    for bits, most in (("keep", 8 * 10**9), ("recompute", 10**9)):
        e, loss, values = case.embeddings(), ours(bits)(case), []

        def step(e: Embeddings = e, loss: Loss = loss, values: list[float] = values) -> None:
            value = loss(e)
            value.backward()
            values.append(value.item())

        if bench.toy:
            step()
        else:
            found = {"forward_bytes": peak_memory(partial(loss, e), "cuda"), "bytes": peak_memory(step, "cuda")}
            found["as_promised"] = found["bytes"] < most
            bench.write(**{f"{bits}_{name}": value for name, value in found.items()})
        bench.write(**{f"{bits}_loss": values[0]})
        print(bench.result)
