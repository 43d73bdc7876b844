"""Ctrl-C in work that writes only at its end: remembered, since not every place in which it arrives lets it through."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import typer

from gist_fast.cli.output import note

INTERRUPTED = 130


class CtrlC:
    """A context in which SIGINT raises KeyboardInterrupt, as ever, and is remembered.

    One that arrives in the hook of a fork or in a finaliser is swallowed by Python, and it may first be seen as the
    failure of a process that the same Ctrl-C ended: ask `check` now and then, and on any exception whether it `came`.
    """

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None
        self._told: Any = None
        self._takes = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> CtrlC:
        if self._takes:
            self._before = signal.signal(signal.SIGINT, self._on_signal)
            self._told = sys.unraisablehook
            sys.unraisablehook = self._on_swallowed
        return self

    def __exit__(self, *_: object) -> None:
        if self._takes:
            signal.signal(signal.SIGINT, self._before)
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
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible(done: list[str] | None = None) -> Iterator[CtrlC]:
    """A context of work that Ctrl-C ends with one line and exit code 130, also where Python swallowed it.

    Args:
        done: the files that are in place, as they come to be; None for work that writes none.
    """
    with CtrlC() as ctrl_c:
        try:
            yield ctrl_c
            ctrl_c.check()
        except (KeyboardInterrupt, Exception) as error:
            if not ctrl_c.came and not isinstance(error, KeyboardInterrupt):
                raise
            written = "" if done is None else f"; {'written: ' + ', '.join(done) if done else 'nothing was written'}"
            note(f"gist-fast: interrupted{written}.")
            raise typer.Exit(INTERRUPTED) from None
