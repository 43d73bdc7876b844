"""Work for a card that is mostly the compiler's, in several processes: what one has compiled, all find on disk."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

MOST = 16
"""Each has a context on the card, of some 0.5 GB."""


def outcomes(work: Mapping[str, Callable[[], Any]], *, here: bool) -> Iterator[tuple[str, Any]]:
    """What each work gave, by name, in the order in which they end; or the exception that it raised.

    Args:
        here: one after the other in this process, as what is interpreted and not compiled may be.
    """
    if here:
        for name, run in work.items():
            try:
                found = run()
            except Exception as error:
                found = error
            yield name, found
        return
    processes = max(1, min(MOST, len(work), os.cpu_count() or 1))
    # A context on a card does not survive a fork.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        names = {pool.submit(run): name for name, run in work.items()}
        for done in as_completed(names):
            error = done.exception()
            yield names[done], done.result() if error is None else error
