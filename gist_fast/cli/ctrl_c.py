"""Ctrl-C in work that writes only at its end: remembered, since not every place in which it arrives lets it through.

SIGTERM ends such work in the same way, so that its processes and scratch folders go with it.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

INTERRUPTED, TERMINATED = 130, 143


class CtrlC:
    """A context in which SIGINT, as ever, and SIGTERM raise KeyboardInterrupt, and are remembered.

    One that arrives in the hook of a fork or in a finaliser is swallowed by Python, and it may first be seen as the
    failure of a process that the same Ctrl-C ended: ask `check` now and then, and on any exception whether it `came`.
    """

    def __init__(self) -> None:
        self.came = False
        self.code = INTERRUPTED
        """What to end with."""
        self._before: dict[int, Any] = {}
        self._told: Any = None
        self._takes = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> CtrlC:
        if self._takes:
            self._before = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
            self._told = sys.unraisablehook
            sys.unraisablehook = self._on_swallowed
        return self

    def __exit__(self, *_: object) -> None:
        if self._takes:
            for number, before in self._before.items():
                signal.signal(number, before)
            if not self.came:  # else the process ends, and finalisers are still to come
                sys.unraisablehook = self._told

    def check(self, *_: object) -> None:
        """Raise KeyboardInterrupt where it was swallowed."""
        if self.came:
            raise KeyboardInterrupt

    def _on_swallowed(self, told: Any) -> None:
        # The traceback of a swallowed Ctrl-C, or of a finaliser that misses the processes it ended, tells nothing.
        if not self.came:
            self._told(told)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        self.code = TERMINATED if number == signal.SIGTERM else INTERRUPTED
        raise KeyboardInterrupt
