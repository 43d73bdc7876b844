"""The README's table of a run of ``gist-fast bench``, made from its ``bench.json``: ours beside each peer at the
largest batch that both were timed at, and how our costs grow."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.machine import measured_on
from gist_fast.bench.growth import NOT_CLEAR
from gist_fast.bench.results import OK, Results, Row, ratio_of
from gist_fast.bench.run import SUITES
from gist_fast.bench.tables import amount, duration, fit_table, markdown

COLUMNS = ["suite", "B", "against", "time, ours", "theirs", "theirs to ours", "memory, ours", "theirs"]


def table(results: Results) -> str:
    """A table, another on growth, and where the figures come from."""
    lines = [*_beside(results), *_alone(results)]
    parts = [markdown(COLUMNS, lines), "", *_ran_out(results), *_growth(results)]
    took = f"{results.seconds:.0f} seconds in all."
    return "\n".join([*parts, f"{measured_on(results.machine, results.command)} {took}"])


def _beside(results: Results) -> Iterator[list[str]]:
    for suite, what in dict.fromkeys((row.suite, row.what) for row in results.rows):
        baseline = SUITES[suite].baseline
        own = [row for row in results.rows if (row.suite, row.what) == (suite, what) and row.ratio and row.size]
        if baseline is None or what == baseline or not own:
            continue
        theirs = max(own, key=lambda row: row.size)
        ours = next(row for row in results.rows if (row.suite, row.what, row.case) == (suite, baseline, theirs.case))
        times = [_time(ours), _time(theirs), str(ratio_of(theirs.ratio))]
        yield [suite, f"{theirs.size:,}", what, *times, _memory(ours), _memory(theirs)]


def _alone(results: Results) -> Iterator[list[str]]:
    """Suites in which nobody is the measure of others."""
    for row in results.rows:
        if row.outcome == OK and SUITES[row.suite].baseline is None:
            yield [row.suite, "-", row.what, _time(row), "-", "-", _memory(row), "-"]


def _ran_out(results: Results) -> Iterator[str]:
    first: dict[tuple[str, str], Row] = {}
    for row in results.rows:
        if row.outcome == "out of memory":
            first.setdefault((row.suite, row.what), row)
    for (suite, what), row in first.items():
        why = f"it {row.why}" if row.why.startswith(("needs", "ran")) else row.why
        yield f"Out of memory: {what} in the suite {suite} at B {row.size:,} ({why})."


def _growth(results: Results) -> Iterator[str]:
    """How our own costs grow, as far as that was seen."""
    columns, told = fit_table(results)
    ours = [
        [suite, *rest]
        for suite, what, *rest in told
        if what == SUITES[suite].baseline and set(rest[1::2]) - {NOT_CLEAR, ""}
    ]
    if ours:
        yield from ("", markdown([columns[0], *columns[2:]], ours), "")


def _time(row: Row) -> str:
    timing = row.timing()
    return "-" if timing is None else duration(timing.median)


def _memory(row: Row) -> str:
    return "-" if row.memory is None else amount(row.memory)
