"""Every launch of a step timed by itself, and the rate at which it multiplies: ``python -m benchmarks.gpu kernels``.

Device events stand before and after each launch and each product of the library. What a launch multiplies is counted
from its own arguments, so that both show: which kernel takes the time, and how far it is from the rate of the library's
product of the same shape, whose factors and result are of the embeddings' type.

Which kernels there are is seen, not listed.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from gist_fast.kernels.chunks import FIELDS
from gist_fast.kernels.launch import LIBRARY, around_launches
from gist_fast.kernels.layout import TILE
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.speed import ours
from gist_fast.bench.cases import LossCase
from gist_fast.bench.results import WHOLE
from gist_fast.bench.timing import Stopwatch, time_iterations

ROUNDS = 3
STEP = "the whole step"
SYMMETRIC, TRANSPOSED = ", symmetric", ", transposed"
"""How the names of launches end for symmetric rectangles, and for products by the transpose of dlogits."""


class Product(NamedTuple):
    """``[rows, depth]`` times ``[depth, columns]``."""

    rows: int
    depth: int
    columns: int
    left_transposed: bool = False
    """Whether the left factor is the transpose of what stands in memory."""
    right_transposed: bool = True

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.depth * self.columns

    def __str__(self) -> str:
        left, right = ("^T" * transposed for transposed in (self.left_transposed, self.right_transposed))
        return f"[{self.rows}, {self.depth}]{left} x [{self.depth}, {self.columns}]{right}"


@dataclass
class Work:
    """What all launches of one name did in a step."""

    seconds: float = 0.0
    launches: int = 0
    products: Counter[Product] = field(default_factory=Counter)
    """FLOPs executed, what lies outside of the matrix in its last tiles included, by the product they are part of."""
    events: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def flops(self) -> float:
        return float(sum(self.products.values()))


def products_of(arguments: Mapping[str, Any]) -> Counter[Product]:
    """What a launch of tiles multiplies, in FLOPs, by the chunks that it covers; nothing where it multiplies nothing.

    Args:
        arguments: by name, as `gist_fast.kernels.launch.start` takes them.
    """
    found: Counter[Product] = Counter()
    if "BLOCK_K" not in arguments:
        return found
    depth = arguments["dim"]
    for row_tiles, column_tiles, triangle in _shapes(arguments["table"], arguments["start"], arguments["chunks"]):
        count = row_tiles * (row_tiles + 1) // 2 if triangle else row_tiles * column_tiles
        found[Product(row_tiles * TILE, depth, column_tiles * TILE)] += 2.0 * count * TILE * TILE * depth
    return found


def _shapes(table: torch.Tensor, start: int, chunks: int) -> list[tuple[int, int, int]]:
    """Rows and columns of the chunks of a launch, in tiles, and whether each is on the diagonal. Waits for a device."""
    rows = table[start : start + chunks * len(FIELDS)].view(chunks, -1).tolist()
    places = [FIELDS.index(name) for name in ("row_tiles", "column_tiles", "triangle")]
    return [(row[places[0]], row[places[1]], row[places[2]]) for row in rows]


def flops_of(arguments: Mapping[str, Any]) -> float:
    """What a launch of tiles multiplies in all."""
    return float(sum(products_of(arguments).values()))


@contextlib.contextmanager
def timed_launches(on_a_card: bool) -> Iterator[dict[str, Work]]:
    """Time the launches of a block of code, by the kernel's name. Seconds are there when it ends."""
    found: dict[str, Work] = defaultdict(Work)

    def timed(name: str, products: Counter[Product], run: Callable[[], object]) -> None:
        work = found[name]
        work.launches += 1
        work.products += products
        if not on_a_card:
            begun = time.perf_counter()
            run()
            work.seconds += time.perf_counter() - begun
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        work.events.append((begin, end))

    def around(name: str, arguments: dict[str, Any], run: Callable[[], object]) -> None:
        if name == LIBRARY:
            a, b = arguments["a"], arguments["b"]
            product = Product(*a.shape, b.shape[1], *(x.stride(0) < x.stride(1) for x in (a, b)))
            timed(name + TRANSPOSED * product.left_transposed, Counter({product: product.flops}), run)
            return
        name = name.removesuffix("_kernel") + SYMMETRIC * bool(arguments.get("SYMMETRIC"))
        timed(name, products_of(arguments), run)

    with around_launches(around):
        yield found
    if on_a_card:
        torch.cuda.synchronize()
        for work in found.values():
            work.seconds = sum(begin.elapsed_time(end) for begin, end in work.events) / 1e3


def ways_to_add(step: Callable[[], object]) -> list[str]:
    """The operations of torch by which the library's products of a step are multiplied and added."""
    seen: dict[str, None] = {}

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # Making another type of it is a view to torch, if it is that type already.
            if not func.is_view or func.overloadpacket is torch.ops.aten.to:
                seen[str(func)] = None
            return func(*args, **(kwargs or {}))

    def around(name: str, arguments: dict[str, Any], run: Callable[[], object]) -> None:
        # A mode is on in one thread alone, and the backward pass has its own.
        with Seen() if name == LIBRARY else contextlib.nullcontext():
            run()

    with around_launches(around):
        step()
    return list(seen)


def library_seconds(products: Iterable[Product], bench: Bench) -> dict[Product, float]:
    """Of torch's own products of those shapes, one by one; medians."""
    stopwatch, found = Stopwatch(bench.device.type), {}

    def factor(rows: int, columns: int, transposed: bool) -> torch.Tensor:
        made = torch.randn((columns, rows) if transposed else (rows, columns), device=bench.device, dtype=bench.dtype)
        return made.T if transposed else made

    for product in products:
        a = factor(product.rows, product.depth, product.left_transposed)
        b = factor(product.depth, product.columns, product.right_transposed)
        out = a.new_empty(product.rows, product.columns)
        parts = {WHOLE: functools.partial(torch.mm, a, b, out=out)}
        found[product] = time_iterations({WHOLE: parts}, stopwatch=stopwatch, most=5)[WHOLE].parts[WHOLE].median
    return found


def time_launches(bench: Bench, case: LossCase, mask_bits: str) -> dict[str, dict[str, float]]:
    """Medians over a few steps of what each kernel took, beside the whole step without the events between; and of the
    library's products of the same shapes."""
    e, loss = case.embeddings(), ours(mask_bits)(case)

    def step() -> None:
        e.anchors.grad = e.positives.grad = None
        loss(e).backward()

    step()
    bench.write(adds=ways_to_add(step))
    rounds: list[dict[str, Work]] = []
    for _ in range(ROUNDS):
        with timed_launches(not bench.toy) as found:
            step()
        rounds.append(found)
    names = rounds[0]
    products = {name: work.products for name, work in names.items()}
    alone = library_seconds(sorted({product for of_one in products.values() for product in of_one}), bench)
    rates = {str(product): product.flops / seconds / 1e12 for product, seconds in alone.items()}
    bench.write(library={**bench.result.get("library", {}), **rates})
    table = {}
    for name, work in names.items():
        seconds, flops = statistics.median(one[name].seconds for one in rounds), products[name]
        table[name] = {"seconds": seconds, "launches": work.launches, "flops": float(sum(flops.values()))}
        if flops:
            table[name]["share"] = sum(alone[one] * count / one.flops for one, count in flops.items()) / seconds
    if not bench.toy:
        from triton.testing import do_bench

        whole = do_bench(step, warmup=1, rep=100, return_mode="median") / 1e3
        table[STEP] = {key: sum(row[key] for row in table.values()) for key in ("seconds", "launches", "flops")}
        table[STEP]["seconds"] = whole
    return table


def _show(table: dict[str, dict[str, float]]) -> None:
    for name, row in table.items():
        rate = f"{row['flops'] / row['seconds'] / 1e12:8.0f} TFLOP/s" if row["flops"] else ""
        share = f", {row['share']:.0%} of the library's" if "share" in row else ""
        print(f"{name:36}{row['launches']:8}{1e3 * row['seconds']:10.2f} ms{rate}{share}", flush=True)


def kernels(bench: Bench) -> None:
    """The kernels of a large batch, one by one, at a narrow and a wide dim; and products of the library alone."""
    widths = bench.sizes["widths"]
    for width in dict.fromkeys((widths[0], widths[-1])):
        case = bench.case(bench.sizes["batch"], width)
        for mask_bits in ("keep", "recompute"):
            table = time_launches(bench, case, mask_bits)
            bench.write(**{f"D {width}, {mask_bits}": table})
            print(f"\nB {case.rows}, D {width}, G {case.guide_width}, {mask_bits}")
            _show(table)
    alone = (f"{name}: {rate:.0f} TFLOP/s" for name, rate in bench.result["library"].items())
    print("\nThe library alone:", *alone, sep="\n")
    print(f"Its products are added by {', '.join(bench.result['adds'])}.")
