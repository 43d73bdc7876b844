"""Results as rows of text: for the terminal, for the page, for the README."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gist_fast.bench.growth import Power, Split
from gist_fast.bench.results import OK, UNSUPPORTED, Results, Row, ratio_of
from gist_fast.bench.run import ALREADY, SUITES
from gist_fast.bench.timing import log_quartiles
from gist_fast.runtime.environment import MEASURED

Cells = list[str]


def suite_table(results: Results, suite: str) -> tuple[list[str], list[Cells]]:
    """Columns and rows of one suite; a competitor that failed at a size has no rows of the larger it skipped."""
    rows = [
        row
        for row in results.rows
        if row.suite == suite and row.outcome != UNSUPPORTED and not (row.outcome != OK and row.why.endswith(ALREADY))
    ]
    sized = any(row.size for row in rows)
    parts = [p for p in ("forward", "backward") if any(p in row.seconds for row in rows)]
    ratios, shares = (any(getattr(row, name) for row in rows) for name in ("ratio", "share"))
    baseline = SUITES[suite].baseline if suite in SUITES else None
    columns = ["B"] * sized + ["what", *parts, "time", "memory"]
    columns += [f"time to {baseline}'s"] * ratios + ["of the matmul rate"] * shares
    return columns, [_cells(row, sized, parts, ratios, shares) for row in rows]


def notes(results: Results, suite: str) -> list[str]:
    """A sentence for each competitor that was not timed, at some size or at all, and why."""
    no_part = {row.what: row.why for row in results.rows if row.suite == suite and row.outcome == UNSUPPORTED}
    said = [f"{what} takes no part: {why}." for what, why in no_part.items()]
    for what in dict.fromkeys(row.what for row in results.rows if row.suite == suite):
        rows = [row for row in results.rows if (row.suite, row.what) == (suite, what)]
        told: set[str] = set()
        for row in rows:
            if row.outcome in (OK, UNSUPPORTED) or row.outcome in told or row.why.endswith(ALREADY):
                continue
            told.add(row.outcome)
            last = rows[-1].outcome == row.outcome and rows[-1] is not row
            where = f" at B {row.size:,}{' and above' if last else ''}" if row.size else ""
            said.append(f"{what}{where} {row.outcome}{f': {row.why}' if row.why else ''}.")
    return said


def fit_table(results: Results) -> tuple[list[str], list[Cells]]:
    """How time and memory grow."""
    rows = []
    for fit in results.fits:
        power = Power(**fit["power"])
        parts = Split.from_dict(fit["split"]).in_words(fit["largest"]) if fit.get("split") else ""
        rows.append([fit["suite"], fit["what"], fit["quantity"], str(power), str(power.sizes), parts])
    return ["suite", "what", "of", "grows as (95 %)", "sizes", "parts"], rows


def facts(results: Results) -> dict[str, str]:
    """Where figures come from, in the reader's words."""
    about = results.machine
    names = ("gpu", "cpu", "threads", "OMP_WAIT_POLICY", "platform", "python", *MEASURED)
    labels = {"gpu": "card", "cpu": "CPU", "python": "Python"}
    found = {labels.get(name, name): str(about[name]) for name in names if about.get(name)}
    found["gist_fast"] = f"{about.get('gist_fast') or 'unknown'}, commit {about.get('commit') or 'unknown'}"
    return {**found, **_products(results), "command": results.command, "took": duration(results.seconds)}


def _products(results: Results) -> dict[str, str]:
    """The rate of the matrix products that shares are taken of: quartiles over all rounds of a type."""
    rates: dict[str, list[float]] = {}
    for rate in results.rates:
        rates.setdefault(rate["case"]["dtype"], []).extend(rate["flops"] / seconds for seconds in rate["seconds"])
    told = {}
    for dtype, values in rates.items():
        low, median, high = (_figure(math.exp(x) / 1e9) for x in log_quartiles(values))
        told[f"matrix product, {dtype}"] = f"{median} GFLOP/s ({low} to {high})"
    return told


def markdown(columns: Sequence[str], rows: Sequence[Cells]) -> str:
    """A table for a README."""
    head, *body = (f"| {' | '.join(line)} |" for line in (columns, *rows))
    return "\n".join([head, "|---" * len(columns) + "|", *body])


def duration(seconds: float) -> str:
    """Three figures and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_figure(seconds / size)} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def amount(n_bytes: float) -> str:
    """Bytes, in a unit that suits them."""
    if n_bytes < 1 << 20:
        return "under 1 MiB"
    return f"{n_bytes / 2**20:,.0f} MiB" if n_bytes < 10 << 30 else f"{n_bytes / 2**30:,.1f} GiB"


def _cells(row: Row, sized: bool, parts: Sequence[str], ratios: bool, shares: bool) -> Cells:
    cells = [f"{row.size:,}"] * sized + [row.what]
    timing = row.timing()
    if row.outcome != OK or timing is None:
        memory = "-" if row.memory is None else amount(row.memory)
        return [*cells, *["-"] * len(parts), row.outcome, memory, *["-"] * (ratios + shares)]
    for part in parts:
        own = row.timing(part) if part in row.seconds else None
        cells.append("-" if own is None else duration(own.median))
    cells += [duration(timing.median), "-" if row.memory is None else amount(row.memory)]
    if ratios:
        cells.append(str(ratio_of(row.ratio) or "-"))
    if shares:
        cells.append(_share(row.share))
    return cells


def _figure(value: float) -> str:
    """Three figures, or all of those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _share(entry: dict[str, Any] | None) -> str:
    """A share is no comparison of two: it is shown with its quartiles, whatever they are."""
    found = ratio_of(entry)
    return "-" if found is None else f"{found.median:.0%} ({found.low:.0%} to {found.high:.0%})"
