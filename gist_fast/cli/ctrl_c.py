"""Ctrl-C in work that writes only at its end: remembered, since not every place in which it arrives lets it through.

SIGTERM ends such work in the same way, so that its processes and scratch folders go with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import typer

from gist_fast.cli.output import INTERRUPTED, note
from gist_fast.runtime.signals import give_back, take


class CtrlC:
    """A context in which SIGINT, as ever, and SIGTERM raise KeyboardInterrupt, and are remembered.

    One that arrives in the hook of a fork or in a finaliser is swallowed by Python, and it may first be seen as the
    failure of a process that the same Ctrl-C ended: ask `check` now and then, and on any exception whether it `came`.

    Args:
        sigterm: take SIGTERM the same way, once; for work that leaves something to remove behind it.
    """

    def __init__(self, *, sigterm: bool = False) -> None:
        self.came = False
        self.exit_code = INTERRUPTED
        """The shell's code of an end by the signal that came: 130, or 143 after SIGTERM."""
        self._numbers = (signal.SIGINT, signal.SIGTERM) if sigterm else (signal.SIGINT,)
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        self._told: Any = None

    def __enter__(self) -> CtrlC:
        self._before = take(self._numbers, self._on_signal)
        if self._before:
            self._told = sys.unraisablehook
            sys.unraisablehook = self._on_swallowed
        return self

    def __exit__(self, *_: object) -> None:
        give_back(self._before)
        if self._before and not self.came:  # else the process ends, and finalisers are still to come
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
        if os.getpid() != self._process:
            # A process that was forked here belongs to whoever forked it, who is told too and ends it. An exception in
            # it would be a traceback among our lines, as any before its first own line of code is.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        if number == signal.SIGTERM:
            # Schedulers send it again; the second must not stop the removing.
            signal.signal(number, signal.SIG_IGN)
        if not self.came:
            self.exit_code = 128 + number
        self.came = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible(done: list[str] | None = None, *, sigterm: bool = False) -> Iterator[CtrlC]:
    """A context of work that Ctrl-C ends with one line and exit code 130, also where Python swallowed it.

    Args:
        done: the files that are in place, as they come to be; None for work that writes none.
        sigterm: whether SIGTERM ends it so too, with exit code 143.
    """
    with CtrlC(sigterm=sigterm) as ctrl_c:
        try:
            yield ctrl_c
            ctrl_c.check()
        except (KeyboardInterrupt, Exception) as error:
            if not ctrl_c.came and not isinstance(error, KeyboardInterrupt):
                raise
            written = "" if done is None else f"; {'written: ' + ', '.join(done) if done else 'nothing was written'}"
            note(f"gist-fast: interrupted{written}.")
            raise typer.Exit(ctrl_c.exit_code) from None
