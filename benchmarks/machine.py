"""What a figure depends on: the machine, the versions, the commit."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from gist_fast.bench.timing import NOT_SEEN, Ratio, Timing
from gist_fast.runtime.environment import MEASURED
from gist_fast.runtime.environment import machine as described


def machine() -> dict[str, Any]:
    """What the figures of this process depend on."""
    return described("cpu")


def command(module: str) -> str:
    """How this process was started, with all that it was given: ``python -m benchmarks.step --rounds 3``."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def measured_on(about: Mapping[str, Any], command: str, versions: Mapping[str, Any] | None = None) -> str:
    """Device, versions, commit and command, as they stand below a table."""
    found = {**about, **(versions or {})}
    where = found["gpu"] if found.get("gpu") else f"{found['cpu']}, {found['threads']} threads"
    known = [f"{name} {found[name]}" for name in MEASURED if found.get(name)]
    ours = f"gist_fast {about['gist_fast']} at {about['commit'] or 'no commit'}"
    return f"{where}; {', '.join([*known, ours])}; `{command}`."


def quartiles(theirs: Timing, ours: Timing) -> list[float]:
    """Lower quartile, median and upper quartile of ``theirs / ours``, paired round by round."""
    ratio = theirs.against(ours)
    return [ratio.low, ratio.median, ratio.high]


def told(ratio: list[float], digits: int = 1, rounds: int = 3) -> str:
    """A ratio by its lower quartile, median and upper quartile; refused where it is not larger than its noise."""
    low, middle, high = ratio
    if not Ratio(low, middle, high, rounds).seen:
        return NOT_SEEN
    return f"{middle:.{digits}f}x ({low:.{digits}f} to {high:.{digits}f})"
