"""The README's table of a run of ``gist-fast bench``, made from its ``bench.json``: ours beside each peer at the
smallest and the largest batch that both were timed at, who was not timed and why, and how our costs grow."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.machine import measured_on
from gist_fast.bench.growth import NOT_CLEAR
from gist_fast.bench.results import NOT_RUN, OK, OUT_OF_MEMORY, UNSUPPORTED, Results, Row, ratio_of
from gist_fast.bench.run import ALREADY, SUITES
from gist_fast.bench.tables import amount, duration, fit_table, markdown

COLUMNS = ["suite", "B", "against", "time, ours", "theirs", "theirs to ours", "memory, ours", "theirs"]
ALONE = ["suite", "what", "time", "memory"]
UNTIMED = ["suite", "not timed", "at B", "why"]


def table(results: Results) -> str:
    """Who was timed beside ours, who alone, who not, how costs grow; and where the figures come from."""
    tables = [(COLUMNS, list(_beside(results))), (ALONE, list(_alone(results))), (UNTIMED, list(_untimed(results)))]
    parts = [line for columns, rows in tables if rows for line in (markdown(columns, rows), "")]
    return "\n".join([*parts, growth(results)])


def growth(results: Results) -> str:
    """How our own costs grow; and where the figures come from."""
    took = f"{results.seconds:.0f} seconds in all."
    return "\n".join([*_growth(results), f"{measured_on(results.machine, results.command)} {took}"])


def _of_each(results: Results) -> Iterator[tuple[str, str, list[Row]]]:
    """The rows of each competitor of a suite, by size."""
    for suite, what in dict.fromkeys((row.suite, row.what) for row in results.rows):
        rows = [row for row in results.rows if (row.suite, row.what) == (suite, what)]
        yield suite, what, sorted(rows, key=lambda row: row.size)


def _beside(results: Results) -> Iterator[list[str]]:
    for suite, what, rows in _of_each(results):
        baseline = SUITES[suite].baseline
        both = [row for row in rows if row.ratio and row.size]
        if baseline is None or what == baseline or not both:
            continue
        # The largest alone would leave out where ours is behind: what is fixed in a cost weighs in small batches.
        for theirs in both[:1] + both[1:][-1:]:
            key = (suite, baseline, theirs.case)
            ours = next(row for row in results.rows if (row.suite, row.what, row.case) == key)
            times = [_time(ours), _time(theirs), str(ratio_of(theirs.ratio))]
            yield [suite, f"{theirs.size:,}", what, *times, _memory(ours), _memory(theirs)]


def _alone(results: Results) -> Iterator[list[str]]:
    """Suites in which nobody is the measure of others."""
    for row in results.rows:
        if row.outcome == OK and SUITES[row.suite].baseline is None:
            yield [row.suite, row.what, _time(row), _memory(row)]


def _untimed(results: Results) -> Iterator[list[str]]:
    for suite, what, rows in _of_each(results):
        groups: list[list[Row]] = []
        for row in rows:
            if row.outcome == OK:
                groups.append([])
            elif groups and groups[-1] and (row.why.endswith(ALREADY) or _reason(row) == _reason(groups[-1][0])):
                groups[-1].append(row)
            else:
                groups.append([row])
        for group in filter(None, groups):
            sizes = [f"{row.size:,}" if row.size else "-" for row in (group[0], group[-1])]
            yield [suite, what, " to ".join(dict.fromkeys(sizes)), _reason(group[0], whole=True)]


def _reason(row: Row, *, whole: bool = False) -> str:
    """Why a row holds no time; unless `whole`, without what differs from size to size where memory is short."""
    if row.outcome in (NOT_RUN, UNSUPPORTED):
        return row.why
    return f"{row.outcome}: {row.why}" if row.why and (whole or row.outcome != OUT_OF_MEMORY) else row.outcome


def _growth(results: Results) -> Iterator[str]:
    """How our own costs grow, as far as that was seen."""
    columns, told = fit_table(results)
    ours = [
        [suite, *rest]
        for suite, what, *rest in told
        if what == SUITES[suite].baseline and set(rest[1::2]) - {NOT_CLEAR, ""}
    ]
    if ours:
        yield from (markdown([columns[0], *columns[2:]], ours), "")


def _time(row: Row) -> str:
    timing = row.timing()
    return "-" if timing is None else duration(timing.median)


def _memory(row: Row) -> str:
    return "-" if row.memory is None else amount(row.memory)
