"""A competitor in a process of its own, under a limit of memory: is it right, and what does it add at its peak.

The process is forked from a server that has imported the packages and computed nothing, so that each starts alike and
in a few hundredths of a second. (A GPU's memory needs no process of its own: torch counts its tensors.)
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from gist_fast.bench.cases import WrongResult
from gist_fast.bench.results import FAILED, NOT_RUN, OK, OUT_OF_MEMORY, WRONG
from gist_fast.bench.timing import COLD, to_skip
from gist_fast.runtime.memory import is_out_of_memory, limit_memory, peak_memory
from gist_fast.runtime.signals import give_back, take

if TYPE_CHECKING:
    from gist_fast.bench.suite import Suite

LIMIT_SHARE = 0.8
"""Of the memory that is available: the rest is for everyone else."""
PRELOAD = ["gist_fast.bench.preload"]
"""Modules that the server imports before it forks."""
TAKEN = f"{100 * LIMIT_SHARE:.0f} % may be taken"


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    outcome: str
    why: str = ""
    memory: int | None = None
    seconds: float = 0.0
    """Of its first iteration; of a second, where one was run to see whether the first was long only for being first."""


def start_server() -> None:
    """Let the server import its packages now, so that the first competitor does not wait for it."""
    context = _context()
    if context.get_start_method() == "forkserver":
        from multiprocessing import forkserver

        # What it starts with it keeps, and hands on: it does not care for Ctrl-C, which goes to all processes of a
        # terminal, and says nothing of semaphores that were left by a competitor which had to be killed.
        said = os.environ.get("PYTHONWARNINGS")
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (said, "ignore:resource_tracker:UserWarning")))
        before = take((signal.SIGINT,), signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            give_back(before)
            os.environ.pop("PYTHONWARNINGS")
            if said is not None:
                os.environ["PYTHONWARNINGS"] = said
    process = context.Process(target=_ignore_interrupts, daemon=True)
    process.start()
    process.join()


def in_own_process(
    suite: Suite,
    case: Any,
    name: str,
    limit: int,
    patience: float,
    **options: Any,
) -> Outcome:
    """`check_and_measure` in a process that ends with it, and is stopped after `patience` seconds."""
    context = _context()
    options["patience"] = patience
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, suite, case, name, limit, options), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(patience):
            return Outcome(NOT_RUN, f"the check and one iteration took more than {patience:.0f} s")
        found = ours.recv()
        process.join(5)
        return found
    except EOFError:
        process.join(5)
        if process.exitcode == -9:  # the system's own way of saying so
            return Outcome(OUT_OF_MEMORY, "stopped by the system")
        return Outcome(FAILED, f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
        ours.close()


def _context() -> Any:
    method = "spawn" if sys.platform == "win32" else "forkserver"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOAD)
    return context


def _ignore_interrupts() -> None:
    """Ctrl-C goes to all processes of a terminal; the one that started this one ends it, without its traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _child(pipe: Connection, suite: Suite, case: Any, name: str, limit: int, options: dict[str, Any]) -> None:
    _ignore_interrupts()
    found = check_and_measure(suite, case, name, limit, **options)
    with contextlib.suppress(BrokenPipeError):  # nobody is there any more who wants to know
        pipe.send(found)
        pipe.close()


def check_and_measure(
    suite: Suite,
    case: Any,
    name: str,
    limit: int | None = None,
    *,
    known_right: bool = False,
    budget: float = math.inf,
    patience: float = math.inf,
) -> Outcome:
    """Check a competitor's result at a small size, which also brings up threads and libraries, then run one iteration.

    A second is taken where the first alone would have it left out, and may have taken long only because it compiled
    and filled caches.

    Args:
        limit: bytes that this process may take from now on, or None for no limit.
        known_right: it was checked before; the baseline's check, a quick one, then brings up what is needed.
        budget: seconds that there are for its rounds; a first iteration that takes more (and more than `COLD`) is not
            repeated.
        patience: seconds that all of this may take, as far as that is in its hands.
    """
    begin = time.perf_counter()
    try:
        if limit is not None:
            limit_memory(limit)
        suite.check(case, (known_right and suite.baseline) or name)
        if not suite.isolated:
            return Outcome(OK, memory=suite.memory(case, name))
        parts, seconds = suite.build(case, name), 0.0

        def iteration() -> None:
            nonlocal seconds
            start = time.perf_counter()
            for call in parts.values():
                call()
            seconds = time.perf_counter() - start

        added = peak_memory(iteration, case.device)
        if to_skip(seconds, budget) and seconds <= min(max(budget, COLD), patience - (time.perf_counter() - begin)):
            iteration()
        suite.check_whole(case, name)
        return Outcome(OK, memory=added, seconds=seconds)
    except WrongResult as error:
        return Outcome(WRONG, str(error))
    except Exception as error:
        if is_out_of_memory(error):
            more = "" if limit is None else f": {limit / 2**30 / LIMIT_SHARE:.1f} GiB are free, of which {TAKEN}"
            return Outcome(OUT_OF_MEMORY, f"ran out{more}")
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({last.name})")
