"""What a run of the benchmarks leaves: rows, facts about the machine, fits; and the file that holds them."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from gist_fast.bench.growth import Power, Split
from gist_fast.bench.timing import BOTH, Ratio, Timing
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import write_whole

FORMAT = 1
OK, OUT_OF_MEMORY, NOT_RUN, WRONG, FAILED = "ok", "out of memory", "not run", "wrong", "failed"
UNSUPPORTED = "not supported"
COUNTED = (OK, NOT_RUN)
"""Outcomes of which a figure that is there counts: memory may be known of whose time was not to be afforded."""
WHOLE = "whole"
PLOTS = ("time", "memory", "share")
"""What is plotted of a suite."""


@dataclass
class Row:
    """One competitor on one case."""

    suite: str
    case: dict[str, Any]
    size: int
    """What the cost grows with: rows of a batch, texts; 0 where nothing grows."""
    what: str
    outcome: str = OK
    why: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of each round, by part."""
    memory: int | None = None
    """Bytes added at the peak."""
    least_memory: float = 0.0
    """Bytes by formula, where it did not fit."""
    ratio: dict[str, Any] | None = None
    """Its seconds over ours, paired within rounds."""
    share: dict[str, Any] | None = None
    """Of the measured rate of a matrix product, by minimal FLOPs."""

    def timing(self, part: str | None = None) -> Timing | None:
        """Of a part, by default of the whole iteration."""
        chosen = part or (BOTH if BOTH in self.seconds else WHOLE)
        return Timing(tuple(self.seconds[chosen])) if self.seconds.get(chosen) else None

    @property
    def key(self) -> str:
        """The same in every run that measures the same."""
        return json.dumps([self.suite, self.what, self.case], sort_keys=True)


@dataclass
class Results:
    """A run."""

    machine: dict[str, Any]
    command: str
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    fits: list[dict[str, Any]] = field(default_factory=list)
    rates: list[dict[str, Any]] = field(default_factory=list)
    """Seconds of a matrix product, round by round, beside each case of the loss."""

    def as_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def ratio_of(entry: dict[str, Any] | None) -> Ratio | None:
    """A ratio as it stands in a row."""
    return None if entry is None else Ratio(**entry)


def write(path: Path, results: Results) -> None:
    """Write a file that is not there yet: all of it, or nothing."""
    write_whole(path, json.dumps(results.as_dict(), indent=1) + "\n")


def write_numbered(folder: Path, results: Results) -> Path:
    """Write ``bench.json``, or with the first number of which neither a file nor a plot is there, and tell which.

    The name is taken when the file is put in place, so that of two runs that end together each has its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    suites = {row.suite for row in results.rows}
    for number in itertools.count(1):
        path = folder / ("bench.json" if number == 1 else f"bench-{number}.json")
        if any(plot_path(path, f"{suite}-{kind}").exists() for suite in suites for kind in PLOTS):
            continue
        try:
            write(path, results)
        except FileExistsError:
            continue
        return path
    raise AssertionError("numbers do not end")


def plot_path(path: Path, name: str) -> Path:
    """Where a plot of a results file lies: beside it, and named after it."""
    return path.with_name(f"{path.stem}-{name}.svg")


def read(path: Path) -> Results:
    """The results of a file.

    Raises:
        InputError: it is not there, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; gist-fast bench --output DIR writes one.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as results of gist-fast bench ({error}).") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        given = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{path}: expected results of gist-fast bench in format {FORMAT}, got format {given!r}.")
    try:
        rows = [_row(row) for row in found.pop("rows")]
        del found["format"]
        results = Results(rows=rows, **found)
        for rate in results.rates:
            _hold(isinstance(rate["case"]["dtype"], str), "dtype", rate["case"]["dtype"])
            _hold(_is_number(rate["flops"]) and rate["flops"] > 0, "flops", rate["flops"])
            _seconds(rate["seconds"])
        for fit in results.fits:
            _fit(fit)
        _hold(_is_number(results.seconds), "seconds", results.seconds)
        _hold(isinstance(results.command, str), "command", results.command)
        results.machine.items()
        return results
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: is not whole ({type(error).__name__}: {error}).") from error


def _row(given: dict[str, Any]) -> Row:
    row = Row(**given)
    for name in ("suite", "what", "outcome", "why"):
        _hold(isinstance(getattr(row, name), str), name, getattr(row, name))
    _hold(_is_count(row.size), "size", row.size)
    _hold(row.memory is None or _is_count(row.memory), "memory", row.memory)
    row.key, row.case.items()
    for seconds in row.seconds.values():
        _seconds(seconds)
    for entry in filter(None, (row.ratio, row.share)):
        _hold(all(_is_number(value) and value > 0 for value in entry.values()), "ratio", Ratio(**entry))
    return row


def _fit(given: dict[str, Any]) -> None:
    """Raise unless it is one."""
    for name in ("suite", "what", "quantity"):
        _hold(isinstance(given[name], str), name, given[name])
    power = Power(**given["power"])
    split = Split.from_dict(given["split"]) if given["split"] else None
    for value in (given["largest"], *astuple(power), *(astuple(split) if split else ())):
        _hold(_is_number(value), "fits", value)


def _seconds(values: Any) -> None:
    """Raise unless they are times."""
    if not (isinstance(values, list) and values and all(_is_number(value) and value > 0 for value in values)):
        raise ValueError(f"{values!r} are no seconds")


def _hold(right: bool, name: str, value: Any) -> None:
    if not right:
        raise ValueError(f"{name}: {value!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
