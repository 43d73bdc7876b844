"""Reading a trace of torch's profiler: how the wall time of each step divides among its regions.

A trace (Chrome's format, as ``torch.profiler.profile.export_chrome_trace`` writes it) holds regions that lie in each
other, on one thread or across threads: while autograd works in a thread of its own, the caller waits in ``backward``.
So at any moment the region that began last is what is being done, whichever thread it is on, and a region's time is
that in which it is this one: nothing is counted twice, and what remains of a step is `OTHER`.

The device's time is divided the same way: each kernel belongs to the region that the host was in when it launched it,
and in each moment the kernel counts that began last. What remains is `IDLE`.
"""

from __future__ import annotations

import gzip
import heapq
import itertools
import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gist_fast.runtime.errors import InputError
from gist_fast.runtime.profiler_regions import IDLE, NAMES, OTHER, step_name

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
"""Categories of the host's calls that start the device's work, on ROCm too."""
_STEP = re.compile(step_name(r"(\d+)"))
_MS = 1e-3  # a trace counts in microseconds

_NODE = "autograd::engine::evaluate_function: "

Event = Mapping[str, Any]


class Span(NamedTuple):
    begin: float
    end: float
    name: str


@dataclass(frozen=True)
class StepTimes:
    """One step, in milliseconds."""

    step: int
    """From 1 at the beginning of training."""
    wall_ms: float
    host: dict[str, float]
    """By region; with `OTHER`, the sum is the wall time."""
    device: dict[str, float] | None
    """By region; with `OTHER` (launched outside of all regions) and `IDLE`, the sum is the wall time. None where the
    trace holds no work of a device."""
    calls: dict[str, int]
    """How often each region began."""


@dataclass(frozen=True)
class Work:
    """A kernel of the device, or an operator of the host, over all steps."""

    name: str
    calls: int
    ms: float
    """In which it was what ran, work that it called for left out."""
    part: str
    """The region of the step that most of it belongs to."""


@dataclass(frozen=True)
class Region:
    """One region over all steps: means over the steps, in milliseconds."""

    name: str
    calls: float
    """A step."""
    host_ms: float
    host_share: float
    """Of the wall time."""
    least_ms: float
    most_ms: float
    device_ms: float | None = None
    device_share: float | None = None


def read_trace(path: Path) -> list[Event]:
    """The events of a trace, gzipped or not.

    Raises:
        InputError: it is no trace.
    """
    raw = path.read_bytes()
    try:
        trace = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
        return list(trace["traceEvents"])
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise InputError(f"{path}: is no trace of torch's profiler ({error}).") from error


def write_trace(events: Sequence[Event], path: Path) -> None:
    """A trace of these events, gzipped."""
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=5) as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)


def straightened(events: Sequence[Event]) -> list[Event]:
    """The events, where regions begin and end with autograd's nodes instead of inside of them.

    A region that `gist_fast.runtime.profiler_regions.follow_backward` opens in one node and closes in another lies
    across both, and viewers of traces know only what lies side by side or inside of each other.
    """
    nodes: dict[Any, list[Span]] = {}
    for event in events:
        if str(event.get("name")).startswith(_NODE) and "dur" in event:
            nodes.setdefault(event.get("tid"), []).append(_span(event))
    found = []
    for event in events:
        if _is_region(event):
            begin, end, _ = _span(event)
            near = nodes.get(event.get("tid"), [])
            first = min((n.begin for n in near if n.begin < begin < n.end < end), default=begin)
            last = min((n.begin for n in near if begin < n.begin < end < n.end), default=end)
            if (first, last) != (begin, end):
                event = {**event, "ts": first, "dur": last - first}
        found.append(event)
    return found


def innermost(spans: Iterable[Span], begin: float, end: float, rest: str) -> list[Span]:
    """The time from `begin` to `end` cut into pieces, each named after the span that began last of those there are.

    Args:
        spans: in any order; of two that begin together the shorter counts.
        rest: the name of a piece in which there is none.
    """
    waiting = sorted(span for span in spans if span.end > begin and span.begin < end and span.end > span.begin)
    cuts = sorted({begin, end, *(t for s in waiting for t in (s.begin, s.end) if begin < t < end)})
    pieces: list[Span] = []
    active: list[tuple[float, float, str]] = []  # the one that began last on top
    entered = 0
    for start, stop in itertools.pairwise(cuts):
        while entered < len(waiting) and waiting[entered].begin <= start:
            span = waiting[entered]
            heapq.heappush(active, (-span.begin, span.end, span.name))
            entered += 1
        while active and active[0][1] <= start:
            heapq.heappop(active)
        name = active[0][2] if active else rest
        if pieces and pieces[-1].name == name:
            pieces[-1] = Span(pieces[-1].begin, stop, name)
        else:
            pieces.append(Span(start, stop, name))
    return pieces


def step_times(events: Sequence[Event]) -> list[StepTimes]:
    """The steps of a trace, in order.

    Raises:
        InputError: there is no step in it.
    """
    windows = _windows(events)
    if not windows:
        raise InputError('trace: holds no step of training (a region "step 1").')
    regions = _region_spans(events)
    device = [span._replace(name=part) for span, part in _kernels(events, windows, regions)]
    return [
        StepTimes(
            step=number,
            wall_ms=(end - begin) * _MS,
            host=_durations(innermost(regions, begin, end, OTHER), (*NAMES, OTHER)),
            device=_durations(innermost(device, begin, end, IDLE), (*NAMES, OTHER, IDLE)) if device else None,
            calls=dict(Counter(span.name for span in regions if begin <= span.begin < end)),
        )
        for number, begin, end in windows
    ]


def regions(steps: Sequence[StepTimes]) -> list[Region]:
    """Every region that there was, in the order of a step, then `OTHER` and `IDLE`; host shares sum to 1, and so do the
    device's."""
    wall = sum(step.wall_ms for step in steps)
    with_device = all(step.device is not None for step in steps)
    found = []
    for name in (*NAMES, OTHER, *((IDLE,) if with_device else ())):
        host = [step.host.get(name, 0.0) for step in steps]
        device = [step.device[name] for step in steps if step.device is not None] if with_device else None
        calls = sum(step.calls.get(name, 0) for step in steps)
        if not calls and not any(host) and not any(device or ()) and name != OTHER:
            continue
        found.append(
            Region(
                name,
                calls / len(steps),
                sum(host) / len(steps),
                sum(host) / wall,
                min(host),
                max(host),
                None if device is None else sum(device) / len(steps),
                None if device is None else sum(device) / wall,
            )
        )
    return found


def median_step(steps: Sequence[StepTimes]) -> StepTimes:
    """The step of the median wall time (of an even number, the shorter of the two in the middle): one that was, so that
    its regions sum to it."""
    return sorted(steps, key=lambda step: step.wall_ms)[(len(steps) - 1) // 2]


def busiest(events: Sequence[Event], count: int = 10) -> list[Work]:
    """The work that takes the most time within the steps: kernels, or, where there is no device, the host's operators.

    Parallel work is counted for each that runs, so the sum may exceed the wall time.
    """
    windows, regions = _windows(events), _region_spans(events)
    kernels = _kernels(events, windows, regions)
    # Milliseconds by the work's name and by region.
    times: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    calls: Counter[str] = Counter()
    if kernels:
        for span, part in kernels:
            inside = sum(max(0.0, min(span.end, end) - max(span.begin, begin)) for _, begin, end in windows)
            if inside > 0:
                times[span.name][part] += inside * _MS
                calls[span.name] += 1
    else:
        where = _Timeline(windows, regions)
        threads: dict[Any, list[Span]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "cpu_op" and "dur" in event:
                threads[event.get("tid")].append(_span(event))
        for spans in threads.values():
            for _, begin, end in windows:
                calls.update(span.name for span in spans if begin <= span.begin < end)
                for piece in innermost(spans, begin, end, ""):
                    if piece.name:
                        times[piece.name][where.region_at(piece.begin)] += (piece.end - piece.begin) * _MS
    found = [Work(name, calls[name], sum(ms.values()), max(ms, key=ms.__getitem__)) for name, ms in times.items()]
    return sorted(found, key=lambda work: work.ms, reverse=True)[:count]


class _Timeline:
    """Which region the host is in at a moment."""

    def __init__(self, windows: Sequence[tuple[int, float, float]], regions: Sequence[Span]) -> None:
        self._pieces = [piece for _, begin, end in windows for piece in innermost(regions, begin, end, OTHER)]
        self._begins = [piece.begin for piece in self._pieces]

    def region_at(self, moment: float) -> str:
        place = bisect_right(self._begins, moment) - 1
        inside = place >= 0 and self._pieces[place].begin <= moment < self._pieces[place].end
        return self._pieces[place].name if inside else OTHER


def _windows(events: Iterable[Event]) -> list[tuple[int, float, float]]:
    """``(number, begin, end)`` of each step."""
    found = []
    for event in events:
        match = _STEP.fullmatch(str(event.get("name"))) if event.get("cat") == "user_annotation" else None
        if match and "dur" in event:
            span = _span(event)
            found.append((int(match[1]), span.begin, span.end))
    return sorted(found)


def _region_spans(events: Iterable[Event]) -> list[Span]:
    # On a GPU the same names come again as gpu_user_annotation, which are not the host's.
    return [_span(event) for event in events if _is_region(event)]


def _is_region(event: Event) -> bool:
    return event.get("cat") == "user_annotation" and event.get("name") in NAMES and "dur" in event


def _kernels(
    events: Iterable[Event], windows: Sequence[tuple[int, float, float]], regions: Sequence[Span]
) -> list[tuple[Span, str]]:
    """What the device did, each with the region that launched it."""
    where, launched = _Timeline(windows, regions), _launch_times(events)
    return [
        (_span(event), where.region_at(launched.get(_correlation(event), float("nan"))))
        for event in events
        if event.get("cat") in DEVICE_WORK and "dur" in event
    ]


def _launch_times(events: Iterable[Event]) -> dict[Any, float]:
    return {_correlation(e): float(e["ts"]) for e in events if e.get("cat") in LAUNCHES and _correlation(e) is not None}


def _correlation(event: Event) -> Any:
    return event.get("args", {}).get("correlation")


def _span(event: Event) -> Span:
    begin = float(event["ts"])
    return Span(begin, begin + float(event["dur"]), str(event["name"]))


def _durations(pieces: Iterable[Span], names: Iterable[str]) -> dict[str, float]:
    times = dict.fromkeys(names, 0.0)
    for piece in pieces:
        times[piece.name] += (piece.end - piece.begin) * _MS
    return times
