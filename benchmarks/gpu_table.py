"""What a card measured, as ``docs/kernels.md`` shows it: ``python -m benchmarks.gpu_table``.

Reads what ``benchmarks/gpu.sh`` left in ``benchmarks/results/<device>/`` and writes the tables into the document.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import spread
from benchmarks.loss_cpu import RESULTS
from benchmarks.marks import put
from gist_fast.bench.results import Results, Row, read
from gist_fast.bench.tables import markdown
from gist_fast.bench.timing import Ratio

DOCS = Path(__file__).parent.parent / "docs" / "kernels.md"
FOLDER = RESULTS / "nvidia-h200"
STEP = "the whole step"
SHARE = ", share of the library's rate at that shape"


def tables(parts: Mapping[str, Any], speed: Results, loss: Results) -> dict[str, str]:
    """By the names of their marks.

    Args:
        parts: ``results.json``.
        speed: ``bench-speed.json``, one batch.
        loss: ``bench.json``, batches of several sizes.
    """
    about = parts["environment"]
    machine = (
        f"{about['gpu']}, torch {about['torch']}, Triton {about['triton']}; a bf16 product of 8192 x 8192 x 8192 "
        f"runs at {about['matmul_tflops']:.0f} TFLOP/s there."
    )
    return {
        "measured kernels": f"{_kernels(parts['kernels'])}\n\n{machine}",
        "measured steps": _steps(speed),
        "measured sizes": _sizes(loss),
        "measured shapes": _shapes(parts["shapes"]),
    }


def _kernels(found: Mapping[str, Any]) -> str:
    steps = {name: table for name, table in found.items() if STEP in table}
    names = list(dict.fromkeys(kernel for table in steps.values() for kernel in table if kernel != STEP))
    rows = [[name, *(_kernel(table.get(name)) for table in steps.values())] for name in [*names, STEP]]
    share = any("share" in row for table in steps.values() for row in table.values())
    return markdown([f"ms (TFLOP/s executed{SHARE * share})", *steps], rows)


def _kernel(row: Mapping[str, float] | None) -> str:
    if row is None:
        return ""
    share = f", {row['share']:.0%}" if "share" in row else ""
    rate = f" ({row['flops'] / row['seconds'] / 1e12:.0f}{share})" if row.get("flops") else ""
    return f"{1e3 * row['seconds']:.2f}{rate}"


def _steps(speed: Results) -> str:
    rows = []
    for row in speed.rows:
        share = "{:.0%} ({:.0%} to {:.0%})".format(*(row.share[name] for name in ("median", "low", "high")))  # type: ignore[index]
        ratio = str(Ratio(**row.ratio)) if row.ratio else ""
        passes = [spread(row.seconds[part]) for part in ("forward", "backward")]
        rows.append([row.what, str(row.case["width"]), *passes, share, ratio, f"{row.memory / 1e9:.2f} GB"])  # type: ignore[operator]
    heads = ["", "D", "forward, ms", "backward, ms", "share of the product's rate", "time to ours", "memory"]
    return markdown(heads, rows)


def _sizes(loss: Results) -> str:
    sizes = sorted({row.size for row in loss.rows if row.suite == "loss"})
    names = dict.fromkeys(row.what for row in loss.rows if row.suite == "loss" and row.seconds)
    rows = [[name, *(_size(loss.rows, name, size) for size in sizes)] for name in names]
    return markdown(["forward and backward, ms", *(f"B {size:,}" for size in sizes)], rows)


def _size(rows: list[Row], name: str, size: int) -> str:
    (row,) = [row for row in rows if (row.suite, row.what, row.size) == ("loss", name, size)]
    return f"{1e3 * statistics.median(row.seconds['both']):.2f}" if "both" in row.seconds else row.outcome


def _shapes(found: Mapping[str, Any]) -> str:
    # "D 384 masks (128, 128, 4, 3) pointers"
    rates: dict[str, dict[str, list[str]]] = {}
    for name, rate in found["tflops"].items():
        kernel, rest = name.split(" (")
        shape, _ = rest.split(") ")
        rates.setdefault(shape, {}).setdefault(kernel, []).append(f"{rate:.0f}")
    kernels = next(iter(rates.values()))
    rows = [[shape, *(", ".join(both) for both in of_shape.values())] for shape, of_shape in rates.items()]
    return markdown(["rows, columns, warps, stages", *kernels], rows)


def written(text: str, folder: Path = FOLDER) -> str:
    """The document with its tables as the results have them."""
    parts = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return put(text, tables(parts, read(folder / "bench-speed.json"), read(folder / "bench.json")))


if __name__ == "__main__":
    DOCS.write_text(written(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{DOCS.name}: written")
